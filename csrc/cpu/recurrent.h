// What a recurrent driver is told, and how its work is shared out.
//
// Dims: T steps, B rows of the batch, N tokens (rows of all steps together), I inputs, H units, R width of h (H, or the
//       projected size), G gates, S states, P parameters of a unit, M masks, A kept values, L lanes of a vector.
#pragma once
#include "../cell.h"
#include "../vocabulary.h"
#include "pack.h"
#include "team.h"
#include <deque>

namespace gk {

constexpr int max_states = 8;

// A mask is 0 with probability p and else `high`, (1 - p) * high without a seed; or it is one of the flags.
struct Noise {
  enum Source { token, fixed, given }; // drawn for each token, drawn for each row of the batch, flags
  double p, high;
  Source source;
};

// The walk: step i of B rows or fewer. Rows are counted longest first; `order` says where each stands in the batch.
struct Sequence {
  int64_t T, B, I, H, R;
  const int64_t *rows;  // [T] rows of each step in time, never growing; null: B
  const int64_t *first; // [T] the token where a step begins; null: t * B
  const int64_t *order; // [B] column of a row; null: the same
  bool reverse;
  int threads;

  const void *params;   // [P, H]
  const int64_t *seed;  // [1] of the masks, or null: they are their means
  const void *flags;    // [N], one for all units, of masks that are given
  const Noise *noise;   // [M]
  int64_t first_number; // of the first token, in the numbers that masks are drawn by
  int64_t skip;         // steps from a delayed state to where it is used
  int64_t heads = 1;    // blocks on the diagonal of the recurrent matrix; whole vectors of units each, if several

