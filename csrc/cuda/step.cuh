// One step of the recurrence at a time: everything between two matrix products, which are the host's. This is the plan
// that takes every cell, any width, projections, and batches so large that a product is best left to a library.
//
// A thread has V neighbouring units of one row, so that a warp reads and writes rows in one piece; V > 1 only where the
// host found every row aligned. Threads are independent (but for the norms), nothing is shared between blocks.
//
// Dims: T steps, B rows of the batch, N tokens, H units, R width of the first state, G gates, S states, A kept values,
// Q gates whose product is of another value than the first state, K = G - Q the others.
#pragma once
#include "arguments.cuh"
#include "cells.cuh"

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

// What both directions do alike: which row and units are this thread's.
template <int V> struct StepPlace {
  int b, u;
  GK_DEVICE StepPlace(int threads, int width) {
    const unsigned item = unsigned(block()) * threads + thread(), per_row = width / V;
    b = int(item / per_row), u = int(item % per_row) * V;
  }
};

// ---------------------------------------------------------------- forward

template <class Cell, class X, int V> struct StepForward {
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q, K = G - Q, THREADS = 256, SHARED_BYTES = 0;

  GK_DEVICE static void run(const StepForwardArgs &p) {
    const StepPlace<V> at(THREADS, p.stage == PROJECT ? p.R : p.walk.H);
    if (at.b >= p.walk.rows_at(p.step)) return;
    if (p.stage == PROJECT)
      project(p, at.b, at.u);
    else
      units(p, at.b, at.u);
  }

private:
  GK_DEVICE static void units(const StepForwardArgs &p, int b, int u) {
    const int H = p.walk.H;
    const int64 token = p.walk.token(p.step, b), own = int64(b) * H + u;
    const bool projects = Q == 0 && p.wide; // then nothing of a unit is in the first state
    float x[G][V], r[G][V], s[S][V], t[S][V], a[A ? A : 1][V];
    GK_UNROLL for (int g = 0; g < G; g++) {
      load<X>(x[g], p.gates, (token * G + g) * H + u);
      if (g >= K && p.stage == SECOND) {
        clear(r[g]);
        continue;
      }
      load<fp32>(r[g], g < K ? p.product : p.second,
                 g < K ? (int64(b) * K + g) * H + u : (int64(b) * Q + g - K) * H + u);
      if (p.b_hh) {
        float bias[V];
        load<X>(bias, p.b_hh, g * H + u);
        GK_UNROLL for (int v = 0; v < V; v++) r[g][v] += bias[v];
      }
    }
    GK_UNROLL for (int k = 0; k < S; k++) {
      if (k == 0 && projects)
        clear(s[k]);
      else
        load<fp32>(s[k], p.state[k], own);
    }

    if constexpr (Q > 0) {
      if (p.stage == SECOND) {
        float w[V];
        GK_UNROLL for (int v = 0; v < V; v++) {
          float xs[G], rs[G], ss[S];
          pick(xs, x, v), pick(rs, r, v), pick(ss, s, v);
          Cell::operand(xs, rs, ss, w[v]);
        }
        return save<X>(p.wide, own, w);
      }
    }

    GK_UNROLL for (int v = 0; v < V; v++) {
      float xs[G], rs[G], ss[S], ts[S], as[A ? A : 1];
      pick(xs, x, v), pick(rs, r, v), pick(ss, s, v);
      Cell::forward(xs, rs, ss, ts, as);
      place(t, ts, v);
      if constexpr (A > 0) place(a, as, v);
    }
    if (p.acts) { GK_UNROLL for (int k = 0; k < A; k++) save<X>(p.acts, (token * A + k) * H + u, a[k]); }
    if (projects) {
      save<X>(p.wide, own, t[0]);
      if (p.raw) save<X>(p.raw, token * H + u, t[0]);
    }
    GK_UNROLL for (int k = 0; k < S; k++) if (k > 0 || !projects) leave(p, k, b, u, H, token, t[k]);
  }

  GK_DEVICE static void project(const StepForwardArgs &p, int b, int u) {
    float h[V];
    load<fp32>(h, p.second, int64(b) * p.R + u);
    leave(p, 0, b, u, p.R, p.walk.token(p.step, b), h);
  }

  // A new state goes to the next step, to the sequence, and, if no step follows for this row, to the final states.
  GK_DEVICE static void leave(const StepForwardArgs &p, int k, int b, int u, int width, int64 token,
                              const float (&t)[V]) {
    save<fp32>(p.state[k], int64(b) * width + u, t);
    if (k == 0 && p.operand) save<X>(p.operand, int64(b) * width + u, t);
    if (p.seq[k]) save<X>(p.seq[k], token * width + u, t);
    if (b >= p.walk.rows_at(p.step + 1)) save<X>(p.final_state[k], int64(p.walk.column(b)) * width + u, t);
  }
};

