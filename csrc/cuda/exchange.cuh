// How each block of a team comes to have the operand, of which it has computed its own units: an all-gather in every
// step.
//
// Dims: H units of the template, Walk.H of them real; C blocks of a cluster, U units of a block, N batch rows of a
//       tile; K = H, in a grid H / C: the values of the contraction that a block multiplies, and needs.
//
// Exchanges are numbered by `turn`, from the first tile of rows to the last. What orders them, and who may overwrite
// what:
//
// * Cluster of one. Exchange e is written to buffer e % 2 while the other is read, and a block_sync ends it.
// * Cluster. Blocks push their lines into the memory of all, their own too. Signal e % 2 counts the bytes that arrive;
//   thread 0 tells it once for every phase how many there will be. Bytes may come before it does, but not before the
//   phase does: a neighbour pushes e + 2, into the buffer of e, when it has all of e + 1. In that is a part from every
//   warp of this block that runs cells, sent after the warp has read e (warp_sync), and after the other warps have:
//   where sums of several warps are added there was a block_sync, elsewhere all warps run cells. So nobody writes
//   where somebody reads, no phase begins before everybody has seen the last but one end, and there is neither a
//   barrier nor a fence in the loop. For the same reason the sums that warps hand each other may be overwritten in the
//   next step: who has all of e + 1 knows that its own block has run its cells. And since each waits for all that is
//   pushed to it, nobody leaves while he is written to.
// * Grid. Every word goes to L2 together with its turn, so that it is heard as soon as it is there: no fence, no
//   counter, no second trip for the data; in return twice the bytes. In L2 there are two buffers: a block tells e + 2
//   when it has heard all of e + 1, or, where a cluster splits the contraction, when its neighbours have and their
//   sums have come; every block with units told a part of e + 1 after it had heard all of e. (One without, in a
//   cluster without, may hear later words, and computes nothing.) In shared memory there is one buffer: a block_sync
//   before it is filled, when all warps have read it, and one after. Words of an earlier launch are cleared first,
//   before all meet.
#pragma once
#include "tile.cuh"

namespace gk {

template <class X, Exchange exchange, int C, int H, int U, int N, int THREADS, int AT> struct AllGather {
  static constexpr bool grid = exchange == Exchange::Grid, pushes = !grid && C > 1;
  static constexpr int K = grid ? H / C : H, N_TILES = N / 8;
  using Near = Operand<X, K, N>;               // in shared memory
  static constexpr int WORDS = Near::LINE / 4; // of a line
  static_assert(grid || H >= C * U, "every unit of the team has a line of the operand");

  static constexpr int BUFFERS = grid ? 1 : 2, AT_SIGNALS = AT + BUFFERS * Near::BYTES;
  static constexpr int SHARED_BYTES = AT_SIGNALS + 16 - AT;                                // from AT on
  static constexpr int FAR_BYTES = grid ? 2 * N_TILES * H * WORDS * int(sizeof(Told)) : 0; // in L2

  const Walk &walk;
  const int rank;  // of the block in its cluster
  const int unit0; // the block's first unit
  const int k0;    // and the first value of the contraction that it needs
  char *const far_memory;
  unsigned turn = 0;

  GK_DEVICE AllGather(const Walk &walk, int unit0, char *far_memory)
      : walk(walk), rank(C == 1 ? 0 : cluster_rank()), unit0(unit0), k0(grid ? rank * K : 0), far_memory(far_memory) {}

  GK_DEVICE Near operand() const { return {shared() + AT + turn % BUFFERS * Near::BYTES}; }
  GK_DEVICE static Signal *signal(int i) { return reinterpret_cast<Signal *>(shared() + AT_SIGNALS) + i; }

  // Lines of the operand that there are: the contraction ends with the last unit.
  GK_DEVICE int lines() const {
    const int left = walk.H - k0;
    return left < 0 ? 0 : left < K ? left : K;
  }

  // Once, before the first operand. Afterwards neighbours write into this block's memory.
  GK_DEVICE void open(const Team &team, int index) {
    // Beyond the last unit the matrix is zero, but 0 times what memory happens to hold need not be.
    const int begin = lines() * Near::LINE, bytes = K * Near::LINE - begin;
    for (int at = thread() * 16; at < bytes; at += THREADS * 16)
      for (int plane = 0; plane < BUFFERS * N_TILES; plane++)
        *reinterpret_cast<Chunk *>(shared() + AT + plane * K * Near::LINE + begin + at) = Chunk{};
    if constexpr (C > 1) {
      if (thread() == 0) {
        signal_init(signal(0));
        signal_init(signal(1));
      }
      cluster_sync();
    }
    if constexpr (grid) { // no word may be heard that was told in another launch
      const int left = walk.H - unit0, count = (left < 0 ? 0 : left < U ? left : U) * WORDS;
      for (int at = thread(); at < count; at += THREADS)
        for (int plane = 0; plane < 2 * N_TILES; plane++) told(plane, unit0)[at] = Told{0, 0};
      block_sync();
      if (thread() == 0) { // the others wait for it at the end of `fill`
        add_release(team.arrivals + 32 * index, 1);
        wait_reached(team.arrivals + 32 * index, team.size);
      }
    }
  }

  // The operand of the first step: the state that enters, column(b) being the place of row b. Whole blocks.
  GK_DEVICE void fill(const X *state, int row0) const {
    const int count = lines();
    for (int at = thread(); at < N_TILES * count; at += THREADS) {
      const int nt = at / count, k = at % count;
      unsigned w[4 * Near::WORDS];
      GK_UNROLL for (int i = 0; i < 4; i++) {
        float v[2];
        GK_UNROLL for (int j = 0; j < 2; j++) {
          const int b = row0 + nt * 8 + 2 * i + j;
          v[j] = b < walk.B ? to_float(state[int64(walk.column(b)) * walk.H + k0 + k]) : 0.f;
        }
        unsigned two[Near::WORDS];
        pack(two, v[0], v[1], X{});
        GK_UNROLL for (int j = 0; j < Near::WORDS; j++) w[i * Near::WORDS + j] = two[j];
      }
      Chunk *line = reinterpret_cast<Chunk *>(operand().line(nt, k));
      GK_UNROLL for (int i = 0; i < Near::WORDS; i++) line[i] =
          Chunk{{w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]}};
    }
    block_sync();
  }

