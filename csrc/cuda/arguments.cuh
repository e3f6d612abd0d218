// What a recurrent kernel is told; gradkernels/backends/cuda/arguments.py has the same structures for the host.
//
// Dims: T steps, B rows of the batch, N tokens (rows of all steps together), H units, G gates, S states, A kept values.
// Everything is contiguous and in the storage of the number type X (platform.cuh) unless said otherwise.
#pragma once
#include "platform.cuh"

namespace gk {

constexpr int max_states = 8, max_masks = 8;

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

// Where a mask comes from: one number, a word for each token and unit or each column and unit, or `flags`.
enum MaskKind { SAME, DRAWN, FIXED, GIVEN };

struct Mask {
  int kind;       // a MaskKind
  unsigned below; // a word less than this makes a zero,
  float high;     // any other this
};

// What gradkernels/backends/_extra.py says of a call. P parameters of a unit, M masks.
struct ExtraArgs {
  const void *params;             // [P, H], null where the cell has none
  const unsigned long long *seed; // [1], null: no mask is drawn
  const void *flags;              // [N] or null
  int64 first;                    // number of the first token
  int skip;                       // steps back to the delayed value
  float clip;                     // backward clamps the adjoint of the first state to +-clip; 0: it does not
  Mask masks[max_masks];
};

struct ForwardArgs {
  Walk walk;
  Team team;
  ExtraArgs extra;
  const void *gates;             // [N, G * H] input pre-activations
  const void *w_hh, *b_hh;       // [G * H, H]; [G * H] or null
  const void *state[max_states]; // [B, H] entering
  void *seq[max_states];         // [N, H], null where not wanted
  void *final_state[max_states]; // [B, H]
  void *acts;                    // [N, A, H], or null
};

struct BackwardArgs {
  Walk walk;
  Team team;
  ExtraArgs extra;
  const void *w_hh;               // [G * H, H]
  const void *acts;               // [N, A, H]
  const void *seq[max_states];    // [N, H]
  const void *state[max_states];  // [B, H]
  const void *dseq[max_states];   // [N, H], null is zero
  const void *dfinal[max_states]; // [B, H], null is zero
  void *dgates;                   // [N, G * H]
  void *dr;                       // [N, G * H]; null where the cell's dr is its dx
  void *operand;                  // [N, H] what the second products were taken of; null where the cell has none
  void *dstate[max_states];       // [B, H]
  double *norms;                  // [T, blocks, S] squared norms of the states' adjoints, zero at launch; null
  void *dparams;                  // [N, P * H] of each token, or null
};

// One step of the walk, for the kernels of step.cuh: products are matrix products of the host's between their launches.
// K = G - Q gates take theirs of the first state, R wide; the last Q of another value. float everywhere in what steps
// hand one another, rows in the order of the walk.

// What a launch does of its step. Cells with Q > 0: SECOND makes what the second products are taken of, then CELL
// follows. With a projection: forward CELL, then PROJECT; backward the other way round.
enum Stage { CELL, SECOND, PROJECT };

struct StepForwardArgs {
  Walk walk;
  ExtraArgs extra;
  int step, stage;               // step of the walk; a Stage
  int steps;                     // that this launch does, one after the other: 1, but all where there is no product
  int R;                         // width of the first state: H, or that of the projection
  const void *gates;             // [N, G * H]
  const void *b_hh;              // [G * H] or null
  const float *product, *second; // [B, K * H], [B, Q * H] w_hh times operand and wide; second of a projection: [B, R]
  float *state[max_states];      // [B, R], [B, H] .. as the step finds and leaves them
  void *operand;         // [B, R] the first state in storage; null where that is float, and the state itself serves
  void *wide;            // [B, H] what `second` is the product of; null where there is none
  void *seq[max_states]; // [N, R], [N, H] .. or null
  void *final_state[max_states]; // [B, R], [B, H] ..
  void *raw;                     // [N, H] the output before projection, or null
  void *acts;                    // [N, A, H] or null
  float *kept;                   // [B, H, ..] what rounds of a function leave to later ones; null without means
};

struct StepBackwardArgs {
  Walk walk;
  ExtraArgs extra;
  int step, stage; // step -1 comes last: rows of step 0 get their dstate
  int steps;       // that this launch does, down from `step`
  int R;
  int blocks;                    // of norms
  const void *acts;              // [N, A, H]
  const void *raw;               // [N, H] the output before projection; null where there is none
  const void *seq[max_states];   // [N, R], [N, H] ..
  const void *state[max_states]; // [B, R], [B, H] .. entering
  const void *dseq[max_states];  // [N, R], [N, H] .. null is zero
  const float *product;          // [B, R] what the step after this one sends to the first state through w_hh
  const float *second;           // [B, H] wide times the second part of w_hh; of a projection, its operand times w_hr
  float *adjoint[max_states];    // [B, R], [B, H] .. what it sends directly; of rows that have not begun, dfinal
  void *operand;                 // [B, K * H] rows of dr; null where a step's rows lie together there
  void *wide;               // [B, Q * H] adjoints of the second products; of a projection [B, R] rows of dproj, or null
  void *dgates, *dr, *v;    // [N, G * H]; [N, G * H] and [N, H], null where the cell has none
  void *dproj;              // [N, R]; null without projection
  void *dstate[max_states]; // [B, R], [B, H] ..
  double *norms;            // [T, blocks, S] squared norms of the states' adjoints, zero at launch; null
  void *dparams;            // [N, P * H] of each token, or null
  float *owed;              // [N, H] what later steps send to a delayed first state, zero at launch; null without one
  float *kept;              // as forward
};

} // namespace gk
