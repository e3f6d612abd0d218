// The product of backpropagation through time, dh = W^T dr, by a team of blocks that each keep a part of W.
//
// Dims: G gates, H units (Walk.H of them real), U units of a block, N rows of the batch in a tile, C blocks of a
//       cluster, M = C U units that a product is taken for, K gradients that a block multiplies. An octet is 8 units.
// A block computes gradients dr of the gates of its own U units and needs dh of the same units. Gate g of unit u is row
// g H + u of W, and dh of unit j is the product with column j: a block's matrix is [M, K] of W^T, what it multiplies
// [K, N]. Warps split M (WM) and K (WK).
//
// Cluster: a block multiplies its own gradients, K = G U, for all units of the team, M >= Walk.H, and pushes partial
// sums in fp32 to the units' owners. In a step each block sends 4 M N bytes and does 2 K M N operations.
//
// Grid: blocks publish their gradients in L2. A block multiplies those of a C-th of the team, K = G H / C, for the
// units of its cluster, whose blocks push partial sums to the owners. In a step each block fetches K N values, sends 4
// M N bytes and does 2 K M N operations. Many values are published behind a meeting; few are told word by word, with
// the turn they are of, in twice the bytes: who sees the turn has the word.
//
// With C = 1 nothing is pushed in either form: partial sums of warps stay in the block.
//
// Who may overwrite what, and when? Exchanges are numbered by `turn`; of what is double, even and odd numbers have one.
// * Inboxes are double: a neighbour pushes number e + 2 after it has all of e + 1, of which this block sends its part
//   after a block_sync that follows its reading of e. With meetings one will do: a neighbour multiplies e + 1 after
//   this block has published it, which follows its reading of e. And with C = 1: block_syncs lie between.
// * Gradients to be multiplied are double in a cluster: a warp that is ahead puts e + 1 while others multiply e; it
//   comes to e + 2 only after the block_sync of e + 1, which the others reach when they are done with e. With C = 1 the
//   product ends in a block_sync; in a grid each warp fetches what it alone multiplies, or a block_sync lies between.
// * Published gradients are double. With meetings a block publishes e + 2 after all have arrived at e + 1, having
//   fetched e. Told, it is so when it has dh of e + 1: its neighbours have sent their parts, to which the gradients of
//   all blocks went, hence each has told e + 1, which it did with dh of e in hand, made of all that its warps heard.
// * Signals: the phase of the next number of the same signal cannot end before this block pushes its own part, behind a
//   block_sync to which every thread comes when it has heard the last one. Nobody misses a phase.
// * The end: whoever is pushed to waits for it, so nobody is gone while a neighbour writes into his memory.
#pragma once
#include "tile.cuh"

namespace gk {

// How a block reaches the others of its team.
struct Link {
  int size, rank, c; // blocks of the team; of this one: place in its team, place in its cluster
  char *published;   // in L2
  char *inboxes;     // in shared memory
  Signal *signals;   // in shared memory, behind the inboxes
  Meeting meeting;
  unsigned turn; // exchanges so far
};

// The part of W^T that belongs to gates [GATE, GATE + GATES), and its product. MOST: gates of the larger of the cell's
// products. AT: where its shared memory begins.
template <class X, Exchange exchange, int C, int H, int U, int N, int WM, int WK, int KEPT, int IN_SHARED, int GATE,
          int GATES, int MOST, int AT>
struct Transposed {
  static constexpr bool JOINED = exchange == Exchange::Grid; // gradients of other blocks come through L2
  static constexpr int WARPS = WM * WK, OCTETS = U / 8, N_TILES = N / 8, HALVES = !JOINED && C > 1 ? 2 : 1;
  static constexpr int GROUPS = (C * OCTETS + WM - 1) / WM;              // octets whose dh a warp computes
  static constexpr int SENDERS = JOINED ? (H + C * U - 1) / (C * U) : 1; // blocks whose gradients this one multiplies
  static constexpr int OWN = GATES * U, TILE = values_of_tile<X>;        // gradients of a block for a row of the batch
  static constexpr int K_TILES = (SENDERS * OWN + TILE * WK - 1) / (TILE * WK); // of a warp
  static constexpr bool ALONE = WM == 1;                                        // warps share none of what they fetch