  int64_t head() const { return R / heads; } // units of h that a unit sees
  int64_t time(int64_t i) const { return reverse ? T - 1 - i : i; }
  int64_t rows_at(int64_t i) const { return i < 0 || i >= T ? 0 : rows ? rows[time(i)] : B; }
  int64_t column(int64_t b) const { return order ? order[b] : b; }
  GK_ALWAYS_INLINE int64_t token(int64_t i, int64_t b) const {
    return (first ? first[time(i)] : time(i) * B) + column(b);
  }
};

struct ForwardArgs : Sequence {
  const void *x;              // [N, I], or [N, G * H] gates when w_ih is null
  const void *w_ih, *b_ih;    // [G * H, I], [G * H]; null where absent
  const void *w_hh, *b_hh;    // [G * H, R / heads], [G * H] or null
  const void *w_hr;           // [R, H] or null
  const void *s0[max_states]; // [B, R], then [B, H]
  void *seq[max_states];      // [N, R], then [N, H]; null where not wanted
  void *raw;                  // [N, H] output before projection, or null
  void *acts;                 // [N, A, H], or null
  void *final[max_states];    // as s0
};

struct BackwardArgs : Sequence {
  const void *x, *w_ih, *w_hh, *w_hr, *raw, *acts; // as in forward
  const void *seq[max_states], *s0[max_states];
  const void *dseq[max_states], *dfinal[max_states]; // null is zero
  void *dx, *dw_ih, *db_ih, *dw_hh, *db_hh, *dw_hr;  // null where not wanted
  void *dparams;                                     // [P, H] or null
  void *ds0[max_states];
  void *dgates, *dr, *v, *dproj; // [N, G * H], [N, G * H], [N, H], [N, R], or null
  void *dp;                      // [N, P * H] or null
  double *norms;                 // [T, S + 1] squared norms of the states' adjoints and rows, or null
  double clip;                   // bound of what reaches h, or 0
};

// Rows that one thread has together: adjoints of parameters are summed block by block, whatever the number of threads.
template <class Cell> int64_t block_of_rows(int64_t B) { return Cell::P > 0 ? std::clamp<int64_t>(B / 8, 1, 4) : 1; }

// Rows x units: `rows` groups that never meet, each of `units` threads that exchange the state once per step.
struct Grid {
  int rows = 1, units = 1;
};

// Rows are shared out while each group still fills tiles and the weights of all units stay in a core's own cache.
inline Grid choose_grid(int threads, int64_t B, int64_t NV, int tile_rows, int64_t weight_bytes) {
  constexpr int64_t near_cache = int64_t(3) << 18; // 768 KiB of the 1 MiB that current server cores have
  Grid g{1, threads};
  for (int p = threads; p > 1; p--)
    if (threads % p == 0 && B / p >= tile_rows && weight_bytes * p / threads <= near_cache) {
      g = {p, threads / p};
      break;
    }
  g.units = int(std::min<int64_t>(g.units, NV));
  return g;
}

// How many threads that much work is for: with less each, one more costs more at the barrier than it saves.
inline int worth(int threads, int64_t multiply_adds) {
  return int(std::clamp<int64_t>(multiply_adds / 49152, 1, threads));
}

// Whether so many threads that share rows have nothing to tell each other before the end: each has heads of its own.
template <class Cell> bool apart(const Sequence &q, int threads) {
  return !Cell::means && (!Cell::recurrent || (q.heads > 1 && q.heads % threads == 0));
}

// Multiply-adds between two meetings. A unit that is not multiplied costs about what 64 of them do.
template <class Cell> int64_t work_of_a_step(const Sequence &q) {
  return q.B * Cell::G * q.H * (Cell::recurrent ? q.head() : 64) * (apart<Cell>(q, q.threads) ? q.T : 1);
}

// The vectors [v0, v1) of units, head by head: each(head, from, to).
template <class T, class Each> void by_heads(const Sequence &q, int64_t v0, int64_t v1, Each each) {
  const int64_t wide = q.heads > 1 ? vectors<T>(q.head()) : std::max<int64_t>(v1, 1);
  for (int64_t v = v0; v < v1;) {
    const int64_t head = v / wide, end = std::min(v1, (head + 1) * wide);
    each(head, v, end);
    v = end;
  }
}

// Where each group of rows begins, so that all have about the same number of tokens and blocks stay together.
inline std::vector<int64_t> cut_rows(const Sequence &q, int groups, int64_t block) {
  std::vector<int64_t> cut(groups + 1, 0), ends(q.B + 1, 0);
  for (int64_t b = 0, t = q.T; b < q.B; b++) { // ends[b]: tokens of the rows before b
    while (t > 0 && q.rows && q.rows[t - 1] <= b) t--;
    ends[b + 1] = ends[b] + t;
  }
  for (int p = 1; p < groups; p++) {
    const int64_t even = std::lower_bound(ends.begin(), ends.end(), ends[q.B] * p / groups) - ends.begin();
    cut[p] = std::max(cut[p - 1], even / block * block);
  }
  cut[groups] = q.B;
  return cut;
}

// The rectangle of one thread.
struct Part {
  int id;
  int64_t b0, b1;  // rows
  int64_t v0, v1;  // vectors of units
  int64_t r0, r1;  // vectors of h where that is projected, the same otherwise
  Barrier *shared; // with those who share rows
  int slice;       // this one among them
  void meet() const { shared->wait(slice); }
  int64_t within(int64_t b) const { return std::clamp(b, b0, b1); }
};

// `size` threads, of which a grid walks the steps; all share what is not bound to one step.
struct Team {
  int size;
  Grid grid;
  int64_t block; // rows that stay together
  std::vector<int64_t> cut;
  std::deque<Barrier> groups;
  Barrier all;
  Team(const Sequence &q, Grid g, int size, bool apart, int64_t block)
      : size(size), grid(g), block(block), cut(cut_rows(q, g.rows, block)), all(size) {
    for (int k = 0; k < g.rows; k++) groups.emplace_back(apart ? 1 : g.units);
  }
  ~Team() {
    int waits = all.waits;
    for (const Barrier &b : groups) waits += b.waits;
    Crowd::note(waits);
  }
  bool walks(int id) const { return id < grid.rows * grid.units; }
  Part part(int id, int64_t NV, int64_t RV) { // of one that walks
    const int group = id / grid.units, n = grid.units;
    const int64_t slice = id % n, next = slice + 1;
    return {id,
            cut[group],
            cut[group + 1],
            NV * slice / n,
            NV * next / n,
            RV * slice / n,
            RV * next / n,
            &groups[group],
            int(slice)};
  }
};

template <class Cell, class T, class P> void recurrent_forward(const ForwardArgs &);
template <class Cell, class T, class P> void recurrent_backward(const BackwardArgs &);

} // namespace gk
