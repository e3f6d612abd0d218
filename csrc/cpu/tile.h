// The register tile: acc[r][u][g] = init[r][u][g] + sum_k a[r][k] * w[u][k][g], where u counts vectors of units and the
// G gates of one vector lie side by side in w. Every matrix product of the drivers is a walk of this tile over panels.
//
// Dims: R rows, U vectors of units, G gates, L lanes of a vector, K length of the sum.
#pragma once
#include "../vec.h"
#include <algorithm>
#include <cstddef>
#include <utility>

namespace gk {

// One multiply-add of a vector of weights with a value that all lanes share. `depth` products are summed at a time.
template <class P> struct Dot {
  static constexpr int depth = 1;
  using W = Vec<P>;
  static W weights(const P *p) { return W::load(p); }
  static W spread(const P *p) { return W(*p); }
  static Vec<P> add(Vec<P> acc, W a, W w) { return acc + a * w; }
};
#if defined(__AVX512F__)
// Pairs of bfloat16, summed in float. By name in the assembler and not as an intrinsic: this file is built for every
// AVX-512 machine, and whether the instruction exists is asked at run time (has_bf16_dots).
template <> struct Dot<bfloat16> {
  static constexpr int depth = 2;
  using W = __m512i;
  static W weights(const bfloat16 *p) { return _mm512_loadu_si512(p); }
  static W spread(const bfloat16 *p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Vec<float> add(Vec<float> acc, W a, W w) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(a), "v"(w));
    return acc;
  }
};
inline bool has_bf16_dots() {
  unsigned a = 7, b = 0, c = 1, d = 0; // leaf 7.1, EAX bit 5
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return a >> 5 & 1;
}
#else
inline bool has_bf16_dots() { return false; }
#endif

// As many accumulators as the register file holds beside one row of weights and one spread value.
constexpr int accumulators = vector_bytes == 64 ? 24 : vector_bytes == 32 ? 12 : 8;
constexpr int max_units = 4;
template <int G> constexpr int max_rows = accumulators / (G < 3 ? (accumulators >= 24 ? 4 : accumulators / 4 + 1) : G);

template <class P>
using Tile = void (*)(Real<P> *out, ptrdiff_t out_row,          // [R][U][G][L], rows `out_row` apart
                      const P *const *a,                        // [R] rows, wherever they lie
                      ptrdiff_t stride,                         // from one sum step to the next within a row
                      const P *w,                               // [U] panels of [K][G][L], `panel` apart
                      ptrdiff_t panel, ptrdiff_t steps,         // steps = ceil(K / depth)
                      const Real<P> *init, ptrdiff_t init_row); // as out, or null for zero

template <class P, int R, int U, int G>
__attribute__((noinline)) void tile(Real<P> *out, ptrdiff_t out_row, const P *const *a, ptrdiff_t stride, const P *w,
                                    ptrdiff_t panel, ptrdiff_t steps, const Real<P> *init, ptrdiff_t init_row) {
  using D = Dot<P>;
  using V = Vec<Real<P>>;
  constexpr int L = V::size;
  V acc[R][U][G];
  const P *p[R];
#pragma GCC unroll 32
  for (int r = 0; r < R; r++) {
    p[r] = a[r];
#pragma GCC unroll 8
    for (int u = 0; u < U; u++)
#pragma GCC unroll 8
      for (int g = 0; g < G; g++) acc[r][u][g] = init ? V::load(init + r * init_row + (u * G + g) * L) : V(0);
  }
  for (ptrdiff_t k = 0; k < steps * stride; k += stride, w += G * L * D::depth) {
    if constexpr (R > U * G) { // whichever side is smaller stays in registers
      typename D::W m[U][G];
#pragma GCC unroll 8
      for (int u = 0; u < U; u++)
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) m[u][g] = D::weights(w + u * panel + g * L * D::depth);
#pragma GCC unroll 32
      for (int r = 0; r < R; r++) {
        const auto x = D::spread(p[r] + k);
#pragma GCC unroll 8
        for (int u = 0; u < U; u++)
#pragma GCC unroll 8
          for (int g = 0; g < G; g++) acc[r][u][g] = D::add(acc[r][u][g], x, m[u][g]);
      }
    } else {
      typename D::W x[R];
#pragma GCC unroll 32
      for (int r = 0; r < R; r++) x[r] = D::spread(p[r] + k);
#pragma GCC unroll 8
      for (int u = 0; u < U; u++)
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
          const auto m = D::weights(w + u * panel + g * L * D::depth);
#pragma GCC unroll 32
          for (int r = 0; r < R; r++) acc[r][u][g] = D::add(acc[r][u][g], x[r], m);
        }
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++)
#pragma GCC unroll 8
      for (int g = 0; g < G; g++) acc[r][u][g].store(out + r * out_row + (u * G + g) * L);
}

