#pragma once
#include "cells.cuh"
#include "tile.cuh"

namespace gk {

template <class Cell, class X, Exchange exchange, int C, int H, int U, int N, int WM, int WK, int KEPT, int IN_SHARED>
struct Forward {
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q, G1 = G - Q, G2 = Q ? Q : 1;
  static constexpr bool grid = exchange == Exchange::Grid;
  static constexpr int SPLIT = grid ? C : 1; // blocks that have a part of the contraction each
  static constexpr int WARPS = WM * WK, THREADS = 32 * WARPS, N_TILES = N / 8;
  static constexpr int K = H / SPLIT, K_TILES = K / WK / values_of_tile<X>; // of the block; of a warp
  static constexpr int OCTETS = U / 8 * SPLIT / WM;                         // whose rows a warp multiplies
  static constexpr int ITEMS = U / 8 * N_TILES; // octets by n-tiles whose cells the block runs
  static constexpr bool DIRECT =
      SPLIT == 1 && WK == 1; // a warp's sums are complete, and it runs the cells of its own rows
  static constexpr int SLOTS = DIRECT ? OCTETS * N_TILES : (ITEMS + WARPS - 1) / WARPS; // items of a warp
  static_assert(U % 8 == 0 && N % 8 == 0 && U / 8 * SPLIT % WM == 0 && H % (SPLIT * WK * values_of_tile<X>) == 0,
                "tiles must fit");
  static_assert(grid || H >= C * U, "every unit of the team has a line of the operand");

  using First = Matrix<X, OCTETS * G1, K_TILES, KEPT, IN_SHARED, WARPS>;
  using Second = Matrix<X, OCTETS * G2, Q ? K_TILES : 0, KEPT, IN_SHARED, WARPS>;
  using FirstSums = Sums<SPLIT * WK, ITEMS, G1>;
  using SecondSums = Sums<SPLIT * WK, ITEMS, G2>;
  using Near = Operand<X, K, N>; // in shared memory
  using Far = Operand<X, H, N>;  // in L2

  static constexpr int OPERANDS = grid ? 1 : 2;
  static constexpr int SUMS_BYTES = DIRECT                                    ? 0
                                    : FirstSums::BYTES > Q *SecondSums::BYTES ? FirstSums::BYTES
                                                                              : SecondSums::BYTES;
  static constexpr int AT_SECOND = First::SHARED_BYTES, AT_OPERAND = AT_SECOND + Second::SHARED_BYTES;
  static constexpr int AT_SUMS = AT_OPERAND + OPERANDS * Near::BYTES, AT_SIGNALS = AT_SUMS + SUMS_BYTES;
  static constexpr int SHARED_BYTES = AT_SIGNALS + 16;
  static constexpr int FAR_BYTES = grid ? 2 * Far::BYTES : 0, STREAM_BYTES = First::STREAM_BYTES + Second::STREAM_BYTES;

  GK_DEVICE static void run(const ForwardArgs &p) { Forward(p).walk(); }

private:
  const ForwardArgs &p;
  const int team, block_of_team, rank, part; // block of the team, of the cluster; part of the contraction
  const int unit0, k0;                       // the block's first unit, and first value of the contraction
  char *const exchange_memory;
  First first;
  Second second;
  Meeting meeting;
  unsigned turn = 0, sent = 0; // exchanges of operands, of partial sums

  float bias[DIRECT ? OCTETS : SLOTS][G], s[SLOTS][2][S];
  X x[SLOTS][2][G];
  int row0;                                // of the tile
  int column[DIRECT ? N_TILES : SLOTS][2]; // where rows stand in the batch

  // Asked for two steps ahead, so that nobody waits for it; hence nothing is made of it here.
  struct Step {
    int rows, start; // the first token, or the time if steps are all of the same size
  };
  Step now, next;

  GK_DEVICE explicit Forward(const ForwardArgs &p)
      : p(p), team(block() / p.team.size), block_of_team(block() % p.team.size), rank(C == 1 ? 0 : cluster_rank()),
        part(grid ? rank : 0), unit0(block_of_team * U), k0(part * K),
        exchange_memory(p.team.exchange + team * (FAR_BYTES + int64(p.team.size) * STREAM_BYTES)),
        meeting{grid ? p.team.arrivals + 32 * team : nullptr, unsigned(p.team.size)} {}

