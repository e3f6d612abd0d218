// Backpropagation through time by a team of blocks that keep the recurrent matrix, for any cell.
//
// Dims: T steps, B rows of the batch, H units, G gates, S states, A kept values, Q products of another value than the
//       first state (those of the last Q gates); U units of a block, N rows of a tile, C blocks of a cluster.
// A step, backwards: the adjoints of the states after it, in registers and fp32 over the whole sequence, and what the
// step's output was handed go through the cell, which gives gradients of the gates and adjoints of the states before
// it. To that of the first state comes W^T dr, an exchange among the blocks (transposed.cuh); with Q > 0 there are two,
// that of the last Q gates first. A row of the batch is in as many steps as it has; the adjoints that enter its last
// one are those of its final states. What a step reads is asked for one step ahead; for what it writes nobody waits.
//
// A warp runs the cells of items, octets of units by n-tiles of rows: lane l has unit l / 4 for rows 2 (l % 4) and the
// next, just as an mma leaves them. Of each row it reads and writes 8 units side by side, so any H will do.
#pragma once
#include "extras.cuh"
#include "transposed.cuh"

namespace gk {

template <class Cell, class X, Exchange exchange, int C, int H, int U, int N, int WM, int WK, int KEPT, int IN_SHARED,
          bool NORMS>
struct Backward {
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q, P = Cell::P,
                       FIRST = G - Q; // gates of the state's product
  static constexpr int WARPS = WM * WK, OCTETS = U / 8, ITEMS = OCTETS * N / 8, SLOTS = (ITEMS + WARPS - 1) / WARPS;
  static_assert(Cell::D == 0 && !Cell::means && Cell::recurrent, "those go step by step");
  static_assert(U % 8 == 0 && N % 8 == 0 && (C == 1 || C % 2 == 0), "tiles must fit");

  template <int GATE, int GATES, int AT>
  using Product =
      Transposed<X, exchange, C, H, U, N, WM, WK, KEPT, IN_SHARED, GATE, GATES, (FIRST > Q ? FIRST : Q), AT>;
  using First = Product<0, FIRST, 0>;
  using Second = Product<FIRST, Q, First::END>;
  static constexpr int HALVES = First::HALVES, INBOXES = First::INBOXES, AT_INBOXES = Second::END;
  static constexpr int AT_SIGNALS = AT_INBOXES + INBOXES * First::Inbox::BYTES,
                       AT_SQUARES = AT_SIGNALS + (C > 1 ? 16 : 0);
  static constexpr int SHARED_BYTES = AT_SQUARES + (NORMS ? HALVES * WARPS * S * 8 : 0);
  static constexpr int PUBLISHED_BYTES = // of a team, in L2
      First::PUBLISHED_BYTES > Second::PUBLISHED_BYTES ? First::PUBLISHED_BYTES : Second::PUBLISHED_BYTES;
  static constexpr int STREAM_BYTES = First::STREAM_BYTES + Second::STREAM_BYTES; // of a block, in L2

  GK_DEVICE static void run(const BackwardArgs &p) { Backward(p).walk(); }

private:
  const BackwardArgs &p;
  const int team, unit0; // unit0: the block's first
  Link link;
  First first;
  Second second;
  int row0;                                  // of the tile
  int column[SLOTS][2];                      // of this lane's rows
  float params[SLOTS][P ? P : 1];            // of this lane's units
  float ds[SLOTS][2][S];                     // adjoints of the states after the step at hand
  X acts[SLOTS][2][A + 1];                   // of the step at hand: kept values,
  X before[SLOTS][2][S], after[SLOTS][2][S]; // states that it found and left,
  X given[SLOTS][2][S];                      // and what was handed in for the latter

  GK_DEVICE explicit Backward(const BackwardArgs &p)
      : p(p), team(block() / p.team.size), unit0(block() % p.team.size * U),
        link{p.team.size,
             block() % p.team.size,
             C == 1 ? 0 : cluster_rank(),
             p.team.exchange + team * (PUBLISHED_BYTES + int64(p.team.size) * STREAM_BYTES),
             shared() + AT_INBOXES,
             reinterpret_cast<Signal *>(shared() + AT_SIGNALS),
             {First::JOINED ? p.team.arrivals + 32 * team : nullptr, unsigned(p.team.size)},
             0} {}

