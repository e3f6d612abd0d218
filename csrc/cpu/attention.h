// Exact attention in blocks: what both directions share.
//
// Dims: B sequences, Hq heads of queries, Hk heads of keys and values (each serves Hq / Hk), Tq queries, Tk keys, D
// width of queries and keys, E width of values. A block is `block` queries by as many keys; memory beyond the arguments
// is O(T). Blocks are held keys by queries: what belongs to a query lies along a vector, so that no maximum and no sum
// goes across lanes.
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
  uint64_t dropout_step() const { return a.cu_q ? a.Hq : 1; } // from one query's row to the next
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
  // What lies in a block.
  static Interval within(Interval seen, int64_t first, int64_t n) {
    const int64_t lo = std::clamp<int64_t>(seen.lo - first, 0, n);
    return {lo, std::clamp<int64_t>(seen.hi - first, lo, n)};
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
  // Those of keys that the block of queries at `first` sees anything of.
  Interval key_blocks(const Place &at, int64_t first) const {
    return blocks_seen([&](int64_t i) { return keys_of(at, i); }, first, std::min(first + block, at.Tq));
  }

  // ---- operands

  // Rows that are wanted soon, asked for one at each call, while there is arithmetic to do: a core drops requests that
  // come all at once, and does not foresee rows that lie apart because heads are side by side.
  class Ahead {
    struct Stream {
      const char *next;
      int64_t stride, bytes, left;
    } streams[5]{};
    int count = 0;

  public:
    void restart() { count = 0; }
    void add(const T *first, int64_t stride, int64_t rows, int64_t n) {
      streams[count++] = {reinterpret_cast<const char *>(first), stride * int64_t(sizeof(T)), n * int64_t(sizeof(T)),
                          rows};
    }
    void operator()() {
      for (int k = 0; k < count; k++) {
        Stream &s = streams[k];
        if (s.left-- <= 0) continue;
        for (int64_t c = 0; c < s.bytes; c += 64) prefetch(s.next + c);
        s.next += s.stride;
      }
    }
  };

  // Rows as the tile reads them.
  struct Rows {
    const P *first;
    int64_t stride;
    const P *operator()(int64_t t) const { return first + t * stride; }
  };
  int64_t width(int64_t n) const { return row_stride<P>(n + depth); }
  Rows copied(const Heads &heads, int64_t s, int64_t h, int64_t t, int64_t count, int64_t n, P *to) const {
    for (int64_t i = 0; i < count; i++, to += width(n)) {
      const T *from = row(heads, s, h, t + i);
      for (int64_t c = 0; c < n; c += L) store(to + c, load(from + c, n - c));
      if (depth > 1) store(to + n, V(0), 1);
    }
    return {to - count * width(n), width(n)};
  }
  // Where they are if they are of the tile's type, else copied.
  Rows rows(const Heads &heads, int64_t s, int64_t h, int64_t t, int64_t count, int64_t n, P *copy) const {
    if constexpr (std::is_same_v<T, P>)
      if (n % depth == 0) return {row(heads, s, h, t), heads.t};
    return copied(heads, s, h, t, count, n, copy);
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

  // ---- a block: queries [i0, i0 + n) by keys [j0, j0 + m), held [m][block]

  struct Block {
    int64_t i0, n, j0, m;
  };
  Interval queries_in(const Place &at, const Block &b, int64_t j) const {
    return within(queries_of(at, b.j0 + j), b.i0, b.n);
  }
  Interval keys_in(const Place &at, const Block &b, int64_t i) const {
    return within(keys_of(at, b.i0 + i), b.j0, b.m);
  }
  // The keys that any query of a vector sees.
  Interval keys_in_vector(const Place &at, const Block &b, int64_t v) const {
    return {keys_in(at, b, v * L).lo, keys_in(at, b, std::min(v * L + L, b.n) - 1).hi};
  }

  // Rows that belong to keys times what is packed of queries, in those vectors where one sees the other.
  void products(const Place &at, const Block &b, const Rows &rows, const Matrix<P> &queries, F *to,
                Ahead &ahead) const {
    product_to(to, block, false, b.m, queries, rows, depth, [&](int64_t first, int64_t count) -> Extent {
      ahead();
      return {queries_in(at, b, first).lo / L, vectors<T>(queries_in(at, b, first + count - 1).hi), 0, queries.steps};
    });
  }
  // Scores, up to the factor that is returned; -infinity where a query does not see a key.
  F scores(const Place &at, const Block &b, const Rows &keys, const Matrix<P> &queries, F *to, Ahead &ahead) const {
    products(at, b, keys, queries, to, ahead);
    const F slope = a.slopes ? static_cast<const F *>(a.slopes)[at.s * a.slopes_b + at.h] : F(0);
    const bool plain = !a.bias && slope == 0 && a.scale > 0;
    if (!plain) adjust(at, b, slope, to);
    const bool *mask = a.key_mask ? a.key_mask + at.s * a.Tk + b.j0 : nullptr;
    if (mask || keys_in(at, b, b.n - 1).lo > 0 || keys_in(at, b, 0).hi < b.m)
      for (int64_t j = 0; j < b.m; j++) {
        F *const row = to + j * block;
        const Interval seen = queries_in(at, b, j);
        const int64_t lo = seen.lo / L * L, hi = vectors<T>(seen.hi) * L;
        std::fill(row + lo, row + (mask && !mask[j] ? hi : seen.lo), -infinity);
        std::fill(row + seen.hi, row + hi, -infinity);
      }
    return plain ? F(a.scale) : F(1);
  }
  // Adds to rows of queries what `from`, [keys] by queries with the keys of a sum step side by side, makes of rows that
  // belong to keys.
  void sums_over_keys(const Place &at, const Block &b, const P *from, const Matrix<P> &over, int64_t n, F *to,
                      Ahead &ahead) const {
    product_to(
        to, vectors<T>(n) * L, true, b.n, part(over, b.j0, b.m), [=](int64_t i) { return from + i * depth; },
        block * depth,
        [&](int64_t first, int64_t count) -> Extent {
          ahead();
          return {0, vectors<T>(n), keys_in(at, b, first).lo / depth,
                  sum_steps<P>(keys_in(at, b, first + count - 1).hi)};
        });
  }
  // Scales scores and adds what there is to add; the bias comes by rows of queries.
  void adjust(const Place &at, const Block &b, F slope, F *s) const {
    for (int64_t i = 0; i < b.n; i += L)
      for (int64_t j = 0; j < b.m; j += L) {
        V added[L];
        for (int k = 0; k < L; k++) added[k] = a.bias && i + k < b.n ? bias(at, b, i + k, j) : V(0);
        transpose(added);
        for (int64_t k = 0; k < std::min<int64_t>(L, b.m - j); k++) {
          F *const x = s + (j + k) * block + i;
          const V away = count() + V(F(b.i0 + i + at.offset() - b.j0 - j - k));
          (V::load(x) * V(F(a.scale)) + added[k] - V(slope) * where(away < V(0), -away, away)).store(x);
        }
      }
  }
  V bias(const Place &at, const Block &b, int64_t i, int64_t j) const { // of a vector of keys
    const F *const from = static_cast<const F *>(a.bias) + at.s * a.bias_b + at.h * a.bias_h + (b.i0 + i) * a.bias_i +
                          (b.j0 + j) * a.bias_j;
    return a.bias_j ? load(from, b.m - j) : V(*from);
  }
  static V count() {
    V v;
    for (int i = 0; i < L; i++) v.v[i] = F(i);
    return v;
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
