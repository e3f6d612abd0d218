// The recurrence forward: each block keeps its rows of the recurrent matrix for the whole sequence, and only the state
// moves.
//
// Dims: T steps, B rows of the batch, N tokens; H units (the template's is rounded up, Walk.H is what there is), G
//       gates, S states, A kept values, Q gates whose product is of another value than the state. Of the template: C
//       blocks of a cluster, U units of a block, N rows of a tile, WM x WK warps over rows and columns of the block's
//       part of the matrix.
//
// A step: multiply the operand, add up what several warps or blocks have of a sum, run the cell, hand the new state
// on. The gates of a unit leave the mma in one lane, which runs the cell; nothing goes through memory where one warp
// has the whole sum. Q > 0: the product of the last Q gates is of what the cell makes of the first ones, hence two
// exchanges a step.
//
// * Cluster: a block has the rows of U units and the whole contraction.
// * Grid: the C blocks of a cluster have the rows of C U units and K = H / C of the contraction each. Partial sums are
//   pushed to the owner of the unit. They are numbered too: number s goes to buffer s % 2 and is counted by signal s %
//   2. A neighbour pushes s + 2 after it has all of s + 1, this block's part of which each warp pushed after the
//   block_sync that followed its reading of s.
//
// A block and a step, for each product (K: its contraction; R: its rows of the matrix, G U, in a grid G C U):
// * mma: R K N / 2048 for two-byte numbers, twice that for tf32, six times for fp32.
// * shared memory: WM K N values of the operand read; the part of the matrix that is there read; WK R N floats of sums
//   written and read.
// * exchange: in a cluster U N values pushed to each of C blocks, and as many received from each; in a grid U N values
//   told and K N heard, at twice their size, and for C > 1 WK R N floats pushed and received.
// * global memory: G U N gates read, one step ahead; U N (sequences + A) values written, for which nobody waits.
#pragma once
#include "exchange.cuh"
#include "extras.cuh"

namespace gk {

template <class Cell, class X, Exchange exchange, int C, int H, int U, int N, int WM, int WK, int KEPT, int IN_SHARED>
struct Forward {
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q, P = Cell::P, G1 = G - Q, G2 = Q ? Q : 1;
  static constexpr int SPLIT = exchange == Exchange::Grid ? C : 1; // blocks that have a part of the contraction each
  static constexpr int WARPS = WM * WK, THREADS = 32 * WARPS, N_TILES = N / 8;
  static constexpr int K_TILES = H / SPLIT / WK / values_of_tile<X>; // of a warp
  static constexpr int OCTETS = U / 8 * SPLIT / WM;                  // whose rows a warp multiplies
  static constexpr int ITEMS = U / 8 * N_TILES;                      // octets by n-tiles whose cells the block runs
  static constexpr bool DIRECT = SPLIT == 1 && WK == 1; // a warp runs the cells of its rows; else they are dealt
  static constexpr int SLOTS = DIRECT ? OCTETS * N_TILES : (ITEMS + WARPS - 1) / WARPS; // items of a warp
  static_assert(Cell::D == 0 && !Cell::means && Cell::recurrent, "those go step by step");
  static_assert(U % 8 == 0 && N % 8 == 0 && U / 8 * SPLIT % WM == 0, "whole octets");
  static_assert(H % (SPLIT * WK * values_of_tile<X>) == 0, "whole k-tiles");

  using First = Matrix<X, OCTETS * G1, K_TILES, KEPT, IN_SHARED, WARPS>;
  using Second = Matrix<X, OCTETS * G2, Q ? K_TILES : 0, KEPT, IN_SHARED, WARPS>;
  using FirstSums = Sums<SPLIT * WK, ITEMS, G1>;
  using SecondSums = Sums<SPLIT * WK, ITEMS, G2>;
  static constexpr int MOST_SUMS = FirstSums::BYTES > SecondSums::BYTES ? FirstSums::BYTES : SecondSums::BYTES;

  static constexpr int AT_SECOND = First::SHARED_BYTES, AT_SUMS = AT_SECOND + Second::SHARED_BYTES;
  static constexpr int SUMS_BYTES = DIRECT ? 0 : Q ? MOST_SUMS : FirstSums::BYTES, SUMS_BUFFERS = SPLIT > 1 ? 2 : 1;
  static constexpr int AT_OPERAND = AT_SUMS + SUMS_BUFFERS * SUMS_BYTES;
  using Gather = AllGather<X, exchange, C, H, U, N, THREADS, AT_OPERAND>;
  static constexpr int SHARED_BYTES = AT_OPERAND + Gather::SHARED_BYTES;
  static constexpr int STREAM_BYTES = First::STREAM_BYTES + Second::STREAM_BYTES; // of a block, in Team.exchange

