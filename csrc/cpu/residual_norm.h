// norm(residual + dropout(x)) over rows, forward and backward, one pass over memory each: a row is read once and stays
// in the core's cache for the second look.
//
// Dims: M rows, N values of a row. The sum s = residual + dropout(x) is rounded to storage before it is normalised, so
// that backward, which reads it back, has the very numbers of forward. Statistics are in float (double for double).
// Bytes a row: forward reads x, residual and writes s, y; backward reads dy, ds, s and writes dx, dresidual.
#pragma once
#include "../philox.h"
#include "pack.h"
#include "team.h"
#include <cmath>

#define GK_INLINE __attribute__((always_inline))

namespace gk {

struct NormArgs {
  int64_t M, N;
  bool rms;      // no mean is taken away
  double eps, p; // of the norm; of the dropout
  uint64_t seed; // of the dropout
  int threads;
  const void *weight, *bias; // [N] in what is computed in; null where absent
};

struct NormForwardArgs : NormArgs {
  const void *x;        // [M, N]
  const void *residual; // [M, N] or null
  void *y;              // [M, N]
  void *sum;            // [M, N]; null where not wanted
  void *mean, *rstd;    // [M] in what is computed in; null where not wanted, mean also where rms
};

struct NormBackwardArgs : NormArgs {
  const void *dy, *dsum;   // [M, N]; null where nobody used the norm, or the sum
  const void *sum;         // [M, N]
  const void *mean, *rstd; // [M]
  void *dx, *dresidual;    // [M, N]; null where not wanted; without dropout one of them is enough for both
  void *dweight, *dbias;   // [N] in what is computed in; null where not wanted
};

template <class T> class ResidualNorm {
  using F = Real<T>;
  using V = Vec<F>;
  static constexpr int L = lanes<T>;

  // f(c, n, k) for the vectors of a row: the first value, how many values are left, and which of four sums side by
  // side, which hide the latency of an addition, it counts to. k is a constant where f is inlined, so that sums stay in
  // registers.
  template <class Each> static void over(int64_t N, Each f) {
    int64_t c = 0;
    for (; c + 4 * L <= N; c += 4 * L)
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) f(c + k * L, int64_t(L), k);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
      if (c + k * L < N) f(c + k * L, N - c - k * L, k);
  }
  static F total(const V (&part)[4]) {
    const V v = (part[0] + part[1]) + (part[2] + part[3]);
    F sum = 0;
    for (int i = 0; i < L; i++) sum += v.v[i];
    return sum;
  }
  static int64_t room(int64_t N) { return (N + Philox::columns) / Philox::columns * Philox::columns; }

  // Rows are handed out in runs, whose number does not depend on the threads.
  template <class Run> static void runs(int64_t M, int64_t count, int threads, Run run) {
    std::atomic<int64_t> next{0};
    run_team(int(std::min<int64_t>(threads, count)),
             [&](int id) { share(next, count, [&](int64_t k) { run(id, k, M * k / count, M * (k + 1) / count); }); });
  }

public:
  static void forward(const NormForwardArgs &q) {
    const Dropout<F> dropout(q.p, q.seed);
    const int64_t N = q.N, bytes = N * int64_t(sizeof(T)), count = std::clamp<int64_t>(q.M * bytes >> 16, 1, q.M);
    Arena &arena = Arena::of_this_thread();
    arena.reset();
    F *const rows = arena.take<F>(2 * q.threads * room(N)); // a row of s, and factors of dropout
    runs(q.M, count, q.threads, [&](int id, int64_t, int64_t first, int64_t last) {
      F *const s = rows + 2 * id * room(N), *const keep = s + room(N);
      for (int64_t m = first; m < last; m++) {
        const T *x = static_cast<const T *>(q.x) + m * N, *r = static_cast<const T *>(q.residual);
        T *const y = static_cast<T *>(q.y) + m * N, *const sum = q.sum ? static_cast<T *>(q.sum) + m * N : nullptr;
        if (r) r += m * N;
        if (dropout.on) dropout.factors(m, 0, N, keep);
        V part[4] = {V(0), V(0), V(0), V(0)};
        over(N, [&](int64_t c, int64_t n, int k) GK_INLINE {
          V v = load(x + c, n);
          if (dropout.on) v = v * V::load(keep + c);
          if (r) v = v + load(r + c, n);
          if constexpr (sizeof(T) == 2) v = decode(encode(v, T{}), T{});
          if (sum) store(sum + c, v, n);
          v = within(v, n);
          v.store(s + c);
          part[k] += q.rms ? v * v : v;
        });
        const F mean = q.rms ? F(0) : total(part) / F(N);
        F square = total(part) / F(N);
        if (!q.rms) {
          for (V &v : part) v = V(0);
          over(N, [&](int64_t c, int64_t n, int k) GK_INLINE {
            const V d = within(V::load(s + c) - V(mean), n);
            part[k] += d * d;
          });
          square = total(part) / F(N);
        }
        const F rstd = F(1) / std::sqrt(square + F(q.eps));
        over(N, [&](int64_t c, int64_t n, int) GK_INLINE {
          V v = (V::load(s + c) - V(mean)) * V(rstd);
          if (q.weight) v = v * load(static_cast<const F *>(q.weight) + c, n);
          if (q.bias) v = v + load(static_cast<const F *>(q.bias) + c, n);
          store(y + c, v, n);
        });
        if (q.mean) static_cast<F *>(q.mean)[m] = mean;
        if (q.rstd) static_cast<F *>(q.rstd)[m] = rstd;
      }
    });
  }

