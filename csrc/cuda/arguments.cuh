// What a recurrent kernel is told; gradkernels/backends/cuda/arguments.py has the same structures for the host.
//
// Dims: T steps, B rows of the batch, N tokens (rows of all steps together), H units, G gates, S states, A kept values.
// Everything is contiguous and in the storage of the number type X (platform.cuh) unless said otherwise.
#pragma once
#include "platform.cuh"

namespace gk {

constexpr int max_states = 8;

// Step i of the walk has rows_at(i) rows, counted longest first; `order` says where each stands in the batch.
struct Walk {
  int T, B, H, reverse;
  const int *rows;  // [T] rows of each step in time, never growing; null: B
  const int *first; // [T] the token where a step begins; null: t * B
  const int *order; // [B] column of a row; null: the same

  GK_DEVICE int time(int i) const { return reverse ? T - 1 - i : i; }
  GK_DEVICE int rows_at(int i) const { return i < 0 || i >= T ? 0 : rows ? rows[time(i)] : B; }
  GK_DEVICE int column(int b) const { return order ? order[b] : b; }
  GK_DEVICE int64 token(int i, int b) const { return (first ? first[time(i)] : int64(time(i)) * B) + column(b); }
};

// Blocks that share a state form a team; team k takes the tiles of rows k, k + teams, ...
struct Team {
  int size;           // blocks
  unsigned *arrivals; // [teams, 32] counters, zero at launch; a team uses the first of its row (grid exchange only)
  char *exchange;     // [teams, ...] what blocks hand each other through L2; the host asks the variant for its size
};

struct ForwardArgs {
  Walk walk;
  Team team;
  const void *gates;               // [N, G * H] input pre-activations
  const void *w_hh, *b_hh;         // [G * H, H]; [G * H] or null
  const void *state[max_states];   // [B, H] entering
  void *seq[max_states];           // [N, H], null where not wanted
  void *final_state[max_states];   // [B, H]
  void *acts;                      // [N, A, H], or null
};

struct BackwardArgs {
  Walk walk;
  Team team;
  const void *w_hh;                  // [G * H, H]
  const void *acts;                  // [N, A, H]
  const void *seq[max_states];       // [N, H]
  const void *state[max_states];     // [B, H]
  const void *dseq[max_states];      // [N, H], null is zero
  const void *dfinal[max_states];    // [B, H], null is zero
  void *dgates;                      // [N, G * H]
  void *dr;                          // [N, G * H]; null where the cell's dr is its dx
  void *operand;                     // [N, H] what the second products were taken of; null where the cell has none
  void *dstate[max_states];          // [B, H]
  double *norms;                     // [T, blocks, S] squared norms of the states' adjoints, zero at launch; null
};

} // namespace gk
