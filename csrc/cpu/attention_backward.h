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

template <class T, class P> class AttentionBackward : Attention<T, P> {
  using Base = Attention<T, P>;
  using Base::a;
  using Base::block;
  using Base::depth;
  using Base::dropout;
  using Base::infinity;
  using Base::L;
  using typename Base::Ahead;
  using typename Base::Block;
  using typename Base::F;
  using typename Base::Interval;
  using typename Base::Rows;
  using typename Base::V;

  const AttentionBackwardArgs &q;

  // What is packed of a head of queries, and of one of keys.
  struct Queries {
    Packed<P> q_along, q_over, dout_along, dout_over;
    F *lse, *delta; // [Tq rounded up]; lse to base 2, infinite where nothing was seen, so that probabilities are 0
  };
  struct Keys {
    Packed<P> over;
  };
  struct Scratch {
    P *keys, *values;         // [block, width] where they cannot be read as they are
    F *probability, *dscores; // [block of keys, block of queries]; then operands P M and dS, rows as far apart
    P *turned;                // dS with the keys of a sum step side by side, where that is another order
    F *factors;               // [block of keys, block of queries] of dropout
    F *dk, *dv;               // [block, width]
    F *dq;                    // [Tq or block, width]
    Ahead ahead;
  };

  int64_t E_wide() const { return vectors<T>(a.E) * L; }
  int64_t D_wide() const { return vectors<T>(a.D) * L; }

  void prepare(const Place &at, const Queries &to) const {
    for (int64_t i = 0; i < at.Tq; i += L) {
      const int64_t n = at.Tq - i, from = this->lse_at(at, i);
      V sums[L]; // of a row each, until they are turned
      for (int r = 0; r < L; r++) {
        sums[r] = 0;
        if (r >= n) continue;
        const T *o = this->row(q.out, at.s, at.h, at.q0 + i + r), *d = this->row(q.dout, at.s, at.h, at.q0 + i + r);
        for (int64_t c = 0; c < a.E; c += L) sums[r] += load(o + c, a.E - c) * load(d + c, a.E - c);
      }
      transpose(sums);
      for (int r = 1; r < L; r++) sums[0] += sums[r];
      if (q.dlse) sums[0] = sums[0] - load(static_cast<const F *>(q.dlse) + from, n);
      sums[0].store(to.delta + i);
      for (int64_t r = 0; r < L; r++) {
        const F lse = r < n ? static_cast<const F *>(a.lse)[from + r] : -infinity;
        to.lse[i + r] = lse == -infinity ? infinity : lse * Exp<F>::log2e;
      }
    }
    this->pack_along(a.q, at, at.h, at.q0, at.Tq, a.D, to.q_along, 0, vectors<T>(at.Tq));
    this->pack_over(a.q, at, at.h, at.q0, at.Tq, a.D, to.q_over);
    this->pack_along(q.dout, at, at.h, at.q0, at.Tq, a.E, to.dout_along, 0, vectors<T>(at.Tq));
    this->pack_over(q.dout, at, at.h, at.q0, at.Tq, a.E, to.dout_over);
  }

  static P *operands(F *block_of, int64_t j) { return reinterpret_cast<P *>(block_of + j * block); }

  // P M and dS of a block.
  void differentiate(const Place &at, const Block &b, const Queries &h, const Rows &keys, const Rows &values,
                     Scratch &w) const {
    const auto from = [&](Matrix<P> m) {
      m.panels += b.i0 / L * m.panel;
      return m;
    };
    const F by = this->scores(at, b, keys, from(h.q_along.matrix), w.probability, w.ahead) * Exp<F>::log2e;
    this->products(at, b, values, from(h.dout_along.matrix), w.dscores, w.ahead);
    if (dropout.on)
      dropout.factors_down(this->dropout_row(at, b.i0), this->dropout_step(), b.n, b.j0, b.m, w.factors, block);
    const int64_t wide = vectors<T>(b.n) * L;
    for (int64_t j = 0; j < b.m; j++) {
      P *const p = operands(w.probability, j), *const ds = operands(w.dscores, j);
      const Interval seen = this->queries_in(at, b, j);
      const int64_t lo = seen.lo / L * L, hi = vectors<T>(seen.hi) * L;
      for (int64_t i = lo; i < hi; i += L) {
        const V x = exp2(V::load(w.probability + j * block + i) * V(by) - V::load(h.lse + b.i0 + i));
        const V kept = dropout.on ? V::load(w.factors + j * block + i) : V(1);
        const V d = x * (V::load(w.dscores + j * block + i) * kept - V::load(h.delta + b.i0 + i));
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
  // Once a block, though blocks are walked twice: two threads must not write one place, be it the same value.
  void write_dscores(const Place &at, const Block &b, const Scratch &w) const {
    for (int64_t i = 0; i < b.n; i++) {
      T *const to = static_cast<T *>(q.dscores) + (((at.s * a.Hq) + at.h) * a.Tq + b.i0 + i) * a.Tk + b.j0;
      for (int64_t j = 0; j < b.m; j++) store(to + j, load(operands(w.dscores, j) + i, 1), 1);
    }
  }

  void add_dkv(const Place &at, const Block &b, const Queries &h, Scratch &w) const {
    const auto add = [&](F *block_of, const Matrix<P> &over, int64_t width, F *to) {
      product_to(
          to, vectors<T>(width) * L, true, b.m, this->part(over, b.i0, b.n),
          [=](int64_t j) { return operands(block_of, j); }, depth,
          [&](int64_t first, int64_t count) -> Extent {
            return {0, vectors<T>(width), this->queries_in(at, b, first).lo / depth,
                    sum_steps<P>(this->queries_in(at, b, first + count - 1).hi)};
          });
    };
    add(w.probability, h.dout_over.matrix, a.E, w.dv), add(w.dscores, h.q_over.matrix, a.D, w.dk);
  }
  void add_dq(const Place &at, const Block &b, const Keys &k, Scratch &w, F *dq) const {
    const P *const from = depth > 1 ? w.turned : operands(w.dscores, 0);
    this->sums_over_keys(at, b, from, k.over.matrix, a.D, dq, w.ahead);
  }
  void write(const Heads &to, const Place &at, int64_t h, int64_t first, int64_t n, const F *from, int64_t width,
             F scale) const {
    const int64_t wide = vectors<T>(width) * L;
    for (int64_t r = 0; r < n; r++) {
      T *const row = this->row(to, at.s, h, first + r);
      for (int64_t c = 0; c < width; c += L) store(row + c, V::load(from + r * wide + c) * V(scale), width - c);
    }
  }

  // The block of keys at j0 of head `kv` and all that see it; with `dq` also what it gives to their queries.
  void keys_block(int64_t s, int64_t kv, int64_t j0, const Queries *heads, const Keys &k, Scratch &w, F *dq) const {
    const int64_t group = this->group();
    const Place any = this->place(s, kv * group);
    const int64_t m = std::min(block, any.Tk - j0);
    const Rows keys = this->rows(a.k, s, kv, any.k0 + j0, m, a.D, w.keys);
    const Rows values = this->rows(a.v, s, kv, any.k0 + j0, m, a.E, w.values);
    std::fill(w.dk, w.dk + m * D_wide(), F(0)), std::fill(w.dv, w.dv + m * E_wide(), F(0));
    const Interval seen = this->blocks_seen([&](int64_t j) { return this->queries_of(any, j); }, j0, j0 + m);
    for (int64_t h = 0; h < group; h++) {
      const Place at = this->place(s, kv * group + h);
      for (int64_t i = seen.lo; i < seen.hi; i++) {
        const Block b{i * block, std::min(block, at.Tq - i * block), j0, m};
        differentiate(at, b, heads[h], keys, values, w);
        add_dkv(at, b, heads[h], w);
        if (q.dscores) write_dscores(at, b, w);
        if (dq) add_dq(at, b, k, w, dq + (h * this->longest_q() + b.i0) * D_wide());
      }
    }
    write(q.dk, any, kv, any.k0 + j0, m, w.dk, a.D, F(a.scale)), write(q.dv, any, kv, any.k0 + j0, m, w.dv, a.E, F(1));
  }
  // The block of queries at i0: dQ alone.
  void queries_block(const Place &at, int64_t i0, const Queries &head, const Keys &k, Scratch &w) const {
    const int64_t n = std::min(block, at.Tq - i0), kv = at.h / this->group();
    std::fill(w.dq, w.dq + n * D_wide(), F(0));
    const Interval seen = this->key_blocks(at, i0);
    for (int64_t j = seen.lo; j < seen.hi; j++) {
      const Block b{i0, n, j * block, std::min(block, at.Tk - j * block)};
      const Rows keys = this->rows(a.k, at.s, kv, at.k0 + b.j0, b.m, a.D, w.keys);
      const Rows values = this->rows(a.v, at.s, kv, at.k0 + b.j0, b.m, a.E, w.values);
      differentiate(at, b, head, keys, values, w);
      add_dq(at, b, k, w, w.dq);
    }
    write(q.dq, at, at.h, at.q0 + i0, n, w.dq, a.D, F(a.scale));
  }

  void expect(int64_t head, Ahead &ahead) const {
    const int64_t kv = head % a.Hk;
    const Place at = this->place(head / a.Hk, kv * this->group());
    ahead.restart();
    ahead.add(this->row(a.k, at.s, kv, at.k0), a.k.t, at.Tk, a.D);
    ahead.add(this->row(a.v, at.s, kv, at.k0), a.v.t, at.Tk, a.E);
    ahead.add(this->row(a.q, at.s, at.h, at.q0), a.q.t, at.Tq, a.D);
    ahead.add(this->row(q.out, at.s, at.h, at.q0), q.out.t, at.Tq, a.E);
    ahead.add(this->row(q.dout, at.s, at.h, at.q0), q.dout.t, at.Tq, a.E);
  }

public:
  explicit AttentionBackward(const AttentionBackwardArgs &q) : Base(q), q(q) {}

  void operator()() {
    Arena &arena = this->arena;
    const int64_t Tk = this->longest_k(), Tq = this->longest_q(), group = this->group(), kv_heads = a.B * a.Hk;
    // Blocks cost half as much again as whole heads, which may leave threads without work at the end.
    const int64_t turns = (kv_heads + a.threads - 1) / a.threads;
    const bool by_heads = 2 * turns * a.threads <= 3 * kv_heads;
    const int64_t slots = by_heads ? a.threads : kv_heads; // of packed heads
    std::vector<Queries> queries(slots * group);
    for (Queries &h : queries)
      h = {take_panels<P>(arena, Tq, 1, a.D), take_panels<P>(arena, a.D, 1, Tq), take_panels<P>(arena, Tq, 1, a.E),
           take_panels<P>(arena, a.E, 1, Tq), arena.take<F>(Tq + block),         arena.take<F>(Tq + block)};
    std::vector<Keys> keys(slots);
    for (Keys &k : keys) k = {take_panels<P>(arena, a.D, 1, Tk)};
    std::vector<Scratch> scratch(a.threads);
    const int64_t dq_rows = by_heads ? group * Tq : block;
    for (Scratch &w : scratch) {
      w.keys = arena.take<P>(block * this->width(a.D)), w.values = arena.take<P>(block * this->width(a.E));
      w.probability = arena.take<F>(block * block), w.dscores = arena.take<F>(block * block);
      w.turned = arena.take<P>(depth > 1 ? block * block : 0);
      w.factors = arena.take<F>(dropout.on ? block * block : 0);
      w.dk = arena.take<F>(block * D_wide()), w.dv = arena.take<F>(block * E_wide());
      w.dq = arena.take<F>(dq_rows * D_wide());
    }
    // Head h of the group, or behind them the keys.
    const auto pack = [&](int64_t head, int64_t h, int64_t slot) {
      const int64_t kv = head % a.Hk;
      const Place at = this->place(head / a.Hk, kv * group + std::min(h, group - 1));
      if (h < group)
        prepare(at, queries[slot * group + h]);
      else
        this->pack_over(a.k, at, kv, at.k0, at.Tk, a.D, keys[slot].over);
    };
    const int64_t q_blocks = this->blocks(Tq), k_blocks = this->blocks(Tk);
    std::atomic<int64_t> packed{0}, first_done{0}, then_done{0};
    Barrier all(a.threads);
    run_team(a.threads, [&](int id) {
      Scratch w = scratch[id];
      if (by_heads)
        return share(first_done, kv_heads, [&](int64_t head) {
          const int64_t s = head / a.Hk, kv = head % a.Hk;
          const Place any = this->place(s, kv * group);
          for (int64_t h = 0; h <= group; h++) pack(head, h, id);
          expect(std::min(head + a.threads, kv_heads - 1), w.ahead); // what this thread is likely to take next
          std::fill(w.dq, w.dq + dq_rows * D_wide(), F(0));
          for (int64_t j0 = 0; j0 < any.Tk; j0 += block) keys_block(s, kv, j0, &queries[id * group], keys[id], w, w.dq);
          for (int64_t h = 0; h < group; h++)
            write(q.dq, any, kv * group + h, any.q0, any.Tq, w.dq + h * Tq * D_wide(), a.D, F(a.scale));
        });
      share(packed, kv_heads * (group + 1),
            [&](int64_t i) { pack(i / (group + 1), i % (group + 1), i / (group + 1)); });
      all.wait(id);
      share(first_done, kv_heads * k_blocks, [&](int64_t i) {
        const int64_t head = i / k_blocks, j0 = i % k_blocks * block, s = head / a.Hk;
        if (j0 < this->place(s, 0).Tk) keys_block(s, head % a.Hk, j0, &queries[head * group], keys[head], w, nullptr);
      });
      share(then_done, kv_heads * group * q_blocks, [&](int64_t i) {
        const int64_t h = i / q_blocks, i0 = (q_blocks - 1 - i % q_blocks) * block, head = h / group;
        const Place at = this->place(head / a.Hk, head % a.Hk * group + h % group);
        if (i0 < at.Tq) queries_block(at, i0, queries[h], keys[head], w);
      });
    });
  }
};

} // namespace gk