  // ---- who does what

  GK_DEVICE static int item(int slot) { return slot * WARPS + warp(); }
  GK_DEVICE static bool active(int slot) { return ITEMS % WARPS == 0 || item(slot) < ITEMS; }
  GK_DEVICE static int octet(int slot) { return item(slot) % OCTETS; }
  GK_DEVICE static int n_tile(int slot) { return item(slot) / OCTETS; }
  GK_DEVICE static int line(int slot, int gate) { return gate * U + octet(slot) * 8 + lane() / 4; }
  GK_DEVICE int unit(int slot) const { return unit0 + octet(slot) * 8 + lane() / 4; }
  GK_DEVICE int row(int slot, int j) const { return row0 + n_tile(slot) * 8 + lane() % 4 * 2 + j; }
  GK_DEVICE bool live(int slot, int j, int rows) const { return row(slot, j) < rows && unit(slot) < p.walk.H; }
  template <class F> GK_DEVICE static void each(F f) { // f(slot, which of the two rows)
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) if (active(slot)) GK_UNROLL for (int j = 0; j < 2; j++)
        f(slot, j);
  }
  GK_DEVICE static double *squares(unsigned turn) {
    return reinterpret_cast<double *>(shared() + AT_SQUARES) + turn % HALVES * WARPS * S;
  }
  template <class V> GK_DEVICE static V *as(void *p) { return static_cast<V *>(p); }
  GK_DEVICE static const X *as_x(const void *p) { return static_cast<const X *>(p); }

  // ---- a step: how many rows it has, and where they begin

  struct Step {
    int rows = 0;
    int64 token = 0;
  };
  GK_DEVICE Step step_at(int i) const {
    if (i < 0 || i >= p.walk.T) return {};
    const int t = p.walk.time(i);
    return {p.walk.rows_at(i), p.walk.first ? p.walk.first[t] : int64(t) * p.walk.B};
  }

  // Begins the loads of step `at`, which is between `previous` and `next` in the walk. The state that the next step
  // found is the one that this one left.
  GK_DEVICE void ask(const Step &previous, const Step &at, const Step &next) {
    const int width = p.walk.H;
    each([&](int slot, int j) {
      if (!live(slot, j, at.rows)) return;
      const int64 token = at.token + column[slot][j], here = token * width + unit(slot);
      GK_UNROLL for (int k = 0; k < A; k++) acts[slot][j][k] = as_x(p.acts)[(token * A + k) * width + unit(slot)];
      const bool begins = row(slot, j) >= previous.rows, ends = row(slot, j) >= next.rows;
      const int64 entering = ((begins ? 0 : previous.token) + column[slot][j]) * width + unit(slot);
      GK_UNROLL for (int k = 0; k < S; k++) {
        after[slot][j][k] = ends ? as_x(p.seq[k])[here] : before[slot][j][k];
        before[slot][j][k] = as_x(begins ? p.state[k] : p.seq[k])[entering];
        given[slot][j][k] = p.dseq[k] ? as_x(p.dseq[k])[here] : X{};
      }
    });
  }
  struct Values {
    float a[A + 1], s[S], t[S], dt[S];
    Extras<Cell> extras;
  };
  GK_DEVICE Values values(const Step &now, int slot, int j) const {
    Values v;
    GK_UNROLL for (int k = 0; k < P; k++) v.extras.p[k] = params[slot][k];
    GK_UNROLL for (int k = 0; k < Cell::M; k++) v.extras.m[k] =
        drawn<X>(p.extra, k, now.token + column[slot][j], column[slot][j], unit(slot));
    GK_UNROLL for (int k = 0; k < A; k++) v.a[k] = to_float(acts[slot][j][k]);
    GK_UNROLL for (int k = 0; k < S; k++) {
      v.s[k] = to_float(before[slot][j][k]);
      v.t[k] = to_float(after[slot][j][k]);
      v.dt[k] = ds[slot][j][k] + to_float(given[slot][j][k]);
    }
    v.dt[0] = clamp(v.dt[0], p.extra.clip);
    return v;
  }

