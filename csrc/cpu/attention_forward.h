// Attention forward: a block of queries walks the blocks of keys it can see, keeping the largest score and the sum of
// exp so far (Milakov and Gimelshein 2018; Dao, Fu, Ermon, Rudra and Ré 2022).
//
// Operations of a pair of query and key: D + E multiply-adds and one exp. Keys and values are packed once per head.
#pragma once
#include "attention.h"

namespace gk {

template <class T, class P> class AttentionForward : Attention<T, P> {
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

  const AttentionForwardArgs &q;
  static constexpr int64_t wave_bytes = int64_t(32) << 20; // of packed keys and values at a time

  struct Head {
    Packed<P> keys, values;
  };
  struct Scratch {
    P *queries;     // [block, width] where they cannot be read as they are
    F *scores;      // [block, block]
    P *probability; // [block, block]
    F *out;         // [block, E rounded up]
    F *most, *sum;  // [block]
    F *hidden;      // [block] 0, or -infinity where the key mask hides a key
  };

  int64_t E_wide() const { return vectors<T>(a.E) * L; }

  // One block of queries against all it sees.
  void run(const Place &at, const Head &head, int64_t first, const Scratch &w) const {
    const int64_t n = std::min(block, at.Tq - first), kv = vectors<T>(block);
    const Rows queries = this->rows(a.q, at.s, at.h, at.q0 + first, n, a.D, w.queries);
    std::memset(w.out, 0, size_t(n * E_wide()) * sizeof(F));
    for (int64_t i = 0; i < n; i++) w.most[i] = -infinity, w.sum[i] = 0;
    const Interval seen = this->blocks_seen([&](int64_t i) { return this->keys_of(at, i); }, first, first + n);
    for (int64_t b = seen.lo; b < seen.hi; b++) {
      const int64_t j0 = b * block, keys = std::min(block, at.Tk - j0);
      product<1, P>(n, j0 / L, j0 / L + vectors<T>(keys), head.keys.matrix, queries, Dot<P>::depth,
                    [&](int64_t r, int64_t v, const F *acc) { V::load(acc).store(w.scores + (r * kv + v) * L - j0); });
      const bool *mask = this->mask(at);
      if (mask)
        for (int64_t j = 0; j < keys; j++) w.hidden[j] = mask[j0 + j] ? F(0) : -infinity;
      for (int64_t i = 0; i < n; i++) soften(at, first + i, i, j0, keys, mask != nullptr, w);
      product<1, P>(
          n, 0, vectors<T>(a.E), this->part(head.values.matrix, j0, keys),
          [&](int64_t r) { return (const P *)w.probability + r * block; }, Dot<P>::depth,
          [&](int64_t r, int64_t v, const F *acc) {
            F *to = w.out + r * E_wide() + v * L;
            (V::load(to) + V::load(acc)).store(to);
          });
    }
    for (int64_t i = 0; i < n; i++) {
      const V by(w.sum[i] > 0 || w.sum[i] != w.sum[i] ? F(1) / w.sum[i] : F(0));
      T *to = this->row(q.out, at.s, at.h, at.q0 + first + i);
      for (int64_t c = 0; c < a.E; c += L) store(to + c, V::load(w.out + i * E_wide() + c) * by, a.E - c);
      static_cast<F *>(a.lse)[this->lse_at(at, first + i)] = w.most[i] + std::log(w.sum[i]);
    }
  }

  // Scores of one query and `keys` keys from j0 on become probabilities, up to a factor that the row's end divides out.
  void soften(const Place &at, int64_t i, int64_t r, int64_t j0, int64_t keys, bool masked, const Scratch &w) const {
    F *const s = w.scores + r * block;
    const Interval seen = this->keys_of(at, i);
    const int64_t lo = std::clamp<int64_t>(seen.lo - j0, 0, keys), hi = std::clamp<int64_t>(seen.hi - j0, lo, keys);
    const F slope = this->slope(at);
    const V from = this->count() - V(F(i + at.offset() - j0));
    V top(w.most[r]);
    for (int64_t j = 0; j < keys; j += L) {
      V x = V::load(s + j) * V(F(a.scale));
      if (a.bias) {
        const F *b = this->bias(at, i, j0 + j);
        x = x + (a.bias_j ? load(b, keys - j) : V(*b));
      }
      if (slope != 0) x = x - V(slope) * this->distance(from + V(F(j)));
      if (masked) x = x + V::load(w.hidden + j);
      x.store(s + j);
      if (j >= lo && j + L <= hi) top = at_least(x, top);
    }
    F most = w.most[r];
    for (int i = 0; i < L; i++) most = top.v[i] > most || top.v[i] != top.v[i] ? top.v[i] : most;
    const int64_t end = (keys + L - 1) / L * L;
    if (lo > 0 || hi < end) { // the ends by themselves
      std::fill(s, s + lo, -infinity), std::fill(s + hi, s + end, -infinity);
      for (int64_t j : {lo / L * L, hi / L * L})
        for (int64_t k = j; k < std::min(j + L, end); k++) most = s[k] > most || s[k] != s[k] ? s[k] : most;
    }
    const V shift(most == -infinity ? F(0) : most);
    alignas(64) F keep[block];
    if (dropout.on) dropout.factors(this->dropout_row(at, i), j0, block, keep);
    V sum(0);
    P *const p = w.probability + r * block;
    for (int64_t j = 0; j < end; j += L) {
      V x = exp(V::load(s + j) - shift);
      sum += x;
      if (dropout.on) x = x * V::load(keep + j);
      store(p + j, x);
    }
    if (most != w.most[r]) {
      const F fade = std::exp(w.most[r] - shift.v[0]);
      w.sum[r] *= fade;
      F *const out = w.out + r * E_wide();
      for (int64_t c = 0; c < E_wide(); c += L) (V::load(out + c) * V(fade)).store(out + c);
      w.most[r] = most;
    }
    for (int i = 0; i < L; i++) w.sum[r] += sum.v[i];
  }

public:
  explicit AttentionForward(const AttentionForwardArgs &q) : Base(q), q(q) {}

  void operator()() {
    const int64_t Tk = this->longest_k(), Tq = this->longest_q(), kv_heads = a.B * a.Hk;
    const int64_t head_bytes = std::max<int64_t>(1, Tk * (a.D + a.E) * int64_t(sizeof(P)));
    const int64_t wave = std::clamp<int64_t>(wave_bytes / head_bytes, 1, kv_heads);
    Arena &arena = this->arena;
    std::vector<Head> heads(wave);
    for (Head &h : heads) h = {take_panels<P>(arena, Tk, 1, a.D), take_panels<P>(arena, a.E, 1, Tk)};
    std::vector<Scratch> scratch(a.threads);
    for (Scratch &w : scratch)
      w = {arena.take<P>(block * this->width(a.D)),
           arena.take<F>(block * block),
           arena.take<P>(block * block),
           arena.take<F>(block * E_wide()),
           arena.take<F>(block),
           arena.take<F>(block),
           arena.take<F>(block)};
    const int64_t per_head = this->group() * this->blocks(Tq), waves = (kv_heads + wave - 1) / wave;
    std::vector<std::atomic<int64_t>> packed(waves), done(waves);
    Barrier all(a.threads);
    run_team(a.threads, [&](int id) {
      for (int64_t k = 0; k < waves; k++) {
        const int64_t first = k * wave, n = std::min(wave, kv_heads - first);
        share(packed[k], n, [&](int64_t i) {
          const Place at = this->place((first + i) / a.Hk, 0);
          const int64_t h = (first + i) % a.Hk;
          this->pack_along(a.k, at, h, at.k0, at.Tk, a.D, heads[i].keys, 0, vectors<T>(at.Tk));
          this->pack_over(a.v, at, h, at.k0, at.Tk, a.E, heads[i].values);
        });
        all.wait(id);
        share(done[k], n * per_head, [&](int64_t i) { // the last queries, which see most, come first
          const int64_t head = first + i / per_head, rest = per_head - 1 - i % per_head, h = rest % this->group();
          const Place at = this->place(head / a.Hk, head % a.Hk * this->group() + h);
          const int64_t begin = rest / this->group() * block;
          if (begin < at.Tq) run(at, heads[i / per_head], begin, scratch[id]);
        });
        all.wait(id);
      }
    });
  }
};

} // namespace gk
