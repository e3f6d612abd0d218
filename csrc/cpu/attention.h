// Exact attention in blocks: what both directions share.
//
// Dims: B sequences, Hq heads of queries, Hk heads of keys and values (each serves Hq / Hk), Tq queries, Tk keys, D
// width of queries and keys, E width of values, L lanes of a vector. Memory beyond the arguments is O(T).
//
// A block is `block` queries by as many keys. It is held keys by queries: what belongs to a query lies along a vector,
// so that no maximum and no sum goes across lanes.
//
// Query i sees the keys of one interval, which causality and the window cut out, but for those that the key mask hides:
// aligned at the end, the last query stands beside the last key.
#pragma once
#include "../philox.h"
#include "attention_args.h"
#include "attention_rows.h"
#include "team.h"
#include <cmath>
#include <limits>

namespace gk {

class Attention {
protected:
  static constexpr int64_t block = 64;
  template <class F> static constexpr F infinity = std::numeric_limits<F>::infinity();
  static_assert(block % Philox::blocks == 0 && block % lanes<float> == 0);

  const AttentionArgs &a;
  Arena &arena = Arena::of_this_thread();

  explicit Attention(const AttentionArgs &a) : a(a) { arena.reset(); }

  static int64_t blocks(int64_t n) { return (n + block - 1) / block; }
  int64_t group() const { return a.Hq / a.Hk; }    // heads of queries that one of keys serves
  int64_t key_heads() const { return a.B * a.Hk; } // of all sequences, which `kv` counts
  int64_t longest_q() const { return longest(a.cu_q, a.Tq); }
  int64_t longest_k() const { return longest(a.cu_k, a.Tk); }

  // One head of queries of one sequence, and the head of keys that serves it.
  struct Place {
    int64_t s, hq, hk;
    int64_t q0, Tq, k0, Tk; // first row, rows
  };
  // Head h of those that `kv` serves.
  Place place(int64_t kv, int64_t h) const {
    const int64_t s = kv / a.Hk, hk = kv % a.Hk, hq = hk * group() + h;
    if (!a.cu_q) return {s, hq, hk, 0, a.Tq, 0, a.Tk};
    return {s, hq, hk, a.cu_q[s], a.cu_q[s + 1] - a.cu_q[s], a.cu_k[s], a.cu_k[s + 1] - a.cu_k[s]};
  }

  template <class T> Rows<T> queries(const Heads &heads, const Place &at, int64_t width) const {
    return {row<T>(heads, at.s, at.hq, at.q0), heads.t, at.Tq, width};
  }
  template <class T> Rows<T> keys(const Heads &heads, const Place &at, int64_t width) const {
    return {row<T>(heads, at.s, at.hk, at.k0), heads.t, at.Tk, width};
  }
  int64_t lse_at(const Place &at, int64_t i) const { return ((a.cu_q ? 0 : at.s * a.Hq) + at.hq) * a.Tq + at.q0 + i; }

  // ---- who sees whom

  // [lo, hi); nothing is [0, 0).
  struct Interval {
    int64_t lo, hi;
    int64_t size() const { return hi - lo; }
    // What of it lies in [first, first + n), counted from there.
    Interval within(int64_t first, int64_t n) const {
      const int64_t from = std::max<int64_t>(lo - first, 0), to = std::min(hi - first, n);
      return from < to ? Interval{from, to} : Interval{0, 0};
    }
    // The groups of n that it touches.
    Interval groups(int64_t n) const { return {lo / n, (hi + n - 1) / n}; }
  };
  // The keys that any of the queries [i, i + n) may see, and the queries that may see any of the keys [j, j + n).
  Interval keys_of(const Place &at, int64_t i, int64_t n) const {
    const int64_t beside = i + at.Tk - at.Tq;
    return Interval{beside - back(), beside + n + forth()}.within(0, at.Tk);
  }
  Interval queries_of(const Place &at, int64_t j, int64_t n) const {
    const int64_t beside = j - at.Tk + at.Tq;
    return Interval{beside - forth(), beside + n + back()}.within(0, at.Tq);
  }

  // Block i of queries with block j of keys: queries [i0, i0 + n), keys [j0, j0 + m); held [m][block].
  struct Block {
    int64_t i0, n, j0, m;
  };
  static Block block_at(const Place &at, int64_t i, int64_t j) {
    return {i * block, std::min(block, at.Tq - i * block), j * block, std::min(block, at.Tk - j * block)};
  }
  // The blocks that a block sees, or is seen from, anything of.
  Interval key_blocks(const Place &at, int64_t i) const {
    return keys_of(at, i * block, std::min(block, at.Tq - i * block)).groups(block);
  }
  Interval query_blocks(const Place &at, int64_t j) const {
    return queries_of(at, j * block, std::min(block, at.Tk - j * block)).groups(block);
  }
  // As keys_of and queries_of, inside a block and counted from its start.
  Interval keys_in(const Place &at, const Block &b, int64_t i, int64_t n) const {
    return keys_of(at, b.i0 + i, n).within(b.j0, b.m);
  }
  Interval queries_in(const Place &at, const Block &b, int64_t j, int64_t n) const {
    return queries_of(at, b.j0 + j, n).within(b.i0, b.n);
  }

  // ---- a block