  // ---- the walk

  GK_DEVICE void walk() {
    char *stream = link.published + PUBLISHED_BYTES + int64(link.rank) * STREAM_BYTES;
    first.template load<SHARED_BYTES>(p.walk, as_x(p.w_hh), link, stream);
    if constexpr (Q > 0) second.template load<SHARED_BYTES>(p.walk, as_x(p.w_hh), link, stream + First::STREAM_BYTES);
    if constexpr (C > 1) {
      if (thread() == 0)
        for (int i = 0; i < INBOXES; i++) signal_init(link.signals + i);
      cluster_sync(); // from here on neighbours write into this block's memory
    }
    if constexpr (First::TOLD) { // nobody is to hear what was told in another launch
      for (int at = (link.rank * WARPS * 32 + thread()) * 16; at < PUBLISHED_BYTES; at += link.size * WARPS * 32 * 16)
        *reinterpret_cast<Chunk *>(link.published + at) = Chunk{};
      link.meeting.arrive();
      link.meeting.wait();
    } else if constexpr (C == 1) {
      block_sync();
    }
    first.weights.start();
    if constexpr (Q > 0) second.weights.start();

    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) GK_UNROLL for (int k = 0; k < P; k++) params[slot][k] =
        active(slot) && unit(slot) < p.walk.H ? to_float(as_x(p.extra.params)[k * p.walk.H + unit(slot)]) : 0.f;

