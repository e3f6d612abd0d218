// Means over the units of a row. One thread has all units of a row while a function of the cell is called in rounds, so
// that what earlier rounds leave to later ones is in its nearest cache, nobody waits, and no sum depends on the number
// of threads.
#pragma once
#include "recurrent.h"

namespace gk {

// What a thread does of a step once the products are there: rows of its group, every stride-th block of them, and
// vectors [v0, v1) of units. That is its part of the products, unless there are means: then it is whole rows.
struct Share {
  int64_t b0, b1, block, stride, v0, v1;
  template <class Cell> static Share of(const Part &p, int units, int64_t NV, int64_t block) {
    if (Cell::means) return {p.b0 + p.slice * block, p.b1, block, units * block, 0, NV};
    return {p.b0, p.b1, block, block, p.v0, p.v1};
  }
  template <class Each> void each_row(int64_t last, Each each) const { // below `last`
    last = std::min(last, b1);
    for (int64_t first = b0; first < last; first += stride)
      for (int64_t b = first; b < std::min(first + block, last); b++) each(b);
  }
  int64_t rows() const { return b0 < b1 ? place(b1 - 1) + block : 0; }
  int64_t place(int64_t b) const { return (b - b0) / stride * block + (b - b0) % stride; }
};

// The values that functions F of a cell leave from round to round, of one row; each thread has its own.
template <class Cell, class T, class... F> class Rounds {
  using V = Vec<Real<T>>;
  static constexpr int L = lanes<T>, kept = std::max({F::Rounds::kept...});
  const int64_t H, NV = vectors<T>(H);
  V *const values; // [NV, kept]

  template <class f, int k, class Each> void from(V *mean, Each each) const {
    constexpr int known = known_of_row<typename f::Rounds>(k), more = f::Rounds::means[k];
    V sum[more + 1], out[more + 1];
    for (int j = 0; j < more; j++) sum[j] = 0;
    for (int64_t v = 0; v < NV; v++) {
      each(Round<k>{}, v, values + v * kept, mean, out);
      const int64_t left = H - v * L;
#pragma GCC unroll 16
      for (int j = 0; j < more; j++) sum[j] += within(out[j], left);
    }
    for (int j = 0; j < more; j++) mean[known + j] = V(gk::sum(sum[j]) / Real<T>(H));
    if constexpr (f::Rounds::rows[k] > 0) f::call(Row<k>{}, mean);
    if constexpr (k < f::Rounds::count) from<f, k + 1>(mean, each);
  }

public:
  Rounds(Arena &arena, int64_t H) : H(H), values(arena.take<V>(Cell::means ? vectors<T>(H) * kept : 0)) {}

  // each(Round<k>, v, kept, mean, out) for all vectors of units, round after round.
  template <class f, class Each> void row(Each each) const {
    V mean[all_of_row<typename f::Rounds>() + 1];
    from<f, 0>(mean, each);
  }
};

} // namespace gk
