// The only file that knows Python: sizes and raw addresses in, nothing out. Whoever calls has checked every one of
// them.
#include "cells.gen.h"
#include "cpu/dispatch.h"
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace gk;

namespace {

using Addresses = std::vector<uintptr_t>;

// Takes addresses one after the other, in the order of the arguments' declaration; 0 is null.
class Reader {
  const Addresses &from;
  size_t next = 0;

public:
  explicit Reader(const Addresses &a) : from(a) {}
  template <class T> Reader &operator>>(T *&p) {
    p = reinterpret_cast<T *>(from.at(next++));
    return *this;
  }
  template <class T> void group(T *(&p)[max_states], int n) {
    for (int k = 0; k < n; k++) *this >> p[k];
  }
  void end() const {
    if (next != from.size()) throw std::invalid_argument("wrong number of addresses");
  }
};

template <class Args>
Args sequence(int64_t T, int64_t B, int64_t I, int64_t H, int64_t R, bool reverse, int threads, Reader &r) {
  Args q{};
  q.T = T, q.B = B, q.I = I, q.H = H, q.R = R, q.reverse = reverse, q.threads = threads;
  r >> q.rows >> q.first >> q.order;
  return q;
}

template <class F> void with_storage(const std::string &name, F f) {
  if (name == "float32") return f(float{});
  if (name == "float64") return f(double{});
  if (name == "bfloat16") return f(bfloat16{});
  if (name == "float16") return f(half{});
  throw std::invalid_argument("no kernels for " + name);
}

void forward(const std::string &cell, int states, const std::string &storage, int64_t T, int64_t B, int64_t I,
             int64_t H, int64_t R, bool reverse, int threads, const Addresses &addresses) {
  Reader r(addresses);
  auto q = sequence<ForwardArgs>(T, B, I, H, R, reverse, threads, r);
  r >> q.x >> q.w_ih >> q.b_ih >> q.w_hh >> q.b_hh >> q.w_hr >> q.raw >> q.acts;
  r.group(q.s0, states), r.group(q.seq, states), r.group(q.final, states);
  r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Recurrent<decltype(z)>::forward(cell, q); });
}

void backward(const std::string &cell, int states, const std::string &storage, int64_t T, int64_t B, int64_t I,
              int64_t H, int64_t R, bool reverse, int threads, const Addresses &addresses) {
  Reader r(addresses);
  auto q = sequence<BackwardArgs>(T, B, I, H, R, reverse, threads, r);
  r >> q.x >> q.w_ih >> q.w_hh >> q.w_hr >> q.raw >> q.acts;
  r.group(q.seq, states), r.group(q.s0, states), r.group(q.dseq, states), r.group(q.dfinal, states);
  r >> q.dx >> q.dw_ih >> q.db_ih >> q.dw_hh >> q.db_hh >> q.dw_hr;
  r.group(q.ds0, states);
  r >> q.dgates >> q.dr >> q.v >> q.dproj >> q.norms;
  r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Recurrent<decltype(z)>::backward(cell, q); });
}

} // namespace

PYBIND11_MODULE(GK_MODULE, m) {
  forked(); // registers what has to happen in a child process
  m.def("recurrent_forward", &forward);
  m.def("recurrent_backward", &backward);
  m.def("has_cell", [](const std::string &name) {
    try {
      with_cell(name, [](auto) {});
    } catch (const std::invalid_argument &) { return false; }
    return true;
  });
  m.attr("vector_bytes") = vector_bytes;
  m.attr("bf16_dots") = has_bf16_dots();
  m.def("huge_pages", [](uintptr_t p, size_t bytes) { // asks for 2 MiB pages under a fresh large buffer
#ifdef MADV_HUGEPAGE
    const size_t page = size_t(2) << 20, lo = (p + page - 1) / page * page, hi = (p + bytes) / page * page;
    if (hi > lo) madvise(reinterpret_cast<void *>(lo), hi - lo, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
  });
}