    const int teams = blocks() / p.team.size;
    for (row0 = team * N; row0 < p.walk.B; row0 += teams * N) {
      each([&](int slot, int j) {
        const bool there = live(slot, j, p.walk.B);
        column[slot][j] = there ? p.walk.column(row(slot, j)) : 0;
        const int64 at = int64(column[slot][j]) * p.walk.H + unit(slot);
        GK_UNROLL for (int k = 0; k < S; k++) ds[slot][j][k] =
            there && p.dfinal[k] ? to_float(as_x(p.dfinal[k])[at]) : 0.f;
      });
      const Span span = span_of_row(p.walk, row0); // the tile's first row is in every step that any of them is in
      Step now = step_at(span.end - 1), previous = step_at(span.end - 2);
      if (span.begin < span.end) ask(previous, now, {});
      for (int i = span.end - 1; i >= span.begin; i--) {
        const Step early = step_at(i - 2);
        step(i, early, previous, now);
        now = previous, previous = early;
      }
      each([&](int slot, int j) {
        if (!live(slot, j, p.walk.B)) return;
        const int64 at = int64(column[slot][j]) * p.walk.H + unit(slot);
        GK_UNROLL for (int k = 0; k < S; k++) store(as<X>(p.dstate[k])[at], ds[slot][j][k]);
      });
    }
    first.weights.finish();
    if constexpr (Q > 0) second.weights.finish();
  }

  // Step i, `now`: adjoints of the states after it become those of the states before it.
  GK_DEVICE void step(int i, const Step &early, const Step &previous, const Step &now) {
    const int rows = now.rows - row0 < N ? now.rows - row0 : N;
    float dv[SLOTS][2];
    if constexpr (Q > 0) late_gates(now, rows, dv);

    X dx[SLOTS][2][G], dr[SLOTS][2][G], dp[SLOTS][2][P ? P : 1];
    double sizes[S] = {};
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) if (active(slot)) {
      float r[2][G] = {};
      GK_UNROLL for (int j = 0; j < 2; j++) if (live(slot, j, now.rows)) {
        const Values v = values(now, slot, j);
        float x[G], total[S];
        ExtraAdjoints<Cell> found;
        v.extras.then([&](auto &...group) {
          found.then([&](auto &...made) {
            if constexpr (Q > 0)
              Cell::backward(v.a, v.s, v.t, group..., v.dt, dv[slot][j], x, r[j], ds[slot][j], made..., total);
            else
              Cell::backward(v.a, v.s, v.t, group..., v.dt, x, r[j], ds[slot][j], made..., total);
          });
        });
        GK_UNROLL for (int k = 0; k < P; k++) store(dp[slot][j][k], found.p[k]);
        GK_UNROLL for (int g = 0; g < G; g++) store(dx[slot][j][g], x[g]), store(dr[slot][j][g], r[j][g]);
        GK_UNROLL for (int k = 0; k < S; k++) sizes[k] +=
            double(k ? total[k] : v.dt[0]) * double(k ? total[k] : v.dt[0]);
      }
      GK_UNROLL for (int g = 0; g < FIRST; g++) First::put(link, n_tile(slot), line(slot, g), r[0][g], r[1][g]);
    }
    const unsigned turn = link.turn;
    if constexpr (NORMS) put_sizes(sizes, turn);

    first.multiply(
        link, rows, [&] { ask(early, previous, now); },
        [&] {
          each([&](int slot, int j) {
            if (!live(slot, j, now.rows)) return;
            const int64 at = (now.token + column[slot][j]) * G * p.walk.H + unit(slot);
            GK_UNROLL for (int g = 0; g < G; g++) {
              as<X>(p.dgates)[at + g * p.walk.H] = dx[slot][j][g];
              if constexpr (!Cell::shared) as<X>(p.dr)[at + g * p.walk.H] = dr[slot][j][g];
            }
            if (!p.dparams) return;
            X *const to = as<X>(p.dparams) + (now.token + column[slot][j]) * P * p.walk.H + unit(slot);
            GK_UNROLL for (int k = 0; k < P; k++) to[k * p.walk.H] = dp[slot][j][k];
          });
          if constexpr (NORMS) save_sizes(p.walk.time(i), turn);
        });
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) if (active(slot)) {
      float dh[2][1];
      First::gather(link, dh, octet(slot), n_tile(slot));
      GK_UNROLL for (int j = 0; j < 2; j++) ds[slot][j][0] += live(slot, j, now.rows) ? dh[j][0] : 0.f;
    }
  }

  // What the last Q gates send to what they were the product of.
  GK_DEVICE void late_gates(const Step &now, int rows, float (&dv)[SLOTS][2]) {
    X operand[SLOTS][2];
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) if (active(slot)) {
      float r[2][Q] = {};
      GK_UNROLL for (int j = 0; j < 2; j++) if (live(slot, j, now.rows)) {
        const Values v = values(now, slot, j);
        float o;
        v.extras.then([&](auto &...group) { Cell::second_adjoint(v.a, v.s, v.t, group..., v.dt, o, r[j]); });
        store(operand[slot][j], o);
      }
      GK_UNROLL for (int q = 0; q < Q; q++) Second::put(link, n_tile(slot), line(slot, q), r[0][q], r[1][q]);
    }
    second.multiply(
        link, rows, [] {},
        [&] {
          each([&](int slot, int j) {
            if (live(slot, j, now.rows))
              as<X>(p.operand)[(now.token + column[slot][j]) * p.walk.H + unit(slot)] = operand[slot][j];
          });
        });
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) if (active(slot)) {
      float sum[2][1];
      Second::gather(link, sum, octet(slot), n_tile(slot));
      GK_UNROLL for (int j = 0; j < 2; j++) dv[slot][j] = sum[j][0];
    }
  }

  // ---- squared norms of the adjoints: of a lane, of a warp, of the block, always added up in the same order

  GK_DEVICE static void put_sizes(double (&sizes)[S], unsigned turn) {
    GK_UNROLL for (int k = 0; k < S; k++) {
      GK_UNROLL for (int lanes = 16; lanes > 0; lanes /= 2) sizes[k] += shuffle_xor(sizes[k], lanes);
      if (lane() == 0) squares(turn)[warp() * S + k] = sizes[k];
    }
  }
  GK_DEVICE void save_sizes(int t, unsigned turn) const { // tiles of one team add up: += by one and the same thread
    if (thread() >= S) return;
    double sum = 0;
    for (int i = 0; i < WARPS; i++) sum += squares(turn)[i * S + thread()];
    p.norms[(int64(t) * blocks() + block()) * S + thread()] += sum;
  }
};

} // namespace gk