  using Weights = Matrix<X, GROUPS, K_TILES, KEPT, IN_SHARED, WARPS>;
  // Whether gradients go through L2 word by word with the turn they are of, rather than by a meeting: twice the bytes,
  // but neither a fence nor a counter, which cost as much as some 20 KB do.
  static constexpr bool TOLD = JOINED && SENDERS * MOST * U * N * int(sizeof(X)) <= 16 << 10;
  static constexpr int INBOXES = C > 1 && (TOLD || !JOINED) ? 2 : 1;

  using Gradients = Operand<X, K_TILES * WK * TILE, N>;      // line: sender, gate, unit
  using Published = Operand<X, C * SENDERS * OWN, N>;        // of the team
  using Partial = Sums<WK, C * OCTETS * N_TILES, 1>;         // of the warps of a block
  using Inbox = Sums<(C > 1 ? C : WK), OCTETS * N_TILES, 1>; // of the blocks of a cluster; of the warps of its only one

  static constexpr int AT_GRADIENTS = AT + Weights::SHARED_BYTES, AT_PARTIAL = AT_GRADIENTS + HALVES * Gradients::BYTES;
  static constexpr int END = AT_PARTIAL + (GATES > 0 && C > 1 && WK > 1 ? Partial::BYTES : 0);
  static constexpr int PUBLISHED_BYTES = JOINED ? (TOLD ? 4 : 2) * Published::BYTES : 0,
                       STREAM_BYTES = Weights::STREAM_BYTES;

  Weights weights;

  // Once, before the first step. `stream`: of this block, STREAM_BYTES of global memory. END_OF_ALL: of the kernel's
  // shared memory, none of which behind the matrix is used yet.
  template <int END_OF_ALL> GK_DEVICE void load(const Walk &walk, const X *w, const Link &link, char *stream) {
    const int sender = (JOINED ? link.c * SENDERS : link.rank) * U, reader = (link.rank - link.c) * U; // first units
    const int first = wk() * K_TILES * TILE;                                                           // line
    auto word = [=](int group, int row, int k) {
      const int unit = reader + octet_of(link.c, wm() * GROUPS + group) * 8 + row;
      const int line = first + k / 8 * 8, gate = GATE + line % OWN / U; // of eight, which are one below the other in W
      const int from = sender + line / OWN * U + line % U + k % 8;
      const bool real = wm() * GROUPS + group < C * OCTETS && unit < walk.H && line < SENDERS * OWN;
      const X *value = w + (int64(gate) * walk.H + from) * walk.H + unit;
      if constexpr (sizeof(X) == 4)
        return real && from < walk.H ? as_bits(value->value) : 0u;
      else
        return (real && from < walk.H ? value->bits : 0u) | (real && from + 1 < walk.H ? value[walk.H].bits : 0u) << 16;
    };
    weights.template load<END_OF_ALL - AT_GRADIENTS>(shared() + AT, stream, word, shared() + AT_GRADIENTS);
    block_sync();
    // What nobody puts has to be zero: a weight of zero makes no zero of a NaN.
    for (int at = thread() * 16; at < HALVES * Gradients::BYTES; at += 32 * WARPS * 16)
      *reinterpret_cast<Chunk *>(shared() + AT_GRADIENTS + at) = Chunk{};
  }

  // Gradients of this lane's two rows of n-tile `nt`: line g U + u of the block. All lines are put, zeros beyond H.
  GK_DEVICE static void put(const Link &link, int nt, int line, float low, float high) {
    if constexpr (TOLD) {
      unsigned w[Gradients::WORDS];
      pack(w, low, high, X{});
      Told *to = told(link, nt, link.rank * OWN + line) + lane() % 4 * Gradients::WORDS;
      GK_UNROLL for (int i = 0; i < Gradients::WORDS; i++) tell(to + i, w[i], link.turn + 1);
    } else if constexpr (JOINED) {
      Published{link.published + link.turn % 2 * Published::BYTES}.put(nt, link.rank * OWN + line, low, high);
    } else {
      gradients(link.turn).put(nt, line, low, high);
    }
  }

