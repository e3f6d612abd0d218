// Attention backward: probabilities are made again from the scores, block by block.
//
// With P the probabilities, M the dropout factors (0 or 1 / (1 - p)), dO the gradient of the output and
// delta_i = sum_c dO_ic O_ic - dlse_i:   dV = (P M)^T dO,   dS = P (M (dO V^T) - delta),   dQ = scale dS K,   dK =
// scale dS^T Q.
//
// Operations of a pair of query and key: 3 D + 2 E multiply-adds and one exp when heads are enough to occupy the
// threads: then one walk over a head makes all three gradients. Otherwise blocks of keys make dK and dV, and blocks of
// queries dQ, with scores made twice (5 D + 3 E). Each gradient is summed in the same order in both, and has the same
// bits.
#pragma once
#include "attention.h"

namespace gk {

template <class T, class P> class AttentionBackward : Attention {
  using F = Real<T>;
  using V = Vec<F>;
  static constexpr int L = lanes<T>, depth = Dot<P>::depth;

  const AttentionBackwardArgs &q; // a, and what this direction has besides
  const Dropout<F> dropout{q.p, q.seed};

  struct Queries { // of a head
    Packed<P> q_along, q_over, dout_along, dout_over;
    F *lse, *delta; // [Tq in whole vectors]; lse to base 2, infinite where nothing was seen: probabilities are 0 there
  };
  struct Scratch {
    Rows<P> keys, values;     // of a block, where they cannot be read as they are
    F *probability, *dscores; // [block of keys, block of queries]; then operands P M and dS, rows as far apart
    P *turned;                // dS with the keys of a sum step side by side, where that is another order
    F *factors;               // [block of keys, block of queries] of dropout
    F *dk, *dv;               // [block, D or E in whole vectors]
    F *dq;                    // [queries of a block, or of all heads that one of keys serves; D in whole vectors]
    Ahead ahead{};
  };

  int64_t D_wide() const { return whole_vectors<T>(a.D); }
  int64_t E_wide() const { return whole_vectors<T>(a.E); }

  void pack_queries(const Place &at, const Queries &to) const {
    const Rows<T> rows = queries<T>(a.q, at, a.D), dout = queries<T>(q.dout, at, a.E);
    pack_along(rows, to.q_along), pack_over(rows, to.q_over);
    pack_along(dout, to.dout_along), pack_over(dout, to.dout_over);
    const Rows<T> out = queries<T>(q.out, at, a.E);
    const F *const lse = static_cast<const F *>(a.lse) + lse_at(at, 0);
    const F *const dlse = q.dlse ? static_cast<const F *>(q.dlse) + lse_at(at, 0) : nullptr;
    for (int64_t i = 0; i < at.Tq; i += L) {
      const int64_t n = std::min<int64_t>(L, at.Tq - i);
      V delta[L]; // of a row each, until they are turned
      for (int64_t r = 0; r < L; r++) {
        delta[r] = 0;
        for (int64_t c = 0; r < n && c < a.E; c += L)
          delta[r] += load(out(i + r) + c, a.E - c) * load(dout(i + r) + c, a.E - c);
      }
      transpose(delta);
      for (int r = 1; r < L; r++) delta[0] += delta[r];
      (dlse ? delta[0] - load(dlse + i, n) : delta[0]).store(to.delta + i);
      const V nothing(-infinity<F>), sum = load(lse + i, n);
      where(sum == nothing, -nothing, sum * V(Exp<F>::log2e)).store(to.lse + i);
      std::fill(to.lse + i + n, to.lse + i + L, infinity<F>);
    }
  }

  // Row j of a block that has become an operand.
  static P *operands(F *block_of, int64_t j) { return reinterpret_cast<P *>(block_of + j * block); }

  // P M and dS of a block.
  void differentiate(const Place &at, const Block &b, const Queries &head, const Rows<P> &keys, const Rows<P> &values,
                     Scratch &w) const {
    const F factor = scores(at, b, keys, along_from(head.q_along.matrix, b.i0), w.probability, w.ahead);
    products(at, b, values, along_from(head.dout_along.matrix, b.i0), w.dscores, w.ahead);
    if (dropout.on) draw(dropout, at, b, w.factors);
    const V by = factor * Exp<F>::log2e;
    const int64_t wide = whole_vectors<T>(b.n);
    for (int64_t j = 0; j < b.m; j++) {
      P *const p = operands(w.probability, j), *const ds = operands(w.dscores, j);
      const Interval seen = queries_in(at, b, j, 1).groups(L);
      const int64_t lo = seen.lo * L, hi = seen.hi * L;
      for (int64_t i = lo; i < hi; i += L) {
        const V x = exp2(V::load(w.probability + j * block + i) * by - V::load(head.lse + b.i0 + i));
        const V kept = dropout.on ? V::load(w.factors + j * block + i) : V(1);
        const V d = x * (V::load(w.dscores + j * block + i) * kept - V::load(head.delta + b.i0 + i));
        const auto unseen = x == V(0); // says nothing, whatever is there
        store(p + i, where(unseen, V(0), x * kept)), store(ds + i, where(unseen, V(0), d));
      }
      std::fill(p, p + lo, P{}), std::fill(ds, ds + lo, P{});
      std::fill(p + hi, p + wide, P{}), std::fill(ds + hi, ds + wide, P{});
    }
    if constexpr (depth > 1)
      for (int64_t j = 0; j < b.m; j += depth)
        for (int64_t i = 0; i < wide; i += L)
          store_words(
              w.turned + j * block + i * depth,
              pair_words(operands(w.dscores, j) + i, j + 1 < b.m ? operands(w.dscores, j + 1) + i : nullptr, L));
  }
  // Once a block, though blocks may be walked twice: two threads must not write one place, be it the same value.
  void write_dscores(const Place &at, const Block &b, const Scratch &w) const {
    T *const to = static_cast<T *>(q.dscores) + ((at.s * a.Hq + at.hq) * a.Tq + b.i0) * a.Tk + b.j0;
    for (int64_t i = 0; i < b.n; i += L)
      for (int64_t j = 0; j < b.m; j += L) {
        V ds[L];
        for (int k = 0; k < L; k++) ds[k] = j + k < b.m ? load(operands(w.dscores, j + k) + i) : V(0);
        transpose(ds);
        for (int64_t r = 0; r < std::min<int64_t>(L, b.n - i); r++) store(to + (i + r) * a.Tk + j, ds[r], b.m - j);
      }
  }

  void add_dkv(const Place &at, const Block &b, const Queries &head, Scratch &w) const {
    const auto add = [&](F *block_of, const Matrix<P> &over, int64_t width, F *sums) {
      product_to(
          sums, whole_vectors<T>(width), true, b.m, over_part(over, b.i0, b.n),
          [=](int64_t j) { return operands(block_of, j); }, depth,
          [&](int64_t first, int64_t count) -> Extent {
            const Interval steps = queries_in(at, b, first, count).groups(depth);
            return {0, vectors<T>(width), steps.lo, steps.hi};
          });
    };
    add(w.probability, head.dout_over.matrix, a.E, w.dv), add(w.dscores, head.q_over.matrix, a.D, w.dk);
  }
  void add_dq(const Place &at, const Block &b, const Packed<P> &keys_over, Scratch &w, F *dq) const {
    const P *const from = depth > 1 ? w.turned : operands(w.dscores, 0);
    add_over_keys(at, b, from, keys_over.matrix, a.D, dq, w.ahead);
  }

  // Block j of head `kv` of keys and all that see it: dK, dV and the scores' gradients; with `dq` also what it gives to
  // their queries.
  void keys_block(int64_t kv, int64_t j, const Queries *heads, const Packed<P> &keys_over, Scratch &w, F *dq) const {
    const Place any = place(kv, 0);
    const Rows<P> k_rows = readable(keys<T>(a.k, any, a.D).part(j * block, block), w.keys);
    const Rows<P> v_rows = readable(keys<T>(a.v, any, a.E).part(j * block, block), w.values);
    std::fill(w.dk, w.dk + k_rows.count * D_wide(), F(0)), std::fill(w.dv, w.dv + v_rows.count * E_wide(), F(0));
    const Interval seen = query_blocks(any, j);
    for (int64_t h = 0; h < group(); h++) {
      const Place at = place(kv, h);
      for (int64_t i = seen.lo; i < seen.hi; i++) {
        const Block b = block_at(at, i, j);
        differentiate(at, b, heads[h], k_rows, v_rows, w);
        add_dkv(at, b, heads[h], w);
        if (q.dscores) write_dscores(at, b, w);
        if (dq) add_dq(at, b, keys_over, w, dq + (h * at.Tq + b.i0) * D_wide());
      }
    }
    write(w.dk, F(a.scale), keys<T>(q.dk, any, a.D).part(j * block, block));
    write(w.dv, F(1), keys<T>(q.dv, any, a.E).part(j * block, block));
  }
  // Block i of queries: dQ alone.
  void queries_block(const Place &at, int64_t i, const Queries &head, const Packed<P> &keys_over, Scratch &w) const {
    const Rows<T> dq = queries<T>(q.dq, at, a.D).part(i * block, block);
    std::fill(w.dq, w.dq + dq.count * D_wide(), F(0));
    const Interval seen = key_blocks(at, i);
    for (int64_t j = seen.lo; j < seen.hi; j++) {
      const Block b = block_at(at, i, j);
      const Rows<P> k_rows = readable(keys<T>(a.k, at, a.D).part(b.j0, b.m), w.keys);
      const Rows<P> v_rows = readable(keys<T>(a.v, at, a.E).part(b.j0, b.m), w.values);
      differentiate(at, b, head, k_rows, v_rows, w);
      add_dq(at, b, keys_over, w, w.dq);
    }
    write(w.dq, F(a.scale), dq);
  }

  // All three gradients of a head of keys and of what it serves.
  void whole_head(int64_t kv, Queries *heads, const Packed<P> &keys_over, Scratch &w) const {
    const Place any = place(kv, 0);
    pack_over(keys<T>(a.k, any, a.D), keys_over);
    for (int64_t h = 0; h < group(); h++) pack_queries(place(kv, h), heads[h]);
    expect(place(std::min(kv + a.threads, key_heads() - 1), 0), w.ahead); // what this thread is likely to take next
    std::fill(w.dq, w.dq + group() * any.Tq * D_wide(), F(0));
    for (int64_t j = 0; j < blocks(any.Tk); j++) keys_block(kv, j, heads, keys_over, w, w.dq);
    for (int64_t h = 0; h < group(); h++)
      write(w.dq + h * any.Tq * D_wide(), F(a.scale), queries<T>(q.dq, place(kv, h), a.D));
  }
  void expect(const Place &at, Ahead &ahead) const {
    ahead.restart();
    ahead.add(keys<T>(a.k, at, a.D)), ahead.add(keys<T>(a.v, at, a.E)), ahead.add(queries<T>(a.q, at, a.D));
    ahead.add(queries<T>(q.out, at, a.E)), ahead.add(queries<T>(q.dout, at, a.E));
  }

public:
  explicit AttentionBackward(const AttentionBackwardArgs &q) : Attention(q), q(q) {}

  void operator()() {
    const int64_t Tk = longest_k(), Tq = longest_q(), q_blocks = blocks(Tq), k_blocks = blocks(Tk);
    // Blocks cost half as much again as whole heads, which may leave threads without work at the end.
    const int64_t turns = (key_heads() + a.threads - 1) / a.threads;
    const bool by_heads = 2 * turns * a.threads <= 3 * key_heads();
    const int64_t slots = by_heads ? a.threads : key_heads(); // of packed heads
    std::vector<Queries> packed_queries(slots * group());
    for (Queries &h : packed_queries)
      h = {take_panels<P>(arena, Tq, 1, a.D), take_panels<P>(arena, a.D, 1, Tq),   take_panels<P>(arena, Tq, 1, a.E),
           take_panels<P>(arena, a.E, 1, Tq), arena.take<F>(whole_vectors<T>(Tq)), arena.take<F>(whole_vectors<T>(Tq))};
    std::vector<Packed<P>> packed_keys(slots);
    for (Packed<P> &k : packed_keys) k = take_panels<P>(arena, a.D, 1, Tk);
    std::vector<Scratch> scratch(a.threads);
    for (Scratch &w : scratch)
      w = {take_rows<P>(arena, block, a.D),
           take_rows<P>(arena, block, a.E),
           arena.take<F>(block * block),
           arena.take<F>(block * block),
           arena.take<P>(depth > 1 ? block * block : 0),
           arena.take<F>(dropout.on ? block * block : 0),
           arena.take<F>(block * D_wide()),
           arena.take<F>(block * E_wide()),
           arena.take<F>((by_heads ? group() * Tq : block) * D_wide())};
    std::atomic<int64_t> packed{0}, first_done{0}, then_done{0};
    Barrier all(a.threads);
    run_team(a.threads, [&](int id) {
      Scratch w = scratch[id];
      if (by_heads)
        return share(first_done, key_heads(),
                     [&](int64_t kv) { whole_head(kv, &packed_queries[id * group()], packed_keys[id], w); });
      share(packed, key_heads() * (group() + 1), [&](int64_t n) { // heads of queries, and behind them that of keys
        const int64_t kv = n / (group() + 1), h = n % (group() + 1);
        if (h < group())
          pack_queries(place(kv, h), packed_queries[kv * group() + h]);
        else
          pack_over(keys<T>(a.k, place(kv, 0), a.D), packed_keys[kv]);
      });
      all.wait(id);
      share(first_done, key_heads() * k_blocks, [&](int64_t n) {
        const int64_t kv = n / k_blocks, j = n % k_blocks;
        if (j * block < place(kv, 0).Tk) keys_block(kv, j, &packed_queries[kv * group()], packed_keys[kv], w, nullptr);
      });
      share(then_done, key_heads() * group() * q_blocks, [&](int64_t n) {
        const int64_t head = n / q_blocks, i = q_blocks - 1 - n % q_blocks, kv = head / group();
        const Place at = place(kv, head % group());
        if (i * block < at.Tq) queries_block(at, i, packed_queries[head], packed_keys[kv], w);
      });
    });
  }
};

} // namespace gk
