// Vec<T>: a SIMD value on compiler vector extensions, with exp, sigmoid and tanh over it; loads and stores of every
// storage type.
//
// One text for SSE2, AVX2, AVX-512 and NEON: the width is the build's. Needs -ffp-contract=fast -fno-math-errno
// -fno-trapping-math and must not be built with -ffast-math, because NaN and Inf have to travel.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define GK_ALWAYS_INLINE __attribute__((always_inline))

namespace gk {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// Storage types. Arithmetic is never done in them: Real<T> is what a stored T is computed in.
struct bfloat16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};
template <class T> using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T> struct Vec {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Raw __attribute__((vector_size(vector_bytes)));
  typedef Int Bits __attribute__((vector_size(vector_bytes)));
  static constexpr int size = vector_bytes / sizeof(T);

  Raw v;
  Vec() = default;
  Vec(Raw r) : v(r) {}
  template <class S, class = std::enable_if_t<std::is_arithmetic_v<S>>> Vec(S s) : v(T(s) - Raw{}) {}

  static Vec load(const T *p) {
    Vec x;
    std::memcpy(&x.v, p, sizeof x.v);
    return x;
  }
  void store(T *p) const { std::memcpy(p, &v, sizeof v); }

  friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend Vec operator-(Vec a) { return -a.v; }
  Vec &operator+=(Vec b) {
    v += b.v;
    return *this;
  }

  friend Bits operator<(Vec a, Vec b) { return a.v < b.v; }
  friend Bits operator>(Vec a, Vec b) { return a.v > b.v; }
  friend Bits operator<=(Vec a, Vec b) { return a.v <= b.v; }
  friend Bits operator>=(Vec a, Vec b) { return a.v >= b.v; }
  friend Bits operator==(Vec a, Vec b) { return a.v == b.v; }
  static bool any(Bits c) {
    Int all = 0;
    for (int i = 0; i < size; i++) all |= c[i];
    return all != 0;
  }
  friend Vec where(Bits c, Vec a, Vec b) { return c ? a.v : b.v; }

  // at_most(x, bound) and at_least(x, bound) let a NaN in x through. Compilers turn the comparison into
  // compare-and-blend, a quarter of the time of exp, so the instruction is named where there is one.
  friend Vec at_most(Vec x, Vec bound) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      return Raw(_mm512_maskz_min_ps(__mmask16(-1), bound.v, x.v));
    else
      return Raw(_mm512_maskz_min_pd(__mmask8(-1), bound.v, x.v));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
      return Raw(_mm256_min_ps(bound.v, x.v));
    else
      return Raw(_mm256_min_pd(bound.v, x.v));
#else
    return x.v > bound.v ? bound.v : x.v;
#endif
  }
  friend Vec at_least(Vec x, Vec bound) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      return Raw(_mm512_maskz_max_ps(__mmask16(-1), bound.v, x.v));
    else
      return Raw(_mm512_maskz_max_pd(__mmask8(-1), bound.v, x.v));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
      return Raw(_mm256_max_ps(bound.v, x.v));
    else
      return Raw(_mm256_max_pd(bound.v, x.v));
#else
    return x.v < bound.v ? bound.v : x.v;
#endif
  }
};

// ---- elementary functions

// e^x = 2^n e^r with |r| <= ln2 / 2 and e^r = 1 + r + r^2 p(r), p minimax. Adding `round` leaves n in the low bits of
// the sum.
template <class T> struct Exp;
template <> struct Exp<float> {
  static constexpr float log2e = 1.44269504f, ln2_hi = 0.693145752f, ln2_lo = 1.42860677e-6f, round = 12582912.f;
  static constexpr float low = -88.f, high = 89.f, tanh_one = 9.02f;
  static constexpr float p[] = {0.00139262131f, 0.00836320315f, 0.0416665561f, 0.166665763f, 0.5f};
  static constexpr float two[] = {0.000155946781f, 0.00134066439f, 0.00961769297f,
                                  0.0555031055f,   0.240226528f,   0.693147215f};
  static constexpr int mantissa = 23, bias = 127;
};
template <> struct Exp<double> {
  static constexpr double log2e = 1.4426950408889634, ln2_hi = 0.69314718036912382, ln2_lo = 1.9082149292705877e-10;
  static constexpr double round = 6755399441055744., low = -709., high = 710., tanh_one = 19.1;
  static constexpr double p[] = {2.5100424157005067e-08, 2.7620138719733994e-07, 2.7557268378684192e-06,
                                 2.480152119021773e-05,  0.00019841269863105968, 0.0013888888917281794,
                                 0.008333333333330051,   0.04166666666662399,    0.16666666666666669,
                                 0.5000000000000001};
  static constexpr double two[] = {4.0780719295883367e-10, 7.0725704128144235e-09, 1.0180647659234214e-07,
                                   1.3215442675329822e-06, 1.5252727385193868e-05, 1.5403530441572130e-04,
                                   1.3333558153439965e-03, 9.6181291076070024e-03, 5.5504108664790395e-02,
                                   2.4022650695910098e-01, 6.9314718055994570e-01};
  static constexpr int mantissa = 52, bias = 1023;
};

