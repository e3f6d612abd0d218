// Attention forward: a block of queries walks the blocks of keys it can see, keeping about the largest score and the
// sum of exp so far (Milakov and Gimelshein 2018; Dao, Fu, Ermon, Rudra and Ré 2022).
//
// Operations of a pair of query and key: D + E multiply-adds and one exp. Keys and values are packed once per head.
#pragma once
#include "attention.h"

namespace gk {

template <class T, class P> class AttentionForward : Attention<T, P> {
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
  using typename Base::V;

  const AttentionForwardArgs &q;
  // How far, in powers of two, a score may exceed what is taken away from it before that follows.
  static constexpr F slack = 8;

  struct Head {
    P *keys; // [Tk, width]
    Packed<P> values;
  };
  struct Scratch {
    Packed<P> queries; // of a block
    F *scores;         // [block, block]; then probabilities, the keys of a sum step side by side
    F *factors;        // [block, block] of dropout
    F *out;            // [block, E rounded up]
    F *shift, *sum;    // [block] what was taken away from scores; of the probabilities
    Ahead ahead{};
  };

  int64_t E_wide() const { return vectors<T>(a.E) * L; }

  // One block of queries against all it sees.
  void run(const Place &at, const Head &head, int64_t first, Scratch &w) const {
    const int64_t n = std::min(block, at.Tq - first);
    this->pack_along(a.q, at, at.h, at.q0 + first, n, a.D, w.queries, 0, vectors<T>(n));
    std::fill(w.out, w.out + n * E_wide(), F(0));
    std::fill(w.shift, w.shift + block, -infinity), std::fill(w.sum, w.sum + block, F(0));
    const Interval seen = this->key_blocks(at, first);
    F factor = 1;
    for (int64_t k = seen.lo; k < seen.hi; k++) {
      const Block b{first, n, k * block, std::min(block, at.Tk - k * block)};
      const int64_t width = this->width(a.D);
      factor = this->scores(at, b, {head.keys + b.j0 * width, width}, w.queries.matrix, w.scores, w.ahead);
      if (dropout.on)
        dropout.factors_down(this->dropout_row(at, first), this->dropout_step(), n, b.j0, b.m, w.factors, block);
      const P *const probability = soften(at, b, factor * Exp<F>::log2e, w);
      this->sums_over_keys(at, b, probability, head.values.matrix, a.E, w.out, w.ahead);
    }
    for (int64_t i = 0; i < n; i++) {
      const V by(w.sum[i] > 0 || w.sum[i] != w.sum[i] ? F(1) / w.sum[i] : F(0));
      T *to = this->row(q.out, at.s, at.h, at.q0 + first + i);
      for (int64_t c = 0; c < a.E; c += L) store(to + c, V::load(w.out + i * E_wide() + c) * by, a.E - c);
      static_cast<F *>(a.lse)[this->lse_at(at, first + i)] = w.shift[i] * factor + std::log(w.sum[i]);
    }
  }

  // Scores times `by` become powers of two, up to a factor that the row's end divides out.
  const P *soften(const Place &at, const Block &b, F by, const Scratch &w) const {
    P *const probability = reinterpret_cast<P *>(w.scores); // written where everything has been read
    for (int64_t v = 0; v < vectors<T>(b.n); v++) {
      F *const s = w.scores + v * L;
      const Interval seen = this->keys_in_vector(at, b, v);
      V top(-infinity), sum(0);
      for (int64_t j = seen.lo; j < seen.hi; j++) top = at_least(V::load(s + j * block), top);
      const V away = follow(top, by, b, v, w);
#pragma GCC unroll 4
      for (int64_t j = seen.lo; j < seen.hi; j++) {
        const V p = exp2(V::load(s + j * block) * V(by) - away);
        sum += p;
        p.store(s + j * block);
      }
      (V::load(w.sum + v * L) + sum).store(w.sum + v * L);
      for (int64_t j = 0; j < seen.lo; j++) V(0).store(s + j * block);
      for (int64_t j = seen.hi; j < b.m + b.m % depth; j++) V(0).store(s + j * block);
      if (dropout.on)
        for (int64_t j = seen.lo; j < seen.hi; j++)
          (V::load(s + j * block) * V::load(w.factors + j * block + v * L)).store(s + j * block);
      if constexpr (depth > 1)
        for (int64_t j = 0; j < b.m; j += depth)
          store_words(probability + j * block + v * L * depth,
                      pair_words(V::load(s + j * block), V::load(s + (j + 1) * block)));
    }
    return probability;
  }
  // What to take away from scores times `by` of the queries of a vector, which have met a score `top`.
  V follow(V top, F by, const Block &b, int64_t v, const Scratch &w) const {
    const V before = V::load(w.shift + v * L);
    const auto behind = (top > before) & ~((top - before) * V(by) <= V(slack));
    if (V::any(behind)) {
      where(behind, top, before).store(w.shift + v * L);
      for (int64_t i = v * L; i < std::min(v * L + L, b.n); i++) {
        const F from = before.v[i - v * L];
        if (w.shift[i] == from || from == -infinity) continue;
        const F fade = std::exp2((from - w.shift[i]) * by);
        w.sum[i] *= fade;
        F *const out = w.out + i * E_wide();
        for (int64_t c = 0; c < E_wide(); c += L) (V::load(out + c) * V(fade)).store(out + c);
      }
    }
    const V shift = V::load(w.shift + v * L);
    return where(shift > V(-infinity), shift * V(by), V(0));
  }

  // `count` blocks of keys and values.
  void pack(int64_t head, int64_t first, int64_t count, const Head &to) const {
    const int64_t h = head % a.Hk, j0 = first * block;
    const Place at = this->place(head / a.Hk, 0);
    const int64_t m = std::min(count * block, at.Tk - j0);
    if (m < 1) return;
    this->copied(a.k, at.s, h, at.k0 + j0, m, a.D, to.keys + j0 * this->width(a.D));
    this->pack_over(a.v, at, h, at.k0 + j0, m, a.E, {to.values.panels + j0 * L, to.values.matrix});
  }

public:
  explicit AttentionForward(const AttentionForwardArgs &q) : Base(q), q(q) {}

  void operator()() {
    const int64_t Tk = this->longest_k(), Tq = this->longest_q(), kv_heads = a.B * a.Hk, group = this->group();
    const bool by_heads = kv_heads >= 8 * a.threads || a.threads == 1; // else threads would wait for the last head
    Arena &arena = this->arena;
    std::vector<Head> heads(by_heads ? a.threads : kv_heads);
    for (Head &h : heads) h = {arena.take<P>(Tk * this->width(a.D)), take_panels<P>(arena, a.E, 1, Tk)};
    std::vector<Scratch> scratch(a.threads);
    for (Scratch &w : scratch)
      w = {take_panels<P>(arena, block, 1, a.D),
           arena.take<F>(block * block),
           arena.take<F>(dropout.on ? block * block : 0),
           arena.take<F>(block * E_wide()),
           arena.take<F>(block),
           arena.take<F>(block)};
    const int64_t per_head = group * this->blocks(Tq), k_blocks = this->blocks(Tk);
    std::atomic<int64_t> packed{0}, done{0};
    Barrier all(a.threads);
    run_team(a.threads, [&](int id) {
      Scratch w = scratch[id];
      if (by_heads)
        return share(done, kv_heads, [&](int64_t head) {
          const Place any = this->place(head / a.Hk, head % a.Hk * group);
          int64_t ready = 0;
          for (int64_t first = 0; first < any.Tq; first += block) {
            const int64_t needed = this->key_blocks(any, first).hi;
            if (needed > ready) pack(head, ready, needed - ready, heads[id]), ready = needed;
            // What comes then: the next block, or the head that this thread is likely to take next.
            const bool more = first + block < any.Tq;
            const int64_t next = more ? head : std::min(head + a.threads, kv_heads - 1), kv = next % a.Hk;
            const Place at = this->place(next / a.Hk, kv * group);
            const int64_t i = more ? first + block : 0, j = more ? ready * block : 0;
            for (int64_t h = 0; h < group; h++) {
              w.ahead.restart();
              w.ahead.add(this->row(a.q, at.s, at.h + h, at.q0 + i), a.q.t, std::min(block, at.Tq - i), a.D);
              if (h == 0) {
                w.ahead.add(this->row(a.k, at.s, kv, at.k0 + j), a.k.t, std::min(block, at.Tk - j), a.D);
                w.ahead.add(this->row(a.v, at.s, kv, at.k0 + j), a.v.t, std::min(block, at.Tk - j), a.E);
              }
              run(this->place(any.s, any.h + h), heads[id], first, w);
            }
          }
        });
      share(packed, kv_heads * k_blocks, [&](int64_t i) { pack(i / k_blocks, i % k_blocks, 1, heads[i / k_blocks]); });
      all.wait(id);
      share(done, kv_heads * per_head, [&](int64_t i) { // the last queries, which see most, come first
        const int64_t head = i / per_head, rest = per_head - 1 - i % per_head, h = rest % group;
        const Place at = this->place(head / a.Hk, head % a.Hk * group + h);
        const int64_t first = rest / group * block;
        if (first < at.Tq) run(at, heads[head], first, w);
      });
    });
  }
};

} // namespace gk
