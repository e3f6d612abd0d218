// Kernels that use each primitive of the twin alone, three exchanges between blocks, and ways to go wrong.
// Every one takes the same arguments; tests/cuda_on_cpu/test_twin.py says what it puts into them.
#pragma once
#include "platform.cuh"

namespace gk {

struct Args {
  const void *in;
  void *out;
  unsigned *counter; // [1], zero at launch
  int n, which;
};

template <class T> T in(const Args &p, int i) { return ((const T *)p.in)[i]; }
template <class T> T &out(const Args &p, int i) { return ((T *)p.out)[i]; }

// ---------------------------------------------------------------- one warp

struct Shuffles {
  static void run(const Args &p) {
    out<double>(p, thread()) = shuffle_xor(in<double>(p, thread()), p.n);
    out<double>(p, 32 + thread()) = shuffle_xor(float(in<double>(p, thread())), p.n);
    out<double>(p, 64 + thread()) = shuffle_xor(unsigned(thread()), p.n);
  }
};

struct Tiles { // in: 32 rows of 16 bytes; out: what every lane gets of two and four tiles, and of them transposed
  static void run(const Args &p) {
    Chunk *rows = (Chunk *)shared();
    rows[thread()] = in<Chunk>(p, thread());
    block_sync();
    unsigned two[2], four[4], *to = &out<unsigned>(p, thread() * 12);
    load_tiles(two, rows + thread() % 16), load_tiles(four, rows + thread());
    for (int i = 0; i < 2; i++) to[i] = two[i];
    for (int i = 0; i < 4; i++) to[2 + i] = four[i];
    load_tiles_transposed(two, rows + thread() % 16), load_tiles_transposed(four, rows + thread());
    for (int i = 0; i < 2; i++) to[6 + i] = two[i];
    for (int i = 0; i < 4; i++) to[8 + i] = four[i];
  }
};

struct Banks { // rows n bytes apart
  static void run(const Args &p) {
    unsigned r[2];
    load_tiles(r, shared() + thread() % 16 * p.n);
  }
};

template <class X> struct Mma { // in: a [16, K], b [8, K]; out: a b^T [16, 8]
  static void run(const Args &p) {
    const unsigned *a = (const unsigned *)p.in, *b = a + 16 * 8;
    const int row = thread() / 4, word = thread() % 4;
    unsigned x[4], y[2];
    for (int i = 0; i < 4; i++) x[i] = as_operand(a[(row + 8 * (i % 2)) * 8 + word + 4 * (i / 2)], X{});
    for (int i = 0; i < 2; i++) y[i] = as_operand(b[row * 8 + word + 4 * i], X{});
    float d[4] = {};
    mma(d, x, y, X{});
    for (int i = 0; i < 4; i++) out<float>(p, (row + 8 * (i / 2)) * 8 + 2 * word + i % 2) = d[i];
  }
};

template <class X> struct Convert { // in: floats; out: them as stored
  static void run(const Args &p) {
    for (int i = thread(); i < p.n; i += 32) {
      X v;
      store(v, in<float>(p, i));
      out<float>(p, i) = to_float(v);
    }
  }
};

struct Relay { // a value through the lanes of a warp by way of shared memory
  static void run(const Args &p) {
    int *cell = (int *)shared();
    cell[thread()] = thread();
    for (int i = 0; i < p.n; i++) {
      warp_sync();
      const int v = cell[(thread() + 1) % 32];
      warp_sync();
      cell[thread()] = v;
    }
    out<int>(p, thread()) = cell[thread()];
  }
};

// ---------------------------------------------------------------- copies

struct Copies { // three groups, of which the last lands last; out: what could be read after each wait
  static void run(const Args &p) {
    Chunk *place = (Chunk *)shared() + 3 * thread();
    for (int i = 0; i < 3; i++) copy16_async(place + i, (const Chunk *)p.in + i), copy_commit();
    auto look = [&](int row) {
      for (int i = 0; i < 3; i++) out<unsigned>(p, (thread() * 3 + row) * 3 + i) = place[i].w[0];
    };
    copy_wait<2>(), look(0);
    copy_wait<1>(), look(1);
    copy_wait(), look(2);
  }
};

// ---------------------------------------------------------------- exchanges, as recurrent kernels have them
// out[block][n]: n rounds, in each of which every value becomes a sum over all blocks and one more.

struct Ring { // the whole grid through global memory, two buffers by parity; in: its place
  static void run(const Args &p) {
    unsigned *buffers = (unsigned *)p.in; // [2][blocks]
    unsigned *sum = (unsigned *)shared();
    unsigned value = block();
    for (int i = 0; i < p.n; i++) {
      unsigned *now = buffers + i % 2 * blocks();
      if (thread() == 32) now[block()] = value;
      block_sync();
      if (thread() == 0) {
        add_release(p.counter, 1);
        wait_reached(p.counter, (i + 1) * blocks());
      }
      block_sync();
      if (thread() == 32) {
        *sum = 1;
        for (int k = 0; k < blocks(); k++) *sum += now[k];
      }
      block_sync();
      value = *sum;
    }
    if (thread() == 0) out<unsigned>(p, block()) = value;
  }
};

struct Talk { // the same, word by word: two buffers, no barrier of the grid
  static void run(const Args &p) {
    Told *words = (Told *)p.in; // [2][blocks]
    unsigned *all = (unsigned *)shared();
    unsigned value = block();
    for (int i = 0; i < p.n; i++) {
      Told *now = words + i % 2 * blocks();
      if (thread() == 0) tell(now + block(), value, i + 1);
      if (2 * thread() < blocks()) {
        const Told *from[1] = {now + 2 * thread()};
        Half two[1];
        hear(two, from, i + 1);
        for (int j = 0; j < 2; j++) all[2 * thread() + j] = two[0].w[j];
      }
      block_sync();
      value = 1;
      for (int k = 0; k < blocks(); k++) value += all[k];
      block_sync();
    }
    if (thread() == 0) out<unsigned>(p, block()) = value;
  }
};

#if GK_CLUSTERS
struct Gather { // all-gather in a cluster by signals: two buffers, no barrier
  static void run(const Args &p) {
    const int size = cluster_size(), rank = cluster_rank();
    Signal *signals = (Signal *)shared();
    Chunk *buffers = (Chunk *)(shared() + 16); // [2][size]
    if (thread() == 0) signal_init(signals), signal_init(signals + 1);
    cluster_sync();
    unsigned value = block();
    for (int i = 0; i < p.n; i++) {
      if (thread() == 0) signal_expect(signals + i % 2, size * 16);
      if (thread() < size) push(buffers + i % 2 * size + rank, thread(), Chunk{{value, 0, 0, value}}, signals + i % 2);
      signal_wait(signals + i % 2, i / 2 % 2);
      value = 1;
      for (int k = 0; k < size; k++) value += buffers[i % 2 * size + k].w[3];
      block_sync(); // nobody sends before all have read: a warp that only reads would be two rounds behind
    }
    if (thread() == 0) out<unsigned>(p, block()) = value; // all that is sent here has come: the block may end
  }
};

struct Scatter { // reduce-scatter in a cluster, halves of a chunk
  static void run(const Args &p) {
    const int size = cluster_size(), rank = cluster_rank();
    Signal *signals = (Signal *)shared();
    Half *buffers = (Half *)(shared() + 16);
    if (thread() < 2) signal_init(signals + thread());
    cluster_sync();
    unsigned value = block();
    for (int i = 0; i < p.n; i++) {
      if (thread() == 0) signal_expect(signals + i % 2, size * 8);
      if (thread() < size) push(buffers + i % 2 * size + rank, thread(), Half{{value, value}}, signals + i % 2);
      signal_wait(signals + i % 2, i / 2 % 2);
      value = 1;
      for (int k = 0; k < size; k++) value += buffers[i % 2 * size + k].w[1];
      block_sync();
    }
    if (thread() == 0) out<unsigned>(p, block()) = value; // all that is sent here has come: the block may end
  }
};

// ---------------------------------------------------------------- ways to go wrong, by p.which

struct Wrong {
  __attribute__((noinline)) static int deep(int n) {
    volatile int much[16 << 10];
    much[n] = n;
    return n ? deep(n - 1) + much[n] : 0;
  }

