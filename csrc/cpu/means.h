// Means over the units of a row, of which each thread has some: a function of a cell is called in rounds, and between
// two of them its threads meet and add up. The sum goes through the vectors of units in order, whoever has them, so
// that its bits do not depend on the number of threads.
#pragma once
#include "recurrent.h"

namespace gk {

template <class V> inline V within(V x, int64_t n) { // the first n lanes, else zero
  for (int64_t i = n; i < V::size; i++) x.v[i] = 0;
  return x;
}

template <int gap, class V, int... J> inline V rotated(V x, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x.v, x.v, ((J + gap) % V::size)...);
#else
  return __builtin_shuffle(x.v, typename V::Bits{((J + gap) % V::size)...});
#endif
}
template <class V, int gap = V::size / 2> inline auto sum_of_lanes(V x) {
  if constexpr (gap == 0)
    return x.v[0];
  else
    return sum_of_lanes<V, gap / 2>(x + rotated<gap>(x, std::make_integer_sequence<int, V::size>{}));
}

// Of one thread, for the functions F of a cell.
template <class Cell, class T, class... F> class Means {
  using S = Real<T>;
  using V = Vec<S>;
  static constexpr int L = lanes<T>;
  static constexpr int kept = std::max({F::Rounds::kept...}), all = std::max({all_means<typename F::Rounds>()...});

public:
  // What the threads share.
  struct Board {
    V *kept = nullptr; // [B, NV, kept] left from one round to the next, each thread its own
    S *sums[2] =
        {}; // [NV, B, means of a round] of the lanes of each vector; a round writes one while the other is read
    S *means = nullptr; // of each slice of units, round after round: [B, means of the round]
    Board() = default;
    Board(Arena &arena, int64_t B, int64_t NV, int slices) {
      if (all == 0) return;
      kept = arena.take<V>(B * NV * Means::kept);
      for (S *&s : sums) s = arena.take<S>(NV * B * all);
      means = arena.take<S>(slices * B * all);
    }
  };

  Means(const Board &board, const Sequence &q, const Part &p) : board(board), q(q), p(p) {}

  // call(kept, mean, out) in round k of f, for row b and vector v.
  template <class f, int k, class Call> GK_ALWAYS_INLINE void round(int64_t b, int64_t v, Call call) {
    using Rounds = typename f::Rounds;
    if constexpr (Rounds::count == 0) {
      V *const none = nullptr;
      call(none, none, none);
    } else {
      constexpr int known = known_means<Rounds>(k), more = Rounds::means[k];
      V mean[known + 1], out[more + 1];
      for (int r = 0, j = 0; r < k; r++)
        for (int i = 0; i < Rounds::means[r]; i++, j++)
          mean[j] = V(means_of(known_means<Rounds>(r))[b * Rounds::means[r] + i]);
      call(board.kept + (b * NV + v) * kept, mean, out);
      for (int j = 0; j < more; j++) {
        const int64_t left = q.H - v * L;
        board.sums[turn][(v * q.B + b) * more + j] = sum_of_lanes(left < L ? within(out[j], left) : out[j]);
      }
    }
  }

  // Rounds of f after the first: each(Round<k>, b, v) for rows [b0, b1).
  template <class f, int k = 1, class Each> void others(int64_t b0, int64_t b1, Each each) {
    if constexpr (k <= f::Rounds::count) {
      p.meet();
      add<known_means<typename f::Rounds>(k - 1), f::Rounds::means[k - 1]>(b0, b1);
      turn ^= 1;
      for (int64_t b = b0; b < b1; b++)
        for (int64_t v = p.v0; v < p.v1; v++) each(Round<k>{}, b, v);
      others<f, k + 1>(b0, b1, each);
    }
  }

private:
  const Board &board;
  const Sequence &q;
  const Part p;
  const int64_t NV = vectors<T>(q.H);
  int turn = 0;

  S *means_of(int first) const { return board.means + (p.slice * all + first) * q.B; }

  template <int first, int count> void add(int64_t b0, int64_t b1) {
    const S *const sums = board.sums[turn];
    for (int64_t n = b0 * count; n < b1 * count; n += L) {
      V total(0);
      for (int64_t v = 0; v < NV; v++) total += load(sums + v * q.B * count + n, b1 * count - n);
      store(means_of(first) + n, total / V(S(q.H)), b1 * count - n);
    }
  }
};

} // namespace gk
