// The primitives of csrc/cuda/platform.cuh on a CPU, stricter than a GPU: what PTX leaves undefined is a fault or a
// NaN.
//
// * A site is a synchronising call, known by its file and line. Left out, it lets its thread pass.
// * What is under way arrives as late as it may, when somebody waits for it; until then its destination is NaN.
// * What a thread does between two calls is plain C++, which sanitizers see. The runtime is not instrumented, and tells
//   ThreadSanitizer of exactly the order that a call promises: lanes of a warp that meet at an mma, for one, order
//   nothing.
#pragma once
#include "runtime.h"
#include <cmath>
#include <cstring>

#define GK_DEVICE inline
#define GK_UNROLL
#define GK_LOOP
#ifndef GK_CLUSTERS
#define GK_CLUSTERS 1 // 0: a GPU before sm_90
#endif
#define GK_SITE twin::Site site = twin::Site::here()
#define __global__
#define __launch_bounds__(...)

namespace gk {

using int64 = long long;

// ---------------------------------------------------------------- who am I

GK_DEVICE int thread() { return twin::thread(); }
GK_DEVICE int block() { return twin::block(); }
GK_DEVICE int blocks() { return twin::blocks(); }
GK_DEVICE char *shared() { return twin::shared(); }

// ---------------------------------------------------------------- numbers

struct bf16 {
  unsigned short bits;
};
struct fp16 {
  unsigned short bits;
};
struct tf32 {
  float value;
};
struct fp32 {
  float value;
};
struct alignas(16) Chunk {
  unsigned w[4];
};
struct alignas(8) Half {
  unsigned w[2];
};

GK_DEVICE float as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
GK_DEVICE unsigned as_bits(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return u;
}

GK_DEVICE float to_float(bf16 v) { return as_float(unsigned(v.bits) << 16); }
GK_DEVICE float to_float(fp16 v) {
  const unsigned sign = (v.bits & 0x8000u) << 16, rest = (v.bits & 0x7fffu) << 13;
  const bool finite = rest < 0x7c00u << 13;
  return as_float(sign | (finite ? as_bits(as_float(rest) * 0x1p112f) : rest | 0x7f800000u));
}
GK_DEVICE float to_float(tf32 v) { return v.value; }
GK_DEVICE float to_float(fp32 v) { return v.value; }

GK_DEVICE void store(bf16 &v, float f) {
  const unsigned u = as_bits(f);
  v.bits = f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
GK_DEVICE void store(fp16 &v, float f) {
  const unsigned sign = as_bits(f) >> 16 & 0x8000;
  const float size = std::fabs(f);
  unsigned u;
  if (size != size)
    u = 0x7fff | sign; // nobody can rely on the sign of a NaN
  else if (size >= 65520.f)
    u = 0x7c00;
  else if (size < 0x1p-14f)
    u = unsigned(std::nearbyint(size * 0x1p24f)); // subnormal: a multiple of 2^-24
  else {
    u = as_bits(size * 0x1p-112f);
    u = (u + 0xfff + (u >> 13 & 1)) >> 13;
  }
  v.bits = u | sign;
}
GK_DEVICE void store(tf32 &v, float f) { v.value = f; }
GK_DEVICE void store(fp32 &v, float f) { v.value = f; }

GK_DEVICE unsigned nearest_tf32(unsigned bits) { // ties away from zero
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u, infinite = (bits & 0x7fffffffu) == 0x7f800000u;
  return nan ? 0x7fffe000u : infinite ? bits : (bits + 0x1000u) & ~0x1fffu;
}
GK_DEVICE unsigned as_operand(unsigned bits, bf16) { return bits; }
GK_DEVICE unsigned as_operand(unsigned bits, fp16) { return bits; }
GK_DEVICE unsigned as_operand(unsigned bits, tf32) { return nearest_tf32(bits); }
GK_DEVICE unsigned as_operand(unsigned bits, fp32) { return bits; }
namespace twin {
template <class X> GK_DEVICE unsigned pair(float low, float high) {
  X x, y;
  store(x, low), store(y, high);
  return x.bits | unsigned(y.bits) << 16;
}
} // namespace twin
GK_DEVICE void pack(unsigned (&w)[1], float low, float high, bf16) { w[0] = twin::pair<bf16>(low, high); }
GK_DEVICE void pack(unsigned (&w)[1], float low, float high, fp16) { w[0] = twin::pair<fp16>(low, high); }
template <class X> GK_DEVICE void pack(unsigned (&w)[2], float low, float high, X number) {
  w[0] = as_operand(as_bits(low), number), w[1] = as_operand(as_bits(high), number);
}

GK_DEVICE float reciprocal(float x) {
  const float y = 1 / x;
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.f, y) : y;
}

// ---------------------------------------------------------------- one block

GK_DEVICE void block_sync(GK_SITE) {
  if (twin::in_force("block_sync", site)) twin::block_barrier();
}
GK_DEVICE unsigned window(const void *p) { return twin::window(p, 1); }

GK_DEVICE void copy16_async(void *to, const void *from, GK_SITE) {
  twin::enter("copy16_async", site);
  twin::window(to, 16), twin::aligned(to, 16), twin::aligned(from, 16);
  const Chunk early = *(const Chunk *)from;
  *(Chunk *)to = Chunk{{~0u, ~0u, ~0u, ~0u}};
  twin::copy_begin({to, from, {early.w[0], early.w[1], early.w[2], early.w[3]}});
}
GK_DEVICE void copy_commit(GK_SITE) {
  if (twin::in_force("copy_commit", site)) twin::copy_commit();
}
template <int PENDING = 0> GK_DEVICE void copy_wait(GK_SITE) {
  if (!twin::in_force("copy_wait", site)) return;
  for (twin::Copy copy; twin::copy_land(PENDING, copy);) {
    const Chunk late = *(const Chunk *)copy.from;
    for (int i = 0; i < 4; i++)
      if (late.w[i] != copy.early[i]) twin::fault("the source of a copy changed while it was under way");
    *(Chunk *)copy.to = late;
  }
}

GK_DEVICE Chunk load_fresh(const Chunk *p, GK_SITE) {
  twin::enter("load_fresh", site);
  twin::aligned(p, 16);
  return *p;
}

// ---------------------------------------------------------------- one warp

namespace twin {
template <class T> GK_DEVICE T shuffle_xor(T v, int lanes, Site site) {
  enter("shuffle_xor", site);
  if (lanes < 0 || lanes > 31) fault("lane %d of a warp of 32", lanes);
  const void *all = exchange(&v, sizeof v);
  memcpy(&v, (const char *)all + ((thread() % 32) ^ lanes) * lane_bytes, sizeof v);
  return v;
}

struct Row { // of a tile
  Chunk held;
  unsigned at;
};
// Which row each lane named, and what it held.
struct Tiles {
  const char *all;
  const Row &operator()(int tile, int row) const { return *(const Row *)(all + (8 * tile + row) * lane_bytes); }