  GK_DEVICE static void run(const ForwardArgs &p) {
    const int team = block() / p.team.size;
    char *memory = p.team.exchange + team * (Gather::FAR_BYTES + int64(p.team.size) * STREAM_BYTES);
    Forward(p, team, memory).walk(memory + Gather::FAR_BYTES);
  }

private:
  // When a step begins is asked for two steps ahead, so that nobody waits for it; hence nothing is made of it at once.
  struct Step {
    int rows, start; // the first token, or the time if all steps have B rows
  };

  const ForwardArgs &p;
  const int team, member; // this block's team, and its place there
  Gather gather;
  First first;
  Second second;
  unsigned sums_sent = 0;

  int row0; // of the tile
  Step now, next;
  X x[SLOTS][2][G]; // gates of the step at hand
  float s[SLOTS][2][S], bias[DIRECT ? OCTETS : SLOTS][G], params[DIRECT ? OCTETS : SLOTS][P ? P : 1];
  int columns[DIRECT ? N_TILES : SLOTS][2]; // where rows are in the batch

  GK_DEVICE Forward(const ForwardArgs &p, int team, char *memory)
      : p(p), team(team), member(block() % p.team.size), gather(p.walk, member * U, memory) {}

  GK_DEVICE int units() const { return p.walk.H; }

  // ---- who does what

  GK_DEVICE static int wm() { return warp() / WK; }
  GK_DEVICE static int wk() { return warp() % WK; }
  GK_DEVICE static int item(int slot) { return DIRECT ? wm() * SLOTS + slot : slot * WARPS + warp(); }
  GK_DEVICE static bool active(int slot) { return DIRECT || ITEMS % WARPS == 0 || item(slot) < ITEMS; }
  GK_DEVICE static int n_tile(int slot) { return DIRECT ? slot % N_TILES : item(slot) % N_TILES; }
  GK_DEVICE int unit(int slot) const { return member * U + item(slot) / N_TILES * 8 + lane() / 4; }
  GK_DEVICE int row(int slot, int j) const { return row0 + n_tile(slot) * 8 + lane() % 4 * 2 + j; }
  GK_DEVICE int &column(int slot, int j) { return columns[DIRECT ? slot % N_TILES : slot][j]; }
  GK_DEVICE float &bias_of(int slot, int g) { return bias[DIRECT ? slot / N_TILES : slot][g]; }
  GK_DEVICE float &param_of(int slot, int k) { return params[DIRECT ? slot / N_TILES : slot][k]; }

  template <class F> GK_DEVICE static void each_slot(F f) {
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) if (active(slot)) f(slot);
  }
  template <class F> GK_DEVICE static void each_cell(F f) {
    each_slot([&](int slot) {
      f(slot, 0);
      f(slot, 1);
    });
  }

  // ---- the walk

  GK_DEVICE void walk(char *streamed) {
    streamed += int64(member) * STREAM_BYTES;
    load_matrix<0>(first, shared(), streamed);
    if constexpr (Q > 0) load_matrix<G1>(second, shared() + AT_SECOND, streamed + First::STREAM_BYTES);
    load_bias();
    gather.open(p.team, team);

    const int teams = blocks() / p.team.size;
    for (row0 = team * N; row0 < p.walk.B; row0 += teams * N) {
      load_state();
      if (row0 == team * N) start();
      const Span span = span_of_row(p.walk, row0);
      now = step_at(span.begin), next = step_at(span.begin + 1);
      ask(now);
      for (int i = span.begin; i < span.end; i++) step(i, i + 1 == span.end);
      save_state();
      block_sync(); // the operand is written again
    }
    first.finish();
    if constexpr (Q > 0) second.finish();
  }

  GK_DEVICE void start() {
    first.start();
    if constexpr (Q > 0) second.start();
  }

