// What a step of a recurrent kernel is made of, each part alone: exchange in a cluster, exchange through L2, tensor
// cores. Kernels run `rounds` rounds, so that the difference of two launches is the time of a round and nothing else.
// In a cluster a block hands on what it has just received, plus one: no round can begin early, and the last value says
// that none was lost. The file is pasted in front of the line that instantiates a kernel (micro.py), and runs on a CPU
// by the twin of platform.cuh.
//
// Dims: C blocks of a cluster, W warps; M and K tiles of the matrix that a warp keeps, in rows and along the
// contraction.
#include "platform.cuh"

namespace gk {

struct MicroArgs {
  int rounds;
  int bytes;          // that a block hands to each other block in a round: a multiple of 16; Stream reads whole sweeps
  int sources;        // whom it takes them from, or plays with
  unsigned *arrivals; // [1] zero at launch
  char *exchange; // [2, blocks, bytes], twice that for Words, and zero at launch; Stream: [blocks, bytes]; Products:
                  // [M, K, 4, 32] pairs or ones of X, all one
  unsigned *out;  // [blocks, threads] what each thread has seen last
};

template <int W> struct Empty {
  static constexpr int THREADS = 32 * W, SHARED_BYTES = 0;
  GK_DEVICE static void run(const MicroArgs &p) { p.out[block() * THREADS + thread()] = p.rounds; }
};

#if GK_CLUSTERS

template <int C, int W> struct ClusterBarrier {
  static constexpr int THREADS = 32 * W, SHARED_BYTES = 0;
  GK_DEVICE static void run(const MicroArgs &p) {
    for (int i = 0; i < p.rounds; i++) cluster_sync();
    p.out[block() * THREADS + thread()] = p.rounds;
  }
};

// Block 0 of a cluster and block `sources` throw one chunk to and fro; a round is both ways.
template <int C> struct PingPong {
  static constexpr int THREADS = 32, SHARED_BYTES = 32;
  GK_DEVICE static void run(const MicroArgs &p) {
    Chunk *slot = (Chunk *)shared();
    Signal *signal = (Signal *)(slot + 1);
    const int rank = cluster_rank();
    if (thread() == 0) signal_init(signal);
    cluster_sync();
    unsigned seen = 0;
    if (rank == 0 || rank == p.sources) {
      const int other = rank == 0 ? p.sources : 0;
      const bool plays = thread() == 0; // the others of its warp wait with it
      for (int i = 0; i < p.rounds; i++) {
        if (plays) signal_expect(signal, sizeof(Chunk));
        if (plays && rank == 0) push(slot, other, Chunk{{seen + 1, 0, 0, 0}}, signal);
        signal_wait(signal, i % 2);
        if (plays) seen = slot->w[0];
        if (plays && rank != 0) push(slot, other, Chunk{{seen + 1, 0, 0, 0}}, signal);
      }
    }
    p.out[block() * THREADS + thread()] = seen; // whoever leaves has waited for all that was on its way to it
  }
};

// Every block sends `bytes` to every block of its cluster, itself too, and goes on when it has what all of them sent:
// the exchange of a forward step, and in bytes and pattern that of a backward step.
template <int C, int W, int MOST> struct AllGather {
  static constexpr int THREADS = 32 * W, AT_SIGNAL = 2 * C * MOST, SHARED_BYTES = AT_SIGNAL + 2 * sizeof(Signal);
  GK_DEVICE static void run(const MicroArgs &p) {
    Signal *signal = (Signal *)(shared() + AT_SIGNAL);
    const int rank = cluster_rank(), chunks = p.bytes / int(sizeof(Chunk));
    if (thread() == 0) {
      signal_init(signal);
      signal_init(signal + 1);
    }
    cluster_sync();
    unsigned seen = 0;
    for (int i = 0; i < p.rounds; i++) {
      char *buffer = shared() + i % 2 * C * MOST;
      if (thread() == 0) signal_expect(signal + i % 2, C * p.bytes);
      for (int k = thread(); k < C * chunks; k += THREADS) // neighbours in a warp send to different blocks
        push(buffer + rank * MOST + k / C * sizeof(Chunk), (rank + k) % C, Chunk{{seen + 1, 0, 0, 0}}, signal + i % 2);
      signal_wait(signal + i % 2, i / 2 % 2);
      const int k = thread() % (C * chunks);
      seen = ((Chunk *)(buffer + k % C * MOST))[k / C].w[0];
      block_sync(); // the block's next pushes say that all of it has read: only then may others write here again
    }
    p.out[block() * THREADS + thread()] = seen; // whoever leaves has waited for all that was on its way to it
  }
};

#endif

// Every block publishes `bytes`, all blocks meet, and each reads what `sources` blocks have published. With no bytes it
// is the barrier of the grid alone.
template <int W> struct GridExchange {
  static constexpr int THREADS = 32 * W, SHARED_BYTES = 0;
  GK_DEVICE static void run(const MicroArgs &p) {
    const int chunks = p.bytes / int(sizeof(Chunk));
    unsigned seen = 0;
    for (int i = 0; i < p.rounds; i++) {
      Chunk *buffer = (Chunk *)p.exchange + int64(i % 2) * blocks() * chunks;
      for (int k = thread(); k < chunks; k += THREADS)
        buffer[int64(block()) * chunks + k] = Chunk{{unsigned(i + 1), 0, 0, 0}};
      block_sync();
      if (thread() == 0) {
        add_release(p.arrivals, 1);
        wait_reached(p.arrivals, unsigned(i + 1) * blocks());
      }
      block_sync();
      unsigned least = unsigned(i + 1);
      for (int k = thread(); k < p.sources * chunks; k += THREADS) {
        const unsigned w = load_fresh(buffer + int64((block() + k / chunks) % blocks()) * chunks + k % chunks).w[0];
        least = w < least ? w : least;
      }
      seen = least == unsigned(i + 1) ? seen + 1 : seen;
    }
    p.out[block() * THREADS + thread()] = seen;
  }
};

// Every block tells `bytes`, word by word with its turn, and goes on when it has heard what `sources` blocks told in
// this turn. Blocks that are not all of the others' sources may be a turn or two ahead of them, and then later words
// are heard.
template <int W> struct Words {
  static constexpr int THREADS = 32 * W, SHARED_BYTES = 0, AHEAD = 4;
  GK_DEVICE static void run(const MicroArgs &p) {
    const int words = p.bytes / int(sizeof(unsigned)), pairs = p.sources * (words / 2);
    unsigned seen = 0;
    for (int i = 0; i < p.rounds; i++) {
      const unsigned turn = i + 1;
      Told *buffer = (Told *)p.exchange + int64(i % 2) * blocks() * words;
      for (int k = thread(); k < words; k += THREADS) tell(buffer + int64(block()) * words + k, turn, turn);
      unsigned least = turn, most = turn;
      for (int k = thread(); k < pairs; k += AHEAD * THREADS) {
        Half heard[AHEAD];
        const Told *from[AHEAD];
        GK_UNROLL for (int j = 0; j < AHEAD; j++) {
          const int at = k + j * THREADS, source = (block() + at / (words / 2)) % blocks();
          heard[j] = Half{{turn, turn}};
          from[j] = at < pairs ? buffer + int64(source) * words + at % (words / 2) * 2 : nullptr;
        }
        hear(heard, from, turn);
        GK_UNROLL for (int j = 0; j < AHEAD; j++) GK_UNROLL for (int h = 0; h < 2; h++) {
          least = heard[j].w[h] < least ? heard[j].w[h] : least;
          most = heard[j].w[h] > most ? heard[j].w[h] : most;
        }
      }
      if (least == turn && (most == turn || p.sources < blocks())) seen++;
      block_sync(); // what the block tells from here on says that all of it has heard
    }
    p.out[block() * THREADS + thread()] = seen;
  }
};

// Every block reads the same `bytes` of its own in every round: weights that fit neither registers nor shared memory.
template <int W> struct Stream {
  static constexpr int THREADS = 32 * W, SHARED_BYTES = 0, AHEAD = 4;
  GK_DEVICE static void run(const MicroArgs &p) {
    const Chunk *from = (const Chunk *)p.exchange + int64(block()) * (p.bytes / int(sizeof(Chunk)));
    unsigned seen = 0;
    for (int i = 0; i < p.rounds; i++)
      for (int k = thread(); k < p.bytes / int(sizeof(Chunk)); k += AHEAD * THREADS) {
        Chunk c[AHEAD];
        GK_UNROLL for (int j = 0; j < AHEAD; j++) c[j] = load_fresh(from + k + j * THREADS);
        GK_UNROLL for (int j = 0; j < AHEAD; j++) seen += c[j].w[0] + c[j].w[3];
      }
    p.out[block() * THREADS + thread()] = seen;
  }
};

// A warp's tiles of the matrix in registers, 8 columns from shared memory: the product of a step. All numbers are one.
template <class X, int W, int M, int K> struct Products {
  static constexpr int THREADS = 32 * W, ROW = K * 32 + 16,
                       SHARED_BYTES = 8 * ROW; // 16 more: rows begin in other banks
  GK_DEVICE static void run(const MicroArgs &p) {
    const int lane = thread() % 32;
    for (int i = thread(); i < SHARED_BYTES / int(sizeof(X)); i += THREADS) store(((X *)shared())[i], 1.f);
    unsigned a[M][K][4];
    GK_UNROLL for (int m = 0; m < M; m++) GK_UNROLL for (int k = 0; k < K; k++) GK_UNROLL for (int i = 0; i < 4; i++)
        a[m][k][i] = ((const unsigned *)p.exchange)[((m * K + k) * 4 + i) * 32 + lane];
    block_sync();
    float d[M][4] = {};
    for (int r = 0; r < p.rounds; r++) GK_UNROLL for (int k = 0; k < K; k++) {
        unsigned b[2];
        load_tiles(b, shared() + lane % 8 * ROW + k * 32 + lane / 8 % 2 * 16);
        GK_UNROLL for (int m = 0; m < M; m++) mma(d[m], a[m][k], b, X{});
      }
    float least = d[0][0];
    GK_UNROLL for (int m = 0; m < M; m++) GK_UNROLL for (int i = 0; i < 4; i++) least =
        d[m][i] < least ? d[m][i] : least;
    p.out[block() * THREADS + thread()] = unsigned(least);
  }
};

} // namespace gk