  // Without dy what is left is ds = dsum, and weights that nobody used: s is not read.
  // With n = (s - mean) rstd and g = dy weight: ds = rstd (g - [mean of g] - n mean of g n) + dsum, the middle term
  // only where forward took the mean away; dresidual = ds, dx = ds as dropout has it; dweight = sum of dy n, dbias =
  // sum of dy.
  static void backward(const NormBackwardArgs &q) {
    const Dropout<F> dropout(q.p, q.seed);
    const int64_t N = q.N,
                  count = std::clamp<int64_t>(q.M * N * int64_t(sizeof(T)) >> 16, 1, std::min<int64_t>(q.M, 64));
    Arena &arena = Arena::of_this_thread();
    arena.reset();
    F *const rows = arena.take<F>(3 * q.threads * room(N));
    // Sums over rows: each run its own, added up in the order of the runs.
    F *const dweights = q.dweight ? arena.zeros<F>(count * room(N)) : nullptr;
    F *const dbiases = q.dbias ? arena.zeros<F>(count * room(N)) : nullptr;
    runs(q.M, count, q.threads, [&](int id, int64_t run, int64_t first, int64_t last) {
      F *const unit = rows + 3 * id * room(N), *const g = unit + room(N), *const keep = g + room(N);
      F *const dweight = dweights ? dweights + run * room(N) : nullptr;
      F *const dbias = dbiases ? dbiases + run * room(N) : nullptr;
      for (int64_t m = first; m < last; m++) {
        const T *dy = q.dy ? static_cast<const T *>(q.dy) + m * N : nullptr;
        const T *s = static_cast<const T *>(q.sum) + m * N;
        const T *dsum = q.dsum ? static_cast<const T *>(q.dsum) + m * N : nullptr;
        T *dx = q.dx ? static_cast<T *>(q.dx) + m * N : nullptr;
        T *dresidual = q.dresidual ? static_cast<T *>(q.dresidual) + m * N : nullptr;
        const V rstd(static_cast<const F *>(q.rstd)[m]), mean(q.rms ? F(0) : static_cast<const F *>(q.mean)[m]);
        V by_g[4] = {V(0), V(0), V(0), V(0)}, by_unit[4] = {V(0), V(0), V(0), V(0)};
        const auto look = [&](int64_t c, int64_t n, int k) GK_INLINE {
          const V d = load(dy + c, n), u = within((load(s + c, n) - mean) * rstd, n);
          if (dweight) (V::load(dweight + c) + d * u).store(dweight + c);
          if (dbias) (V::load(dbias + c) + d).store(dbias + c);
          const V w = q.weight ? d * load(static_cast<const F *>(q.weight) + c, n) : d;
          by_g[k] += w;
          by_unit[k] += w * u;
          u.store(unit + c), w.store(g + c);
        };
        if (dy) over(N, look);
        const V level(q.rms ? F(0) : total(by_g) / F(N)), tilt(total(by_unit) / F(N));
        if (dropout.on && dx) dropout.factors(m, 0, N, keep);
        over(N, [&](int64_t c, int64_t n, int) GK_INLINE {
          V d = dy ? (V::load(g + c) - level - V::load(unit + c) * tilt) * rstd : V(0);
          if (dsum) d = d + load(dsum + c, n);
          if (dresidual) store(dresidual + c, d, n);
          if (dx) store(dx + c, dropout.on ? d * V::load(keep + c) : d, n);
        });
      }
    });
    const auto add_up = [&](const F *parts, void *out) {
      if (!out) return;
      over(N, [&](int64_t c, int64_t n, int) GK_INLINE {
        V v(0);
        for (int64_t k = 0; k < count; k++) v += V::load(parts + k * room(N) + c);
        store(static_cast<F *>(out) + c, v, n);
      });
    };
    add_up(dweights, q.dweight), add_up(dbiases, q.dbias);
  }
};

} // namespace gk

#undef GK_INLINE