  GK_DEVICE void step(int i, bool last) {
    float r[SLOTS][2][G] = {}, xs[SLOTS][2][G];
    X acts[SLOTS][2][A ? A : 1];
    Extras<Cell> extras[SLOTS][2];
    each_cell([&](int slot, int j) { extras[slot][j] = extras_of(slot, j); });
    multiply<FirstSums, 0>(first, r);
    each_cell([&](int slot, int j) { GK_UNROLL for (int g = 0; g < G; g++) xs[slot][j][g] = to_float(x[slot][j][g]); });

    if constexpr (Q > 0) {
      gather.begin();
      each_slot([&](int slot) {
        float v[2];
        GK_UNROLL for (int j = 0; j < 2; j++) extras[slot][j].then(
            [&](auto &...group) { Cell::operand(xs[slot][j], r[slot][j], s[slot][j], group..., v[j]); });
        gather.send(n_tile(slot), unit(slot), v);
      });
      gather.end();
      multiply<SecondSums, G1>(second, r);
    }

    if (!last) gather.begin();
    each_slot([&](int slot) {
      float h[2];
      GK_UNROLL for (int j = 0; j < 2; j++) {
        float t[S], a[A ? A : 1];
        extras[slot][j].then(
            [&](auto &...group) { Cell::forward(xs[slot][j], r[slot][j], s[slot][j], group..., t, a); });
        const bool live = row(slot, j) < now.rows;
        GK_UNROLL for (int k = 0; k < S; k++) s[slot][j][k] = live ? t[k] : s[slot][j][k];
        GK_UNROLL for (int k = 0; k < A; k++) store(acts[slot][j][k], a[k]);
        h[j] = s[slot][j][0];
      }
      if (!last) gather.send(n_tile(slot), unit(slot), h);
    });

    save(acts);
    if (last) return;
    ask(next);
    now = next, next = step_at(i + 2);
    gather.end();
  }

  // r[.., G0 ..] = the product of the operand at hand with the gates of a matrix, and their bias.
  template <class Parts, int G0, class M> GK_DEVICE void multiply(M &matrix, float (&r)[SLOTS][2][G]) {
    constexpr int GATES = G0 ? G2 : G1;
    float d[M::M_TILES][N_TILES][4];
    matrix.multiply(d, gather.operand(), wk() * K_TILES);
    if constexpr (DIRECT) {
      each_cell([&](int slot, int j) {
        GK_UNROLL for (int g = 0; g < GATES; g++) {
          const int group = slot / N_TILES * GATES + g;
          r[slot][j][G0 + g] = d[group / 2][slot % N_TILES][group % 2 * 2 + j] + bias_of(slot, G0 + g);
        }
      });
    } else {
      const Parts sums{shared() + AT_SUMS + sums_sent % SUMS_BUFFERS * SUMS_BYTES};
      scatter(sums, d, OCTETS * GATES);
      each_slot([&](int slot) {
        float sum[2][GATES];
        sums.gather(sum, item(slot));
        GK_UNROLL for (int g = 0; g < GATES; g++) GK_UNROLL for (int j = 0; j < 2; j++) r[slot][j][G0 + g] =
            sum[j][g] + bias_of(slot, G0 + g);
      });
    }
  }

  // What this warp has goes to the owners of the units; afterwards the block has all that belongs to its own.
  template <class Parts, int M_TILES>
  GK_DEVICE void scatter(const Parts &sums, const float (&d)[M_TILES][N_TILES][4], int groups) {
    Signal *const arrived = gather.signal(sums_sent % 2); // which are free in a grid
    if constexpr (SPLIT > 1)
      if (thread() == 0) signal_expect(arrived, Parts::BYTES);
    Parts::scatter(d, groups, [&](int octet, int nt, int gate, auto value) {
      octet += wm() * OCTETS;
      const int source = (SPLIT > 1 ? gather.rank : 0) * WK + wk();
      char *to = sums.at(source, octet % (U / 8) * N_TILES + nt, gate);
      if constexpr (SPLIT > 1)
        push(to, octet / (U / 8), value, arrived);
      else
        *reinterpret_cast<decltype(value) *>(to) = value;
    });
    if constexpr (SPLIT > 1)
      signal_wait(arrived, sums_sent++ / 2 % 2);
    else
      block_sync();
  }

  // ---- what is read

  GK_DEVICE Step step_at(int i) const {
    const int t = p.walk.time(i);
    const bool there = i >= 0 && i < p.walk.T;
    return {p.walk.rows_at(i), there && p.walk.first ? p.walk.first[t] : t};
  }
  GK_DEVICE int64 first_token(const Step &step) const {
    return p.walk.first ? step.start : int64(step.start) * p.walk.B;
  }

  GK_DEVICE void ask(const Step &step) {
    const int64 token = first_token(step);
    each_cell([&](int slot, int j) {
      const bool live = row(slot, j) < step.rows && unit(slot) < units();
      const int64 at = live ? (token + column(slot, j)) * G * units() + unit(slot) : 0;
      GK_UNROLL for (int g = 0; g < G; g++) x[slot][j][g] =
          live ? static_cast<const X *>(p.gates)[at + g * units()] : X{};
    });
  }

