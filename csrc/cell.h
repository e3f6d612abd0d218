// What every cell of cells.gen.h has in common, and how its functions are called whatever groups they take.
#pragma once
#include "vec.h"
#include <tuple>

namespace gk {

// Which part of a function that is cut at its means; and what follows from the means of a round alone.
template <int K> struct Round {};
template <int K> struct Row {};
struct NoRounds {
  static constexpr int count = 0, kept = 0, rows[] = {0}, means[] = {0};
};
template <int K> constexpr int number(Round<K>) { return K; }
// How many values of the row are known before a round.
template <class Rounds> constexpr int known_of_row(int round) {
  int n = 0;
  for (int k = 0; k < round; k++) n += Rounds::means[k] + Rounds::rows[k];
  return n;
}
template <class Rounds> constexpr int all_of_row() { return known_of_row<Rounds>(Rounds::count); }

// Parameters, masks and the delayed value of one unit, or as many units as V has lanes.
template <class Cell, class V> struct Extras {
  V p[Cell::P ? Cell::P : 1], m[Cell::M ? Cell::M : 1], d[Cell::D ? Cell::D : 1];
  auto groups() const { return std::tuple_cat(some<(Cell::P > 0)>(p), some<(Cell::M > 0)>(m), some<(Cell::D > 0)>(d)); }

private:
  template <bool has, class Group> static auto some(const Group &group) {
    if constexpr (has)
      return std::tie(group);
    else
      return std::tuple<>();
  }
};

// Groups p and d of adjoints, those that a cell has.
template <class Cell, class V> struct ExtraAdjoints {
  V p[Cell::P ? Cell::P : 1], d[Cell::D ? Cell::D : 1];
  template <class Call> GK_ALWAYS_INLINE void then(Call call) {
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

// The functions of a cell as types.
template <class Cell> struct Functions {
#define GK_FUNCTION(Name, name)                                                                                        \
  struct Name {                                                                                                        \
    using Rounds = typename Cell::name##_rounds;                                                                       \
    template <class... A> GK_ALWAYS_INLINE static inline void call(A &&...a) { Cell::name(a...); }                     \
  };
  GK_FUNCTION(Forward, forward)
  GK_FUNCTION(Backward, backward)
  GK_FUNCTION(Operand, operand)
  GK_FUNCTION(SecondAdjoint, second_adjoint)
#undef GK_FUNCTION
};

// Where a cell has no second product, something that is never called stands for the functions of one.
struct NoFunction {
  using Rounds = NoRounds;
};
template <class Cell, bool = (Cell::Q > 0)> struct SecondProduct {
  using Operand = NoFunction;
  using Adjoint = NoFunction;
};
template <class Cell> struct SecondProduct<Cell, true> {
  using Operand = typename Functions<Cell>::Operand;
  using Adjoint = typename Functions<Cell>::SecondAdjoint;
};

// A round of F of a cell, or all of it where it has no means: of `given`, a tuple of groups.
template <class Cell, class F, int k, class Given, class V, class... Out>
GK_ALWAYS_INLINE inline void evaluate(Round<k> round, const Given &given, V *kept, const V *mean, Out &&...out) {
  std::apply(
      [&](auto &&...group) GK_ALWAYS_INLINE {
        if constexpr (Cell::means)
          F::call(round, group..., kept, mean, out...);
        else
          F::call(group..., out...);
      },
      given);
}

} // namespace gk