  // One exchange, after which gather has dh. Only the first `live` rows of the tile count. `ask` begins loads that are
  // wanted afterwards, `keep` stores what nobody waits for; both run where they delay others least.
  template <class Ask, class Keep> GK_DEVICE void multiply(Link &link, int live, Ask ask, Keep keep) {
    const int n_tiles = (live + 7) / 8;
    if constexpr (JOINED && !TOLD)
      link.meeting.arrive();
    else
      block_sync(); // all warps have put their gradients, and read what the last exchange brought
    ask();
    if constexpr (JOINED) keep();
    if constexpr (TOLD) {
      hear_all(link, n_tiles);
    } else if constexpr (JOINED) {
      link.meeting.wait();
      fetch(link, n_tiles);
    }
    float d[Weights::M_TILES][N_TILES][4];
    weights.multiply(d, gradients(link.turn), wk() * K_TILES);

    if constexpr (C == 1) {
      store_all(inbox(link, 0), d, n_tiles);
      if constexpr (!JOINED) keep();
      block_sync();
    } else {
      if (thread() == 0) signal_expect(signal(link), C * OCTETS * n_tiles * 256);
      if constexpr (WK == 1) {
        GK_UNROLL for (int mt = 0; mt < Weights::M_TILES; mt++)
            GK_UNROLL for (int nt = 0; nt < N_TILES; nt++) if (nt < n_tiles)
                push_octets(link, wm() * GROUPS + 2 * mt, 2 * mt + 1 < GROUPS ? 2 : 1, nt, d[mt][nt]);
      } else {
        const Partial partial{shared() + AT_PARTIAL};
        store_all(partial, d, n_tiles);
        block_sync();
        for (int i = warp(); i < C * OCTETS / 2 * n_tiles; i += WARPS) {
          const int m = i / n_tiles * 2, nt = i % n_tiles;
          float a[2][1], b[2][1];
          partial.gather(a, nt * C * OCTETS + m);
          partial.gather(b, nt * C * OCTETS + m + 1);
          push_octets(link, m, 2, nt, {a[0][0], a[1][0], b[0][0], b[1][0]});
        }
      }
      if constexpr (!JOINED) keep();
      signal_wait(signal(link), link.turn / INBOXES % 2);
    }
    link.turn++;
  }

  // dh of this lane's two rows of an octet of the block, by the last exchange; always added up in the same order.
  GK_DEVICE static void gather(const Link &link, float (&dh)[2][1], int octet, int nt) {
    inbox(link, link.turn - 1).gather(dh, nt * OCTETS + octet);
  }

private:
  GK_DEVICE static int wm() { return warp() % WM; }
  GK_DEVICE static int wk() { return warp() / WM; }
  // Row m of octets of W^T is an octet of the cluster. Each block begins with its own, lest all push to the same one.
  GK_DEVICE static int octet_of(int c, int m) { return (m + c * OCTETS) % (C * OCTETS); }
  GK_DEVICE static Gradients gradients(unsigned turn) {
    return {shared() + AT_GRADIENTS + turn % HALVES * Gradients::BYTES};
  }
  GK_DEVICE static Inbox inbox(const Link &link, unsigned turn) {
    return {link.inboxes + turn % INBOXES * Inbox::BYTES};
  }
  GK_DEVICE static Signal *signal(const Link &link) { return link.signals + link.turn % INBOXES; }

  GK_DEVICE static Told *told(const Link &link, int nt, int line) {
    return reinterpret_cast<Told *>(link.published) +
           ((link.turn % 2 * N_TILES + nt) * C * SENDERS * OWN + line) * (Gradients::LINE / 4);
  }