  template <int gate0, class M> GK_DEVICE void load_matrix(M &matrix, char *shared_memory, char *global_memory) {
    if (sizeof(X) == 4 || (reinterpret_cast<unsigned long long>(p.w_hh) | units() * sizeof(X)) % 4 == 0)
      load_rows<gate0, true>(matrix, shared_memory, global_memory);
    else
      load_rows<gate0, false>(matrix, shared_memory, global_memory);
  }
  template <int gate0, bool aligned, class M>
  GK_DEVICE void load_rows(M &matrix, char *shared_memory, char *global_memory) {
    const X *w = static_cast<const X *>(p.w_hh);
    const int width = units(), unit0 = (SPLIT > 1 ? member - gather.rank : member) * U + wm() * OCTETS * 8;
    const int k0 = gather.k0 + wk() * K_TILES * values_of_tile<X>;
    const auto word = [=](int group, int row, int k) {
      constexpr int gates = gate0 ? G2 : G1;
      const int u = unit0 + group / gates * 8 + row;
      const X *from = w + (int64(gate0 + group % gates) * width + u) * width;
      return u < width ? word_of_row<aligned>(from, k0 + k, width) : 0;
    };
    matrix.template load<Gather::AT_SIGNALS - AT_SUMS>(shared_memory, global_memory, word, shared() + AT_SUMS);
    block_sync(); // what it went through is written by other warps from here on
  }

  GK_DEVICE void load_bias() {
    each_slot([&](int slot) {
      GK_UNROLL for (int g = 0; g < G; g++) {
        const bool there = p.b_hh && unit(slot) < units();
        bias_of(slot, g) = there ? to_float(static_cast<const X *>(p.b_hh)[g * units() + unit(slot)]) : 0.f;
      }
      GK_UNROLL for (int k = 0; k < P; k++) param_of(slot, k) =
          unit(slot) < units() ? to_float(static_cast<const X *>(p.extra.params)[k * units() + unit(slot)]) : 0.f;
    });
  }

  // Of the step at hand, before its product is there.
  GK_DEVICE Extras<Cell> extras_of(int slot, int j) {
    Extras<Cell> one;
    GK_UNROLL for (int k = 0; k < P; k++) one.p[k] = param_of(slot, k);
    const int at = row(slot, j) < now.rows ? column(slot, j) : 0; // any other token would do for who is not there
    GK_UNROLL for (int k = 0; k < Cell::M; k++) one.m[k] =
        drawn<X>(p.extra, k, now.rows ? first_token(now) + at : 0, at, unit(slot));
    return one;
  }

  GK_DEVICE void load_state() {
    each_cell([&](int slot, int j) { column(slot, j) = row(slot, j) < p.walk.B ? p.walk.column(row(slot, j)) : 0; });
    each_cell([&](int slot, int j) {
      const bool there = row(slot, j) < p.walk.B && unit(slot) < units();
      const int64 at = there ? int64(column(slot, j)) * units() + unit(slot) : 0;
      GK_UNROLL for (int k = 0; k < S; k++) s[slot][j][k] =
          there ? to_float(static_cast<const X *>(p.state[k])[at]) : 0.f;
    });
    gather.fill(static_cast<const X *>(p.state[0]), row0);
  }

  // ---- what is written

  GK_DEVICE void save(const X (&acts)[SLOTS][2][A ? A : 1]) {
    const int64 token = first_token(now);
    each_cell([&](int slot, int j) {
      if (row(slot, j) >= now.rows || unit(slot) >= units()) return;
      const int64 at = token + column(slot, j);
      GK_UNROLL for (int k = 0; k < S; k++) if (p.seq[k])
          store(static_cast<X *>(p.seq[k])[at * units() + unit(slot)], s[slot][j][k]);
      if (p.acts) {
        X *to = static_cast<X *>(p.acts) + at * A * units() + unit(slot);
        GK_UNROLL for (int k = 0; k < A; k++) to[k * units()] = acts[slot][j][k];
      }
    });
  }

  GK_DEVICE void save_state() {
    each_cell([&](int slot, int j) {
      if (row(slot, j) >= p.walk.B || unit(slot) >= units()) return;
      const int64 at = int64(column(slot, j)) * units() + unit(slot);
      GK_UNROLL for (int k = 0; k < S; k++) store(static_cast<X *>(p.final_state[k])[at], s[slot][j][k]);
    });
  }
};

} // namespace gk
