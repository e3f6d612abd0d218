// What a kernel's own checks call, compiled in by -fsanitize=alignment,bounds,null: faults of the twin, where the
// sanitizer's library would end the process. Only the beginning of each record is looked at, the place in the source.
#include "runtime.h"

namespace {
struct Place {
  const char *file;
  unsigned line, column;
};
} // namespace

extern "C" {
void __ubsan_handle_type_mismatch_v1(const Place *p, unsigned long address) {
  gk::twin::fault("%s:%u: no object of that type can be at address %#lx", p->file, p->line, address);
}
void __ubsan_handle_out_of_bounds(const Place *p, unsigned long index) {
  gk::twin::fault("%s:%u: index %ld is outside of the array", p->file, p->line, long(index));
}
}