// 2^n for the n that adding `round` has left; the sum's own exponent bits leave on the left.
template <class T> inline Vec<T> power_of_two(Vec<T> shifted) {
  using V = Vec<T>;
  using E = Exp<T>;
  const typename V::Bits bits =
      ((typename V::Bits)shifted.v << E::mantissa) + (typename V::Int(E::bias) << E::mantissa);
  return V((typename V::Raw)bits);
}

// e^x = (1 + m) s. Below `low` s is 0 and above `high` infinite, so that saturation needs no branch.
template <class T> struct Reduced {
  Vec<T> m, s;
};
template <class T> inline Reduced<T> reduce(Vec<T> x) {
  using V = Vec<T>;
  using E = Exp<T>;
  const V shifted = x * V(E::log2e) + V(E::round), n = shifted - V(E::round);
  const V r = (x - n * V(E::ln2_hi)) - n * V(E::ln2_lo);
  V p = E::p[0];
  for (int i = 1; i < int(sizeof(E::p) / sizeof(T)); i++) p = p * r + V(E::p[i]);
  return {p * (r * r) + r, power_of_two(shifted)};
}

template <class T> inline Vec<T> exp(Vec<T> x) {
  const auto [m, s] = reduce(at_least(at_most(x, Vec<T>(Exp<T>::high)), Vec<T>(Exp<T>::low)));
  return (m + Vec<T>(1)) * s;
}
// 2^x for what is not large, as logarithms of probabilities are: half the instructions of exp. 2^r = 1 + r p(r) with
// |r| <= 1/2, p minimax; a result too small for the exponent is 0.
template <class T> inline Vec<T> exp2(Vec<T> x) {
  using V = Vec<T>;
  using E = Exp<T>;
  x = at_least(x, V(-E::bias));
  const V shifted = x + V(E::round), r = x - (shifted - V(E::round));
  V p = E::two[0];
  for (int i = 1; i < int(sizeof(E::two) / sizeof(T)); i++) p = p * r + V(E::two[i]);
  return (p * r + V(1)) * power_of_two(shifted);
}
template <class T> inline Vec<T> sigmoid(Vec<T> x) { return Vec<T>(1) / (Vec<T>(1) + exp(-x)); }
template <class T> inline Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  const V one = Exp<T>::tanh_one, y = at_least(at_most(x, one), -one);
  const auto [m, s] = reduce(y + y);
  const V e = m * s + (s - V(1)); // e^2x - 1 without cancellation near 0
  return e / (e + V(2));
}
template <class T> inline Vec<T> relu(Vec<T> x) {
  return where(x < Vec<T>(0), Vec<T>(0), x); // a NaN stays one
}

// ---- loads and stores: the first n lanes, n >= 1; the others read as zero and are not written. n may exceed the
// width.

template <class T> constexpr int lanes = Vec<Real<T>>::size;

