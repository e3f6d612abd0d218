// What a kernel may use of the machine, and nothing else. One list, two implementations:
//   on a GPU   this file, a few lines of PTX each and no CUDA header, so that NVRTC needs no include path;
//   on a CPU   tests/cuda_on_cpu/twin.h, the same names on fibers, with synchronising calls that a test can leave out.
// Addresses are generic pointers. Blocks and threads are one-dimensional; a warp is 32 threads.
#pragma once
#if !defined(__CUDACC__)
#include "twin.h"
#else

#define GK_DEVICE __device__ __forceinline__
#define GK_UNROLL _Pragma("unroll")
#define GK_LOOP _Pragma("unroll 1")
#define GK_CLUSTERS (__CUDA_ARCH__ >= 900)

namespace gk {

using int64 = long long;

// ---------------------------------------------------------------- who am I

GK_DEVICE int thread() { return threadIdx.x; }
GK_DEVICE int block() { return blockIdx.x; }
GK_DEVICE int blocks() { return gridDim.x; }
GK_DEVICE char *shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// ---------------------------------------------------------------- numbers
// How a value is stored and multiplied; all other arithmetic is float. tf32 and fp32 are both stored as float: tf32 is
// multiplied by one mma with 10 bits of mantissa, fp32 by three, which together are as good as float's own product.

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
struct alignas(16) Chunk { // the unit of a copy
  unsigned w[4];
};
struct alignas(8) Half { // of a Chunk
  unsigned w[2];
};

GK_DEVICE float as_float(unsigned u) { return __uint_as_float(u); }
GK_DEVICE unsigned as_bits(float f) { return __float_as_uint(f); }

GK_DEVICE float to_float(bf16 v) { return as_float(unsigned(v.bits) << 16); }
GK_DEVICE float to_float(fp16 v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
}
GK_DEVICE float to_float(tf32 v) { return v.value; }
GK_DEVICE float to_float(fp32 v) { return v.value; }

GK_DEVICE void store(bf16 &v, float f) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f)); }
GK_DEVICE void store(fp16 &v, float f) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f)); }
GK_DEVICE void store(tf32 &v, float f) { v.value = f; }
GK_DEVICE void store(fp32 &v, float f) { v.value = f; }

// What mma takes of a register of stored values, and two floats as such registers, the first in the low bits: rounded
// to the number type, tf32 too.
GK_DEVICE unsigned nearest_tf32(unsigned bits) {
  unsigned r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(as_float(bits)));
  return r & ~0x1fffu; // PTX leaves these bits open, and the rest of a split is taken of what is returned
}
GK_DEVICE unsigned as_operand(unsigned bits, bf16) { return bits; }
GK_DEVICE unsigned as_operand(unsigned bits, fp16) { return bits; }
GK_DEVICE unsigned as_operand(unsigned bits, tf32) { return nearest_tf32(bits); }
GK_DEVICE unsigned as_operand(unsigned bits, fp32) { return bits; }
GK_DEVICE void pack(unsigned (&w)[1], float low, float high, bf16) {
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[0]) : "f"(high), "f"(low));
}
GK_DEVICE void pack(unsigned (&w)[1], float low, float high, fp16) {
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w[0]) : "f"(high), "f"(low));
}
template <class X> GK_DEVICE void pack(unsigned (&w)[2], float low, float high, X number) {
  w[0] = as_operand(as_bits(low), number), w[1] = as_operand(as_bits(high), number);
}

// 1 / x to one unit in the last place; results below 2^-126 are 0.
GK_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---------------------------------------------------------------- one block

GK_DEVICE void block_sync() { __syncthreads(); }
// A 32-bit address in shared memory.
GK_DEVICE unsigned window(const void *p) { return unsigned(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes from global to shared memory, past L1. Copies belong to the group that the next commit
// closes; copy_wait returns when at most PENDING groups of this thread are under way.
GK_DEVICE void copy16_async(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(window(to)), "l"(from) : "memory");
}
GK_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING = 0> GK_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Past L1, which does not see what other multiprocessors write.
GK_DEVICE Chunk load_fresh(const Chunk *p) {
  Chunk c;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.w[0]), "=r"(c.w[1]), "=r"(c.w[2]), "=r"(c.w[3])
               : "l"(p)
               : "memory");
  return c;
}

// ---------------------------------------------------------------- one warp

GK_DEVICE void warp_sync() { __syncwarp(); } // lanes meet, and see what the others wrote
GK_DEVICE unsigned shuffle_xor(unsigned v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
GK_DEVICE float shuffle_xor(float v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
GK_DEVICE double shuffle_xor(double v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }

// Tiles of 8 rows x 16 bytes; lane l names row l % 8 of tile l / 8. Lane l receives bytes [4 (l % 4), + 4) of row l / 4
// of every tile. load_tiles_transposed: bytes of two-byte elements, lane l receives elements l / 4 of rows 2 (l % 4)
// and + 1.
GK_DEVICE void load_tiles(unsigned (&r)[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(window(row))
               : "memory");
}
GK_DEVICE void load_tiles(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(window(row))
               : "memory");
}

GK_DEVICE void load_tiles_transposed(unsigned (&r)[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(window(row))
               : "memory");
}
GK_DEVICE void load_tiles_transposed(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(window(row))
               : "memory");
}