  // to [keys][block] = rows that belong to keys times what is packed of queries, in those vectors where one sees the
  // other.
  template <class P>
  void products(const Place &at, const Block &b, const Rows<P> &rows, const Matrix<P> &queries, Real<P> *to,
                Ahead &ahead) const {
    product_to(to, block, false, b.m, queries, rows, Dot<P>::depth, [&](int64_t first, int64_t count) -> Extent {
      ahead.ask();
      const Interval v = queries_in(at, b, first, count).groups(lanes<P>);
      return {v.lo, v.hi, 0, queries.steps};
    });
  }

  // Adds to sums [queries][whole vectors] what `from` [keys][block], the keys of a sum step side by side, makes of rows
  // that belong to keys and are `width` wide.
  template <class P>
  void add_over_keys(const Place &at, const Block &b, const P *from, const Matrix<P> &over, int64_t width,
                     Real<P> *sums, Ahead &ahead) const {
    constexpr int depth = Dot<P>::depth;
    product_to(
        sums, whole_vectors<P>(width), true, b.n, over_part(over, b.j0, b.m),
        [=](int64_t i) { return from + i * depth; }, block * depth,
        [&](int64_t first, int64_t count) -> Extent {
          ahead.ask();
          const Interval steps = keys_in(at, b, first, count).groups(depth);
          return {0, vectors<P>(width), steps.lo, steps.hi};
        });
  }

  // Scores, up to the factor that is returned; -infinity where a query does not see a key.
  template <class P, class F = Real<P>>
  F scores(const Place &at, const Block &b, const Rows<P> &keys, const Matrix<P> &queries, F *to, Ahead &ahead) const {
    products(at, b, keys, queries, to, ahead);
    const F slope = a.slopes ? static_cast<const F *>(a.slopes)[at.s * a.slopes_b + at.hq] : F(0);
    const bool plain = !a.bias && slope == 0 && a.scale > 0;
    if (!plain) adjust(at, b, slope, to);
    const bool *const mask = a.key_mask ? a.key_mask + at.s * a.Tk + b.j0 : nullptr;
    if (mask || keys_in(at, b, 0, 1).size() < b.m || keys_in(at, b, b.n - 1, 1).size() < b.m) hide(at, b, mask, to);
    return plain ? F(a.scale) : F(1);
  }

  // Factors of dropout [keys][block].
  template <class F> void draw(const Dropout<F> &dropout, const Place &at, const Block &b, F *factors) const {
    const uint64_t row = a.cu_q ? (at.q0 + b.i0) * a.Hq + at.hq : (at.s * a.Hq + at.hq) * a.Tq + b.i0;
    dropout.factors_down(row, a.cu_q ? a.Hq : 1, b.n, b.j0, b.m, factors, block);
  }

private:
  // Scales scores and adds what there is to add; the bias comes by rows of queries.
  template <class F> void adjust(const Place &at, const Block &b, F slope, F *scores) const {
    using V = Vec<F>;
    constexpr int L = V::size;
    const auto bias = [&](int64_t i, int64_t j) { // of a vector of keys
      const F *const from =
          static_cast<const F *>(a.bias) + at.s * a.bias_b + at.hq * a.bias_h + i * a.bias_i + j * a.bias_j;
      return a.bias_j ? load(from, b.j0 + b.m - j) : V(*from);
    };
    V lane;
    for (int i = 0; i < L; i++) lane.v[i] = F(i);
    for (int64_t i = 0; i < b.n; i += L)
      for (int64_t j = 0; j < b.m; j += L) {
        V added[L];
        for (int k = 0; k < L; k++) added[k] = a.bias && i + k < b.n ? bias(b.i0 + i + k, b.j0 + j) : V(0);
        transpose(added);
        for (int64_t k = 0; k < std::min<int64_t>(L, b.m - j); k++) {
          F *const x = scores + (j + k) * block + i;
          const V away = lane + V(F(b.i0 + i + at.Tk - at.Tq - b.j0 - j - k));
          (V::load(x) * V(F(a.scale)) + added[k] - V(slope) * where(away < V(0), -away, away)).store(x);
        }
      }
  }
  // -infinity where a query does not see a key, in those vectors that there are products of.
  template <class F> void hide(const Place &at, const Block &b, const bool *mask, F *scores) const {
    constexpr int L = Vec<F>::size;
    for (int64_t j = 0; j < b.m; j++, scores += block) {
      const Interval seen = queries_in(at, b, j, 1), v = seen.groups(L);
      std::fill(scores + v.lo * L, scores + (mask && !mask[j] ? seen.hi : seen.lo), -infinity<F>);
      std::fill(scores + seen.hi, scores + v.hi * L, -infinity<F>);
    }
  }

  // How many keys before and after the one beside it a query sees.
  static constexpr int64_t unbounded = std::numeric_limits<int64_t>::max() / 4;
  int64_t back() const { return a.left < 0 ? unbounded : a.left; }
  int64_t forth() const { return a.causal ? 0 : a.right < 0 ? unbounded : a.right; }

  template <class T> T *row(const Heads &heads, int64_t s, int64_t h, int64_t t) const {
    return static_cast<T *>(heads.data) + (a.cu_q ? 0 : s * heads.b) + h * heads.h + t * heads.t;
  }
  int64_t longest(const int32_t *cu, int64_t rows) const {
    if (!cu) return rows;
    int64_t n = 0;
    for (int64_t s = 0; s < a.B; s++) n = std::max<int64_t>(n, cu[s + 1] - cu[s]);
    return n;
  }
};

} // namespace gk
