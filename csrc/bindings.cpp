// The only file that knows Python: sizes and raw addresses in, nothing out. Whoever calls has checked every one of
// them.
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
  void end() const {
    if (next != from.size()) throw std::invalid_argument("wrong number of addresses");
  }
};

template <class F> void with_storage(const std::string &name, F f) {
  if (name == "float32") return f(float{});
  if (name == "float64") return f(double{});
  if (name == "bfloat16") return f(bfloat16{});
  if (name == "float16") return f(half{});
  throw std::invalid_argument("no kernels for " + name);
}

// Addresses of the forward and the backward driver of a cell that is part of this module.
std::pair<uintptr_t, uintptr_t> recurrent_entries(const std::string &cell, const std::string &storage) {
  Entries found{};
  with_storage(storage, [&](auto z) { found = Recurrent<decltype(z)>::entries(cell); });
  return {reinterpret_cast<uintptr_t>(found.forward), reinterpret_cast<uintptr_t>(found.backward)};
}

void recurrent(uintptr_t entry, const std::vector<int64_t> &sizes, const std::vector<double> &reals,
               const Addresses &addresses) {
  static_assert(sizeof(uintptr_t) == sizeof(void *));
  const Flat flat{sizes.data(),
                  reals.data(),
                  reinterpret_cast<void *const *>(addresses.data()),
                  {int64_t(sizes.size()), int64_t(reals.size()), int64_t(addresses.size())}};
  py::gil_scoped_release release;
  reinterpret_cast<Entry>(entry)(flat);
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

void squares(const std::string &storage, int64_t M, int64_t T, int64_t N, const Addresses &addresses, int threads) {
  SquaresArgs q{M, T, N, nullptr, nullptr, nullptr, threads};
  Reader r(addresses);
  r >> q.x >> q.less >> q.out;
  r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Layers<decltype(z)>::squares(q); });
}

void joined(const std::string &storage, int64_t N, const Addresses &addresses, int threads) {
  JoinedArgs q{N, nullptr, nullptr, nullptr, nullptr, threads};
  Reader r(addresses);
  r >> q.a >> q.b >> q.sum >> q.out;
  r.end();
  py::gil_scoped_release release;
  with_storage(storage, [&](auto z) { Layers<decltype(z)>::joined(q); });
}

// Who made this processor, by its own word; empty where it has none.
std::string vendor() {
#if defined(__x86_64__)
  unsigned a = 0, name[3];
  asm("cpuid" : "+a"(a), "=b"(name[0]), "=c"(name[2]), "=d"(name[1]));
  return {reinterpret_cast<const char *>(name), sizeof name};
#else
  return {};
#endif
}

} // namespace

PYBIND11_MODULE(GK_MODULE, m) {
  forked(); // registers what has to happen in a child process
  m.def("recurrent_entries", &recurrent_entries);
  m.def("recurrent", &recurrent);
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("causal_conv_forward", &conv_forward);
  m.def("causal_conv_backward", &conv_backward);
  m.def("residual_norm_forward", &norm_forward);
  m.def("residual_norm_backward", &norm_backward);
  m.def("squares", &squares);
  m.def("joined", &joined);
  m.attr("vector_bytes") = vector_bytes;
  m.attr("bf16_dots") = has_bf16_dots();
  m.attr("vendor") = vendor();
  m.def("huge_pages", [](uintptr_t p, size_t bytes) { // asks for 2 MiB pages under a fresh large buffer
#ifdef MADV_HUGEPAGE
    const size_t page = size_t(2) << 20, lo = (p + page - 1) / page * page, hi = (p + bytes) / page * page;
    if (hi > lo) madvise(reinterpret_cast<void *>(lo), hi - lo, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
  });
}
