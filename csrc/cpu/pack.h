// Scratch memory that is kept between calls, and the orders in which tiles want their operands.
#pragma once
#include "tile.h"
#include <cstdlib>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gk {

// Scratch memory of one calling thread, kept between calls: fresh pages cost more than the arithmetic on them.
class Arena {
  struct Block {
    char *start;
    size_t size;
  };
  std::vector<Block> blocks;
  size_t used = 0, total = 0;
  static constexpr size_t page = size_t(2) << 20;

  void grow(size_t size) {
    size = (size + page - 1) / page * page;
    void *const p = std::aligned_alloc(page, size);
    if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(p, size, MADV_HUGEPAGE);
#endif
    blocks.push_back({static_cast<char *>(p), size});
    used = 0;
  }
  void drop() {
    for (const Block &b : blocks) std::free(b.start);
    blocks.clear();
  }

public:
  Arena() = default;
  Arena(const Arena &) = delete;
  ~Arena() { drop(); }
  static Arena &of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }
  // Everything taken before is void; what was several blocks becomes one.
  void reset() {
    if (blocks.size() > 1) {
      drop();
      grow(total);
    }
    used = total = 0;
  }
  template <class T> T *take(int64_t count) {
    const size_t size = (size_t(count) * sizeof(T) + 63) / 64 * 64 + 64; // 64 more: a tile may read past the last pair
    if (blocks.empty() || used + size > blocks.back().size) grow(std::max(size, total));
    T *const p = reinterpret_cast<T *>(blocks.back().start + used);
    used += size;
    total += size;
    return p;
  }
  template <class T> T *zeros(int64_t count) {
    T *const p = take<T>(count);
    std::memset(static_cast<void *>(p), 0, size_t(count) * sizeof(T) + 64);
    return p;
  }
};

// Asks for a cache line. GCC takes functions that do nothing else for ones without effect and drops their calls: so
// asm.
inline void prefetch(const void *p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
}

template <class T> constexpr int64_t vectors(int64_t n) { return (n + lanes<T> - 1) / lanes<T>; }
template <class P> constexpr int64_t sum_steps(int64_t K) { return (K + Dot<P>::depth - 1) / Dot<P>::depth; }
// Elements of a row of n, so that rows begin at cache lines and rows of 2^k bytes do not meet in the same cache sets.
template <class P> constexpr int64_t row_stride(int64_t n) {
  constexpr int64_t line = 64 / sizeof(P);
  return ((n + line - 1) / line | 1) * line;
}

template <class P> struct Packed {
  P *panels;
  Matrix<P> matrix;
};
// Room for `columns` of weights of G gates each with a sum of length K; panels a line apart, for the same reason.
template <class P> Packed<P> take_panels(Arena &arena, int64_t columns, int G, int64_t K) {
  const int64_t panel = sum_steps<P>(K) * Dot<P>::depth * G * lanes<P> + 64 / int64_t(sizeof(P));
  P *const p = arena.take<P>(vectors<P>(columns) * panel);
  return {p, {p, panel, sum_steps<P>(K), nullptr}};
}

// ---- one vector of words, a word being what one lane takes in a sum step: a value, or a pair of bfloat16

template <class P> using Word = Vec<std::conditional_t<sizeof(P) == 8, double, float>>;

template <int Gap, class V, int... J> inline void exchange(V &a, V &b, std::integer_sequence<int, J...>) {
  constexpr int L = V::size;
#if defined(__clang__)
  const auto low = __builtin_shufflevector(a.v, b.v, (J & Gap ? L + J - Gap : J)...);
  const auto high = __builtin_shufflevector(a.v, b.v, (J & Gap ? L + J : J + Gap)...);
#else
  const auto low = __builtin_shuffle(a.v, b.v, typename V::Bits{(J & Gap ? L + J - Gap : J)...});
  const auto high = __builtin_shuffle(a.v, b.v, typename V::Bits{(J & Gap ? L + J : J + Gap)...});
#endif
  a = low, b = high;
}
template <int Gap = 1, class V> inline void transpose(V (&m)[V::size]) {
  for (int i = 0; i < V::size; i++)
    if (!(i & Gap)) exchange<Gap>(m[i], m[i + Gap], std::make_integer_sequence<int, V::size>{});
  if constexpr (Gap * 2 < V::size) transpose<Gap * 2>(m);
}

// Words k .. k + L of a row of K stored values.
template <class P, class T> inline Word<P> row_words(const T *row, int64_t k, int64_t K) {
  constexpr int L = Word<P>::size, depth = Dot<P>::depth;
  if constexpr (depth == 1)
    return load(row + k, K - k);
  else {
    Word<P> words(0);
    const int64_t n = std::min<int64_t>(L * depth, K - k * depth);
    std::memcpy(&words.v, row + k * depth, n == L * depth ? sizeof words.v : size_t(n) * sizeof(P));
    return words;
  }
}
// A value of each of two rows side by side: what is a pair in a sum over rows.
inline Vec<float> pair_words(const bfloat16 *a, const bfloat16 *b, int64_t n) {
  const auto raw = [n](const bfloat16 *p) {
    Short s;
    if (n >= Vec<float>::size)
      std::memcpy(&s, p, sizeof s);
    else
      s = load_part<Short>(reinterpret_cast<const uint16_t *>(p), int(n));
    return widen(s);
  };
  return Vec<float>((Vec<float>::Raw)(raw(a) | (b ? raw(b) << 16 : raw(a) & 0)));
}
inline Vec<float> pair_words(Vec<float> a, Vec<float> b) {
  return Vec<float>((Vec<float>::Raw)(bfloat16_bits(a) | bfloat16_bits(b) << 16));
}
template <class P> inline void store_words(P *p, Word<P> w) { std::memcpy(static_cast<void *>(p), &w.v, sizeof w.v); }