  Tiles(const void *row, int tiles) {
    const int lane = thread() % 32;
    Row mine{};
    if (lane < 8 * tiles) {
      mine.at = window(row, 16), aligned(row, 16);
      mine.held = *(const Chunk *)row;
    }
    all = (const char *)exchange(&mine, sizeof mine);
    for (int i = 0; lane == 0 && i < tiles; i++) {
      int most = 1; // rows that lie in the same four banks
      for (int j = 0; j < 8; j++) {
        int same = 1;
        for (int k = 0; k < j; k++) {
          const unsigned a = (*this)(i, j).at, b = (*this)(i, k).at;
          same += a != b && a % 128 == b % 128;
        }
        most = same > most ? same : most;
      }
      bank_conflicts(most - 1);
    }
  }
};
template <int TILES> GK_DEVICE void load_tiles(unsigned (&r)[TILES], const void *row, Site site) {
  enter("load_tiles", site);
  const Tiles tiles(row, TILES);
  const int lane = thread() % 32;
  for (int i = 0; i < TILES; i++) r[i] = tiles(i, lane / 4).held.w[lane % 4];
}
template <int TILES> GK_DEVICE void load_tiles_transposed(unsigned (&r)[TILES], const void *row, Site site) {
  enter("load_tiles_transposed", site);
  const Tiles tiles(row, TILES);
  const int lane = thread() % 32, column = lane / 4;
  auto element = [&](int i, int row) { return tiles(i, row).held.w[column / 2] >> column % 2 * 16 & 0xffff; };
  for (int i = 0; i < TILES; i++) r[i] = element(i, lane % 4 * 2) | element(i, lane % 4 * 2 + 1) << 16;
}

// Every lane brings what it holds of a and b as floats, PER to a register.
template <int PER, class Number>
GK_DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Number number, Site site) {
  struct Held {
    float a[4][PER], b[2][PER];
  } mine;
  static_assert(sizeof(Held) <= lane_bytes);
  enter("mma", site);
  for (int j = 0; j < PER; j++) {
    for (int i = 0; i < 4; i++) mine.a[i][j] = number(a[i], j);
    for (int i = 0; i < 2; i++) mine.b[i][j] = number(b[i], j);
  }
  const char *all = (const char *)exchange(&mine, sizeof mine);
  auto of = [all](int lane) { return (const Held *)(all + lane * lane_bytes); };
  const int row = thread() % 32 / 4, column = thread() % 4 * 2;
  for (int i = 0; i < 4; i++) {
    float sum = 0;
    for (int part = 0; part < 2; part++) // 16 bytes of the 32
      for (int word = 0; word < 4; word++)
        for (int j = 0; j < PER; j++)
          sum += of(row * 4 + word)->a[part * 2 + i / 2][j] * of((column + i % 2) * 4 + word)->b[part][j];
    d[i] += sum;
  }
}
template <class X>
GK_DEVICE void multiply_halves(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], Site site) {
  multiply<2>(d, a, b, [](unsigned u, int j) { return to_float(X{(unsigned short)(u >> 16 * j)}); }, site);
}
} // namespace twin

