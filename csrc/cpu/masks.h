// The masks of a cell, made where they are used: whoever knows the seed knows them, so backward makes them again.
#pragma once
#include "../philox.h"
#include "means.h"

namespace gk {

// Of the share of one thread. Step for step it makes what is drawn for each token; a mask that is the same in all
// steps of a row is made once.
template <class Cell, class T> class Masks {
  using F = Real<T>;
  using V = Vec<F>;
  static constexpr int M = Cell::M, L = lanes<T>;

  const Sequence &q;
  const Share own;
  const int64_t from = own.v0 * L / 4 * 4; // Philox has four columns to a block
  const int64_t width = (own.v1 * L - from + Philox::columns - 1) / Philox::columns * Philox::columns;
  const int64_t rows = own.rows();
  F *const values; // [M, rows, width]

  bool drawn(int k, Noise::Source source) const { return q.seed && q.noise[k].source == source; }
  void fill(int k, int64_t b, uint64_t place) {
    const Philox philox{uint64_t(*q.seed)};
    const uint32_t below = dropped_below(q.noise[k].p);
    const F high = F(q.noise[k].high);
    F *const to = values + (k * rows + own.place(b)) * width;
    alignas(64) uint32_t words[Philox::columns];
    for (int64_t c = 0; c < width; c += Philox::columns) {
      philox.draw((uint64_t(k) << 32) + place, uint64_t(from + c), words);
      for (int j = 0; j < Philox::columns; j++) to[c + j] = words[j] < below ? F(0) : high;
    }
  }

public:
  Masks(const Sequence &q, const Share &own, Arena &arena)
      : q(q), own(own), values(arena.take<F>(q.seed ? M * rows * width : 0)) {}

  void once() {
    for (int k = 0; k < M; k++)
      if (drawn(k, Noise::fixed)) own.each_row(own.b1, [&](int64_t b) { fill(k, b, uint64_t(q.column(b))); });
  }
  void draw(int64_t i) {
    for (int k = 0; k < M; k++)
      if (drawn(k, Noise::token))
        own.each_row(q.rows_at(i), [&](int64_t b) { fill(k, b, uint64_t(q.first_number + q.token(i, b))); });
  }
  V at(int k, int64_t i, int64_t b, int64_t v) const {
    const Noise &noise = q.noise[k];
    if (noise.source == Noise::given) return V(load(static_cast<const T *>(q.flags) + q.token(i, b), 1).v[0]);
    return q.seed ? V::load(values + (k * rows + own.place(b)) * width + v * L - from) : V((1 - noise.p) * noise.high);
  }
};

// Parameters, masks and the delayed value of step i, of what a cell has.
template <class Cell, class T>
GK_ALWAYS_INLINE inline void gather_extras(const Sequence &q, const Masks<Cell, T> *masks, const void *outputs,
                                           int64_t i, int64_t b, int64_t v, Extras<Cell, Vec<Real<T>>> &to) {
  constexpr int L = lanes<T>;
  const int64_t unit = v * L, n = q.H - unit;
#pragma GCC unroll 32
  for (int k = 0; k < Cell::P; k++) to.p[k] = load(static_cast<const T *>(q.params) + k * q.H + unit, n);
  for (int k = 0; k < Cell::M; k++) to.m[k] = masks->at(k, i, b, v);
  if constexpr (Cell::D > 0)
    to.d[0] = b < q.rows_at(i - q.skip) ? load(static_cast<const T *>(outputs) + q.token(i - q.skip, b) * q.H + unit, n)
                                        : Vec<Real<T>>(0);
}

} // namespace gk
