// What attention is called with. Dims: see attention.h.
#pragma once
#include <cstdint>

namespace gk {

// Heads of rows somewhere in memory; the values of a row lie side by side.
struct Heads {
  void *data;
  int64_t b, h, t; // strides of sequence, head and row, in values
};

struct AttentionArgs {
  int64_t B, Hq, Hk, Tq, Tk, D, E;
  const int32_t *cu_q, *cu_k; // [B + 1] where sequences begin that lie one after the other; Tq, Tk then count all rows
  Heads q, k, v;
  const void *bias; // added to scores, in what is computed in; null: none
  int64_t bias_b, bias_h, bias_i, bias_j;
  const void *slopes; // [B or 1, Hq] in what is computed in: the score loses slope |distance|; null: none
  int64_t slopes_b;
  const bool *key_mask; // [B, Tk] which keys can be seen; null: all
  bool causal;
  int64_t left, right; // how far a query sees; negative: no bound
  double scale, p;     // of scores; of dropout on probabilities
  uint64_t seed;
  void *lse; // [B, Hq, Tq] (sequences one after the other: [Hq, Tq]) log of the sum of exp, in what is computed in
  int threads;
};

struct AttentionForwardArgs : AttentionArgs {
  Heads out;
};

struct AttentionBackwardArgs : AttentionArgs {
  Heads out, dout;
  const void *dlse; // as lse, or null
  Heads dq, dk, dv;
  void *dscores; // [B, Hq, Tq, Tk] in storage, zero where nobody writes, or null: the gradient of the bias before it is
                 // summed
};

} // namespace gk