GK_DEVICE void warp_sync(GK_SITE) {
  if (twin::in_force("warp_sync", site)) twin::warp_barrier();
}
GK_DEVICE unsigned shuffle_xor(unsigned v, int lanes, GK_SITE) { return twin::shuffle_xor(v, lanes, site); }
GK_DEVICE float shuffle_xor(float v, int lanes, GK_SITE) { return twin::shuffle_xor(v, lanes, site); }
GK_DEVICE double shuffle_xor(double v, int lanes, GK_SITE) { return twin::shuffle_xor(v, lanes, site); }

GK_DEVICE void load_tiles(unsigned (&r)[2], const void *row, GK_SITE) { twin::load_tiles(r, row, site); }
GK_DEVICE void load_tiles(unsigned (&r)[4], const void *row, GK_SITE) { twin::load_tiles(r, row, site); }
GK_DEVICE void load_tiles_transposed(unsigned (&r)[2], const void *row, GK_SITE) {
  twin::load_tiles_transposed(r, row, site);
}
GK_DEVICE void load_tiles_transposed(unsigned (&r)[4], const void *row, GK_SITE) {
  twin::load_tiles_transposed(r, row, site);
}

GK_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16, GK_SITE) {
  twin::multiply_halves<bf16>(d, a, b, site);
}
GK_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], fp16, GK_SITE) {
  twin::multiply_halves<fp16>(d, a, b, site);
}
GK_DEVICE void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], GK_SITE) {
  auto number = [&](unsigned u, int) {
    if (u & 0x1fff) twin::fault("mma takes a tf32 as_operand: the tensor core would cut %g", as_float(u));
    return as_float(u);
  };
  twin::multiply<1>(d, a, b, number, site);
}
GK_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], tf32, GK_SITE) {
  mma_tf32(d, a, b, site);
}
GK_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], fp32, GK_SITE) {
  unsigned x[4], x_rest[4], y[2], y_rest[2];
  for (int i = 0; i < 4; i++) {
    x[i] = nearest_tf32(a[i]);
    x_rest[i] = nearest_tf32(as_bits(as_float(a[i]) - as_float(x[i])));
  }
  for (int i = 0; i < 2; i++) {
    y[i] = nearest_tf32(b[i]);
    y_rest[i] = nearest_tf32(as_bits(as_float(b[i]) - as_float(y[i])));
  }
  mma_tf32(d, x_rest, y, site);
  mma_tf32(d, x, y_rest, site);
  mma_tf32(d, x, y, site);
}

