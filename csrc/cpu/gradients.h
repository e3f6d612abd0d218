// Sums over tokens: gradients of weights and biases, and the squared norms that a probe receives.
//
// Dims: N tokens of a chunk, M rows of a gradient of weights (what the adjoints have), C its columns (what came in).
#pragma once
#include "pack.h"

namespace gk {

// Adjoints of a chunk of tokens and of the one before, a row a token.
template <class P> struct Ring {
  P *start = nullptr; // [places, stride]
  int64_t stride = 0;
  P *row(int64_t place) const { return start + place * stride; }
  static Ring take(Arena &arena, int64_t places, int64_t n) {
    const int64_t stride = row_stride<P>(n + Dot<P>::depth);
    return {arena.zeros<P>(places * stride), stride};
  }
};

// The other factor of a gradient of weights, a chunk of tokens in panels of its columns; two of them.
template <class P> struct Factor {
  Packed<P> panels[2];
  int64_t C = 0;
  static Factor take(Arena &arena, int64_t N, int64_t C) {
    return {{take_panels<P>(arena, C, 1, N), take_panels<P>(arena, C, 1, N)}, C};
  }
};

// A gradient of weights [M, C] as it grows, in what T is computed in, and where it goes.
template <class T> struct Weights {
  T *out = nullptr;
  Real<T> *sum = nullptr; // the same, where T is what it is computed in
  int64_t M = 0, C = 0;
  static Weights take(Arena &arena, void *out, int64_t M, int64_t C) {
    T *const to = static_cast<T *>(out);
    if constexpr (std::is_same_v<T, Real<T>>)
      return {to, to, M, C};
    else
      return {to, arena.take<Real<T>>(M * C), M, C};
  }
  void round(int64_t m0, int64_t m1) const {
    if constexpr (!std::is_same_v<T, Real<T>>)
      for (int64_t n = m0 * C; out && n < m1 * C; n += lanes<T>) store(out + n, load(sum + n, m1 * C - n), m1 * C - n);
  }
};

// dw[m, :] += sum over tokens of adjoints[token, m] * factor[token, :] for m in [m0, m1).
template <class T, class P>
void accumulate(const P *adjoints, ptrdiff_t stride, int64_t N, int64_t m0, int64_t m1, Matrix<P> factor,
                const Weights<T> &w, bool first, [[maybe_unused]] P *pairs) {
  using V = Vec<Real<T>>;
  constexpr int L = V::size, depth = Dot<P>::depth;
  if (m0 >= m1) return;
  const P *left = adjoints + m0;
  if constexpr (depth > 1) { // two tokens side by side
    const int64_t wide = row_stride<P>((m1 - m0 + L) * depth);
    for (int64_t t = 0; t < N; t += depth, left += depth * stride)
      for (int64_t m = 0; m < m1 - m0; m += L)
        store_words(pairs + t / depth * wide + m * depth,
                    pair_words(left + m, t + 1 < N ? left + stride + m : nullptr, m1 - m0 - m));
    left = pairs, stride = wide;
  }
  factor.steps = sum_steps<P>(N);
  product<1>(
      m1 - m0, 0, vectors<T>(w.C), factor, [&](int64_t m) { return left + m * depth; }, stride,
      [&](int64_t m, int64_t v, const Real<T> *acc) {
        Real<T> *const to = w.sum + (m0 + m) * w.C + v * L;
        const int64_t n = w.C - v * L;
        const V d = V::load(acc);
        store(to, first ? d : load(to, n) + d, n);
      });
}

// sums[m] += sum over tokens of adjoints[token, m] for m in [m0, m1).
template <class P>
void add_columns(const P *adjoints, ptrdiff_t stride, int64_t N, int64_t m0, int64_t m1, Real<P> *sums, bool first) {
  for (int64_t m = m0; m < m1; m += lanes<P>) {
    Vec<Real<P>> sum = 0;
    for (int64_t t = 0; t < N; t++) sum += load(adjoints + t * stride + m, m1 - m);
    store(sums + m, first ? sum : load(sums + m, m1 - m) + sum, m1 - m);
  }
}

// Sum of squares in double, where the square of any float neither vanishes nor overflows.
template <class F> struct Norm {
  using D = Vec<double>;
  static constexpr int parts = sizeof(double) / sizeof(F), apart = 4;
  D squares[apart][parts] = {}; // an addition would wait for the one before
  GK_ALWAYS_INLINE void add(Vec<F> x, int64_t n, int64_t row) {
    const auto values = in_double(within(x, n));
    for (int k = 0; k < parts; k++) squares[row & (apart - 1)][k] += values[k] * values[k];
  }
  double sum() const {
    D all = 0;
    for (auto &to : squares)
      for (const D &part : to) all += part;
    return gk::sum(all);
  }
};

} // namespace gk