  // An exchange: begin; send everything; end. Whole warps.
  GK_DEVICE void begin() {
    turn++;
    if constexpr (pushes) {
      warp_sync(); // what the warp has read comes before what any of its lanes sends
      if (thread() == 0) signal_expect(signal(turn % 2), N_TILES * C * U * Near::LINE);
    }
  }

  // Lanes have two rows each of unit u.
  GK_DEVICE void send(int nt, int u, const float (&v)[2]) const {
    if constexpr (pushes) {
      push_line(nt, u, v);
    } else if (u < walk.H) {
      if constexpr (grid) {
        unsigned w[Near::WORDS];
        pack(w, v[0], v[1], X{});
        Told *to = told(turn % 2 * N_TILES + nt, u) + lane() % 4 * Near::WORDS;
        GK_UNROLL for (int i = 0; i < Near::WORDS; i++) tell(to + i, w[i], turn);
      } else {
        operand().put(nt, u, v[0], v[1]);
      }
    }
  }

  GK_DEVICE void end() {
    if constexpr (pushes) {
      signal_wait(signal(turn % 2), (turn - 1) / 2 % 2);
      return;
    }
    block_sync(); // in a grid: all warps have read the operand before
    if constexpr (grid) {
      fetch();
      block_sync();
    }
  }

private:
  GK_DEVICE Told *told(int plane, int u) const {
    return reinterpret_cast<Told *>(far_memory) + (plane * H + u) * WORDS;
  }

  // Words of the operand come in pairs, several of a thread at a time: the way to L2 and back is long.
  GK_DEVICE void fetch() const {
    constexpr int PLANE = K * WORDS / 2, PAIRS = N_TILES * PLANE, EACH = (PAIRS + THREADS - 1) / THREADS;
    constexpr int AT_ONCE = EACH < 8 ? EACH : 8;
    const int there = lines() * WORDS / 2; // pairs of a plane
    GK_LOOP for (int begin = thread(); begin < PAIRS; begin += AT_ONCE * THREADS) {
      const Told *from[AT_ONCE];
      Half words[AT_ONCE];
      GK_UNROLL for (int i = 0; i < AT_ONCE; i++) {
        const int pair = begin + i * THREADS, nt = pair / PLANE, at = pair % PLANE;
        from[i] = nt < N_TILES && at < there ? told(turn % 2 * N_TILES + nt, k0) + 2 * at : nullptr;
      }
      hear(words, from, turn);
      GK_UNROLL for (int i = 0; i < AT_ONCE; i++) {
        const int pair = begin + i * THREADS; // planes follow one another in shared memory
        if (from[i]) reinterpret_cast<Half *>(operand().base)[pair] = words[i];
      }
    }
  }

  // The four lanes of a line swap what they have, so that each holds 16 bytes of it and sends them to some of the
  // blocks. Lines beyond the last unit are sent too, as zeros: every warp has to be heard of.
  GK_DEVICE void push_line(int nt, int u, const float (&v)[2]) const {
    constexpr int EACH = Near::WORDS == 1 ? 4 : 2; // lanes that then hold the same
    const int l = lane() % 4;
    const bool there = u < walk.H;
    unsigned w[Near::WORDS];
    pack(w, there ? v[0] : 0.f, there ? v[1] : 0.f, X{});
    Chunk c;
    if constexpr (Near::WORDS == 1) {
      const unsigned one = shuffle_xor(w[0], 1);
      const unsigned low = l % 2 ? one : w[0], high = l % 2 ? w[0] : one;
      const unsigned other_low = shuffle_xor(low, 2), other_high = shuffle_xor(high, 2);
      c = l < 2 ? Chunk{{low, high, other_low, other_high}} : Chunk{{other_low, other_high, low, high}};
    } else {
      const unsigned low = shuffle_xor(w[0], 1), high = shuffle_xor(w[1], 1);
      c = l % 2 ? Chunk{{low, high, w[0], w[1]}} : Chunk{{w[0], w[1], low, high}};
    }
    char *to = operand().line(nt, u) + l / EACH * 16;
    GK_UNROLL for (int i = 0; i < C; i += EACH) {
      const int ahead = i + l % EACH; // not all begin with the same block
      if (C % EACH == 0 || ahead < C) push(to, (rank + ahead) % C, c, signal(turn % 2));
    }
  }
};

} // namespace gk
