// Attention backward: probabilities are made again from the scores, block by block.
//
// With P the probabilities, M the dropout factors (0 or 1 / (1 - p)), dO the gradient of the output and
// delta_i = sum_c dO_ic O_ic - dlse_i:   dV = (P M)^T dO,   dS = P (M (dO V^T) - delta),   dQ = scale dS K,   dK =
// scale dS^T Q. Blocks are held transposed, keys by queries, so that what belongs to a query lies along a vector.
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
  using Base::dropout;
  using Base::infinity;
  using Base::L;
  using typename Base::F;
  using typename Base::Interval;
  using typename Base::Rows;
  using typename Base::V;

  const AttentionBackwardArgs &q;
  static constexpr int64_t wave_bytes = int64_t(64) << 20; // of packed operands at a time

  // What is packed of a head of queries, and of one of keys.
  struct Queries {
    Packed<P> q_along, q_over, dout_along, dout_over;
    F *lse, *delta; // [Tq rounded up]; lse is infinite where nothing was seen, so that probabilities are 0
  };
  struct Keys {
    Packed<P> over;
  };
  struct Scratch {
    P *keys, *values;              // [block, width] where they cannot be read as they are
    F *probability, *score;        // [block of keys, block of queries]
    P *weights, *dscores, *turned; // the same as operands: P M, dS; dS by queries
    F *factors;                    // [block of queries, block of keys] of dropout
    F *dk, *dv;                    // [block, width]
    F *dq;                         // [Tq or block, width]
  };

  int64_t E_wide() const { return vectors<T>(a.E) * L; }
  int64_t D_wide() const { return vectors<T>(a.D) * L; }

  void prepare(const Place &at, const Queries &to) const {
    for (int64_t i = 0; i < vectors<T>(at.Tq) * L; i++) {
      to.lse[i] = infinity, to.delta[i] = 0;
      if (i >= at.Tq) continue;
      const T *o = this->row(q.out, at.s, at.h, at.q0 + i), *d = this->row(q.dout, at.s, at.h, at.q0 + i);
      V sum(0);
      for (int64_t c = 0; c < a.E; c += L) sum += load(o + c, a.E - c) * load(d + c, a.E - c);
      for (int j = 0; j < L; j++) to.delta[i] += sum.v[j];
      const int64_t n = this->lse_at(at, i);
      if (q.dlse) to.delta[i] -= static_cast<const F *>(q.dlse)[n];
      const F lse = static_cast<const F *>(a.lse)[n];
      to.lse[i] = lse == -infinity ? infinity : lse;
    }
    this->pack_along(a.q, at, at.h, at.q0, at.Tq, a.D, to.q_along, 0, vectors<T>(at.Tq));
    this->pack_over(a.q, at, at.h, at.q0, at.Tq, a.D, to.q_over);
    this->pack_along(q.dout, at, at.h, at.q0, at.Tq, a.E, to.dout_along, 0, vectors<T>(at.Tq));
    this->pack_over(q.dout, at, at.h, at.q0, at.Tq, a.E, to.dout_over);
  }

  // P M and dS of queries [i0, i0 + n) and keys [j0, j0 + m).
  void scores(const Place &at, const Queries &h, int64_t i0, int64_t n, int64_t j0, int64_t m, const Rows &keys,
              const Rows &values, const Scratch &w) const {
    const auto keep = [](F *to) {
      return [=](int64_t r, int64_t v, const F *acc) { V::load(acc).store(to + r * block + v * L); };
    };
    const int64_t v0 = i0 / L, nv = vectors<T>(n);
    const auto from = [v0](Matrix<P> m) {
      m.panels += v0 * m.panel;
      return m;
    };
    product<1, P>(m, 0, nv, from(h.q_along.matrix), keys, Dot<P>::depth, keep(w.probability));
    product<1, P>(m, 0, nv, from(h.dout_along.matrix), values, Dot<P>::depth, keep(w.score));
    if (dropout.on)
      for (int64_t i = 0; i < n; i++) {
        alignas(64) F row[block];
        dropout.factors(this->dropout_row(at, i0 + i), j0, block, row);
        for (int64_t j = 0; j < block; j++) w.factors[j * block + i] = row[j];
      }
    const F slope = this->slope(at);
    const bool *mask = this->mask(at);
    for (int64_t j = 0; j < m; j++) {
      F *const p = w.probability + j * block, *const s = w.score + j * block;
      const Interval seen = this->queries_of(at, j0 + j);
      int64_t lo = std::clamp<int64_t>(seen.lo - i0, 0, n), hi = std::clamp<int64_t>(seen.hi - i0, lo, n);
      if (mask && !mask[j0 + j]) lo = hi = 0;
      const V away = this->count() - V(F(j0 + j - at.offset() - i0));
      for (int64_t i = 0; i < nv * L; i += L) {
        V x = V::load(p + i) * V(F(a.scale));
        if (a.bias) {
          V b(0);
          for (int64_t k = i; k < std::min(i + L, n); k++) b.v[k - i] = *this->bias(at, i0 + k, j0 + j);
          x = x + b;
        }
        if (slope != 0) x = x - V(slope) * this->distance(away + V(F(i)));
        exp(x - V::load(h.lse + i0 + i)).store(p + i);
      }
      std::fill(p, p + lo, F(0)), std::fill(p + hi, p + nv * L, F(0));
      for (int64_t i = 0; i < nv * L; i += L) {
        const V x = V::load(p + i), kept = dropout.on ? V::load(w.factors + j * block + i) : V(1);
        V d = x * (V::load(s + i) * kept - V::load(h.delta + i0 + i));
        const auto unseen = x == V(0); // says nothing, whatever is there
        d = where(unseen, V(0), d);
        store(w.weights + j * block + i, where(unseen, V(0), x * kept));
        store(w.dscores + j * block + i, d);
        d.store(s + i);
      }
      if (Dot<P>::depth > 1) // sums go by pairs
        for (int64_t i = nv * L; i < std::min(nv * L + L, block); i += L)
          store(w.weights + j * block + i, V(0)), store(w.dscores + j * block + i, V(0));
    }
    if (q.dscores)
      for (int64_t i = 0; i < n; i++) {
        T *to = static_cast<T *>(q.dscores) + (((at.s * a.Hq) + at.h) * a.Tq + i0 + i) * a.Tk + j0;
        for (int64_t j = 0; j < m; j++) store(to + j, V(w.score[j * block + i]), 1);
      }
  }

  static auto add(F *to, int64_t wide) {
    return [=](int64_t r, int64_t v, const F *acc) {
      F *const p = to + r * wide + v * L;
      (V::load(p) + V::load(acc)).store(p);
    };
  }
  void add_dkv(const Queries &h, int64_t i0, int64_t n, int64_t m, const Scratch &w) const {
    const auto rows = [](const P *p) { return [=](int64_t j) { return p + j * block; }; };
    product<1, P>(m, 0, vectors<T>(a.E), this->part(h.dout_over.matrix, i0, n), rows(w.weights), Dot<P>::depth,
                  add(w.dv, E_wide()));
    product<1, P>(m, 0, vectors<T>(a.D), this->part(h.q_over.matrix, i0, n), rows(w.dscores), Dot<P>::depth,
                  add(w.dk, D_wide()));
  }
  void add_dq(const Keys &k, int64_t n, int64_t j0, int64_t m, const Scratch &w, F *dq) const {
    const Matrix<P> keys = this->part(k.over.matrix, j0, m);
    if constexpr (Dot<P>::depth == 1)
      product<1, P>(
          n, 0, vectors<T>(a.D), keys, [&](int64_t i) { return (const P *)w.dscores + i; }, block, add(dq, D_wide()));
    else { // pairs of keys have to be neighbours
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < m + m % 2; j++) w.turned[i * block + j] = j < m ? w.dscores[j * block + i] : P{};
      product<1, P>(
          n, 0, vectors<T>(a.D), keys, [&](int64_t i) { return (const P *)w.turned + i * block; }, Dot<P>::depth,
          add(dq, D_wide()));
    }
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
  void keys_block(int64_t s, int64_t kv, int64_t j0, const Queries *heads, const Keys &k, const Scratch &w,
                  F *dq) const {
    const int64_t group = this->group();
    const Place any = this->place(s, kv * group);
    const int64_t m = std::min(block, any.Tk - j0);
    const Rows keys = this->rows(a.k, s, kv, any.k0 + j0, m, a.D, w.keys);
    const Rows values = this->rows(a.v, s, kv, any.k0 + j0, m, a.E, w.values);
    std::fill(w.dk, w.dk + m * D_wide(), F(0)), std::fill(w.dv, w.dv + m * E_wide(), F(0));
    const Interval seen = this->blocks_seen([&](int64_t j) { return this->queries_of(any, j); }, j0, j0 + m);
    for (int64_t h = 0; h < group; h++) {
      const Place at = this->place(s, kv * group + h);
      for (int64_t b = seen.lo; b < seen.hi; b++) {
        const int64_t i0 = b * block, n = std::min(block, at.Tq - i0);
        scores(at, heads[h], i0, n, j0, m, keys, values, w);
        add_dkv(heads[h], i0, n, m, w);
        if (dq) add_dq(k, n, j0, m, w, dq + (h * this->longest_q() + i0) * D_wide());
      }
    }
    write(q.dk, any, kv, any.k0 + j0, m, w.dk, a.D, F(a.scale)), write(q.dv, any, kv, any.k0 + j0, m, w.dv, a.E, F(1));
  }
  // The block of queries at i0: dQ alone.
  void queries_block(const Place &at, int64_t i0, const Queries &head, const Keys &k, const Scratch &w) const {
    const int64_t n = std::min(block, at.Tq - i0), kv = at.h / this->group();
    std::fill(w.dq, w.dq + n * D_wide(), F(0));
    const Interval seen = this->blocks_seen([&](int64_t i) { return this->keys_of(at, i); }, i0, i0 + n);
    for (int64_t b = seen.lo; b < seen.hi; b++) {
      const int64_t j0 = b * block, m = std::min(block, at.Tk - j0);
      const Rows keys = this->rows(a.k, at.s, kv, at.k0 + j0, m, a.D, w.keys);
      const Rows values = this->rows(a.v, at.s, kv, at.k0 + j0, m, a.E, w.values);
      scores(at, head, i0, n, j0, m, keys, values, w);
      add_dq(k, n, j0, m, w, w.dq);
    }
    write(q.dq, at, at.h, at.q0 + i0, n, w.dq, a.D, F(a.scale));
  }

