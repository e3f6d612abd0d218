// What both directions multiply with: the block's part of the recurrent matrix, the operand that it is multiplied by,
// partial sums that several warps or blocks have of one value, and the meetings of blocks.
//
// Dims: K contraction, N batch rows of a tile. A group is 8 rows of the matrix (8 units of one gate), an octet 8 units
// with all their gates. One mma has 16 rows of the matrix (two groups: an m-tile), 32 bytes of the contraction (a
// k-tile) and 8 batch rows (an n-tile). Lane l of a warp is (l / 4, l % 4): after an mma it has unit l / 4 of both
// groups for batch rows 2 (l % 4) and the next. Groups are ordered by octet and then by gate, so that a lane ends up
// with all gates of its units.
#pragma once
#include "arguments.cuh"

namespace gk {

enum class Exchange { Cluster, Grid }; // what a team is: one cluster, or blocks that meet through L2

GK_DEVICE int lane() { return thread() % 32; }
GK_DEVICE int warp() { return thread() / 32; }

template <class X> constexpr int values_of_tile = 32 / int(sizeof(X)); // of the contraction

// ---------------------------------------------------------------- the operand

// K values for each of N batch rows, in the order [n-tile][K][8]: a line is one k of 8 batch rows. A lane's two rows of
// a unit are neighbours in it, so a new state is written straight from registers; lines are aligned for any number of
// units; and ldmatrix, or a warp that reads words, takes consecutive lines, which never conflict for banks.
template <class X, int K, int N> struct Operand {
  static constexpr int N_TILES = N / 8, LINE = 8 * sizeof(X), BYTES = N_TILES * K * LINE, WORDS = sizeof(X) / 2;

  char *base; // in shared or global memory, 16-byte aligned

  GK_DEVICE char *line(int nt, int k) const { return base + (nt * K + k) * LINE; }

  // This lane's two rows.
  GK_DEVICE void put(int nt, int k, float low, float high) const {
    unsigned w[WORDS];
    pack(w, low, high, X{});
    char *to = line(nt, k) + lane() % 4 * LINE / 4;
    if constexpr (WORDS == 1)
      *reinterpret_cast<unsigned *>(to) = w[0];
    else
      *reinterpret_cast<Half *>(to) = Half{{w[0], w[1]}};
  }

  // What mma takes of `TILES` (1 or 2) k-tiles, kt being the first.
  template <int TILES> GK_DEVICE void fragments(unsigned (&b)[2 * TILES], int nt, int kt) const {
    if constexpr (WORDS == 1)
      load_tiles_transposed(b, line(nt, kt * 16 + lane() % (16 * TILES)));
    else
      GK_UNROLL for (int i = 0; i < 2 * TILES; i++) b[i] =
          reinterpret_cast<const unsigned *>(line(nt, kt * 8 + i * 4 + lane() % 4))[lane() / 4];
  }
};

// ---------------------------------------------------------------- the matrix

// A warp's share of the matrix: GROUPS groups by K_TILES k-tiles, as fragments, that is in the order in which lanes
// hand them to mma. The first k-tiles are in registers, the next in shared memory, the rest in global memory, from
// where they come through a ring in shared memory that runs ahead of the mma, also from one product to the next. Every
// lane reads only what it has copied itself, so none of this needs a barrier.
template <class X, int GROUPS, int K_TILES, int KEPT_AT_MOST, int SHARED_AT_MOST, int WARPS> struct Matrix {
  static constexpr int M_TILES = (GROUPS + 1) / 2; // an odd group is padded with zeros
  static constexpr int KEPT = KEPT_AT_MOST < K_TILES ? KEPT_AT_MOST : K_TILES;
  static constexpr int IN_SHARED = SHARED_AT_MOST < K_TILES - KEPT ? SHARED_AT_MOST : K_TILES - KEPT;
  static constexpr int STREAMED = K_TILES - KEPT - IN_SHARED, RING = STREAMED < 4 ? STREAMED : 4;
  static constexpr int TILE_BYTES = 512 * M_TILES;                             // of one k-tile of a warp
  static constexpr int SHARED_BYTES = WARPS * (IN_SHARED + RING) * TILE_BYTES; // of the block
  static constexpr int STREAM_BYTES = WARPS * STREAMED * TILE_BYTES;           // of the block, in global memory

  unsigned kept[M_TILES][KEPT ? KEPT : 1][4];
  Chunk *in_shared, *ring, *streamed; // of this lane; tiles are 32 chunks apart
  int slot = 0;                       // of the ring: the next to be multiplied

  // word(group, row, k): the 4 bytes of the matrix that begin at row `row` of 8 and value k of the warp's share.
  // `spare`: SPARE bytes of shared memory that nobody uses before a block_sync after this. What registers keep goes
  // through it where there is room for a tile of each warp: a loop that fills registers is unrolled, and the addresses
  // of all that it loads would take more of them than the loop of steps does.
  template <int SPARE = 0, class F>
  GK_DEVICE void load(char *shared_memory, char *global_memory, F word, char *spare = nullptr) {
    in_shared = reinterpret_cast<Chunk *>(shared_memory + warp() * (IN_SHARED + RING) * TILE_BYTES) + lane();
    ring = in_shared + IN_SHARED * M_TILES * 32;
    if constexpr (STREAMED > 0)
      streamed = reinterpret_cast<Chunk *>(global_memory + warp() * STREAMED * TILE_BYTES) + lane();
    auto tile = [&](int mt, int kt) {
      Chunk c;
      GK_UNROLL for (int i = 0; i < 4; i++) {
        const int group = 2 * mt + i % 2, k = (kt * 32 + i / 2 * 16 + lane() % 4 * 4) / int(sizeof(X));
        c.w[i] = group < GROUPS ? as_operand(word(group, lane() / 4, k), X{}) : 0;
      }
      return c;
    };
    constexpr int TILES = KEPT * M_TILES, ROOM = SPARE / (512 * WARPS), AT_ONCE = ROOM < TILES ? ROOM : TILES;
    if constexpr (AT_ONCE > 0)
      load_through<0, AT_ONCE>(reinterpret_cast<Chunk *>(spare + warp() * AT_ONCE * 512) + lane(), tile);
    else
      GK_UNROLL for (int kt = 0; kt < KEPT; kt++) GK_UNROLL for (int mt = 0; mt < M_TILES; mt++)
          keep(mt, kt, tile(mt, kt));
    for (int kt = 0; kt < IN_SHARED; kt++)
      GK_UNROLL for (int mt = 0; mt < M_TILES; mt++) in_shared[(kt * M_TILES + mt) * 32] = tile(mt, KEPT + kt);
    for (int kt = 0; kt < STREAMED; kt++)
      GK_UNROLL for (int mt = 0; mt < M_TILES; mt++) streamed[(kt * M_TILES + mt) * 32] =
          tile(mt, KEPT + IN_SHARED + kt);
  }

  // Fills the ring, once, after load; and lets what is under way arrive, before the kernel ends.
  GK_DEVICE void start() { GK_UNROLL for (int kt = 0; kt < RING; kt++) ask(kt, kt); }
  GK_DEVICE void finish() {
    if constexpr (STREAMED > 0) copy_wait();
  }

  // d = this share times the operand, whose k-tile `first` is the warp's first. With few tiles two chains of sums hide
  // more of the latency of an mma than one.
  template <class O> GK_DEVICE void multiply(float (&d)[M_TILES][O::N_TILES][4], const O &operand, int first) {
    constexpr int N_TILES = O::N_TILES, CHAINS = M_TILES * N_TILES < 4 ? 2 : 1;
    float sums[CHAINS][M_TILES][N_TILES][4] = {};
    GK_UNROLL for (int kt = 0; kt + 1 < KEPT + IN_SHARED; kt += 2) {
      unsigned b[N_TILES][4];
      GK_UNROLL for (int nt = 0; nt < N_TILES; nt++) operand.template fragments<2>(b[nt], nt, first + kt);
      GK_UNROLL for (int mt = 0; mt < M_TILES; mt++) GK_UNROLL for (int i = 0; i < 2; i++) {
        unsigned a[4];
        resident(a, mt, kt + i);
        GK_UNROLL for (int nt = 0; nt < N_TILES; nt++)
            mma(sums[i % CHAINS][mt][nt], a, {b[nt][2 * i], b[nt][2 * i + 1]}, X{});
      }
    }
    if constexpr ((KEPT + IN_SHARED) % 2) {
      constexpr int kt = KEPT + IN_SHARED - 1;
      unsigned b[N_TILES][2];
      GK_UNROLL for (int nt = 0; nt < N_TILES; nt++) operand.template fragments<1>(b[nt], nt, first + kt);
      GK_UNROLL for (int mt = 0; mt < M_TILES; mt++) {
        unsigned a[4];
        resident(a, mt, kt);
        GK_UNROLL for (int nt = 0; nt < N_TILES; nt++) mma(sums[0][mt][nt], a, b[nt], X{});
      }
    }
    for (int kt = 0; kt < STREAMED; kt++) {
      unsigned b[N_TILES][2];
      GK_UNROLL for (int nt = 0; nt < N_TILES; nt++)
          operand.template fragments<1>(b[nt], nt, first + KEPT + IN_SHARED + kt);
      copy_wait<RING ? RING - 1 : 0>();
      GK_UNROLL for (int mt = 0; mt < M_TILES; mt++) {
        const Chunk a = ring[(slot * M_TILES + mt) * 32];
        GK_UNROLL for (int nt = 0; nt < N_TILES; nt++) mma(sums[0][mt][nt], a.w, b[nt], X{});
      }
      ask(slot, kt + RING < STREAMED ? kt + RING : kt + RING - STREAMED);
      slot = slot + 1 == RING ? 0 : slot + 1;
    }
    GK_UNROLL for (int mt = 0; mt < M_TILES; mt++) GK_UNROLL for (int nt = 0; nt < N_TILES; nt++)
        GK_UNROLL for (int i = 0; i < 4; i++) d[mt][nt][i] =
            CHAINS == 2 ? sums[0][mt][nt][i] + sums[CHAINS - 1][mt][nt][i] : sums[0][mt][nt][i];
  }

private:
  GK_DEVICE void keep(int mt, int kt, const Chunk &c) {
    GK_UNROLL for (int i = 0; i < 4; i++) kept[mt][kt][i] = c.w[i];
  }
  // Tiles from number BEGIN on to registers, so many at once through `stage`.
  template <int BEGIN, int AT_ONCE, class F> GK_DEVICE void load_through(Chunk *stage, F tile) {
    constexpr int TILES = KEPT * M_TILES, END = BEGIN + AT_ONCE < TILES ? BEGIN + AT_ONCE : TILES;
    GK_LOOP for (int at = BEGIN; at < END; at += 4) { // four at a time hide much of what it takes to load one
      Chunk four[4];
      GK_UNROLL for (int i = 0; i < 4; i++) if (at + i < END) four[i] = tile((at + i) % M_TILES, (at + i) / M_TILES);
      GK_UNROLL for (int i = 0; i < 4; i++) if (at + i < END) stage[(at + i - BEGIN) * 32] = four[i];
    }
    GK_UNROLL for (int at = BEGIN; at < END; at++) keep(at % M_TILES, at / M_TILES, stage[(at - BEGIN) * 32]);
    if constexpr (END < TILES) load_through<END, AT_ONCE>(stage, tile);
  }
  GK_DEVICE void resident(unsigned (&a)[4], int mt, int kt) const {
    if (kt < KEPT) {
      GK_UNROLL for (int i = 0; i < 4; i++) a[i] = kept[mt][kt < KEPT ? kt : 0][i];
    } else {
      const Chunk c = in_shared[((kt - KEPT) * M_TILES + mt) * 32];
      GK_UNROLL for (int i = 0; i < 4; i++) a[i] = c.w[i];
    }
  }
  GK_DEVICE void ask(int to, int kt) {
    GK_UNROLL for (int mt = 0; mt < M_TILES; mt++)
        copy16_async(ring + (to * M_TILES + mt) * 32, streamed + (kt * M_TILES + mt) * 32);
    copy_commit();
  }
};

// The 4 bytes that begin at value k of a row of so many, 0 beyond its end; `aligned`: all such words are.
template <bool aligned, class X> GK_DEVICE unsigned word_of_row(const X *row, int k, int width) {
  if constexpr (sizeof(X) == 4 || aligned)
    return k < width ? *reinterpret_cast<const unsigned *>(row + k) : 0;
  else
    return (k < width ? row[k].bits : 0u) | (k + 1 < width ? row[k + 1].bits : 0u) << 16;
}

// ---------------------------------------------------------------- partial sums

// What SOURCES warps, of one block or of several, have of the GATES values of ITEMS octets by n-tiles. Lanes hand over
// whole fragments of an mma, of 16 bytes where a pair of groups is of one octet, and take them back as they gave them.
template <int SOURCES, int ITEMS, int GATES> struct Sums {
  static constexpr bool PAIRS = GATES % 2 == 0;
  static constexpr int BYTES = SOURCES * ITEMS * GATES * 256;

  char *base;

  GK_DEVICE char *at(int source, int item, int gate) const {
    char *fragment = base + (source * ITEMS + item) * GATES * 256;
    return PAIRS ? fragment + gate / 2 * 512 + lane() * 16 + gate % 2 * 8 : fragment + gate * 256 + lane() * 8;
  }

  // send(octet, n-tile, gate, value) for everything that a warp has, value being a Chunk or a Half.
  template <int M_TILES, int N_TILES, class F>
  GK_DEVICE static void scatter(const float (&d)[M_TILES][N_TILES][4], int groups, F send) {
    GK_UNROLL for (int mt = 0; mt < M_TILES; mt++) GK_UNROLL for (int nt = 0; nt < N_TILES; nt++) {
      unsigned w[4];
      GK_UNROLL for (int i = 0; i < 4; i++) w[i] = as_bits(d[mt][nt][i]);
      if constexpr (PAIRS)
        send(2 * mt / GATES, nt, 2 * mt % GATES, Chunk{{w[0], w[1], w[2], w[3]}});
      else
        GK_UNROLL for (int i = 0; i < 2; i++) if (2 * mt + i < groups)
            send((2 * mt + i) / GATES, nt, (2 * mt + i) % GATES, Half{{w[2 * i], w[2 * i + 1]}});
    }
  }

  // The sums of this lane's two batch rows of an item, always in the same order.
  GK_DEVICE void gather(float (&sum)[2][GATES], int item) const {
    GK_UNROLL for (int source = 0; source < SOURCES; source++) {
      GK_UNROLL for (int gate = 0; gate < GATES; gate += PAIRS ? 2 : 1) {
        if constexpr (PAIRS) {
          const Chunk c = *reinterpret_cast<const Chunk *>(at(source, item, gate));
          GK_UNROLL for (int i = 0; i < 4; i++) add(sum[i % 2][gate + i / 2], c.w[i], source);
        } else {
          const Half h = *reinterpret_cast<const Half *>(at(source, item, gate));
          GK_UNROLL for (int j = 0; j < 2; j++) add(sum[j][gate], h.w[j], source);
        }
      }
    }
  }

private:
  GK_DEVICE static void add(float &sum, unsigned bits, int source) {
    sum = source ? sum + as_float(bits) : as_float(bits);
  }
};

// ---------------------------------------------------------------- meetings and steps

// The blocks of a team in L2. What a block wrote before arrive can be read, past L1, by all after wait. The two are
// apart so that what nobody waits for can be done between: a release waits for all stores under way.
struct Meeting {
  unsigned *count;
  unsigned size, target = 0;

  GK_DEVICE void arrive() {
    block_sync();
    if (thread() == 0) add_release(count, 1);
  }
  GK_DEVICE void wait() {
    target += size;
    if (thread() == 0) wait_reached(count, target);
    block_sync();
  }
};

// The steps of the walk in which row b takes part: rows never grow in time, so they are the first in time.
struct Span {
  int begin, end;
};
GK_DEVICE Span span_of_row(const Walk &walk, int b) {
  int low = 0, high = walk.T; // steps before `low` have the row, from `high` on they have not
  if (!walk.rows)
    low = b < walk.B ? walk.T : 0;
  else
    while (low < high) {
      const int middle = (low + high) / 2;
      if (walk.rows[middle] > b)
        low = middle + 1;
      else
        high = middle;
    }
  return walk.reverse ? Span{walk.T - low, walk.T} : Span{0, low};
}

} // namespace gk
