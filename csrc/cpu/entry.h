// A recurrent call as flat arrays, so that the drivers of a cell are called in one way, whether they are part of the
// module or were compiled where they are used.
#pragma once
#include "recurrent.h"
#include <stdexcept>

namespace gk {

struct Flat {
  const int64_t *sizes;
  const double *reals;
  void *const *addresses; // null where absent
  int64_t counts[3];      // of those
};
using Entry = void (*)(const Flat &); // throws std::exception

struct Entries {
  Entry forward, backward;
};

// Takes them one after the other, in the order of the arguments' declaration.
class FlatReader {
  const Flat &from;
  int64_t next[3] = {};
  int64_t take(int kind) {
    if (next[kind] == from.counts[kind]) throw std::invalid_argument("too few arguments of a recurrent call");
    return next[kind]++;
  }

public:
  explicit FlatReader(const Flat &flat) : from(flat) {}
  FlatReader &operator>>(int64_t &n) {
    n = from.sizes[take(0)];
    return *this;
  }
  FlatReader &operator>>(double &x) {
    x = from.reals[take(1)];
    return *this;
  }
  template <class T> FlatReader &operator>>(T *&p) {
    p = static_cast<T *>(from.addresses[take(2)]);
    return *this;
  }
  template <class T> void group(T *(&p)[max_states], int n) {
    for (int k = 0; k < n; k++) *this >> p[k];
  }
  void end() const {
    for (int kind = 0; kind < 3; kind++)
      if (next[kind] != from.counts[kind]) throw std::invalid_argument("too many arguments of a recurrent call");
  }
};

template <class Cell> void read(FlatReader &r, Sequence &q, Noise (&noise)[Cell::M + 1]) {
  static_assert(Cell::S <= max_states, "a cell has too many states");
  int64_t reverse, threads;
  r >> q.T >> q.B >> q.I >> q.H >> q.R >> reverse >> threads >> q.first_number >> q.skip >> q.heads;
  q.reverse = reverse != 0, q.threads = int(threads), q.noise = noise;
  for (int k = 0; k < Cell::M; k++) {
    double source;
    r >> noise[k].p >> noise[k].high >> source;
    noise[k].source = Noise::Source(int(source));
  }
  r >> q.rows >> q.first >> q.order >> q.params >> q.seed >> q.flags;
}

// Panels are of the type that sums are made of: the storage type itself where a machine can, else what it is computed
// in.
template <class T, class F> void with_panels(F f) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bfloat16>)
    if (has_bf16_dots()) return f(bfloat16{});
#endif
  f(Real<T>{});
}

template <class Cell, class T> void forward_entry(const Flat &flat) {
  constexpr int S = Cell::S;
  FlatReader r(flat);
  Noise noise[Cell::M + 1];
  ForwardArgs q{};
  read<Cell>(r, q, noise);
  r >> q.x >> q.w_ih >> q.b_ih >> q.w_hh >> q.b_hh >> q.w_hr >> q.raw >> q.acts;
  r.group(q.s0, S), r.group(q.seq, S), r.group(q.final, S);
  r.end();
  with_panels<T>([&](auto p) { recurrent_forward<Cell, T, decltype(p)>(q); });
}

template <class Cell, class T> void backward_entry(const Flat &flat) {
  constexpr int S = Cell::S;
  FlatReader r(flat);
  Noise noise[Cell::M + 1];
  BackwardArgs q{};
  read<Cell>(r, q, noise);
  r >> q.clip >> q.x >> q.w_ih >> q.w_hh >> q.w_hr >> q.raw >> q.acts;
  r.group(q.seq, S), r.group(q.s0, S), r.group(q.dseq, S), r.group(q.dfinal, S);
  r >> q.dx >> q.dw_ih >> q.db_ih >> q.dw_hh >> q.db_hh >> q.dw_hr >> q.dparams;
  r.group(q.ds0, S);
  r >> q.dgates >> q.dr >> q.v >> q.dproj >> q.dp >> q.norms;
  r.end();
  with_panels<T>([&](auto p) { recurrent_backward<Cell, T, decltype(p)>(q); });
}

} // namespace gk
