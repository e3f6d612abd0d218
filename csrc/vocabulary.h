// The functions that cells may use beyond exp, sigmoid, tanh and relu, over vectors; within a few units in the last
// place of the result.
//
// What is rare in a step is computed in double for floats too: one text, and results rounded once.
#pragma once
#include "vec.h"
#include <cmath>
#include <limits>

namespace gk {

template <class T> inline bool any(Vec<T> x) { // whether a lane of a condition is set
  uint64_t words[vector_bytes / 8], all = 0;
  std::memcpy(words, &x.v, sizeof words);
  for (uint64_t w : words) all |= w;
  return all != 0;
}
template <class T> inline bool any_of(typename Vec<T>::Bits c) { return any(Vec<T>((typename Vec<T>::Raw)c)); }

// f for every lane by itself.
template <class T, class F> inline Vec<T> by_lane(F f) {
  Vec<T> y;
  for (int i = 0; i < Vec<T>::size; i++) y.v[i] = f(i);
  return y;
}

// Of floats what f makes of doubles.
template <class F> inline Vec<float> in_double(Vec<float> x, F f) {
  typedef float Half __attribute__((vector_size(vector_bytes / 2)));
  Half part[2];
  std::memcpy(part, &x.v, sizeof part);
  for (Half &p : part)
    p = __builtin_convertvector(f(Vec<double>(__builtin_convertvector(p, Vec<double>::Raw))).v, Half);
  std::memcpy(&x.v, part, sizeof part);
  return x;
}

// The coefficient of the highest power first.
template <class T, int N> inline Vec<T> polynomial(const T (&c)[N], Vec<T> x) {
  Vec<T> p = c[0];
  for (int i = 1; i < N; i++) p = p * x + Vec<T>(c[i]);
  return p;
}

template <class T> inline Vec<T> abs(Vec<T> x) {
  using V = Vec<T>;
  const typename V::Bits sign = (typename V::Bits)V(T(-0.)).v;
  return V((typename V::Raw)((typename V::Bits)x.v & ~sign));
}
template <class T> inline Vec<T> sign(Vec<T> x) { // of a NaN 0, as in torch
  using V = Vec<T>;
  return where(x > V(0), V(1), where(x < V(0), V(-1), V(0)));
}
template <class T> inline Vec<T> with_sign(Vec<T> magnitude, Vec<T> x) {
  using V = Vec<T>;
  const typename V::Bits sign = (typename V::Bits)V(T(-0.)).v;
  return V((typename V::Raw)((typename V::Bits)magnitude.v | ((typename V::Bits)x.v & sign)));
}
template <class T> inline Vec<T> min(Vec<T> a, Vec<T> b) { return where(b == b, at_most(a, b), b); }
template <class T> inline Vec<T> max(Vec<T> a, Vec<T> b) { return where(b == b, at_least(a, b), b); }

template <class T> inline Vec<T> sqrt(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>(typename Vec<T>::Raw(_mm512_maskz_sqrt_ps(__mmask16(-1), x.v)));
  else
    return Vec<T>(typename Vec<T>::Raw(_mm512_maskz_sqrt_pd(__mmask8(-1), x.v)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    return Vec<T>(typename Vec<T>::Raw(_mm256_sqrt_ps(x.v)));
  else
    return Vec<T>(typename Vec<T>::Raw(_mm256_sqrt_pd(x.v)));
#else
  return by_lane<T>([&](int i) { return std::sqrt(x.v[i]); });
#endif
}

// ---- exponentials and logarithms

template <class T> inline Vec<T> expm1(Vec<T> x) {
  using V = Vec<T>;
  const auto [m, s] = reduce(at_least(at_most(x, V(Exp<T>::high)), V(Exp<T>::low)));
  const V large = (m + V(1)) * s; // s may be infinite while m is negative
  return where(s > V(T(1) / std::numeric_limits<T>::epsilon()), large, m * s + (s - V(1)));
}

// x = 2^k (1 + f) with sqrt(1/2) <= 1 + f < sqrt 2 and log(1 + f) = 2 atanh(s), s = f / (2 + f), by odd powers of s.
template <class T> struct Log;
template <> struct Log<float> {
  static constexpr int32_t least = 0x3f3504f3; // sqrt(1/2)
  static constexpr float p[] = {0.296012836f, 0.399883014f, 0.666666862f};
};
template <> struct Log<double> {
  static constexpr int64_t least = 0x3fe6a09e667f3bcd;
  static constexpr double p[] = {0.14644075183638814, 0.15329460567685439, 0.18182957963454629, 0.22222210178222156,
                                 0.2857142863191148,  0.3999999999988624,  0.66666666666666702};
};
template <class T> inline Vec<T> log(Vec<T> x) {
  using V = Vec<T>;
  using Bits = typename V::Bits;
  using E = Exp<T>;
  const T infinite = std::numeric_limits<T>::infinity(), scale = T(int64_t(1) << (E::mantissa + 1));
  const Bits subnormal = x < V(std::numeric_limits<T>::min());
  const Bits bits = (Bits)where(subnormal, x * V(scale), x).v, k = (bits - Log<T>::least) >> E::mantissa;
  const V f = V((typename V::Raw)(bits - (k << E::mantissa))) - V(1);
  const V power = V((typename V::Raw)(k + (Bits)V(E::round).v)) - V(E::round); // k as a number
  const V n = where(subnormal, power - V(E::mantissa + 1), power);
  const V s = f / (V(2) + f), z = s * s, half = V(T(0.5)) * f * f;
  const V y = n * V(E::ln2_hi) - ((half - (s * (half + z * polynomial(Log<T>::p, z)) + n * V(E::ln2_lo))) - f);
  const V edge = where(x == V(0), V(-infinite), V(std::numeric_limits<T>::quiet_NaN()));
  return where(x > V(0), where(x < V(infinite), y, x), edge);
}
template <class T> inline Vec<T> log1p(Vec<T> x) {
  using V = Vec<T>;
  const V u = V(1) + x, lost = where(x < V(1), x - (u - V(1)), V(1) - (u - x)) / u;
  return log(u) + where(lost * lost < V(1), lost, V(0)); // not where u is 0 or infinite
}
template <class T> inline Vec<T> softplus(Vec<T> x) { return at_least(x, Vec<T>(0)) + log1p(exp(-abs(x))); }

inline Vec<double> pow(Vec<double> x, Vec<double> n) {
  return by_lane<double>([&](int i) { return std::pow(x.v[i], n.v[i]); });
}
inline Vec<float> pow(Vec<float> x, Vec<float> n) { // n is a number of the cell's text: the same in all lanes
  if (any_of<float>(x <= Vec<float>(0))) return by_lane<float>([&](int i) { return std::pow(x.v[i], n.v[i]); });
  return in_double(x, [&](Vec<double> a) { return exp(Vec<double>(n.v[0]) * log(a)); });
}

// ---- sin and cos: x = n pi / 2 + r with |r| <= pi / 4

struct Sine {
  // pi / 2 in three parts, of which products with n up to 2^20 are exact but for the last.
  static constexpr double pi[] = {1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21};
  static constexpr double two_over_pi = 0.63661977236758134, near = 1048576.;
  static constexpr double sin[] = {1.5917861853805836e-10,  -2.505112814998458e-8, 2.7557316084929949e-6,
                                   -0.00019841269836724881, 0.0083333333333309265, -0.16666666666666665};
  static constexpr double cos[] = {-1.1382464188417539e-11, 2.0876143942503406e-9,  -2.7557317260627941e-7,
                                   2.4801587298744439e-5,   -0.0013888888888887383, 0.041666666666666665};
};
// sin(x + quarter pi / 2)
template <int quarter> inline Vec<double> sine(Vec<double> x) {
  using V = Vec<double>;
  if (any_of<double>(abs(x) > V(Sine::near)))
    return by_lane<double>([&](int i) { return quarter ? std::cos(x.v[i]) : std::sin(x.v[i]); });
  const V shifted = x * V(Sine::two_over_pi) + V(Exp<double>::round), n = shifted - V(Exp<double>::round);
  const V r = ((x - n * V(Sine::pi[0])) - n * V(Sine::pi[1])) - n * V(Sine::pi[2]), z = r * r;
  const V s = r + r * z * polynomial(Sine::sin, z);
  const V c = V(1) - (V(0.5) * z - z * z * polynomial(Sine::cos, z));
  const V::Bits turn = (V::Bits)shifted.v + quarter, odd = (turn & 1) != 0;
  return V((V::Raw)((V::Bits)where(odd, c, s).v ^ ((turn & 2) << 62)));
}
inline Vec<double> sin(Vec<double> x) { return sine<0>(x); }
inline Vec<double> cos(Vec<double> x) { return sine<1>(x); }
inline Vec<float> sin(Vec<float> x) { return in_double(x, sine<0>); }
inline Vec<float> cos(Vec<float> x) { return in_double(x, sine<1>); }

// ---- erf: below 1 x p(x^2), above 1 - e^(-x^2) q((x - 3) / (x + 3))

struct Erf {
  static constexpr double p[] = {5.9452576939415425e-11, -1.1365663136628493e-9,  1.4657878989888879e-8,
                                 -1.6350025076223881e-7, 1.6460972801190718e-6,   -1.4925593505766363e-5,
                                 0.00012055331036846668, -0.00085483269787405676, 0.0052239776247808347,
                                 -0.026866170645072891,  0.11283791670954857,     -0.37612638903183748,
                                 1.1283791670955126};
  static constexpr double q[] = {-2.045906125657907e-7,  -2.7036046904595301e-7, 1.2460255757271061e-6,
                                 2.1129520615013254e-6,  -7.9776114370986029e-6, -1.2859434385485739e-5,
                                 6.405655738340564e-5,   4.5255209194936577e-5,  -0.00059706195118922722,
                                 0.00070774644316962185, 0.0042691363329843137,  -0.024392499318779878,
                                 0.071665837197975345,   -0.15011593650077596,   0.2456038017123309,
                                 -0.32623356004303723,   0.17900115118138995};
  static constexpr double one = 6.; // beyond that erf is 1
};
inline Vec<double> erf(Vec<double> x) {
  using V = Vec<double>;
  const V a = at_most(abs(x), V(Erf::one)), z = a * a;
  const V tail = V(1) - exp(-z) * polynomial(Erf::q, (a - V(3)) / (a + V(3)));
  return with_sign(where(a < V(1), a * polynomial(Erf::p, z), tail), x);
}
inline Vec<float> erf(Vec<float> x) {
  return in_double(x, [](Vec<double> a) { return erf(a); });
}

} // namespace gk
