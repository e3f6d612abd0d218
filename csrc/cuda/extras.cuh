// What a cell may take beside gates and states, and how its functions are called whatever groups they take.
//
// Dims: P parameters of a unit, M masks, D values of some steps ago, N tokens, H units.
#pragma once
#include "arguments.cuh"
#include "cells.cuh"

namespace gk {

// ---------------------------------------------------------------- masks

// Four words of csrc/philox.h: those of columns 4 block .. + 3 of a row.
GK_DEVICE void philox(unsigned (&words)[4], unsigned long long seed, unsigned long long row, unsigned block) {
  unsigned x0 = block, x1 = unsigned(row), x2 = unsigned(row >> 32), x3 = 0;
  unsigned k0 = unsigned(seed), k1 = unsigned(seed >> 32);
  GK_UNROLL for (int round = 0; round < 10; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const unsigned long long a = 0xd2511f53ull * x0, b = 0xcd9e8d57ull * x2;
    x0 = unsigned(b >> 32) ^ x1 ^ k0, x1 = unsigned(b);
    x2 = unsigned(a >> 32) ^ x3 ^ k1, x3 = unsigned(a);
  }
  words[0] = x0, words[1] = x1, words[2] = x2, words[3] = x3;
}
GK_DEVICE unsigned word_of(const unsigned (&w)[4], int column) { // without an address: all four stay in registers
  const unsigned low = column & 1 ? w[1] : w[0], high = column & 1 ? w[3] : w[2];
  return column & 2 ? high : low;
}

// Mask k of V units side by side, V = 1 or u a multiple of 4.
template <class X, int V>
GK_DEVICE void draw(float (&m)[V], const ExtraArgs &e, int k, int64 token, int64 column, int u) {
  static_assert(V == 1 || V == 4, "words come in fours");
  const Mask &mask = e.masks[k];
  const float same = mask.kind == GIVEN ? to_float(static_cast<const X *>(e.flags)[token]) : mask.high;
  if (mask.kind == SAME || mask.kind == GIVEN) {
    GK_UNROLL for (int v = 0; v < V; v++) m[v] = same;
    return;
  }
  unsigned words[4];
  const int64 place = mask.kind == DRAWN ? e.first + token : column;
  philox(words, *e.seed, (static_cast<unsigned long long>(k) << 32) + place, unsigned(u) / 4);
  GK_UNROLL for (int v = 0; v < V; v++) m[v] = word_of(words, V == 1 ? u % 4 : v) < mask.below ? 0.f : mask.high;
}

template <class X> GK_DEVICE float drawn(const ExtraArgs &e, int k, int64 token, int64 column, int u) {
  float m[1];
  draw<X>(m, e, k, token, column, u);
  return m[0];
}

// ---------------------------------------------------------------- backward

// Clipped to [-limit, limit]; NaN stays. limit 0: as it is.
GK_DEVICE float clamp(float v, float limit) { return limit <= 0.f ? v : v > limit ? limit : v < -limit ? -limit : v; }

// ---------------------------------------------------------------- calls

template <class Cell> struct Extras { // of one unit
  float p[Cell::P ? Cell::P : 1], m[Cell::M ? Cell::M : 1], d[Cell::D ? Cell::D : 1];
  template <class Call> GK_DEVICE void then(Call call) const { // call(those groups that the cell has ..)
    const auto with_d = [&](auto &...group) {
      if constexpr (Cell::D > 0)
        call(group..., d);
      else
        call(group...);
    };
    const auto with_m = [&](auto &...group) {
      if constexpr (Cell::M > 0)
        with_d(group..., m);
      else
        with_d(group...);
    };
    if constexpr (Cell::P > 0)
      with_m(p);
    else
      with_m();
  }
};
template <class Cell> struct ExtraAdjoints {
  float p[Cell::P ? Cell::P : 1], d[Cell::D ? Cell::D : 1];
  template <class Call> GK_DEVICE void then(Call call) { // call(those that the cell has ..)
    if constexpr (Cell::P > 0 && Cell::D > 0)
      call(p, d);
    else if constexpr (Cell::P > 0)
      call(p);
    else if constexpr (Cell::D > 0)
      call(d);
    else
      call();
  }
};

template <class A, class B> constexpr bool is_same = false;
template <class A> constexpr bool is_same<A, A> = true;

// The functions of a cell as types.
template <class Cell> struct Functions {
#define GK_FUNCTION(Name, name)                                                                                        \
  struct Name {                                                                                                        \
    using Rounds = typename Cell::name##_rounds;                                                                       \
    template <class... Group> GK_DEVICE static void call(Group &&...group) { Cell::name(group...); }                   \
  };
  GK_FUNCTION(Forward, forward)
  GK_FUNCTION(Backward, backward)
  GK_FUNCTION(Operand, operand)
  GK_FUNCTION(SecondAdjoint, second_adjoint)
#undef GK_FUNCTION
};

// ---------------------------------------------------------------- means over the units of a row

// How many values of the row are known before a round, and how many floats an array of all of them has.
template <class Rounds> GK_DEVICE constexpr int known_of_row(int round) {
  int n = 0;
  for (int k = 0; k < round; k++) n += Rounds::means[k] + Rounds::rows[k];
  return n;
}
template <class Rounds> GK_DEVICE constexpr int room_for_means() { return known_of_row<Rounds>(Rounds::count) + 1; }
template <class Rounds> GK_DEVICE constexpr int most_means() { // of a round
  int most = 0;
  for (int n : Rounds::means) most = n > most ? n : most;
  return most;
}

// means[j] = the sum of every thread's sums[j], over `count`: added up in one order. memory: [n, warps].
template <int n, int WARPS> GK_DEVICE void block_means(float *means, const float (&sums)[n], int count, float *memory) {
  GK_UNROLL for (int j = 0; j < n; j++) {
    float sum = sums[j];
    for (int lanes = 16; lanes; lanes /= 2) sum += shuffle_xor(sum, lanes);
    if (thread() % 32 == 0) memory[j * WARPS + thread() / 32] = sum;
  }
  block_sync();
  GK_UNROLL for (int j = 0; j < n; j++) {
    float sum = 0.f;
    GK_UNROLL for (int w = 0; w < WARPS; w++) sum += memory[j * WARPS + w];
    means[j] = sum / count;
  }
  block_sync(); // the next round writes there
}

} // namespace gk