  // ---- who does what

  GK_DEVICE static int wm() { return warp() / WK; }
  GK_DEVICE static int wk() { return warp() % WK; }
  GK_DEVICE static int item(int slot) { return DIRECT ? wm() * SLOTS + slot : slot * WARPS + warp(); }
  GK_DEVICE static bool active(int slot) { return DIRECT || ITEMS % WARPS == 0 || item(slot) < ITEMS; }
  GK_DEVICE static int n_tile(int slot) { return DIRECT ? slot % N_TILES : item(slot) % N_TILES; }
  GK_DEVICE int unit(int slot) const { return unit0 + item(slot) / N_TILES * 8 + lane() / 4; }
  GK_DEVICE int row(int slot, int j) const { return row0 + n_tile(slot) * 8 + lane() % 4 * 2 + j; }

  // Only for rows that there are.
  GK_DEVICE int column_of(int slot, int j) const { return column[DIRECT ? slot % N_TILES : slot][j]; }

  GK_DEVICE Near operand() const { return {shared() + AT_OPERAND + turn % OPERANDS * Near::BYTES}; }
  GK_DEVICE Far far() const { return {exchange_memory + turn % 2 * Far::BYTES}; }
  GK_DEVICE static Signal *signal(int i) { return reinterpret_cast<Signal *>(shared() + AT_SIGNALS) + i; }

  // ---- a step: when it begins, and its gates

  GK_DEVICE Step step_at(int i) const {
    const int t = p.walk.time(i);
    const bool there = i >= 0 && i < p.walk.T;
    return {p.walk.rows_at(i), there && p.walk.first ? p.walk.first[t] : t};
  }
  GK_DEVICE int64 token(const Step &step) const { return p.walk.first ? step.start : int64(step.start) * p.walk.B; }
  GK_DEVICE void ask(const Step &step) {
    const int64 first_token = token(step);
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) GK_UNROLL for (int j = 0; j < 2; j++) {
      const bool live = active(slot) && row(slot, j) < step.rows && unit(slot) < p.walk.H;
      const X *from =
          static_cast<const X *>(p.gates) + (live ? (first_token + column_of(slot, j)) * G * p.walk.H + unit(slot) : 0);
      GK_UNROLL for (int g = 0; g < G; g++) x[slot][j][g] = live ? from[g * p.walk.H] : X{};
    }
  }

  // ---- the walk

  GK_DEVICE void walk() {
    char *streamed = exchange_memory + FAR_BYTES + int64(block_of_team) * STREAM_BYTES;
    load_matrix<First, 0>(first, shared(), streamed);
    if constexpr (Q > 0) load_matrix<Second, G1>(second, shared() + AT_SECOND, streamed + First::STREAM_BYTES);
    load_bias();
    clear_beyond();
    if constexpr (C > 1) {
      if (thread() == 0) {
        signal_init(signal(0));
        signal_init(signal(1));
      }
      cluster_sync(); // from here on neighbours write into this block's memory
    }
    const int teams = blocks() / p.team.size;
    for (row0 = team * N; row0 < p.walk.B; row0 += teams * N) {
      load_state();
      if (row0 == team * N) start();
      const Span span = span_of_row(p.walk, row0);
      now = step_at(span.begin), next = step_at(span.begin + 1);
      ask(now);
      for (int i = span.begin; i < span.end; i++) step(i, i + 1 == span.end);
      save_state();
      // Operand and sums are written again, the sums by neighbours too.
      if constexpr (SPLIT > 1)
        cluster_sync();
      else
        block_sync();
    }
    first.finish();
    if constexpr (Q > 0) second.finish();
  }

  GK_DEVICE void start() {
    first.start();
    if constexpr (Q > 0) second.start();
  }