// ---------------------------------------------------------------- blocks that are all resident
// Left out, add_release counts without ordering memory.

GK_DEVICE void add_release(unsigned *p, unsigned v, GK_SITE) {
  const bool release = twin::in_force("add_release", site);
  twin::aligned(p, 4);
  twin::count(p, v, release);
}
GK_DEVICE void wait_reached(const unsigned *p, unsigned target, GK_SITE) {
  if (!twin::in_force("wait_reached", site)) return;
  twin::aligned(p, 4);
  twin::reached(p, target);
}

struct alignas(8) Told {
  unsigned word, turn;
};
GK_DEVICE void tell(Told *to, unsigned word, unsigned turn, GK_SITE) {
  if (!twin::in_force("tell", site)) return;
  twin::aligned(to, 8);
  __atomic_fetch_or((unsigned long long *)to, 0, __ATOMIC_RELAXED); // for the race detector; it lands later
  twin::tell(to, (unsigned long long)turn << 32 | word);
}
template <int n> GK_DEVICE void hear(Half (&words)[n], const Told *const (&from)[n], unsigned turn, GK_SITE) {
  const bool waits = twin::in_force("hear", site);
  for (int i = 0; i < n; i++) {
    if (!from[i]) continue;
    twin::aligned(from[i], 16);
    for (int j = 0; j < 2; j++) {
      if (waits) twin::heard(&from[i][j].turn, turn);
      words[i].w[j] = unsigned(__atomic_load_n((const unsigned long long *)(from[i] + j), __ATOMIC_RELAXED));
    }
  }
}

// ---------------------------------------------------------------- one cluster

using Signal = unsigned long long;
#if !GK_CLUSTERS
GK_DEVICE int cluster_rank() { return 0; }
GK_DEVICE int cluster_size() { return 1; }
#else
GK_DEVICE int cluster_rank() { return twin::cluster_rank(); }
GK_DEVICE int cluster_size() { return twin::cluster_size(); }
GK_DEVICE void cluster_sync(GK_SITE) {
  if (twin::in_force("cluster_sync", site)) twin::cluster_barrier();
}
GK_DEVICE unsigned peer_window(const void *p, int rank) { return twin::peer(p, rank, 1), window(p); }

namespace twin {
GK_DEVICE void initialised(const Signal *s) {
  if (*s != signal_mark) fault("a signal that is not initialised, or was overwritten");
}
template <class T> GK_DEVICE void push(void *to, int rank, T v, Signal *s, Site site) {
  enter("push", site);
  aligned(to, sizeof v), aligned(s, sizeof *s);
  char *there = peer(to, rank, sizeof v);
  Signal *signal = (Signal *)peer(s, rank, sizeof *s);
  initialised(signal);
  for (unsigned &w : v.w) ((unsigned *)there)[&w - v.w] = ~0u;
  signal_send(signal, there, &v, sizeof v);
}
} // namespace twin

GK_DEVICE void signal_init(Signal *s, GK_SITE) {
  if (!twin::in_force("signal_init", site)) return;
  twin::window(s, sizeof *s), twin::aligned(s, sizeof *s);
  *s = twin::signal_mark;
  twin::signal_begin(s);
}
GK_DEVICE void signal_expect(Signal *s, unsigned bytes, GK_SITE) {
  if (!twin::in_force("signal_expect", site)) return;
  twin::window(s, sizeof *s), twin::initialised(s);
  twin::signal_open(s, bytes);
}
GK_DEVICE void push(void *to, int rank, Chunk v, Signal *s, GK_SITE) { twin::push(to, rank, v, s, site); }
GK_DEVICE void push(void *to, int rank, Half v, Signal *s, GK_SITE) { twin::push(to, rank, v, s, site); }
GK_DEVICE void signal_wait(Signal *s, unsigned parity, GK_SITE) {
  if (!twin::in_force("signal_wait", site)) return;
  twin::window(s, sizeof *s), twin::initialised(s);
  twin::signal_heard(s, parity);
}
#endif

} // namespace gk