// ---- orders

// G rows of K values for each of H units -> panels of [K][G][L], vectors of units [v0, v1): for sums along a row.
template <class P, class Row>
void pack_units(Row row, P *out, int64_t panel, int G, int64_t H, int64_t K, int64_t v0, int64_t v1) {
  using W = Word<P>;
  constexpr int L = W::size, depth = Dot<P>::depth;
  const int64_t steps = sum_steps<P>(K);
  for (int64_t v = v0; v < v1; v++)
    for (int g = 0; g < G; g++)
      for (int64_t k = 0; k < steps; k += L) {
        W block[L];
        for (int j = 0; j < L; j++) block[j] = v * L + j < H ? row_words<P>(row(g, v * L + j), k, K) : W(0);
        transpose(block);
        for (int64_t i = 0; i < std::min<int64_t>(L, steps - k); i++)
          store_words(out + v * panel + ((k + i) * G + g) * L * depth, block[i]);
      }
}
// Weights [G * H, K] row-major in that order (forward).
template <class P, class T>
void pack_gates(const T *w, P *out, int64_t panel, int G, int64_t H, int64_t K, int64_t v0, int64_t v1) {
  pack_units([=](int g, int64_t unit) { return w + (g * H + unit) * K; }, out, panel, G, H, K, v0, v1);
}

// Rows of `columns` stored values, K of them -> panels of [K][L], vectors of columns [v0, v1): for sums along a column.
template <class P, class Row>
void pack_rows(Row row, P *out, int64_t panel, int64_t K, int64_t columns, int64_t v0, int64_t v1) {
  constexpr int L = lanes<P>, depth = Dot<P>::depth;
  for (int64_t k = 0; k < K; k += depth) {
    const auto a = row(k), b = depth > 1 && k + 1 < K ? row(k + 1) : nullptr;
    for (int64_t v = v0; v < v1; v++) {
      P *const to = out + v * panel + k * L;
      if constexpr (depth == 1)
        store(to, load(a + v * L, columns - v * L));
      else
        store_words(to, pair_words(a + v * L, b ? b + v * L : nullptr, columns - v * L));
    }
  }
}

// n rows times weights [G * H, K] as they are, for so few rows that packing costs more than the product: a dot product
// for every gate of every unit, done(row, vector, acc [G][L]) as for packed ones.
template <int G, class P, class T, class Row, class Done>
void product_unpacked(int64_t n, int64_t v0, int64_t v1, const T *w, int64_t H, int64_t K, const Real<P> *bias, Row row,
                      Done done) {
  using D = Dot<P>;
  using V = Vec<Real<P>>;
  constexpr int L = V::size;
  const auto words = [K](const auto *p, int64_t k) {
    if constexpr (D::depth == 1)
      return row_words<P>(p, k, K);
    else
      return (typename D::W)row_words<P>(p, k, K).v;
  };
  alignas(64) Real<P> out[G * L];
  for (int64_t v = v0; v < v1; v++)
    for (int64_t r = 0; r < n; r++) {
      const P *const a = row(r);
      for (int g = 0; g < G; g++) {
        V acc[L];
        const T *unit[L];
        for (int j = 0; j < L; j++) {
          acc[j] = 0;
          unit[j] = w + (g * H + std::min(v * L + j, H - 1)) * K;
        }
        for (int64_t k = 0; k < sum_steps<P>(K); k += L) {
          const auto x = words(a, k);
          for (int j = 0; j < L; j++) acc[j] = D::add(acc[j], x, words(unit[j], k));
        }
        transpose(acc);
        for (int gap = L / 2; gap; gap /= 2)
          for (int j = 0; j < gap; j++) acc[j] += acc[j + gap];
        (bias ? acc[0] + V::load(bias + (v * G + g) * L) : acc[0]).store(out + g * L);
      }
      done(r, v, out);
    }
}

// Bias [G, H] -> [NV][G][L], zero where there is none.
template <class T> Real<T> *pack_bias(Arena &arena, const T *b, int G, int64_t H) {
  constexpr int L = lanes<T>;
  if (!b) return nullptr;
  Real<T> *const out = arena.zeros<Real<T>>(vectors<T>(H) * G * L);
  for (int64_t v = 0; v < vectors<T>(H); v++)
    for (int g = 0; g < G; g++) load(b + g * H + v * L, H - v * L).store(out + (v * G + g) * L);
  return out;
}

} // namespace gk