  GK_DEVICE void step(int i, bool last) {
    float r[SLOTS][2][G], xs[SLOTS][2][G];
    X acts[SLOTS][2][A ? A : 1];
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) GK_UNROLL for (int j = 0; j < 2; j++)
        GK_UNROLL for (int g = 0; g < G; g++) r[slot][j][g] = 0;
    multiply<FirstSums, 0>(first, r);
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) GK_UNROLL for (int j = 0; j < 2; j++)
        GK_UNROLL for (int g = 0; g < G; g++) xs[slot][j][g] = to_float(x[slot][j][g]);

    if constexpr (Q > 0) {
      begin_exchange();
      GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) if (active(slot)) {
        float v[2];
        GK_UNROLL for (int j = 0; j < 2; j++) Cell::operand(xs[slot][j], r[slot][j], s[slot][j], v[j]);
        send(slot, v);
      }
      if constexpr (grid) meeting.arrive();
      end_exchange();
      multiply<SecondSums, G1>(second, r);
    }

    if (!last) begin_exchange();
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) if (active(slot)) {
      float h[2];
      GK_UNROLL for (int j = 0; j < 2; j++) {
        float t[S], a[A ? A : 1];
        Cell::forward(xs[slot][j], r[slot][j], s[slot][j], t, a);
        const bool live = row(slot, j) < now.rows;
        GK_UNROLL for (int k = 0; k < S; k++) s[slot][j][k] = live ? t[k] : s[slot][j][k];
        GK_UNROLL for (int k = 0; k < A; k++) store(acts[slot][j][k], a[k]);
        h[j] = s[slot][j][0];
      }
      if (!last) send(slot, h);
    }
    if constexpr (grid)
      if (!last) meeting.arrive();

    save(acts);
    if (last) return;
    ask(next);
    now = next, next = step_at(i + 2);
    end_exchange();
  }

  // r[g, ...] = the product of the operand at hand with the gates of a matrix, and their bias.
  template <class Parts, int G0, class M> GK_DEVICE void multiply(M &matrix, float (&r)[SLOTS][2][G]) {
    constexpr int GATES = G0 ? G2 : G1;
    float d[M::M_TILES][N_TILES][4];
    matrix.multiply(d, operand(), wk() * K_TILES);
    if constexpr (DIRECT) {
      GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) GK_UNROLL for (int g = 0; g < GATES; g++) {
        const int group = slot / N_TILES * GATES + g;
        GK_UNROLL for (int j = 0; j < 2; j++) r[slot][j][G0 + g] =
            d[group / 2][slot % N_TILES][group % 2 * 2 + j] + bias[DIRECT ? slot / N_TILES : slot][G0 + g];
      }
    } else {
      const Parts sums{shared() + AT_SUMS};
      if constexpr (SPLIT > 1)
        if (thread() == 0) signal_expect(signal(0), Parts::BYTES);
      Parts::scatter(d, OCTETS * GATES, [&](int octet, int nt, int gate, auto value) {
        octet += wm() * OCTETS;
        const int source = part * WK + wk();
        char *to = sums.at(source, octet % (U / 8) * N_TILES + nt, gate);
        if constexpr (SPLIT > 1)
          push(to, octet / (U / 8), value, signal(0)); // to the owner of the units
        else
          *reinterpret_cast<decltype(value) *>(to) = value;
      });
      if constexpr (SPLIT > 1)
        signal_wait(signal(0), sent++ % 2);
      else
        block_sync();
      GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) if (active(slot)) {
        float sum[2][GATES];
        sums.gather(sum, item(slot));
        GK_UNROLL for (int j = 0; j < 2; j++) GK_UNROLL for (int g = 0; g < GATES; g++) r[slot][j][G0 + g] =
            sum[j][g] + bias[DIRECT ? slot / N_TILES : slot][G0 + g];
      }
    }
  }

  // ---- the exchange of an operand: begin, send for every slot, (in a grid: arrive,) end

  GK_DEVICE void begin_exchange() {
    turn++;
    if constexpr (!grid && C > 1) {
      warp_sync(); // what the warp has read comes before what any of its lanes sends
      if (thread() == 0) signal_expect(signal(turn % 2), N_TILES * C * U * Near::LINE);
    }
  }

  GK_DEVICE void send(int slot, const float (&v)[2]) {
    const int nt = n_tile(slot), u = unit(slot);
    const bool there = u < p.walk.H;
    if constexpr (grid) {
      if (there) far().put(nt, u, v[0], v[1]);
    } else if constexpr (C == 1) {
      if (there) operand().put(nt, u, v[0], v[1]);
    } else {
      // The four lanes of a line swap what they have, so that each holds 16 bytes of it and sends them to some of the
      // blocks. Lines beyond the last unit are sent too, as zeros: every warp has to be heard of.
      constexpr int HOLD = Near::LINE / 16, EACH = 4 / HOLD; // chunks of a line; lanes that hold the same
      unsigned w[Near::WORDS], c[4];
      pack(w, there ? v[0] : 0.f, there ? v[1] : 0.f, X{});
      const int l = lane() % 4;
      if constexpr (Near::WORDS == 1) {
        const unsigned other = shuffle_xor(w[0], 1), low = l % 2 ? other : w[0], high = l % 2 ? w[0] : other;
        const unsigned low2 = shuffle_xor(low, 2), high2 = shuffle_xor(high, 2);
        c[0] = l < 2 ? low : low2, c[1] = l < 2 ? high : high2, c[2] = l < 2 ? low2 : low, c[3] = l < 2 ? high2 : high;
      } else {
        const unsigned other[2] = {shuffle_xor(w[0], 1), shuffle_xor(w[1], 1)};
        GK_UNROLL for (int i = 0; i < 2; i++) c[i] = l % 2 ? other[i] : w[i], c[2 + i] = l % 2 ? w[i] : other[i];
      }
      char *to = operand().line(nt, u) + l / EACH * 16;
      GK_UNROLL for (int i = 0; i < (C + EACH - 1) / EACH; i++) {
        const int other = i * EACH + l % EACH;
        if (C % EACH == 0 || other < C) push(to, (rank + other) % C, Chunk{{c[0], c[1], c[2], c[3]}}, signal(turn % 2));
      }
    }
  }

  GK_DEVICE void end_exchange() {
    if constexpr (grid) {
      meeting.wait();
      const int bytes = lines() * Near::LINE;
      for (int at = thread() * 16; at < bytes; at += THREADS * 16)
        GK_UNROLL for (int nt = 0; nt < N_TILES; nt++)
            copy16_async(operand().line(nt, 0) + at, far().line(nt, k0) + at);
      copy_commit();
      copy_wait();
      block_sync();
    } else if constexpr (C > 1) {
      signal_wait(signal(turn % 2), (turn - 1) / 2 % 2);
    } else {
      block_sync();
    }
  }

  // Lines of the operand that there are: the contraction ends with the last unit.
  GK_DEVICE int lines() const {
    const int left = p.walk.H - k0;
    return left < 0 ? 0 : left < K ? left : K;
  }

  // ---- before and after the steps

  template <class M, int gate0> GK_DEVICE void load_matrix(M &matrix, char *shared_memory, char *global_memory) {
    if (sizeof(X) == 4 || (reinterpret_cast<unsigned long long>(p.w_hh) | p.walk.H * sizeof(X)) % 4 == 0)
      load_matrix<M, gate0, true>(matrix, shared_memory, global_memory);
    else
      load_matrix<M, gate0, false>(matrix, shared_memory, global_memory);
  }
  template <class M, int gate0, bool aligned>
  GK_DEVICE void load_matrix(M &matrix, char *shared_memory, char *global_memory) {
    const X *w = static_cast<const X *>(p.w_hh);
    const int width = p.walk.H, first_unit = (block_of_team - part) * U + wm() * OCTETS * 8;
    const int first_k = k0 + wk() * K_TILES * values_of_tile<X>;
    matrix.load(shared_memory, global_memory, [=](int group, int row, int k) {
      constexpr int gates = gate0 ? G2 : G1;
      const int u = first_unit + group / gates * 8 + row;
      const X *from = w + (int64(gate0 + group % gates) * width + u) * width;
      return u < width ? word_of_row<aligned>(from, first_k + k, width) : 0;
    });
  }

  GK_DEVICE void load_bias() {
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot += DIRECT ? N_TILES : 1) GK_UNROLL for (int g = 0; g < G; g++) {
      const bool there = p.b_hh && active(slot) && unit(slot) < p.walk.H;
      bias[DIRECT ? slot / N_TILES : slot][g] =
          there ? to_float(static_cast<const X *>(p.b_hh)[g * p.walk.H + unit(slot)]) : 0.f;
    }
  }

  // Zeros where the contraction is longer than there are units: the matrix is zero there, but 0 NaN is not 0.
  GK_DEVICE void clear_beyond() {
    const int begin = lines() * Near::LINE, bytes = K * Near::LINE - begin;
    for (int at = thread() * 16; at < bytes; at += THREADS * 16)
      for (int i = 0; i < OPERANDS * N_TILES; i++)
        *reinterpret_cast<Chunk *>(shared() + AT_OPERAND + i * K * Near::LINE + begin + at) = Chunk{};
  }

  GK_DEVICE void load_state() {
    const int H_ = p.walk.H;
    GK_UNROLL for (int slot = 0; slot < (DIRECT ? N_TILES : SLOTS); slot++) GK_UNROLL for (int j = 0; j < 2; j++) {
      const int b = row(slot, j);
      column[slot][j] = active(slot) && b < p.walk.B ? p.walk.column(b) : 0;
    }
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++) GK_UNROLL for (int j = 0; j < 2; j++) {
      const bool there = active(slot) && row(slot, j) < p.walk.B && unit(slot) < H_;
      const int64 at = there ? int64(column_of(slot, j)) * H_ + unit(slot) : 0;
      GK_UNROLL for (int k = 0; k < S; k++) s[slot][j][k] =
          there ? to_float(static_cast<const X *>(p.state[k])[at]) : 0.f;
    }
    for (int at = thread(); at < N_TILES * lines(); at += THREADS) {
      const int nt = at / lines(), k = at % lines();
      unsigned w[4][Near::WORDS];
      GK_UNROLL for (int i = 0; i < 4; i++) {
        float v[2];
        GK_UNROLL for (int j = 0; j < 2; j++) {
          const int b = row0 + nt * 8 + 2 * i + j;
          v[j] =
              b < p.walk.B ? to_float(static_cast<const X *>(p.state[0])[int64(p.walk.column(b)) * H_ + k0 + k]) : 0.f;
        }
        pack(w[i], v[0], v[1], X{});
      }
      Chunk *to = reinterpret_cast<Chunk *>(operand().line(nt, k));
      GK_UNROLL for (int c = 0; c < Near::WORDS; c++) GK_UNROLL for (int i = 0; i < 4; i++) to[c].w[i] =
          w[(c * 4 + i) / Near::WORDS][i % Near::WORDS];
    }
    block_sync();
  }

  GK_DEVICE void save(const X (&acts)[SLOTS][2][A ? A : 1]) const {
    const int H_ = p.walk.H;
    const int64 first_token = token(now);
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++)
        GK_UNROLL for (int j = 0; j < 2; j++) if (active(slot) && row(slot, j) < now.rows && unit(slot) < H_) {
      const int64 at = first_token + column_of(slot, j);
      GK_UNROLL for (int k = 0; k < S; k++) if (p.seq[k])
          store(static_cast<X *>(p.seq[k])[at * H_ + unit(slot)], s[slot][j][k]);
      if (A > 0 && p.acts)
        GK_UNROLL for (int k = 0; k < A; k++) static_cast<X *>(p.acts)[(at * A + k) * H_ + unit(slot)] =
            acts[slot][j][k];
    }
  }

  GK_DEVICE void save_state() const {
    GK_UNROLL for (int slot = 0; slot < SLOTS; slot++)
        GK_UNROLL for (int j = 0; j < 2; j++) if (active(slot) && row(slot, j) < p.walk.B && unit(slot) < p.walk.H) {
      const int64 at = int64(column_of(slot, j)) * p.walk.H + unit(slot);
      GK_UNROLL for (int k = 0; k < S; k++) store(static_cast<X *>(p.final_state[k])[at], s[slot][j][k]);
    }
  }
};

} // namespace gk
