// Attention forward: a block of queries walks the blocks of keys it can see, keeping about the largest score and the
// sum of exp so far (Milakov and Gimelshein 2018; Dao, Fu, Ermon, Rudra and Ré 2022).
//
// Operations of a pair of query and key: D + E multiply-adds and one exp. Keys and values are packed once per head.
#pragma once
#include "attention.h"

namespace gk {

template <class T, class P> class AttentionForward : Attention {
  using F = Real<T>;
  using V = Vec<F>;
  static constexpr int L = lanes<T>, depth = Dot<P>::depth;
  // How far, in powers of two, a score may exceed what is taken away from it before that follows.
  static constexpr F slack = 8;

  const AttentionForwardArgs &q; // a, and what this direction has besides
  const Dropout<F> dropout{q.p, q.seed};

  struct Head { // of keys
    Rows<P> keys;
    Packed<P> values; // over rows
  };
  struct Scratch {
    Packed<P> queries; // along rows, of a block
    F *scores;         // [block of keys, block of queries]; then probabilities, the keys of a sum step side by side
    F *factors;        // [block of keys, block of queries] of dropout
    F *out;            // [block, E in whole vectors]
    F *shift, *sum;    // [block] what was taken away from scores; of the probabilities
    Ahead ahead{};
  };

  // Block j of keys and values.
  void pack(const Place &at, int64_t j, const Head &to) const {
    const int64_t j0 = j * block;
    copy(keys<T>(a.k, at, a.D).part(j0, block), to.keys.part(j0, block));
    pack_over(keys<T>(a.v, at, a.E).part(j0, block), to.values, j0);
  }

  // Block i of queries against all it sees.
  void attend(const Place &at, int64_t i, const Head &head, Scratch &w) const {
    const int64_t wide = whole_vectors<T>(a.E);
    const Rows<T> out = queries<T>(q.out, at, a.E).part(i * block, block);
    pack_along(queries<T>(a.q, at, a.D).part(i * block, block), w.queries);
    std::fill(w.out, w.out + out.count * wide, F(0));
    std::fill(w.shift, w.shift + block, -infinity<F>), std::fill(w.sum, w.sum + block, F(0));
    F factor = 1;
    const Interval seen = key_blocks(at, i);
    for (int64_t j = seen.lo; j < seen.hi; j++) {
      const Block b = block_at(at, i, j);
      factor = scores(at, b, head.keys.part(b.j0, b.m), w.queries.matrix, w.scores, w.ahead);
      if (dropout.on) draw(dropout, at, b, w.factors);
      const P *const probabilities = soften(at, b, factor * Exp<F>::log2e, w);
      add_over_keys(at, b, probabilities, head.values.matrix, a.E, w.out, w.ahead);
    }
    for (int64_t r = 0; r < out.count; r++) {
      const F sum = w.sum[r]; // 0 where nothing was seen; a NaN stays one
      write(w.out + r * wide, sum == 0 ? F(0) : F(1) / sum, out.part(r, 1));
      static_cast<F *>(a.lse)[lse_at(at, i * block + r)] = w.shift[r] * factor + std::log(sum);
    }
  }

  // Scores times `by`, less what is taken away, become powers of two: probabilities up to a factor, by which attend
  // divides in the end. The operand of the second product, which lies where the scores were.
  const P *soften(const Place &at, const Block &b, F by, const Scratch &w) const {
    P *const packed = reinterpret_cast<P *>(w.scores); // written where everything has been read
    for (int64_t i = 0; i < b.n; i += L) {
      F *const s = w.scores + i;
      const Interval seen = keys_in(at, b, i, std::min<int64_t>(L, b.n - i));
      V top(-infinity<F>), sum(0);
      for (int64_t j = seen.lo; j < seen.hi; j++) top = at_least(V::load(s + j * block), top);
      const V away = follow(top, by, b, i, w);
#pragma GCC unroll 4
      for (int64_t j = seen.lo; j < seen.hi; j++) {
        const V p = exp2(V::load(s + j * block) * V(by) - away);
        sum += p;
        p.store(s + j * block);
      }
      (V::load(w.sum + i) + sum).store(w.sum + i);
      if (dropout.on)
        for (int64_t j = seen.lo; j < seen.hi; j++)
          (V::load(s + j * block) * V::load(w.factors + j * block + i)).store(s + j * block);
      for (int64_t j = 0; j < seen.lo; j++) V(0).store(s + j * block);
      for (int64_t j = seen.hi; j < b.m + b.m % depth; j++) V(0).store(s + j * block);
      if constexpr (depth > 1)
        for (int64_t j = 0; j < b.m; j += depth)
          store_words(packed + j * block + i * depth, pair_words(V::load(s + j * block), V::load(s + (j + 1) * block)));
    }
    return packed;
  }
  // What to take away from scores times `by` of the vector of queries at i, which have met a score `top`.
  V follow(V top, F by, const Block &b, int64_t i, const Scratch &w) const {
    const V before = V::load(w.shift + i);
    const auto behind = (top > before) & ~((top - before) * V(by) <= V(slack));
    V shift = before;
    if (V::any(behind)) {
      shift = where(behind, top, before);
      shift.store(w.shift + i);
      for (int64_t r = 0; r < std::min<int64_t>(L, b.n - i); r++) {
        const F from = before.v[r], to = shift.v[r];
        if (to == from || from == -infinity<F>) continue;
        const F fade = std::exp2((from - to) * by);
        w.sum[i + r] *= fade;
        const int64_t wide = whole_vectors<T>(a.E);
        F *const out = w.out + (i + r) * wide;
        for (int64_t c = 0; c < wide; c += L) (V::load(out + c) * V(fade)).store(out + c);
      }
    }
    return where(shift > V(-infinity<F>), shift * V(by), V(0));
  }

  // All that a head of keys serves; its blocks are packed when the first query needs them.
  void whole_head(int64_t kv, const Head &head, Scratch &w) const {
    const Place any = place(kv, 0);
    int64_t ready = 0;
    for (int64_t i = 0; i < blocks(any.Tq); i++) {
      const Interval seen = key_blocks(any, i);
      for (ready = std::max(ready, seen.lo); ready < seen.hi; ready++) pack(any, ready, head);
      for (int64_t h = 0; h < group(); h++) {
        expect(kv, h, i + 1, ready, w.ahead);
        attend(place(kv, h), i, head, w);
      }
    }
  }
  // What comes after that: block i of queries and j of keys, or the head that this thread is likely to take next.
  void expect(int64_t kv, int64_t h, int64_t i, int64_t j, Ahead &ahead) const {
    if (i * block >= place(kv, h).Tq) kv = std::min(kv + a.threads, key_heads() - 1), i = j = 0;
    const Place at = place(kv, h);
    ahead.restart();
    ahead.add(queries<T>(a.q, at, a.D).part(i * block, block));
    if (h > 0) return; // the others have the same keys
    ahead.add(keys<T>(a.k, at, a.D).part(j * block, block));
    ahead.add(keys<T>(a.v, at, a.E).part(j * block, block));
  }

public:
  explicit AttentionForward(const AttentionForwardArgs &q) : Attention(q), q(q) {}

  void operator()() {
    const int64_t Tk = longest_k(), per_head = group() * blocks(longest_q()), k_blocks = blocks(Tk);
    const bool by_heads = key_heads() >= 8 * a.threads || a.threads == 1; // else threads would wait for the last head
    std::vector<Head> heads(by_heads ? a.threads : key_heads());
    for (Head &h : heads) h = {take_rows<P>(arena, Tk, a.D), take_panels<P>(arena, a.E, 1, Tk)};
    std::vector<Scratch> scratch(a.threads);
    for (Scratch &w : scratch)
      w = {take_panels<P>(arena, block, 1, a.D),
           arena.take<F>(block * block),
           arena.take<F>(dropout.on ? block * block : 0),
           arena.take<F>(block * whole_vectors<T>(a.E)),
           arena.take<F>(block),
           arena.take<F>(block)};
    std::atomic<int64_t> packed{0}, done{0};
    Barrier all(a.threads);
    run_team(a.threads, [&](int id) {
      Scratch w = scratch[id];
      if (by_heads) return share(done, key_heads(), [&](int64_t kv) { whole_head(kv, heads[id], w); });
      share(packed, key_heads() * k_blocks, [&](int64_t n) {
        const int64_t kv = n / k_blocks, j = n % k_blocks;
        const Place at = place(kv, 0);
        if (j * block < at.Tk) pack(at, j, heads[kv]);
      });
      all.wait(id);
      share(done, key_heads() * per_head, [&](int64_t n) { // the last queries, which see most, come first
        const int64_t kv = n / per_head, rest = per_head - 1 - n % per_head, h = rest % group(), i = rest / group();
        const Place at = place(kv, h);
        if (i * block < at.Tq) attend(at, i, heads[kv], w);
      });
    });
  }
};

} // namespace gk