  // Of the bytes of an n-tile that this block multiplies, those that this warp fetches, or all where warps share them.
  // A team may have fewer blocks than H allows for.
  static constexpr int PART = (ALONE ? 1 : WK) * K_TILES * TILE * Gradients::LINE, FETCHING = ALONE ? 32 : 32 * WARPS;
  struct Range {
    int begin, end; // from this thread's first to the end of all
  };
  GK_DEVICE static Range part(const Link &link, int bytes_at_once) {
    const int begin = ALONE ? wk() * PART : 0, senders = link.size - link.c * SENDERS;
    const int bytes = (senders < SENDERS ? senders : SENDERS) * OWN * Gradients::LINE;
    return {begin + (ALONE ? lane() : thread()) * bytes_at_once, begin + PART < bytes ? begin + PART : bytes};
  }
  GK_DEVICE static void fetch(const Link &link, int n_tiles) {
    const Range mine = part(link, 16);
    const Published from{link.published + link.turn % 2 * Published::BYTES};
    for (int nt = 0; nt < n_tiles; nt++)
      for (int at = mine.begin; at < mine.end; at += FETCHING * 16)
        copy16_async(gradients(0).line(nt, 0) + at, from.line(nt, link.c * SENDERS * OWN) + at);
    copy_commit();
    copy_wait();
    fetched();
  }
  // Several pairs of words of a lane at a time: the way to L2 and back is long.
  GK_DEVICE static void hear_all(const Link &link, int n_tiles) {
    constexpr int EACH = (PART + FETCHING * 8 - 1) / (FETCHING * 8), AT_ONCE = EACH < 8 ? EACH : 8;
    const Range mine = part(link, 8);
    for (int nt = 0; nt < n_tiles; nt++) {
      const Told *from = told(link, nt, link.c * SENDERS * OWN);
      GK_LOOP for (int at = mine.begin; at < mine.end; at += AT_ONCE * FETCHING * 8) {
        const Told *pairs[AT_ONCE];
        Half words[AT_ONCE];
        GK_UNROLL for (int i = 0; i < AT_ONCE; i++) {
          const int here = at + i * FETCHING * 8;
          pairs[i] = here < mine.end ? from + here / 4 : nullptr;
        }
        hear(words, pairs, link.turn + 1);
        Half *to = reinterpret_cast<Half *>(gradients(0).line(nt, 0) + at);
        GK_UNROLL for (int i = 0; i < AT_ONCE; i++) {
          if (pairs[i]) to[i * FETCHING] = words[i];
        }
      }
    }
    fetched();
  }
  GK_DEVICE static void fetched() {
    if constexpr (ALONE)
      warp_sync();
    else
      block_sync();
  }

  // The sums of a warp, each where it belongs: item [n-tile][octet].
  template <class Where>
  GK_DEVICE static void store_all(const Where &where, const float (&d)[Weights::M_TILES][N_TILES][4], int n_tiles) {
    GK_UNROLL for (int group = 0; group < GROUPS; group++) GK_UNROLL for (int nt = 0; nt < N_TILES; nt++) {
      const int m = wm() * GROUPS + group, i = group % 2 * 2;
      const float (&v)[4] = d[group / 2][nt];
      if (nt < n_tiles && m < C * OCTETS)
        *reinterpret_cast<Half *>(where.at(wk(), nt * C * OCTETS + m, 0)) = Half{{as_bits(v[i]), as_bits(v[i + 1])}};
    }
  }

  // Sums of octets m and, if count is 2, m + 1 to their owners. Lanes 2 i and 2 i + 1 have two rows of the batch each
  // of both; they swap, so that each has four of one, which lie side by side in an inbox.
  GK_DEVICE static void push_octets(const Link &link, int m, int count, int nt, const float (&v)[4]) {
    const int odd = lane() % 2;
    const unsigned a = shuffle_xor(as_bits(odd ? v[0] : v[2]), 1), b = shuffle_xor(as_bits(odd ? v[1] : v[3]), 1);
    const Chunk four = odd ? Chunk{{a, b, as_bits(v[2]), as_bits(v[3])}} : Chunk{{as_bits(v[0]), as_bits(v[1]), a, b}};
    if (odd < count && m + odd < C * OCTETS) {
      const int octet = octet_of(link.c, m + odd);
      char *to = inbox(link, link.turn).at(link.c, nt * OCTETS + octet % OCTETS, 0) - odd * 8;
      push(to, octet / OCTETS, four, signal(link));
    }
  }
};

} // namespace gk