// The sum of n values, halves added to one another.
template <int n, class T> inline T sum(const T *p) {
  if constexpr (n == 1)
    return *p;
  else {
    typedef T Half __attribute__((vector_size(n / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, p, sizeof low), std::memcpy(&high, p + n / 2, sizeof high);
    low += high;
    T left[n / 2];
    std::memcpy(left, &low, sizeof low);
    return sum<n / 2>(left);
  }
}
template <class T> inline T sum(const Vec<T> &x) {
  T p[Vec<T>::size];
  x.store(p);
  return sum<Vec<T>::size>(p);
}

typedef uint16_t Short __attribute__((vector_size(vector_bytes / 2)));
inline Vec<float>::Bits widen(Short s) { return __builtin_convertvector(s, Vec<float>::Bits); }
inline Short narrow(Vec<float>::Bits b) { return __builtin_convertvector(b, Short); }

inline Vec<float> decode(Short s, bfloat16) { return Vec<float>((Vec<float>::Raw)(widen(s) << 16)); }
inline Vec<float>::Bits bfloat16_bits(Vec<float> x) { // to nearest, ties to even; a NaN stays one
  typedef uint32_t Word __attribute__((vector_size(vector_bytes)));
  const Word b = (Word)x.v, rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return (Vec<float>::Bits)(x.v == x.v ? rounded : ((b >> 16) | 0x40));
}
inline Short encode(Vec<float> x, bfloat16) { return narrow(bfloat16_bits(x)); }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  uint32_t bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  if (exponent == 31) bits |= 0x7f800000;
  if (exponent == 0) { // zero or subnormal: mantissa * 2^-24, exact in float
    const float m = float(mantissa) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &m, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_half(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  const uint16_t sign = uint16_t((b >> 16) & 0x8000);
  b &= 0x7fffffff;
  if (b > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (b >= 0x477ff000) return uint16_t(sign | 0x7c00); // rounds past the largest half
  if (b < 0x38800000) {                                // subnormal: adding 0.5 rounds at 2^-24
    float m;
    std::memcpy(&m, &b, 4);
    m += 0.5f;
    std::memcpy(&b, &m, 4);
    return uint16_t(sign | (b - 0x3f000000));
  }
  return uint16_t(sign | ((b - 0x38000000 + 0xfff + ((b >> 13) & 1)) >> 13));
}
inline Vec<float> decode(Short s, half) {
#if defined(__AVX512F__)
  return Vec<float>((Vec<float>::Raw)_mm512_maskz_cvtph_ps(__mmask16(-1), (__m256i)s));
#elif defined(__AVX2__)
  return Vec<float>((Vec<float>::Raw)_mm256_cvtph_ps((__m128i)s));
#else
  Vec<float> x;
  for (int i = 0; i < Vec<float>::size; i++) x.v[i] = half_to_float(s[i]);
  return x;
#endif
}
inline Short encode(Vec<float> x, half) {
#if defined(__AVX512F__)
  return (Short)_mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Short)_mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  Short s;
  for (int i = 0; i < Vec<float>::size; i++) s[i] = float_to_half(x.v[i]);
  return s;
#endif
}

// The first n lanes, else zero.
template <class T> inline Vec<T> within(Vec<T> x, int64_t n) {
  using V = Vec<T>;
  typename V::Bits lane;
  for (int i = 0; i < V::size; i++) lane[i] = i;
  return n >= V::size ? x : V((typename V::Raw)((lane < typename V::Int(n)) & (typename V::Bits)x.v));
}

// The same values in double, in as many vectors as they take. Compilers go through memory for it.
inline std::array<Vec<double>, 1> in_double(Vec<double> x) { return {x}; }
inline std::array<Vec<double>, 2> in_double(Vec<float> x) {
#if defined(__AVX512F__)
  const auto half = [&](auto k) {
    const __m512d all = _mm512_castps_pd(x.v);
    const __m256d part = _mm512_maskz_extractf64x4_pd(__mmask8(-1), all, decltype(k)::value);
    return Vec<double>(_mm512_maskz_cvtps_pd(__mmask8(-1), _mm256_castpd_ps(part)));
  };
  return {half(std::integral_constant<int, 0>()), half(std::integral_constant<int, 1>())};
#elif defined(__AVX2__)
  return {Vec<double>(_mm256_cvtps_pd(_mm256_castps256_ps128(x.v))),
          Vec<double>(_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)))};
#else
  typedef float Half __attribute__((vector_size(vector_bytes / 2)));
  Half part[2];
  std::memcpy(part, &x.v, sizeof x.v);
  return {Vec<double>(__builtin_convertvector(part[0], Vec<double>::Raw)),
          Vec<double>(__builtin_convertvector(part[1], Vec<double>::Raw))};
#endif
}

// Part of a vector of any element, by mask where the machine has one.
template <class Raw, class E> inline Raw load_part(const E *p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 2)
    return (Raw)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
  else if constexpr (sizeof(E) == 4)
    return (Raw)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else
    return (Raw)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#else
  E part[sizeof(Raw) / sizeof(E)] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  Raw r;
  std::memcpy(&r, part, sizeof r);
  return r;
#endif
}
template <class Raw, class E> inline void store_part(E *p, int n, Raw r) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 2)
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)r);
  else if constexpr (sizeof(E) == 4)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)r);
  else
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)r);
#else
  E part[sizeof(Raw) / sizeof(E)];
  std::memcpy(part, &r, sizeof r);
  for (int i = 0; i < n; i++) p[i] = part[i];
#endif
}

template <class T> inline Vec<Real<T>> load(const T *p, int64_t n = lanes<T>) {
  using V = Vec<Real<T>>;
  if constexpr (sizeof(T) == 2) {
    Short s;
    if (n >= V::size)
      std::memcpy(&s, p, sizeof s);
    else
      s = load_part<Short>(reinterpret_cast<const uint16_t *>(p), int(n));
    return decode(s, T{});
  } else
    return n >= V::size ? V::load(p) : V(load_part<typename V::Raw>(p, int(n)));
}
template <class T> inline void store(T *p, Vec<Real<T>> x, int64_t n = lanes<T>) {
  using V = Vec<Real<T>>;
  if constexpr (sizeof(T) == 2) {
    const Short s = encode(x, T{});
    if (n >= V::size)
      std::memcpy(p, &s, sizeof s);
    else
      store_part(reinterpret_cast<uint16_t *>(p), int(n), s);
  } else if (n >= V::size)
    x.store(p);
  else
    store_part(p, int(n), x.v);
}

} // namespace gk
