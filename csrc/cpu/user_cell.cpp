// One driver of a cell that did not come with the package, gk::GK_CELL of user_cell.h, for one storage type,
// GK_STORAGE: GK_DRIVER is forward or backward. All but its entry is hidden from what else is in the process.
#include "../cell.h"

#include "user_cell.h"

#include "backward.h"
#include "entry.h"
#include "forward.h"

#define GK_JOIN(a, b) a##b
#define GK_NAME(a, b) GK_JOIN(a, b)

namespace gk {

extern "C" __attribute__((visibility("default"))) void GK_NAME(gk_, GK_DRIVER)(const Flat &flat) {
  GK_NAME(GK_DRIVER, _entry)<GK_CELL, GK_STORAGE>(flat);
}

} // namespace gk