// d[16 x 8] += a[16 x K] b[K x 8] with K elements in 32 bytes: 16 of two bytes, 8 of four. Accumulation in float.
// With l = lane: d[i] is row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2. a[i] is bytes [4 (l % 4) + 16 (i / 2), + 4)
// of row l / 4 + 8 (i % 2). b[i] is bytes [4 (l % 4) + 16 i, + 4) of column l / 4. In bytes that holds for every number
// type. Registers of tf32 are as_operand.
#define GK_MMA(shape, type)                                                                                            \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "  \
               "{%0,%1,%2,%3};"                                                                                        \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
GK_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bf16) { GK_MMA("m16n8k16", "bf16"); }
GK_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], fp16) { GK_MMA("m16n8k16", "f16"); }
GK_DEVICE void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { GK_MMA("m16n8k8", "tf32"); }
#undef GK_MMA
GK_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], tf32) { mma_tf32(d, a, b); }
// Each operand is a sum of two: what tf32 holds of it, and what tf32 holds of the rest.
GK_DEVICE void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], fp32) {
  unsigned x[4], x_rest[4], y[2], y_rest[2];
  GK_UNROLL for (int i = 0; i < 4; i++) {
    x[i] = nearest_tf32(a[i]);
    x_rest[i] = nearest_tf32(as_bits(as_float(a[i]) - as_float(x[i])));
  }
  GK_UNROLL for (int i = 0; i < 2; i++) {
    y[i] = nearest_tf32(b[i]);
    y_rest[i] = nearest_tf32(as_bits(as_float(b[i]) - as_float(y[i])));
  }
  mma_tf32(d, x_rest, y);
  mma_tf32(d, x, y_rest);
  mma_tf32(d, x, y);
}

// ---------------------------------------------------------------- blocks that are all resident

// A counter that only grows. add_release: what this thread, and by a block_sync before it this block, wrote is there
// for whoever then waits for the count.
GK_DEVICE void add_release(unsigned *p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
GK_DEVICE void wait_reached(const unsigned *p, unsigned target) {
  unsigned v;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  while (int(v - target) < 0); // the way to L2 and back is pause enough
}

// A word and the turn it is of, in one piece: who sees the turn has the word, without a fence or a counter. Nothing
// else is ordered by it. hear waits until pairs of neighbours (null: none) are all of this turn or a later one.
struct alignas(8) Told {
  unsigned word, turn;
};
GK_DEVICE void tell(Told *to, unsigned word, unsigned turn) {
  asm volatile("{\n.reg .b64 both;\nmov.b64 both, {%1, %2};\nst.relaxed.gpu.global.b64 [%0], both;\n}" ::"l"(to),
               "r"(word), "r"(turn)
               : "memory");
}
template <int n> GK_DEVICE void hear(Half (&words)[n], const Told *const (&from)[n], unsigned turn) {
  bool all;
  do {
    unsigned turns[n][2];
    GK_UNROLL for (int i = 0; i < n; i++) {
      turns[i][0] = turns[i][1] = turn;
      if (from[i])
        asm volatile("{\n.reg .b64 a, b;\nld.relaxed.gpu.global.v2.b64 {a, b}, [%4];\nmov.b64 {%0, %1}, a;\n"
                     "mov.b64 {%2, %3}, b;\n}"
                     : "=r"(words[i].w[0]), "=r"(turns[i][0]), "=r"(words[i].w[1]), "=r"(turns[i][1])
                     : "l"(from[i])
                     : "memory");
    }
    all = true;
    GK_UNROLL for (int i = 0; i < n; i++) all &= turns[i][0] >= turn && turns[i][1] >= turn;
  } while (!all);
}

// ---------------------------------------------------------------- one cluster; before sm_90 a block is one by itself

using Signal = unsigned long long;
#if !GK_CLUSTERS
GK_DEVICE int cluster_rank() { return 0; }
GK_DEVICE int cluster_size() { return 1; }
// Only named, where `if constexpr` leaves them out: a kernel that used one would not link.
__device__ void cluster_sync();
__device__ void signal_init(Signal *);
__device__ void signal_expect(Signal *, unsigned bytes);
__device__ void signal_wait(Signal *, unsigned parity);
__device__ void push(void *to, int rank, Chunk, Signal *);
__device__ void push(void *to, int rank, Half, Signal *);
#else
GK_DEVICE int cluster_rank() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
GK_DEVICE int cluster_size() {
  unsigned n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
GK_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
GK_DEVICE unsigned peer_window(const void *p, int rank) { // the same place in a neighbour's shared memory
  unsigned q;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(q) : "r"(window(p)), "r"(rank));
  return q;
}

// A signal counts the bytes that arrive in this block's shared memory. expect says how many belong to the phase at
// hand; push sends a value to a place in a neighbour's memory and counts it there; wait returns when the phase of that
// parity is complete, and what was pushed can be read; whole warps wait. Bytes may arrive before they are expected.
GK_DEVICE void signal_init(Signal *s) { // by one thread, and a cluster_sync before anybody pushes
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(window(s))
               : "memory");
}
GK_DEVICE void signal_expect(Signal *s, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(window(s)), "r"(bytes) : "memory");
}
GK_DEVICE void push(void *to, int rank, Chunk v, Signal *s) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   peer_window(to, rank)),
               "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]), "r"(peer_window(s, rank))
               : "memory");
}
GK_DEVICE void push(void *to, int rank, Half v, Signal *s) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(peer_window(to, rank)),
      "r"(v.w[0]), "r"(v.w[1]), "r"(peer_window(s, rank))
      : "memory");
}
GK_DEVICE void signal_wait(Signal *s, unsigned parity) {
  for (unsigned done = 0; !done;)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(window(s)), "r"(parity)
                 : "memory");
  __syncwarp(); // lanes may have left the loop one by one
}
#endif

} // namespace gk
#endif
