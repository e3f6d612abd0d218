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
  Reader &operator>>(Heads &h) { return *this >> h.data; }
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

// Sizes and strides, one after the other in the order of their declaration.
class Sizes {
  const std::vector<int64_t> &from;
  size_t next = 0;

public:
  explicit Sizes(const std::vector<int64_t> &from) : from(from) {}
  Sizes &operator>>(int64_t &n) {
    n = from.at(next++);
    return *this;
  }
  Sizes &operator>>(Heads &h) { return *this >> h.b >> h.h >> h.t; }
  void end() const {
    if (next != from.size()) throw std::invalid_argument("wrong number of sizes");
  }
};

struct Rest { // of the arguments of a layer
  double scale, p;
  uint64_t seed;
  int threads;
};

void read(AttentionArgs &q, const Rest &rest, bool causal, Sizes &n, Reader &r) {
  q.scale = rest.scale, q.p = rest.p, q.seed = rest.seed, q.threads = rest.threads, q.causal = causal;
  n >> q.B >> q.Hq >> q.Hk >> q.Tq >> q.Tk >> q.D >> q.E >> q.left >> q.right;
  n >> q.bias_b >> q.bias_h >> q.bias_i >> q.bias_j >> q.slopes_b >> q.q >> q.k >> q.v;
  r >> q.cu_q >> q.cu_k >> q.q >> q.k >> q.v >> q.bias >> q.slopes >> q.key_mask >> q.lse;
}

void attention_forward(const std::string &storage, const std::vector<int64_t> &sizes, const Addresses &addresses,
                       bool causal, double scale, double p, uint64_t seed, int threads) {
  AttentionForwardArgs q{};
  Sizes n(sizes);
  Reader r(addresses);
  read(q, {scale, p, seed, threads}, causal, n, r);
  n >> q.out, r >> q.out;
  n.end(), r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Layers<decltype(z)>::attention_forward(q); });
}

void attention_backward(const std::string &storage, const std::vector<int64_t> &sizes, const Addresses &addresses,
                        bool causal, double scale, double p, uint64_t seed, int threads) {
  AttentionBackwardArgs q{};
  Sizes n(sizes);
  Reader r(addresses);
  read(q, {scale, p, seed, threads}, causal, n, r);
  n >> q.out >> q.dout >> q.dq >> q.dk >> q.dv;
  r >> q.out >> q.dout >> q.dq >> q.dk >> q.dv >> q.dlse >> q.dscores;
  n.end(), r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Layers<decltype(z)>::attention_backward(q); });
}

void read(ConvArgs &q, int threads, const std::vector<int64_t> &sizes, Reader &r) {
  Sizes n(sizes);
  n >> q.B >> q.T >> q.C >> q.O >> q.K >> q.dilation;
  n.end();
  q.threads = threads;
  r >> q.x >> q.weight;
}

void conv_forward(const std::string &storage, const std::vector<int64_t> &sizes, const Addresses &addresses,
                  int threads) {
  ConvForwardArgs q{};
  Reader r(addresses);
  read(q, threads, sizes, r);
  r >> q.bias >> q.y;
  r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Layers<decltype(z)>::conv_forward(q); });
}

void conv_backward(const std::string &storage, const std::vector<int64_t> &sizes, const Addresses &addresses,
                   int threads) {
  ConvBackwardArgs q{};
  Reader r(addresses);
  read(q, threads, sizes, r);
  r >> q.dy >> q.dx >> q.dweight >> q.dbias;
  r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Layers<decltype(z)>::conv_backward(q); });
}

void read(NormArgs &q, int64_t M, int64_t N, bool rms, double eps, double p, uint64_t seed, int threads, Reader &r) {
  q.M = M, q.N = N, q.rms = rms, q.eps = eps, q.p = p, q.seed = seed, q.threads = threads;
  r >> q.weight >> q.bias;
}

void norm_forward(const std::string &storage, int64_t M, int64_t N, const Addresses &addresses, bool rms, double eps,
                  double p, uint64_t seed, int threads) {
  NormForwardArgs q{};
  Reader r(addresses);
  read(q, M, N, rms, eps, p, seed, threads, r);
  r >> q.x >> q.residual >> q.y >> q.sum >> q.mean >> q.rstd;
  r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Layers<decltype(z)>::norm_forward(q); });
}

void norm_backward(const std::string &storage, int64_t M, int64_t N, const Addresses &addresses, bool rms, double eps,
                   double p, uint64_t seed, int threads) {
  NormBackwardArgs q{};
  Reader r(addresses);
  read(q, M, N, rms, eps, p, seed, threads, r);
  r >> q.dy >> q.dsum >> q.sum >> q.mean >> q.rstd >> q.dx >> q.dresidual >> q.dweight >> q.dbias;
  r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Layers<decltype(z)>::norm_backward(q); });
}

} // namespace

PYBIND11_MODULE(GK_MODULE, m) {
  forked(); // registers what has to happen in a child process
  m.def("recurrent_forward", &forward);
  m.def("recurrent_backward", &backward);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("causal_conv_forward", &conv_forward);
  m.def("causal_conv_backward", &conv_backward);
  m.def("residual_norm_forward", &norm_forward);
  m.def("residual_norm_backward", &norm_backward);
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
