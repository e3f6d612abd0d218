// Squared norms of gradients, in double, where the square of any float neither vanishes nor overflows. Pieces of fixed
// size are added up in their order, so that no sum depends on the number of threads.
#pragma once
#include "gradients.h"
#include "team.h"

namespace gk {

// A gradient [M, T, N], each step of which is all that has its t.
struct SquaresArgs {
  int64_t M, T, N;
  const void *x, *less; // what is taken from x before, or null
  double *out;          // [T] sum over M and N of (x - less)^2
  int threads;
};

// The gradient of what was used twice.
struct JoinedArgs {
  int64_t N;
  const void *a, *b;
  void *sum;   // [N] a + b
  double *out; // [3] squared norms of the sum, of a, of b
  int threads;
};

template <class T> struct Squares {
  using F = Real<T>;
  using V = Vec<F>;
  static constexpr int L = V::size;
  static constexpr int64_t piece = 1 << 13, together = 8; // elements; pieces that a thread takes at a time

  template <class Each> static void pieces(int64_t count, int64_t elements, int threads, Each each) {
    std::atomic<int64_t> next{0};
    run_team(int(std::clamp<int64_t>(elements / (2 * piece), 1, threads)), [&](int) {
      share(next, (count + together - 1) / together, [&](int64_t n) {
        for (int64_t k = n * together; k < std::min(count, (n + 1) * together); k++) each(k);
      });
    });
  }

  static void run(const SquaresArgs &q) {
    const int64_t cuts = (q.N + piece - 1) / piece, count = q.M * q.T * cuts;
    std::vector<double> parts(count);
    pieces(count, q.M * q.T * q.N, q.threads, [&](int64_t k) {
      const int64_t first = k % cuts * piece, at = k / cuts * q.N + first, n = std::min(piece, q.N - first);
      const T *const x = static_cast<const T *>(q.x) + at, *less = static_cast<const T *>(q.less);
      if (less) less += at;
      Norm<F> norm;
      for (int64_t c = 0; c < n; c += L)
        norm.add(less ? load(x + c, n - c) - load(less + c, n - c) : load(x + c, n - c), n - c, c / L);
      parts[k] = norm.sum();
    });
    for (int64_t t = 0; t < q.T; t++) {
      q.out[t] = 0;
      for (int64_t m = 0; m < q.M; m++)
        for (int64_t c = 0; c < cuts; c++) q.out[t] += parts[(m * q.T + t) * cuts + c];
    }
  }

  static void joined(const JoinedArgs &q) {
    const int64_t count = (q.N + piece - 1) / piece;
    std::vector<std::array<double, 3>> parts(count);
    pieces(count, q.N, q.threads, [&](int64_t k) {
      const int64_t at = k * piece, n = std::min(piece, q.N - at);
      const T *const a = static_cast<const T *>(q.a) + at, *const b = static_cast<const T *>(q.b) + at;
      T *const sum = static_cast<T *>(q.sum) + at;
      Norm<F> norm[3];
      for (int64_t c = 0; c < n; c += L) {
        const V va = load(a + c, n - c), vb = load(b + c, n - c), both = va + vb;
        store(sum + c, both, n - c);
        norm[0].add(both, n - c, c / L), norm[1].add(va, n - c, c / L), norm[2].add(vb, n - c, c / L);
      }
      parts[k] = {norm[0].sum(), norm[1].sum(), norm[2].sum()};
    });
    for (int j = 0; j < 3; j++) {
      q.out[j] = 0;
      for (const auto &part : parts) q.out[j] += part[j];
    }
  }
};

} // namespace gk
