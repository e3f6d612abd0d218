// The drivers of every cell for one storage type, GK_STORAGE: a unit of compilation of its own, so that they build at
// once.
#include "../cells.gen.h"
#include "backward.h"
#include "dispatch.h"
#include "forward.h"

namespace gk {

template <class T> void Recurrent<T>::forward(const std::string &cell, const ForwardArgs &q) {
  with_cell(cell, [&](auto c) { with_panels<T>([&](auto p) { recurrent_forward<decltype(c), T, decltype(p)>(q); }); });
}
template <class T> void Recurrent<T>::backward(const std::string &cell, const BackwardArgs &q) {
  with_cell(cell, [&](auto c) { with_panels<T>([&](auto p) { recurrent_backward<decltype(c), T, decltype(p)>(q); }); });
}

template struct Recurrent<GK_STORAGE>;

} // namespace gk