// The tiles of one G by rows and vectors of units; null where the accumulators would not fit.
template <class P, int G> struct Tiles {
  static constexpr int rows = max_rows<G>;

  static Tile<P> get(int r, int u) {
    static constexpr auto table = make(std::make_integer_sequence<int, rows * max_units>{});
    return table.f[(r - 1) * max_units + u - 1];
  }
  // The most vectors of units that tiles over n rows can take. A single row is bound by the stream of its weights, and
  // one stream is what a core prefetches best.
  static int units(int64_t n) {
    const int64_t parts = (n + rows - 1) / rows, largest = n < 1 ? 1 : (n + parts - 1) / parts;
    if (largest == 1 && G > 2) return 1;
    return int(std::clamp<int64_t>(accumulators / (largest * G), 1, max_units));
  }

private:
  struct Table {
    Tile<P> f[rows * max_units];
  };
  template <int R, int U> static constexpr Tile<P> at() {
    if constexpr (R * U * G <= accumulators)
      return tile<P, R, U, G>;
    else
      return nullptr;
  }
  template <int... N> static constexpr Table make(std::integer_sequence<int, N...>) {
    return {{at<N / max_units + 1, N % max_units + 1>()...}};
  }
};

// n rows times the vectors [v0, v1) of a packed matrix: done(row, vector, acc [G][L]) for each.
template <class P> struct Matrix {
  const P *panels = nullptr; // [vectors][K][G][L], `panel` apart
  ptrdiff_t panel = 0, steps = 0;
  const Real<P> *bias = nullptr; // [vectors][G][L] or null
};

template <int G, class P, class Row, class Done>
inline void product(int64_t n, int64_t v0, int64_t v1, const Matrix<P> &m, Row row, ptrdiff_t stride, Done done) {
  using Set = Tiles<P, G>;
  constexpr int L = lanes<P>;
  alignas(64) Real<P> out[accumulators * L];
  if (n < 1) return;
  const int64_t parts = (n + Set::rows - 1) / Set::rows;
  for (int64_t v = v0, u; v < v1; v += u) {
    u = std::min<int64_t>(Set::units(n), v1 - v);
    for (int64_t part = 0; part < parts; part++) { // as even as possible
      const int64_t first = n * part / parts, size = n * (part + 1) / parts - first;
      const P *rows[Set::rows];
      for (int64_t r = 0; r < size; r++) rows[r] = row(first + r);
      Set::get(int(size), int(u))(out, u * G * L, rows, stride, m.panels + v * m.panel, m.panel, m.steps,
                                  m.bias ? m.bias + v * G * L : nullptr, 0);
      for (int64_t r = 0; r < size; r++)
        for (int64_t j = 0; j < u; j++) done(first + r, v + j, out + (r * u + j) * G * L);
    }
  }
}

// What a few rows take part in: vectors [v0, v1), steps [k0, k1) of the sum.
struct Extent {
  int64_t v0, v1, k0, k1;
};

// n rows times a packed matrix of one gate, straight to where it belongs, or added to what is there.
// part(first row, rows) -> Extent: what lies outside of it is not computed, and nothing is written outside of its
// vectors.
template <class P, class Row, class Partly>
inline void product_to(Real<P> *out, ptrdiff_t out_row, bool add, int64_t n, const Matrix<P> &m, Row row,
                       ptrdiff_t stride, Partly part) {
  using Set = Tiles<P, 1>;
  constexpr int L = lanes<P>;
  if (n < 1) return;
  const int64_t groups = (n + Set::rows - 1) / Set::rows, units = Set::units(n), last = part(0, n).v1;
  for (int64_t v = part(0, n).v0; v < last; v += units)
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = n * group / groups, size = n * (group + 1) / groups - first;
      const Extent p = part(first, size);
      const int64_t from = std::max(v, p.v0), u = std::min(v + units, p.v1) - from;
      if (u < 1) continue;
      const P *rows[Set::rows];
      for (int64_t r = 0; r < size; r++) rows[r] = row(first + r) + p.k0 * stride;
      Real<P> *const to = out + first * out_row + from * L;
      Set::get(int(size), int(u))(to, out_row, rows, stride, m.panels + from * m.panel + p.k0 * L * Dot<P>::depth,
                                  m.panel, p.k1 - p.k0, add ? to : nullptr, out_row);
    }
}

} // namespace gk
