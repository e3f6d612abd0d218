// One step of the recurrence at a time: everything between two matrix products, which are the host's. This is the plan
// that takes every cell, any width, projections, and batches so large that a product is best left to a library.
//
// A thread has V neighbouring units of one row, so that a warp reads and writes rows in one piece; V > 1 only where the
// host found every row aligned. Threads are independent (but for the norms), nothing is shared between blocks: a cell
// without a recurrent product walks all of its steps in one launch.
//
// Where a cell takes means over the units of a row, a block has that row. A function of the cell is then in rounds with
// a sum of the block after each; a round reads its units anew, and what it leaves to later ones goes through memory.
//
// Dims: T steps, B rows of the batch, N tokens, H units, R width of the first state, G gates, S states, A kept values,
// P parameters, M masks, D delayed values, Q gates whose product is of another value than the first state, K = G - Q
// the others.
#pragma once
#include "extras.cuh"

namespace gk {

template <int V, class X> struct alignas(V * sizeof(X)) Pack {
  X v[V];
};

// V neighbours, the first at index i.
template <class X, int V> GK_DEVICE void load(float (&f)[V], const void *p, int64 i) {
  const Pack<V, X> pack = *reinterpret_cast<const Pack<V, X> *>(static_cast<const X *>(p) + i);
  GK_UNROLL for (int v = 0; v < V; v++) f[v] = to_float(pack.v[v]);
}
template <class X, int V> GK_DEVICE void save(void *p, int64 i, const float (&f)[V]) {
  Pack<V, X> pack;
  GK_UNROLL for (int v = 0; v < V; v++) store(pack.v[v], f[v]);
  *reinterpret_cast<Pack<V, X> *>(static_cast<X *>(p) + i) = pack;
}
template <int V> GK_DEVICE void clear(float (&f)[V]) { GK_UNROLL for (int v = 0; v < V; v++) f[v] = 0.f; }

// Element v of each of n values, which is what a cell takes.
template <int V, int n> GK_DEVICE void pick(float (&to)[n], const float (&from)[n][V], int v) {
  GK_UNROLL for (int k = 0; k < n; k++) to[k] = from[k][v];
}
template <int V, int n> GK_DEVICE void place(float (&to)[n][V], const float (&from)[n], int v) {
  GK_UNROLL for (int k = 0; k < n; k++) to[k][v] = from[k];
}

// What both directions do alike: which row is this thread's, and from which unit on; of a block that has a row it is
// every so many units, else once.
template <class Cell, int V, int THREADS> struct StepPlace {
  int b, u;
  GK_DEVICE StepPlace(int width, bool whole_row) {
    const unsigned item = unsigned(block()) * THREADS + thread(), per_row = width / V;
    b = whole_row ? block() : int(item / per_row);
    u = whole_row ? thread() * V : int(item % per_row) * V;
  }
  template <class F> GK_DEVICE void each(int width, F f) const { // of a row of the cell, not of a projection
    if constexpr (Cell::means)
      GK_LOOP for (int unit = u; unit < width; unit += THREADS * V) f(unit);
    else
      f(u);
  }
};

// Parameters, masks and the delayed value of V units.
template <class Cell, class X, int V> struct StepExtras {
  static constexpr int P = Cell::P, M = Cell::M, D = Cell::D;
  float p[P ? P : 1][V], m[M ? M : 1][V], d[D ? D : 1][V];

  GK_DEVICE void load_at(const ExtraArgs &e, const Walk &walk, const void *first_states, int i, int b, int u,
                         int64 token) {
    GK_UNROLL for (int k = 0; k < P; k++) load<X>(p[k], e.params, int64(k) * walk.H + u);
    GK_UNROLL for (int k = 0; k < M; k++) draw<X>(m[k], e, k, token, walk.column(b), u);
    if constexpr (D > 0) {
      clear(d[0]);
      if (b < walk.rows_at(i - e.skip)) load<X>(d[0], first_states, walk.token(i - e.skip, b) * walk.H + u);
    }
  }
  GK_DEVICE Extras<Cell> at(int v) const {
    Extras<Cell> one;
    GK_UNROLL for (int k = 0; k < P; k++) one.p[k] = p[k][v];
    GK_UNROLL for (int k = 0; k < M; k++) one.m[k] = m[k][v];
    GK_UNROLL for (int k = 0; k < D; k++) one.d[k] = d[k][v];
    return one;
  }
};

// What functions leave behind between rounds, of the most that any of them does.
template <class Cell, bool = (Cell::Q > 0)> struct StepRounds {
  using F = Functions<Cell>;
  static constexpr int most(int a, int b) { return a > b ? a : b; }
  static constexpr int KEPT = most(F::Forward::Rounds::kept, F::Backward::Rounds::kept),
                       MEANS =
                           most(most_means<typename F::Forward::Rounds>(), most_means<typename F::Backward::Rounds>());
};
template <class Cell> struct StepRounds<Cell, true> {
  using F = Functions<Cell>;
  using First = StepRounds<Cell, false>;
  static constexpr int KEPT =
      First::most(First::KEPT, First::most(F::Operand::Rounds::kept, F::SecondAdjoint::Rounds::kept));
  static constexpr int MEANS = First::most(First::MEANS, First::most(most_means<typename F::Operand::Rounds>(),
                                                                     most_means<typename F::SecondAdjoint::Rounds>()));
};

// All rounds of a function but the last, from round k on: read(u) is what it is given of the units from u on.
template <class Cell, class F, int V, int THREADS, int k, class Read>
GK_DEVICE void step_means(const StepPlace<Cell, V, THREADS> &at, int H, float *kept, float *means, float *memory,
                          const Read &read) {
  using Rounds = typename F::Rounds;
  if constexpr (k < Rounds::count) {
    constexpr int n = Rounds::means[k], KEPT = StepRounds<Cell>::KEPT;
    float sums[n] = {};
    at.each(H, [&](int u) {
      const auto given = read(u);
      GK_UNROLL for (int v = 0; v < V; v++) {
        float out[n];
        given.template call<F>(Round<k>{}, v, kept + int64(u + v) * KEPT, means, out);
        GK_UNROLL for (int j = 0; j < n; j++) sums[j] += out[j];
      }
    });
    block_means<n, THREADS / 32>(means + known_of_row<Rounds>(k), sums, H, memory);
    if constexpr (Rounds::rows[k] > 0) F::call(Row<k>{}, means);
    step_means<Cell, F, V, THREADS, k + 1>(at, H, kept, means, memory, read);
  }
}

// ---------------------------------------------------------------- forward

template <class Cell, class X, int V> struct StepForward {
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q, K = G - Q, THREADS = 256;
  static constexpr int KEPT = StepRounds<Cell>::KEPT;
  static constexpr int SHARED_BYTES = THREADS / 32 * StepRounds<Cell>::MEANS * sizeof(float);
  using F = Functions<Cell>;
  using Place = StepPlace<Cell, V, THREADS>;

  GK_DEVICE static void run(const StepForwardArgs &p) {
    const Place at(p.stage == PROJECT ? p.R : p.walk.H, Cell::means && p.stage != PROJECT);
    if constexpr (Cell::recurrent)
      step(p, at, p.step);
    else
      GK_LOOP for (int i = p.step; i < p.step + p.steps; i++) step(p, at, i);
  }

private:
  GK_DEVICE static void step(const StepForwardArgs &p, const Place &at, int i) {
    if (at.b >= p.walk.rows_at(i)) return;
    if (p.stage == PROJECT)
      project(p, i, at.b, at.u);
    else
      units(p, at, i);
  }

  // What the cell is given of V units.
  struct Given {
    float x[G][V], r[G][V], s[S][V];
    StepExtras<Cell, X, V> extras;

    template <class Function, class R, class... Out>
    GK_DEVICE void call(R round, int v, float *kept, const float *means, Out &...out) const {
      float xs[G], rs[G], ss[S];
      pick(xs, x, v), pick(rs, r, v), pick(ss, s, v);
      const Extras<Cell> one = extras.at(v);
      one.then([&](auto &...group) {
        if constexpr (Cell::means)
          Function::call(round, xs, rs, ss, group..., kept, means, out...);
        else
          Function::call(xs, rs, ss, group..., out...);
      });
    }
  };

  GK_DEVICE static Given read(const StepForwardArgs &p, int i, int b, int u, int64 token, bool projects) {
    const int H = p.walk.H;
    Given in;
    GK_UNROLL for (int g = 0; g < G; g++) {
      load<X>(in.x[g], p.gates, (token * G + g) * H + u);
      if (!Cell::recurrent || (g >= K && p.stage == SECOND)) {
        clear(in.r[g]);
        continue;
      }
      load<fp32>(in.r[g], g < K ? p.product : p.second,
                 g < K ? (int64(b) * K + g) * H + u : (int64(b) * Q + g - K) * H + u);
      if (p.b_hh) {
        float bias[V];
        load<X>(bias, p.b_hh, g * H + u);
        GK_UNROLL for (int v = 0; v < V; v++) in.r[g][v] += bias[v];
      }
    }
    GK_UNROLL for (int k = 0; k < S; k++) {
      if (k == 0 && projects)
        clear(in.s[k]);
      else
        load<fp32>(in.s[k], p.state[k], int64(b) * H + u);
    }
    in.extras.load_at(p.extra, p.walk, p.seq[0], i, b, u, token);
    return in;
  }

  GK_DEVICE static void units(const StepForwardArgs &p, const Place &at, int i) {
    const int H = p.walk.H, b = at.b;
    const int64 token = p.walk.token(i, b);
    const bool projects = Q == 0 && p.wide; // then nothing of a unit is in the first state
    const auto given = [&](int u) { return read(p, i, b, u, token, projects); };
    float *const kept = Cell::means ? p.kept + int64(b) * H * KEPT : nullptr;
    float *const memory = reinterpret_cast<float *>(shared());

    if constexpr (Q > 0) {
      if (p.stage == SECOND) {
        using Rounds = typename F::Operand::Rounds;
        float means[room_for_means<Rounds>()];
        step_means<Cell, typename F::Operand, V, THREADS, 0>(at, H, kept, means, memory, given);
        at.each(H, [&](int u) {
          const Given in = given(u);
          float w[V];
          GK_UNROLL for (int v = 0; v < V; v++)
              in.template call<typename F::Operand>(Round<Rounds::count>{}, v, kept + int64(u + v) * KEPT, means, w[v]);
          save<X>(p.wide, int64(b) * H + u, w);
        });
        return;
      }
    }

    using Rounds = typename F::Forward::Rounds;
    float means[room_for_means<Rounds>()];
    step_means<Cell, typename F::Forward, V, THREADS, 0>(at, H, kept, means, memory, given);
    at.each(H, [&](int u) {
      const Given in = given(u);
      float t[S][V], a[A ? A : 1][V];
      GK_UNROLL for (int v = 0; v < V; v++) {
        float ts[S], as[A ? A : 1];
        in.template call<typename F::Forward>(Round<Rounds::count>{}, v, kept + int64(u + v) * KEPT, means, ts, as);
        place(t, ts, v);
        if constexpr (A > 0) place(a, as, v);
      }
      if (p.acts) { GK_UNROLL for (int k = 0; k < A; k++) save<X>(p.acts, (token * A + k) * H + u, a[k]); }
      if (projects) {
        save<X>(p.wide, int64(b) * H + u, t[0]);
        if (p.raw) save<X>(p.raw, token * H + u, t[0]);
      }
      GK_UNROLL for (int k = 0; k < S; k++) if (k > 0 || !projects) leave(p, i, k, b, u, H, token, t[k]);
    });
  }

  GK_DEVICE static void project(const StepForwardArgs &p, int i, int b, int u) {
    float h[V];
    load<fp32>(h, p.second, int64(b) * p.R + u);
    leave(p, i, 0, b, u, p.R, p.walk.token(i, b), h);
  }

  // A new state goes to the next step, to the sequence, and, if no step follows for this row, to the final states.
  GK_DEVICE static void leave(const StepForwardArgs &p, int i, int k, int b, int u, int width, int64 token,
                              const float (&t)[V]) {
    save<fp32>(p.state[k], int64(b) * width + u, t);
    if (k == 0 && p.operand) save<X>(p.operand, int64(b) * width + u, t);
    if (p.seq[k]) save<X>(p.seq[k], token * width + u, t);
    if (b >= p.walk.rows_at(i + 1)) save<X>(p.final_state[k], int64(p.walk.column(b)) * width + u, t);
  }
};

// ---------------------------------------------------------------- backward

// The step after this one in the walk came before it here: what it sends to row b is its own `adjoint` plus, of the
// first state, `product`. A row whose first step it was gets dstate of them.
template <class Cell, class X, int V> struct StepBackward {
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q, K = G - Q, P = Cell::P, THREADS = 256,
                       WARPS = THREADS / 32;
  static constexpr int KEPT = StepRounds<Cell>::KEPT;
  static constexpr int AT_MEANS = WARPS * S * sizeof(double); // after sums of the norms
  static constexpr int SHARED_BYTES = AT_MEANS + WARPS * StepRounds<Cell>::MEANS * sizeof(float);
  using F = Functions<Cell>;
  using Place = StepPlace<Cell, V, THREADS>;

  GK_DEVICE static void run(const StepBackwardArgs &p) {
    const Place at(p.stage == PROJECT ? p.R : p.walk.H, Cell::means && p.stage != PROJECT);
    if constexpr (Cell::recurrent) {
      step(p, at, p.step);
    } else {
      GK_LOOP for (int i = p.step; i > p.step - p.steps; i--) {
        step(p, at, i);
        block_sync(); // the next step's norms are added up where those of this one are
      }
    }
  }

private:
  GK_DEVICE static void step(const StepBackwardArgs &p, const Place &at, int i) {
    const bool projects = p.dproj;
    double squares[S] = {};
    if (at.b < p.walk.rows_at(i)) {
      if (p.stage == PROJECT)
        project(p, i, at.b, at.u, squares);
      else
        units(p, at, i, projects, squares);
    } else if (at.b < p.walk.rows_at(i + 1) && p.stage != SECOND) {
      const bool others = p.stage == CELL;
      if (p.stage == PROJECT)
        begin(p, i, 0, at.b, at.u, projects);
      else
        at.each(p.walk.H, [&](int u) {
          GK_UNROLL for (int k = 0; k < S; k++) if (k == 0 ? !projects : others) begin(p, i, k, at.b, u, projects);
        });
    }
    if (p.norms && i >= 0 && p.stage != SECOND) add_norms(p, i, squares, projects);
  }

  // dL/d(state k after this step): what later steps send, and the sequence's own.
  GK_DEVICE static void arriving(const StepBackwardArgs &p, int i, int k, int b, int u, int width, bool projects,
                                 float (&dt)[V]) {
    const int64 own = int64(b) * width + u;
    load<fp32>(dt, p.adjoint[k], own);
    if (!Cell::recurrent || k > 0 || b >= p.walk.rows_at(i + 1)) return;
    float sent[V];
    load<fp32>(sent, p.product, own);
    GK_UNROLL for (int v = 0; v < V; v++) dt[v] = projects ? sent[v] : dt[v] + sent[v];
  }
  GK_DEVICE static void with_own(const StepBackwardArgs &p, int k, int u, int width, int64 token, float (&dt)[V]) {
    float d[V];
    if (p.dseq[k]) {
      load<X>(d, p.dseq[k], token * width + u);
      GK_UNROLL for (int v = 0; v < V; v++) dt[v] += d[v];
    }
    if (k > 0) return;
    if constexpr (Cell::D > 0) {
      load<fp32>(d, p.owed, token * width + u);
      GK_UNROLL for (int v = 0; v < V; v++) dt[v] += d[v];
    }
    GK_UNROLL for (int v = 0; v < V; v++) dt[v] = clamp(dt[v], p.extra.clip);
  }
  GK_DEVICE static void begin(const StepBackwardArgs &p, int i, int k, int b, int u, bool projects) {
    const int width = k == 0 ? p.R : p.walk.H;
    float d[V];
    arriving(p, i, k, b, u, width, projects, d);
    save<X>(p.dstate[k], int64(p.walk.column(b)) * width + u, d);
  }

  GK_DEVICE static void project(const StepBackwardArgs &p, int i, int b, int u, double (&squares)[S]) {
    const int64 token = p.walk.token(i, b);
    float d[V];
    arriving(p, i, 0, b, u, p.R, true, d);
    with_own(p, 0, u, p.R, token, d);
    save<X>(p.dproj, token * p.R + u, d);
    if (p.wide) save<X>(p.wide, int64(b) * p.R + u, d);
    if (p.norms) GK_UNROLL for (int v = 0; v < V; v++) squares[0] += double(d[v]) * d[v];
  }

  // What the cell is given of V units.
  struct Given {
    float a[A ? A : 1][V], s[S][V], t[S][V], dt[S][V], dv[V];
    StepExtras<Cell, X, V> extras;

    template <class Function, class R, class... Out>
    GK_DEVICE void call(R round, int v, float *kept, const float *means, Out &...out) const {
      constexpr bool with_dv = Q > 0 && !is_same<Function, typename F::SecondAdjoint>;
      float as[A ? A : 1], ss[S], ts[S], dts[S];
      pick(as, a, v), pick(ss, s, v), pick(ts, t, v), pick(dts, dt, v);
      const Extras<Cell> one = extras.at(v);
      one.then([&](auto &...group) {
        const auto rest = [&](auto &...last) {
          if constexpr (Cell::means)
            Function::call(round, as, ss, ts, group..., dts, last..., kept, means, out...);
          else
            Function::call(as, ss, ts, group..., dts, last..., out...);
        };
        if constexpr (with_dv)
          rest(dv[v]);
        else
          rest();
      });
    }
  };

  GK_DEVICE static Given read(const StepBackwardArgs &p, int i, int b, int u, int64 token, bool projects) {
    const int H = p.walk.H;
    const int64 own = int64(b) * H + u;
    const bool earlier = b < p.walk.rows_at(i - 1);
    const int64 before = earlier ? p.walk.token(i - 1, b) : p.walk.column(b);
    Given in;
    GK_UNROLL for (int k = 0; k < A; k++) load<X>(in.a[k], p.acts, (token * A + k) * H + u);
    GK_UNROLL for (int k = 0; k < S; k++) {
      if (k == 0 && projects) {
        clear(in.s[k]); // which such a cell does not read
        load<X>(in.t[k], p.raw, token * H + u);
        load<fp32>(in.dt[k], p.second, own);
        continue;
      }
      load<X>(in.s[k], earlier ? p.seq[k] : p.state[k], before * H + u);
      load<X>(in.t[k], p.seq[k], token * H + u);
      arriving(p, i, k, b, u, H, false, in.dt[k]);
      with_own(p, k, u, H, token, in.dt[k]);
    }
    if constexpr (Q > 0) {
      if (p.stage != SECOND) load<fp32>(in.dv, p.second, own);
    }
    in.extras.load_at(p.extra, p.walk, p.seq[0], i, b, u, token);
    return in;
  }

  GK_DEVICE static void units(const StepBackwardArgs &p, const Place &at, int i, bool projects, double (&squares)[S]) {
    const int H = p.walk.H, b = at.b;
    const int64 token = p.walk.token(i, b);
    const auto given = [&](int u) { return read(p, i, b, u, token, projects); };
    float *const kept = Cell::means ? p.kept + int64(b) * H * KEPT : nullptr;
    float *const memory = reinterpret_cast<float *>(shared() + AT_MEANS);

    if constexpr (Q > 0) {
      if (p.stage == SECOND) {
        using Rounds = typename F::SecondAdjoint::Rounds;
        float means[room_for_means<Rounds>()];
        step_means<Cell, typename F::SecondAdjoint, V, THREADS, 0>(at, H, kept, means, memory, given);
        at.each(H, [&](int u) {
          const Given in = given(u);
          float operand[V], late[Q][V];
          GK_UNROLL for (int v = 0; v < V; v++) {
            float late_v[Q];
            in.template call<typename F::SecondAdjoint>(Round<Rounds::count>{}, v, kept + int64(u + v) * KEPT, means,
                                                        operand[v], late_v);
            place(late, late_v, v);
          }
          save<X>(p.v, token * H + u, operand);
          GK_UNROLL for (int q = 0; q < Q; q++) save<X>(p.wide, (int64(b) * Q + q) * H + u, late[q]);
        });
        return;
      }
    }

    using Rounds = typename F::Backward::Rounds;
    float means[room_for_means<Rounds>()];
    step_means<Cell, typename F::Backward, V, THREADS, 0>(at, H, kept, means, memory, given);
    at.each(H, [&](int u) {
      const Given in = given(u);
      float dx[G][V], dr[G][V], ds[S][V], dp[P ? P : 1][V], dd[V];
      GK_UNROLL for (int v = 0; v < V; v++) {
        float dxs[G], drs[G], dss[S], total[S];
        ExtraAdjoints<Cell> extra;
        extra.then([&](auto &...found) {
          in.template call<typename F::Backward>(Round<Rounds::count>{}, v, kept + int64(u + v) * KEPT, means, dxs, drs,
                                                 dss, found..., total);
        });
        place(dx, dxs, v), place(dr, drs, v), place(ds, dss, v);
        GK_UNROLL for (int k = 0; k < P; k++) dp[k][v] = extra.p[k];
        if constexpr (Cell::D > 0) dd[v] = extra.d[0];
        if (!p.norms) continue;
        if (!projects) squares[0] += double(in.dt[0][v]) * in.dt[0][v];
        GK_UNROLL for (int k = 1; k < S; k++) squares[k] += double(total[k]) * total[k];
      }
      GK_UNROLL for (int g = 0; g < G; g++) {
        save<X>(p.dgates, (token * G + g) * H + u, dx[g]);
        if (!Cell::shared) save<X>(p.dr, (token * G + g) * H + u, dr[g]);
        if (g < K && p.operand) save<X>(p.operand, (int64(b) * K + g) * H + u, dr[g]);
      }
      if (p.dparams) { GK_UNROLL for (int k = 0; k < P; k++) save<X>(p.dparams, (token * P + k) * H + u, dp[k]); }
      if constexpr (Cell::D > 0) {
        const int back = i - p.extra.skip;
        if (b < p.walk.rows_at(back)) save<fp32>(p.owed, p.walk.token(back, b) * H + u, dd);
      }
      GK_UNROLL for (int k = 0; k < S; k++) if (k > 0 || !projects) save<fp32>(p.adjoint[k], int64(b) * H + u, ds[k]);
    });
  }

  // Of a projection PROJECT has the first state's, CELL the others'. Every thread comes here; sums are in a fixed
  // order.
  GK_DEVICE static void add_norms(const StepBackwardArgs &p, int i, const double (&squares)[S], bool projects) {
    double *sums = reinterpret_cast<double *>(shared()); // [S, WARPS]
    GK_UNROLL for (int k = 0; k < S; k++) {
      double sum = squares[k];
      for (int lanes = 16; lanes; lanes /= 2) sum += shuffle_xor(sum, lanes);
      if (thread() % 32 == 0) sums[k * WARPS + thread() / 32] = sum;
    }
    block_sync();
    const int k = thread();
    if (k >= S || (projects && (k == 0) != (p.stage == PROJECT))) return;
    double sum = 0;
    for (int w = 0; w < WARPS; w++) sum += sums[k * WARPS + w];
    p.norms[(int64(p.walk.time(i)) * p.blocks + block()) * S + k] = sum;
  }
};

} // namespace gk