public:
  explicit AttentionBackward(const AttentionBackwardArgs &q) : Base(q), q(q) {}

  void operator()() {
    Arena &arena = this->arena;
    const int64_t Tk = this->longest_k(), Tq = this->longest_q(), group = this->group(), kv_heads = a.B * a.Hk;
    const bool by_heads = kv_heads >= 2 * a.threads || a.threads == 1;
    const int64_t bytes = (Tk * a.D + 2 * group * Tq * (a.D + a.E)) * int64_t(sizeof(P));
    const int64_t wave = std::clamp<int64_t>(wave_bytes / std::max<int64_t>(1, bytes), 1, kv_heads);
    std::vector<Queries> queries(wave * group);
    for (Queries &h : queries)
      h = {take_panels<P>(arena, Tq, 1, a.D), take_panels<P>(arena, a.D, 1, Tq), take_panels<P>(arena, Tq, 1, a.E),
           take_panels<P>(arena, a.E, 1, Tq), arena.take<F>(Tq + block),         arena.take<F>(Tq + block)};
    std::vector<Keys> keys(wave);
    for (Keys &k : keys) k = {take_panels<P>(arena, a.D, 1, Tk)};
    std::vector<Scratch> scratch(a.threads);
    const int64_t dq_rows = by_heads ? group * Tq : block;
    for (Scratch &w : scratch) {
      w.keys = arena.take<P>(block * this->width(a.D)), w.values = arena.take<P>(block * this->width(a.E));
      w.probability = arena.take<F>(block * block), w.score = arena.take<F>(block * block);
      w.weights = arena.take<P>(block * block), w.dscores = arena.take<P>(block * block);
      w.turned = arena.take<P>(block * block), w.factors = arena.take<F>(block * block);
      w.dk = arena.take<F>(block * D_wide()), w.dv = arena.take<F>(block * E_wide());
      w.dq = arena.take<F>(dq_rows * D_wide());
    }
    const int64_t waves = (kv_heads + wave - 1) / wave, q_blocks = this->blocks(Tq), k_blocks = this->blocks(Tk);
    std::vector<std::atomic<int64_t>> packed(waves), first_done(waves), then_done(waves);
    Barrier all(a.threads);
    run_team(a.threads, [&](int id) {
      const Scratch &w = scratch[id];
      for (int64_t k = 0; k < waves; k++) {
        const int64_t first = k * wave, n = std::min(wave, kv_heads - first);
        share(packed[k], n * (group + 1), [&](int64_t i) {
          const int64_t head = i / (group + 1), h = i % (group + 1), s = (first + head) / a.Hk,
                        kv = (first + head) % a.Hk;
          const Place at = this->place(s, kv * group + std::min(h, group - 1));
          if (h < group)
            prepare(at, queries[head * group + h]);
          else
            this->pack_over(a.k, at, kv, at.k0, at.Tk, a.D, keys[head].over);
        });
        all.wait(id);
        if (by_heads)
          share(first_done[k], n, [&](int64_t head) {
            const int64_t s = (first + head) / a.Hk, kv = (first + head) % a.Hk;
            const Place any = this->place(s, kv * group);
            std::fill(w.dq, w.dq + dq_rows * D_wide(), F(0));
            for (int64_t j0 = 0; j0 < any.Tk; j0 += block)
              keys_block(s, kv, j0, &queries[head * group], keys[head], w, w.dq);
            for (int64_t h = 0; h < group; h++)
              write(q.dq, any, kv * group + h, any.q0, any.Tq, w.dq + h * Tq * D_wide(), a.D, F(a.scale));
          });
        else {
          share(first_done[k], n * k_blocks, [&](int64_t i) {
            const int64_t head = i / k_blocks, j0 = i % k_blocks * block, s = (first + head) / a.Hk;
            if (j0 < this->place(s, 0).Tk)
              keys_block(s, (first + head) % a.Hk, j0, &queries[head * group], keys[head], w, nullptr);
          });
          share(then_done[k], n * group * q_blocks, [&](int64_t i) {
            const int64_t h = i / q_blocks, i0 = (q_blocks - 1 - i % q_blocks) * block, head = first + h / group;
            const Place at = this->place(head / a.Hk, head % a.Hk * group + h % group);
            if (i0 < at.Tq) queries_block(at, i0, queries[h], keys[h / group], w);
          });
        }
        all.wait(id);
      }
    });
  }
};

} // namespace gk
