// The drivers of the cells that are built with the package, for one storage type, GK_STORAGE: a unit of compilation of
// its own, so that they build at once.
#include "../cells.gen.h"
#include "backward.h"
#include "dispatch.h"
#include "forward.h"

namespace gk {

template <class T> Entries Recurrent<T>::entries(const std::string &cell) {
  return with_cell(cell,
                   [](auto c) { return Entries{&forward_entry<decltype(c), T>, &backward_entry<decltype(c), T>}; });
}

template struct Recurrent<GK_STORAGE>;

} // namespace gk
