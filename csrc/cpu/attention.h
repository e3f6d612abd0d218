// Exact attention in blocks: what both directions share.
//
// Dims: B sequences, Hq heads of queries, Hk heads of keys and values (each serves Hq / Hk), Tq queries, Tk keys, D
// width of queries and keys, E width of values. A block is `block` queries by as many keys; memory beyond the arguments
// is O(T).
//
// Query i sees the keys of one interval, which causality and the window cut out, but for those that the key mask hides:
// aligned at the end, the last query stands beside the last key.
#pragma once
#include "../philox.h"
#include "pack.h"
#include "team.h"
#include <cmath>
#include <limits>

namespace gk {

// Heads of rows somewhere in memory; the values of a row lie side by side.
struct Heads {
  void *data;
  int64_t b, h, t; // strides of sequence, head and row, in values
};

struct AttentionArgs {
  int64_t B, Hq, Hk, Tq, Tk, D, E;
  const int32_t *cu_q, *cu_k; // [B + 1] where sequences begin that lie one after the other; Tq, Tk then count all rows
  Heads q, k, v;
  const void *bias; // added to scores, in what is computed in; null: none
  int64_t bias_b, bias_h, bias_i, bias_j;
  const void *slopes; // [B or 1, Hq] in what is computed in: the score loses slope |distance|; null: none
  int64_t slopes_b;
  const bool *key_mask; // [B, Tk] which keys can be seen; null: all
  bool causal;
  int64_t left, right; // how far a query sees; negative: no bound
  double scale, p;     // of scores; of dropout on probabilities
  uint64_t seed;
  void *lse; // [B, Hq, Tq] (sequences one after the other: [Hq, Tq]) log of the sum of exp, in what is computed in
  int threads;
};

struct AttentionForwardArgs : AttentionArgs {
  Heads out;
};

struct AttentionBackwardArgs : AttentionArgs {
  Heads out, dout;
  const void *dlse; // as lse, or null
  Heads dq, dk, dv;
  void *dscores; // [B, Hq, Tq, Tk] in storage, zero where nobody writes, or null: the gradient of the bias before it is
                 // summed
};

// One sequence and head of queries.
struct Place {
  int64_t s, h;           // sequence, head of queries
  int64_t q0, Tq, k0, Tk; // first row, rows
  int64_t offset() const { return Tk - Tq; }
};

template <class T, class P> class Attention {
protected:
  using F = Real<T>;
  using V = Vec<F>;
  static constexpr int L = lanes<T>, depth = Dot<P>::depth;
  static constexpr int64_t block = 64;
  static constexpr F infinity = std::numeric_limits<F>::infinity();
  static_assert(block % Philox::columns == 0 && block % L == 0);

  const AttentionArgs &a;
  const Dropout<F> dropout;
  Arena &arena = Arena::of_this_thread();

  explicit Attention(const AttentionArgs &a) : a(a), dropout(a.p, a.seed) { arena.reset(); }

  static int64_t blocks(int64_t n) { return (n + block - 1) / block; }
  Place place(int64_t s, int64_t h) const {
    if (!a.cu_q) return {s, h, 0, a.Tq, 0, a.Tk};
    return {s, h, a.cu_q[s], a.cu_q[s + 1] - a.cu_q[s], a.cu_k[s], a.cu_k[s + 1] - a.cu_k[s]};
  }
  int64_t longest_q() const { return longest(a.cu_q, a.Tq); }
  int64_t longest_k() const { return longest(a.cu_k, a.Tk); }
  int64_t group() const { return a.Hq / a.Hk; }

  T *row(const Heads &heads, int64_t s, int64_t h, int64_t t) const {
    return static_cast<T *>(heads.data) + (a.cu_q ? 0 : s * heads.b) + h * heads.h + t * heads.t;
  }
  int64_t lse_at(const Place &at, int64_t i) const { return ((a.cu_q ? 0 : at.s * a.Hq) + at.h) * a.Tq + at.q0 + i; }
  uint64_t dropout_row(const Place &at, int64_t i) const {
    return a.cu_q ? (at.q0 + i) * a.Hq + at.h : (at.s * a.Hq + at.h) * a.Tq + i;
  }

  // The keys [lo, hi) that query i may see.
  struct Interval {
    int64_t lo, hi;
  };
  Interval keys_of(const Place &at, int64_t i) const {
    const int64_t here = i + at.offset();
    int64_t lo = 0, hi = at.Tk;
    if (a.causal) hi = std::min(hi, here + 1);
    if (a.right >= 0) hi = std::min(hi, here + a.right + 1);
    if (a.left >= 0) lo = std::max(lo, here - a.left);
    return {lo, std::max(lo, hi)};
  }
  // The queries [lo, hi) that may see key j.
  Interval queries_of(const Place &at, int64_t j) const {
    const int64_t here = j - at.offset();
    int64_t lo = 0, hi = at.Tq;
    if (a.causal) lo = std::max(lo, here);
    if (a.right >= 0) lo = std::max(lo, here - a.right);
    if (a.left >= 0) hi = std::min(hi, here + a.left + 1);
    return {lo, std::max(lo, hi)};
  }
  // The blocks that those of [first, last) see anything of.
  template <class See> static Interval blocks_seen(See see, int64_t first, int64_t last) {
    int64_t lo = std::numeric_limits<int64_t>::max(), hi = 0;
    for (int64_t i = first; i < last; i++) {
      const Interval n = see(i);
      if (n.lo < n.hi) lo = std::min(lo, n.lo), hi = std::max(hi, n.hi);
    }
    return hi == 0 ? Interval{0, 0} : Interval{lo / block, blocks(hi)};
  }

  F slope(const Place &at) const {
    return a.slopes ? static_cast<const F *>(a.slopes)[at.s * a.slopes_b + at.h] : F(0);
  }
  const F *bias(const Place &at, int64_t i, int64_t j) const {
    return static_cast<const F *>(a.bias) + at.s * a.bias_b + at.h * a.bias_h + i * a.bias_i + j * a.bias_j;
  }
  const bool *mask(const Place &at) const { return a.key_mask ? a.key_mask + at.s * a.Tk : nullptr; }

  static V count() {
    V v;
    for (int i = 0; i < L; i++) v.v[i] = F(i);
    return v;
  }
  static V distance(V x) { return where(x < V(0), -x, x); }

  // ---- operands

  // Rows as the tile reads them: where they are if they are of its type, else copied.
  struct Rows {
    const P *first;
    int64_t stride;
    const P *operator()(int64_t t) const { return first + t * stride; }
  };
  int64_t width(int64_t n) const { return row_stride<P>(n + depth); }
  Rows rows(const Heads &heads, int64_t s, int64_t h, int64_t t, int64_t count, int64_t n, P *copy) const {
    if constexpr (std::is_same_v<T, P>)
      if (n % depth == 0) return {row(heads, s, h, t), heads.t};
    for (int64_t i = 0; i < count; i++) {
      const T *from = row(heads, s, h, t + i);
      P *to = copy + i * width(n);
      for (int64_t c = 0; c < n; c += L) store(to + c, load(from + c, n - c));
      if (depth > 1) store(to + n, V(0), 1);
    }
    return {copy, width(n)};
  }

  // For sums along the width: panels of [width][L rows]. For sums over rows: panels of [rows][L of the width].
  void pack_along(const Heads &heads, const Place &at, int64_t h, int64_t first, int64_t T_, int64_t n,
                  const Packed<P> &to, int64_t v0, int64_t v1) const {
    pack_units([&](int, int64_t t) { return (const T *)row(heads, at.s, h, first + t); }, to.panels, to.matrix.panel, 1,
               T_, n, v0, v1);
  }
  void pack_over(const Heads &heads, const Place &at, int64_t h, int64_t first, int64_t T_, int64_t n,
                 const Packed<P> &to) const {
    pack_rows<P>([&](int64_t t) { return (const T *)row(heads, at.s, h, first + t); }, to.panels, to.matrix.panel, T_,
                 n, 0, vectors<T>(n));
  }
  // The part of a matrix summed over rows that has rows [first, first + n).
  static Matrix<P> part(const Matrix<P> &m, int64_t first, int64_t n) {
    return {m.panels + first * L, m.panel, sum_steps<P>(n), nullptr};
  }

private:
  int64_t longest(const int32_t *cu, int64_t all) const {
    if (!cu) return all;
    int64_t n = 0;
    for (int64_t s = 0; s < a.B; s++) n = std::max<int64_t>(n, cu[s + 1] - cu[s]);
    return n;
  }
};

} // namespace gk