// ---------------------------------------------------------------- backward

// The step after this one in the walk came before it here: what it sends to row b is its own `adjoint` plus, of the
// first state, `product`. A row whose first step it was gets dstate of them.
template <class Cell, class X, int V> struct StepBackward {
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q, K = G - Q, THREADS = 256,
                       WARPS = THREADS / 32;
  static constexpr int SHARED_BYTES = WARPS * S * sizeof(double); // sums of the norms

  GK_DEVICE static void run(const StepBackwardArgs &p) {
    const StepPlace<V> at(THREADS, p.stage == PROJECT ? p.R : p.walk.H);
    const bool projects = p.dproj;
    double squares[S] = {};
    if (at.b < p.walk.rows_at(p.step)) {
      if (p.stage == PROJECT)
        project(p, at.b, at.u, squares);
      else
        units(p, at.b, at.u, projects, squares);
    } else if (at.b < p.walk.rows_at(p.step + 1) && p.stage != SECOND) {
      const bool first = !projects || p.stage == PROJECT, others = p.stage == CELL;
      GK_UNROLL for (int k = 0; k < S; k++) if (k == 0 ? first : others) begin(p, k, at.b, at.u, projects);
    }
    if (p.norms && p.step >= 0 && p.stage != SECOND) add_norms(p, squares, projects);
  }

private:
  // dL/d(state k after this step): what later steps send, and the sequence's own.
  GK_DEVICE static void arriving(const StepBackwardArgs &p, int k, int b, int u, int width, bool projects,
                                 float (&dt)[V]) {
    const int64 own = int64(b) * width + u;
    const bool later = b < p.walk.rows_at(p.step + 1);
    load<fp32>(dt, p.adjoint[k], own);
    if (k > 0 || !later) return;
    float sent[V];
    load<fp32>(sent, p.product, own);
    GK_UNROLL for (int v = 0; v < V; v++) dt[v] = projects ? sent[v] : dt[v] + sent[v];
  }
  GK_DEVICE static void with_own(const StepBackwardArgs &p, int k, int u, int width, int64 token, float (&dt)[V]) {
    if (!p.dseq[k]) return;
    float d[V];
    load<X>(d, p.dseq[k], token * width + u);
    GK_UNROLL for (int v = 0; v < V; v++) dt[v] += d[v];
  }
  GK_DEVICE static void begin(const StepBackwardArgs &p, int k, int b, int u, bool projects) {
    const int width = k == 0 ? p.R : p.walk.H;
    float d[V];
    arriving(p, k, b, u, width, projects, d);
    save<X>(p.dstate[k], int64(p.walk.column(b)) * width + u, d);
  }

  GK_DEVICE static void project(const StepBackwardArgs &p, int b, int u, double (&squares)[S]) {
    const int64 token = p.walk.token(p.step, b);
    float d[V];
    arriving(p, 0, b, u, p.R, true, d);
    with_own(p, 0, u, p.R, token, d);
    save<X>(p.dproj, token * p.R + u, d);
    if (p.wide) save<X>(p.wide, int64(b) * p.R + u, d);
    if (p.norms) GK_UNROLL for (int v = 0; v < V; v++) squares[0] += double(d[v]) * d[v];
  }

  GK_DEVICE static void units(const StepBackwardArgs &p, int b, int u, bool projects, double (&squares)[S]) {
    const int H = p.walk.H;
    const int64 token = p.walk.token(p.step, b), own = int64(b) * H + u;
    const bool earlier = b < p.walk.rows_at(p.step - 1);
    const int64 before = earlier ? p.walk.token(p.step - 1, b) : p.walk.column(b);
    float a[A ? A : 1][V], s[S][V], t[S][V], dt[S][V];
    GK_UNROLL for (int k = 0; k < A; k++) load<X>(a[k], p.acts, (token * A + k) * H + u);
    GK_UNROLL for (int k = 0; k < S; k++) {
      if (k == 0 && projects) {
        clear(s[k]); // which such a cell does not read
        load<X>(t[k], p.raw, token * H + u);
        load<fp32>(dt[k], p.second, own);
        continue;
      }
      load<X>(s[k], earlier ? p.seq[k] : p.state[k], before * H + u);
      load<X>(t[k], p.seq[k], token * H + u);
      arriving(p, k, b, u, H, false, dt[k]);
      with_own(p, k, u, H, token, dt[k]);
    }

    float dv[V];
    if constexpr (Q > 0) {
      if (p.stage == SECOND) {
        float late[Q][V];
        GK_UNROLL for (int v = 0; v < V; v++) {
          float as[A ? A : 1], ss[S], ts[S], ds[S], late_v[Q];
          pick(as, a, v), pick(ss, s, v), pick(ts, t, v), pick(ds, dt, v);
          Cell::second_adjoint(as, ss, ts, ds, dv[v], late_v);
          place(late, late_v, v);
        }
        save<X>(p.v, token * H + u, dv);
        GK_UNROLL for (int q = 0; q < Q; q++) save<X>(p.wide, (int64(b) * Q + q) * H + u, late[q]);
        return;
      }
      load<fp32>(dv, p.second, own);
    }

    float dx[G][V], dr[G][V], ds[S][V];
    GK_UNROLL for (int v = 0; v < V; v++) {
      float as[A ? A : 1], ss[S], ts[S], dts[S], dxs[G], drs[G], dss[S], total[S];
      pick(as, a, v), pick(ss, s, v), pick(ts, t, v), pick(dts, dt, v);
      if constexpr (Q > 0)
        Cell::backward(as, ss, ts, dts, dv[v], dxs, drs, dss, total);
      else
        Cell::backward(as, ss, ts, dts, dxs, drs, dss, total);
      place(dx, dxs, v), place(dr, drs, v), place(ds, dss, v);
      if (!p.norms) continue;
      if (!projects) squares[0] += double(dts[0]) * dts[0];
      GK_UNROLL for (int k = 1; k < S; k++) squares[k] += double(total[k]) * total[k];
    }
    GK_UNROLL for (int g = 0; g < G; g++) {
      save<X>(p.dgates, (token * G + g) * H + u, dx[g]);
      if (!Cell::shared) save<X>(p.dr, (token * G + g) * H + u, dr[g]);
      if (g < K && p.operand) save<X>(p.operand, (int64(b) * K + g) * H + u, dr[g]);
    }
    GK_UNROLL for (int k = 0; k < S; k++) if (k > 0 || !projects) save<fp32>(p.adjoint[k], own, ds[k]);
  }

  // Of a projection PROJECT has the first state's, CELL the others'. Every thread comes here; sums are in a fixed
  // order.
  GK_DEVICE static void add_norms(const StepBackwardArgs &p, const double (&squares)[S], bool projects) {
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
    p.norms[(int64(p.walk.time(p.step)) * p.blocks + block()) * S + k] = sum;
  }
};

} // namespace gk
