// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; 2011): random words by place.
//
// The word of (row, column) under a seed is word column % 4 of the block whose counter is (column / 4, row's low and
// high half, 0) and whose key is the seed's two halves. Whoever knows seed and place knows the word: no mask is ever
// stored, and the reference, these kernels and those on a GPU draw the same ones.
#pragma once
#include "vec.h"
#include <algorithm>
#include <utility>

namespace gk {

// Blocks side by side, a 32-bit word in the low half of each 64-bit lane; what is in the high halves does not matter.
struct Philox {
  typedef uint64_t Lanes __attribute__((vector_size(vector_bytes)));
  static constexpr int blocks = vector_bytes / 8, columns = 4 * blocks; // of one draw

  uint32_t key[2];
  explicit Philox(uint64_t seed) : key{uint32_t(seed), uint32_t(seed >> 32)} {}

  static Lanes count() {
    Lanes v{};
    for (int i = 0; i < blocks; i++) v[i] = i;
    return v;
  }
  static Lanes multiply(Lanes a, uint32_t m) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_maskz_mul_epu32(__mmask8(-1), (__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
    return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
    return (a & 0xffffffffu) * m;
#endif
  }

  // The four words of blocks by row and first column.
  struct Words {
    Lanes x0, x1, x2, x3;
  };
  Words block(Lanes row, Lanes column) const {
    Lanes x0 = column / 4, x1 = row, x2 = row >> 32, x3 = Lanes{};
    uint32_t k0 = key[0], k1 = key[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
      const Lanes a = multiply(x0, 0xd2511f53u), b = multiply(x2, 0xcd9e8d57u);
      x0 = (b >> 32) ^ x1 ^ k0;
      x2 = (a >> 32) ^ x3 ^ k1;
      x1 = b, x3 = a;
    }
    return {x0, x1, x2, x3};
  }

  // The words of columns [first, first + columns) of a row; first is a multiple of 4.
  void draw(uint64_t row, uint64_t first, uint32_t *out) const {
    const auto [x0, x1, x2, x3] = block(Lanes{} + row, 4 * count() + first);
    // Words 0 and 1 of each block side by side, then 2 and 3; then the blocks one after the other.
    const Lanes low = (x0 & 0xffffffffu) | (x1 << 32), high = (x2 & 0xffffffffu) | (x3 << 32);
    uint64_t *const to = reinterpret_cast<uint64_t *>(out);
    Lanes even, odd;
#if defined(__clang__)
    interleave(low, high, even, odd, std::make_integer_sequence<int, blocks>{});
#else
    Lanes pick_even, pick_odd;
    for (int i = 0; i < blocks; i++) {
      pick_even[i] = i / 2 + (i % 2) * blocks;
      pick_odd[i] = (i + blocks) / 2 + (i % 2) * blocks;
    }
    even = __builtin_shuffle(low, high, pick_even), odd = __builtin_shuffle(low, high, pick_odd);
#endif
    std::memcpy(to, &even, sizeof even), std::memcpy(to + blocks, &odd, sizeof odd);
  }

  // The words of columns [first, first + 4) of `blocks` rows, `step` apart: [4][blocks].
  void draw_down(uint64_t row, uint64_t step, uint64_t first, uint32_t *out) const {
    typedef uint32_t Half __attribute__((vector_size(vector_bytes / 2)));
    const auto [x0, x1, x2, x3] = block(count() * step + row, Lanes{} + first);
    const Lanes words[4] = {x0, x1, x2, x3};
    for (int i = 0; i < 4; i++) {
      const Half low = __builtin_convertvector(words[i], Half);
      std::memcpy(out + i * blocks, &low, sizeof low);
    }
  }

#if defined(__clang__)
  template <int... I>
  static void interleave(Lanes a, Lanes b, Lanes &even, Lanes &odd, std::integer_sequence<int, I...>) {
    even = __builtin_shufflevector(a, b, (I / 2 + I % 2 * blocks)...);
    odd = __builtin_shufflevector(a, b, ((I + blocks) / 2 + I % 2 * blocks)...);
  }
#endif
};

// A place is dropped with probability p: where its word is below this.
inline uint32_t dropped_below(double p) { return uint32_t(std::min(p * 4294967296.0, 4294967295.0)); }

// Which values of a row a dropout keeps, and what the kept ones are multiplied with: place (row, column) is dropped
// when its word is below p 2^32.
template <class F> struct Dropout {
  Philox philox;
  uint32_t below;
  F scale;
  bool on;
  Dropout(double p, uint64_t seed)
      : philox(seed), below(dropped_below(p)), scale(p < 1 ? F(1 / (1 - p)) : F(0)), on(p > 0) {}

  // Fills [0, n) of `factors` with 0 and scale, for columns [first, first + n) of a row; room for one draw more is
  // needed.
  void factors(uint64_t row, int64_t first, int64_t n, F *factors) const {
    const Dropout d = *this; // what `factors` points at might be this
    alignas(64) uint32_t words[Philox::columns];
    for (int64_t c = 0; c < n; c += Philox::columns) {
      d.philox.draw(row, first + c, words);
      for (int i = 0; i < Philox::columns; i++) factors[c + i] = words[i] < d.below ? F(0) : d.scale;
    }
  }
  // The same for n rows, `step` apart, side by side: [columns][stride]; whole draws are written.
  void factors_down(uint64_t row, uint64_t step, int64_t n, int64_t first, int64_t columns, F *factors,
                    int64_t stride) const {
    const Dropout d = *this;
    constexpr int blocks = Philox::blocks;
    alignas(64) uint32_t words[4 * blocks];
    for (int64_t r = 0; r < n; r += blocks)
      for (int64_t c = 0; c < columns; c += 4) {
        d.philox.draw_down(row + r * step, step, first + c, words);
        for (int w = 0; w < 4; w++)
          for (int i = 0; i < blocks; i++)
            factors[(c + w) * stride + r + i] = words[w * blocks + i] < d.below ? F(0) : d.scale;
      }
  }
};

} // namespace gk