  static void run(const Args &p) {
    Signal *s = (Signal *)shared();
    Chunk *place = (Chunk *)(shared() + 64);
    const Chunk zero{};
    const bool first = thread() == 0;
    switch (p.which) {
    case 0: // half a warp
      if (thread() < 16)
        shuffle_xor(1.f, 1);
      else
        block_sync();
      break;
    case 1: // a thread that does not come
      if (thread() != 5) block_sync();
      break;
    case 2:
      out<float>(p, thread()) = *(const float *)(shared() + 2);
      break;
    case 3:
      out<Chunk>(p, thread()) = *(const Chunk *)(shared() + 8);
      break;
    case 4:
      copy16_async(shared() + 8, p.in);
      break;
    case 5:
      copy16_async(shared(), (const char *)p.in + 4);
      break;
    case 6:
      copy16_async(shared(), p.in);
      break; // and nobody waits
    case 7:  // the source changes
      copy16_async(shared() + 16 * thread(), p.in), copy_commit();
      if (first) out<unsigned>({p.in, (void *)p.in, nullptr, 0, 0}, 0)++;
      copy_wait();
      break;
    case 8:
      load_fresh((const Chunk *)((const char *)p.in + 8));
      break;
    case 9: { // past the end
      unsigned r[2];
      load_tiles(r, shared() + 4096 - 8);
      break;
    }
    case 10:
      signal_wait(s, 0);
      break; // never initialised
    case 11: // expected twice
      if (first) signal_init(s), signal_expect(s, 16), signal_expect(s, 16);
      break;
    case 12: // more than a signal counts
      if (first) signal_init(s), signal_expect(s, 1 << 20);
      break;
    case 13: // a neighbour that has ended
      if (first) signal_init(s);
      cluster_sync();
      if (cluster_rank() == 0) {
        add_release(p.counter, 1);
      } else {
        wait_reached(p.counter, 32);
        push(place, 0, zero, s);
      }
      break;
    case 14: // ends while something is on its way
      if (first) signal_init(s);
      cluster_sync();
      if (first) push(place, 1 - cluster_rank(), zero, s);
      break;
    case 15: // waits for what nobody sends
      if (first) signal_init(s), signal_expect(s, 32), push(place, cluster_rank(), zero, s);
      block_sync();
      signal_wait(s, 0);
      break;
    case 16:
      wait_reached(p.counter, 3);
      break;
    case 17: { // outside of an array
      int a[4] = {1, 2, 3, 4};
      out<int>(p, thread()) = a[p.n];
      break;
    }
    case 18:
      push(place, 2, zero, s);
      break; // no such rank
    case 19: // a signal that was written over
      if (first) signal_init(s), *(unsigned *)s = 0, signal_expect(s, 16);
      break;
    case 20: // reading what was pushed, and landed only later
      if (first) signal_init(s);
      cluster_sync();
      if (first) signal_expect(s, 16), push(place, 1 - cluster_rank(), zero, s);
      cluster_sync();
      out<unsigned>(p, block() * 2) = place->w[0];
      block_sync();
      signal_wait(s, 0);
      out<unsigned>(p, block() * 2 + 1) = place->w[0];
      cluster_sync();
      break;
    case 21:
      shuffle_xor(1.f, 32);
      break;
    case 22:
      push(place + 1000, 0, zero, s);
      break;
    case 23: { // a float that no tf32 is
      float d[4] = {};
      mma(d, {as_bits(0.1f), 0, 0, 0}, {0, 0}, tf32{});
      break;
    }
    case 24: // half a warp waits
      if (first) signal_init(s);
      block_sync();
      if (thread() < 16)
        signal_wait(s, 1);
      else
        block_sync();
      break;
    case 28: { // told, counted without release, and read: not yet there
      Told *word = (Told *)p.in;
      if (first && block() == 0) tell(word, 5, 1), p.n ? add_release(p.counter, 1) : void();
      if (!p.n) cluster_sync();
      if (first && block() == 1 && p.n) wait_reached(p.counter, 1);
      if (first && block() == 1) out<unsigned>(p, 0) = word->word;
      break;
    }
    case 25:
      *(int *)(unsigned long long)(8 * p.n) = 1;
      break; // nobody's memory
    case 26:
      out<char>(p, thread()) = shared()[4096 + p.n];
      break;
    case 27:
      out<int>(p, thread()) = deep(64);
      break; // more than there is of a stack
    }
  }
};

#endif

} // namespace gk
