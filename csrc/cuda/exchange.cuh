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
// * Grid. Blocks publish in L2, meet (arrive, then wait), and fetch past L1. In L2 there are two buffers: e + 2 is
//   published after the meeting of e + 1, to which all came after they had fetched e. In shared memory there is one:
//   all warps have read it before their block comes to the meeting. A release waits for all stores under way, so what
//   nobody needs is stored between arriving and waiting.
#pragma once
#include "tile.cuh"

namespace gk {

template <class X, Exchange exchange, int C, int H, int U, int N, int THREADS, int AT> struct AllGather {
  static constexpr bool grid = exchange == Exchange::Grid, pushes = !grid && C > 1;
  static constexpr int K = grid ? H / C : H, N_TILES = N / 8;
  using Near = Operand<X, K, N>; // in shared memory
  using Far = Operand<X, H, N>;  // in L2
  static_assert(grid || H >= C * U, "every unit of the team has a line of the operand");

  static constexpr int BUFFERS = grid ? 1 : 2, AT_SIGNALS = AT + BUFFERS * Near::BYTES;
  static constexpr int SHARED_BYTES = AT_SIGNALS + 16 - AT; // from AT on
  static constexpr int FAR_BYTES = grid ? 2 * Far::BYTES : 0;

  const Walk &walk;
  const int rank; // of the block in its cluster
  const int k0;   // the first value of the contraction that this block needs
  char *const far_memory;
  Meeting meeting;
  unsigned turn = 0;

  GK_DEVICE AllGather(const Walk &walk, const Team &team, int index, char *far_memory)
      : walk(walk), rank(C == 1 ? 0 : cluster_rank()), k0(grid ? rank * K : 0), far_memory(far_memory),
        meeting{grid ? team.arrivals + 32 * index : nullptr, unsigned(team.size)} {}

  GK_DEVICE Near operand() const { return {shared() + AT + turn % BUFFERS * Near::BYTES}; }
  GK_DEVICE Far published() const { return {far_memory + turn % 2 * Far::BYTES}; }
  GK_DEVICE static Signal *signal(int i) { return reinterpret_cast<Signal *>(shared() + AT_SIGNALS) + i; }

  // Lines of the operand that there are: the contraction ends with the last unit.
  GK_DEVICE int lines() const {
    const int left = walk.H - k0;
    return left < 0 ? 0 : left < K ? left : K;
  }

  // Once, before the first operand. Afterwards neighbours write into this block's memory.
  GK_DEVICE void open() {
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

  // An exchange: begin; send everything; in a grid, arrive; end. Whole warps.
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
      if constexpr (grid)
        published().put(nt, u, v[0], v[1]);
      else
        operand().put(nt, u, v[0], v[1]);
    }
  }

  GK_DEVICE void arrive() {
    if constexpr (grid) meeting.arrive();
  }

  GK_DEVICE void end() {
    if constexpr (grid) {
      meeting.wait();
      const int bytes = lines() * Near::LINE;
      const Near to = operand();
      const Far from = published();
      for (int at = thread() * 16; at < bytes; at += THREADS * 16)
        GK_UNROLL for (int nt = 0; nt < N_TILES; nt++) copy16_async(to.line(nt, 0) + at, from.line(nt, k0) + at);
      copy_commit();
      copy_wait();
      block_sync();
    } else if constexpr (pushes) {
      signal_wait(signal(turn % 2), (turn - 1) / 2 % 2);
    } else {
      block_sync();
    }
  }

private:
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
