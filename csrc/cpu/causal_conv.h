// Dilated causal convolution over rows of tokens, as one product per tap with the rows that lie `dilation` apart:
// nothing is padded and nothing is unfolded.
//
// y[b, t, o] = bias[o] + sum over k, c of weight[o, c, k] x[b, t - (K - 1 - k) dilation, c], where x is 0 before its
// start.
//
// Dims: B sequences, T tokens, C channels in, O channels out, K taps. Operations of a token: K C O multiply-adds,
// forward and for each of the two gradients; bytes: x and y once, weights stay in cache.
#pragma once
#include "gradients.h"
#include "team.h"

namespace gk {

struct ConvArgs {
  int64_t B, T, C, O, K, dilation;
  int threads;
  const void *x, *weight; // [B, T, C]; [O, C, K]
};
struct ConvForwardArgs : ConvArgs {
  const void *bias; // [O] or null
  void *y;          // [B, T, O]
};
struct ConvBackwardArgs : ConvArgs {
  const void *dy;             // [B, T, O]
  void *dx, *dweight, *dbias; // as x, weight, bias; null where not wanted
};

template <class T, class P> class CausalConv {
  using F = Real<T>;
  using V = Vec<F>;
  static constexpr int L = lanes<T>, depth = Dot<P>::depth;
  static constexpr int64_t block = 64, chunk = 256; // tokens of a piece of work; tokens of a sum for dweight

  const ConvArgs &a;
  Arena &arena = Arena::of_this_thread();

  explicit CausalConv(const ConvArgs &a) : a(a) { arena.reset(); }

  int64_t shift(int64_t k) const { return (a.K - 1 - k) * a.dilation; }

  // Rows of tokens as the tile reads them, and one of zeros for what lies outside.
  struct Tokens {
    const P *first, *zero;
    int64_t stride, length;
    const P *operator()(int64_t b, int64_t t) const {
      return t < 0 || t >= length ? zero : first + (b * length + t) * stride;
    }
  };
  bool as_they_are(int64_t n) const { return std::is_same_v<T, P> && n % depth == 0; }
  struct Copy {
    const T *from;
    P *to;
    int64_t n, stride;
  };
  Copy room(const void *from, int64_t n) {
    const int64_t stride = row_stride<P>(n + depth);
    return {static_cast<const T *>(from), as_they_are(n) ? nullptr : arena.zeros<P>(a.B * a.T * stride), n, stride};
  }
  void fill(const Copy &c, int id, int size) const {
    if (c.to)
      for (int64_t t = a.B * a.T * id / size; t < a.B * a.T * (id + 1) / size; t++)
        for (int64_t i = 0; i < c.n; i += L)
          store(c.to + t * c.stride + i, load(c.from + t * c.n + i, c.n - i), c.n - i);
  }
  Tokens tokens(const Copy &c, const P *zero) const {
    if constexpr (std::is_same_v<T, P>)
      if (!c.to) return {c.from, zero, c.n, a.T};
    return {c.to, zero, c.stride, a.T};
  }

  // The taps, each in panels: of `units` outputs with sums of length n.
  struct Taps {
    std::vector<Packed<P>> panels;
    T *apart; // [K, O, C], where several taps lie side by side in memory
    int64_t units, n;
  };
  Taps take_taps(int64_t units, int64_t n) {
    Taps taps{{}, a.K > 1 ? arena.take<T>(a.K * a.O * a.C) : nullptr, units, n};
    for (int64_t k = 0; k < a.K; k++) taps.panels.push_back(take_panels<P>(arena, units, 1, n));
    return taps;
  }
  // Packed by all threads together, for y = W x, or transposed, for dx = W^T dy.
  void pack(const Taps &taps, bool transposed, int id, Barrier &all, int size) const {
    const T *const w = static_cast<const T *>(a.weight);
    const int64_t part = a.O * a.C, UV = vectors<T>(taps.units), v0 = UV * id / size, v1 = UV * (id + 1) / size;
    if (taps.apart) {
      for (int64_t i = part * id / size; i < part * (id + 1) / size; i++)
        for (int64_t k = 0; k < a.K; k++) taps.apart[k * part + i] = w[i * a.K + k];
      all.wait(id);
    }
    for (int64_t k = 0; k < a.K; k++) {
      const T *const tap = taps.apart ? taps.apart + k * part : w;
      const Packed<P> &to = taps.panels[k];
      if (transposed)
        pack_rows<P>([=](int64_t o) { return tap + o * a.C; }, to.panels, to.matrix.panel, taps.n, taps.units, v0, v1);
      else
        pack_gates(tap, to.panels, to.matrix.panel, 1, taps.units, taps.n, v0, v1);
    }
  }

  // to[b, t] = start + sum over taps of tap k times from[b, t + direction * shift(k)], for one block of tokens.
  void apply(const Taps &taps, const Tokens &from, int64_t direction, int64_t b, int64_t t0, const T *start, F *sums,
             T *to) const {
    const int64_t n = std::min(block, a.T - t0), wide = vectors<T>(taps.units) * L;
    for (int64_t r = 0; r < n; r++)
      for (int64_t c = 0; c < wide; c += L)
        (start && c < taps.units ? load(start + c, taps.units - c) : V(0)).store(sums + r * wide + c);
    for (int64_t k = 0; k < a.K; k++) {
      const int64_t by = direction * shift(k);
      if (t0 + n - 1 + by < 0 || t0 + by >= a.T) continue;
      product<1, P>(
          n, 0, vectors<T>(taps.units), taps.panels[k].matrix, [&](int64_t r) { return from(b, t0 + r + by); }, depth,
          [&](int64_t r, int64_t v, const F *acc) {
            F *const p = sums + r * wide + v * L;
            (V::load(p) + V::load(acc)).store(p);
          });
    }
    for (int64_t r = 0; r < n; r++)
      for (int64_t c = 0; c < taps.units; c += L)
        store(to + (b * a.T + t0 + r) * taps.units + c, V::load(sums + r * wide + c), taps.units - c);
  }

public:
  static void forward(const ConvForwardArgs &q) {
    CausalConv conv(q);
    Arena &arena = conv.arena;
    const Taps taps = conv.take_taps(q.O, q.C);
    const Copy x = conv.room(q.x, q.C);
    const P *const zero = arena.zeros<P>(row_stride<P>(q.C + depth));
    const int64_t wide = vectors<T>(q.O) * L, per_row = (q.T + block - 1) / block;
    F *const sums = arena.take<F>(q.threads * block * wide);
    std::atomic<int64_t> next{0};
    Barrier all(q.threads);
    run_team(q.threads, [&](int id) {
      conv.pack(taps, false, id, all, q.threads);
      conv.fill(x, id, q.threads);
      all.wait(id);
      const Tokens from = conv.tokens(x, zero);
      share(next, q.B * per_row, [&](int64_t i) {
        conv.apply(taps, from, -1, i / per_row, i % per_row * block, static_cast<const T *>(q.bias),
                   sums + id * block * wide, static_cast<T *>(q.y));
      });
    });
  }

  static void backward(const ConvBackwardArgs &q) {
    CausalConv conv(q);
    Arena &arena = conv.arena;
    const Copy dy = conv.room(q.dy, q.O), x = conv.room(q.x, q.C);
    const P *const zero = arena.zeros<P>(row_stride<P>(std::max(q.O, q.C) + depth));
    const Taps taps = q.dx ? conv.take_taps(q.C, q.O) : Taps{};
    const int64_t wide = vectors<T>(q.C) * L, per_row = (q.T + block - 1) / block;
    F *const sums = arena.take<F>(q.threads * block * wide);
    // A piece of dweight is one tap and some channels out. Whoever has it walks all tokens and packs their inputs,
    // which is little beside the product where channels are many.
    const int64_t few = (q.O + 47) / 48, pieces = std::clamp<int64_t>((2 * q.threads + q.K - 1) / q.K, 1, few);
    const int64_t some = (q.O + pieces - 1) / pieces;
    const bool in_place = std::is_same_v<T, F> && q.K == 1; // sums of dweight are what is wanted, where it is wanted
    std::vector<Weights<F>> dweights;
    std::vector<Packed<P>> factors;
    std::vector<P *> pairs;
    if (q.dweight) {
      F *const all = in_place ? static_cast<F *>(q.dweight) : arena.take<F>(q.K * q.O * q.C);
      for (int64_t k = 0; k < q.K; k++) dweights.push_back({all + k * q.O * q.C, all + k * q.O * q.C, q.O, q.C});
      for (int i = 0; i < q.threads; i++) {
        factors.push_back(take_panels<P>(arena, q.C, 1, chunk));
        pairs.push_back(depth > 1 ? arena.take<P>(sum_steps<P>(chunk) * row_stride<P>((some + L) * depth)) : nullptr);
      }
    }
    F *const dbias = arena.take<F>(vectors<T>(q.O) * L);
    std::atomic<int64_t> blocks{0}, taken{0}, columns{0};
    Barrier all(q.threads);
    run_team(q.threads, [&](int id) {
      if (q.dx) conv.pack(taps, true, id, all, q.threads);
      conv.fill(dy, id, q.threads), conv.fill(x, id, q.threads);
      all.wait(id);
      const Tokens dout = conv.tokens(dy, zero), in = conv.tokens(x, zero);
      if (q.dx)
        share(blocks, q.B * per_row, [&](int64_t i) {
          conv.apply(taps, dout, 1, i / per_row, i % per_row * block, nullptr, sums + id * block * wide,
                     static_cast<T *>(q.dx));
        });
      if (q.dweight)
        share(taken, q.K * pieces, [&](int64_t i) {
          const int64_t k = i / pieces, o0 = i % pieces * some, o1 = std::min(q.O, o0 + some), by = conv.shift(k);
          const Weights<F> &to = dweights[k];
          bool first = true;
          for (int64_t b = 0; b < q.B; b++)
            for (int64_t t = by; t < q.T; t += chunk) {
              const int64_t n = std::min(chunk, q.T - t);
              pack_rows<P>([&](int64_t r) { return in(b, t - by + r); }, factors[id].panels, factors[id].matrix.panel,
                           n, q.C, 0, vectors<T>(q.C));
              accumulate<F, P>(dout(b, t), dout.stride, n, o0, o1, factors[id].matrix, to, first, pairs[id]);
              first = false;
            }
          T *const out = static_cast<T *>(q.dweight);
          for (int64_t o = o0; o < o1 && !(in_place && !first); o++)
            for (int64_t c = 0; c < q.C; c++) {
              const V v(first ? F(0) : to.sum[o * q.C + c]);
              store(out + (o * q.C + c) * q.K + k, v, 1);
            }
        });
      if (q.dbias)
        share(columns, vectors<T>(q.O), [&](int64_t v) {
          const int64_t o0 = v * L, o1 = std::min<int64_t>(q.O, o0 + L);
          add_columns<P>(dout(0, 0), dout.stride, q.B * q.T, o0, o1, dbias, true);
          store(static_cast<T *>(q.dbias) + o0, V::load(dbias + o0), o1 - o0);
        });
    });
  }
};

} // namespace gk
