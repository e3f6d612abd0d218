// Written by `python -m gradkernels.cells.codegen` from gradkernels/cells; a test compares. Do not edit.
// clang-format off
#pragma once
#include "cell.h"
#include <stdexcept>
#include <string>

// One struct per cell: pure arithmetic over a value type V, which has + - * / and unary -, comparisons that where(c, a, b)
// accepts, construction from a number, and the functions named here (sigmoid, tanh ...), found by argument-dependent lookup.
//
// Sizes: G gates, S states, P parameters, M masks, D values of some steps ago, A values kept for backward, Q products of another
// value than s[0] (those of the last Q gates).
// x[G], r[G]: pre-activations of the input and of the recurrent product; s[S], t[S]: states before and after; a[A]: kept values;
// p[P], m[M], d[D]: where a cell has them. dt[S] -> dx[G], dr[G], ds[S], dp[P], dd[D]: adjoints; total[S]: full adjoints of t.
// shared: dx and dr are the same. Not recurrent: r is not read.
// Where Q > 0: v is what the last Q products are taken of, dv its adjoint. Results may not overlap with arguments.
//
// Where a cell has means over the units of a row, a function f is in rounds: f(Round<k>, .., kept, mean, out) computes what
// f_rounds::means[k] means are taken of, for k < count; f(Round<count>, .., kept, mean, results) the rest. mean: what is known of
// the row, round after round, its means and then f_rounds::rows[k] values that f(Row<k>, mean) makes of means alone; kept[f_rounds::kept]: values of this unit that earlier rounds leave to later ones.
namespace gk {

struct LstmCell {
  static constexpr const char *name = "lstm";
  static constexpr int G = 4, S = 2, P = 0, M = 0, D = 0, A = 4, Q = 0;
  static constexpr bool shared = true, recurrent = true, means = false;

  using forward_rounds = NoRounds;
  template <class V>
  static inline void forward(const V (&x)[G], const V (&r)[G], const V (&s)[S], V (&t)[S], V *a) {
    const V i = sigmoid(x[0] + r[0]);
    const V f = sigmoid(x[1] + r[1]);
    const V g = tanh(x[2] + r[2]);
    const V o = sigmoid(x[3] + r[3]);
    const V c = f * s[1] + i * g;
    t[0] = o * tanh(c); t[1] = c;
    a[0] = i; a[1] = f; a[2] = g; a[3] = o;
  }

  using backward_rounds = NoRounds;
  template <class V>
  static inline void backward(const V *a, const V (&s)[S], const V (&t)[S], const V (&dt)[S],
      V (&dx)[G], V (&dr)[G], V (&ds)[S], V (&total)[S]) {
    const V i = a[0];
    const V f = a[1];
    const V g = a[2];
    const V o = a[3];
    const V u1 = tanh(t[1]);
    const V dc = dt[1] + dt[0] * o * (V(1) - u1 * u1);
    const V dx3 = dt[0] * u1 * (o * (V(1) - o));
    const V dx2 = dc * i * (V(1) - g * g);
    const V dx1 = dc * s[1] * (f * (V(1) - f));
    const V dx0 = dc * g * (i * (V(1) - i));
    dx[0] = dx0; dx[1] = dx1; dx[2] = dx2; dx[3] = dx3;
    dr[0] = dx[0]; dr[1] = dx[1]; dr[2] = dx[2]; dr[3] = dx[3];
    ds[0] = V(0); ds[1] = dc * f;
    total[0] = dt[0]; total[1] = dc;
  }
};

struct GruCell {
  static constexpr const char *name = "gru";
  static constexpr int G = 3, S = 1, P = 0, M = 0, D = 0, A = 4, Q = 0;
  static constexpr bool shared = false, recurrent = true, means = false;

  using forward_rounds = NoRounds;
  template <class V>
  static inline void forward(const V (&x)[G], const V (&r)[G], const V (&s)[S], V (&t)[S], V *a) {
    const V reset = sigmoid(x[0] + r[0]);
    const V z = sigmoid(x[1] + r[1]);
    const V n = tanh(x[2] + reset * r[2]);
    t[0] = n + z * (s[0] - n);
    a[0] = reset; a[1] = z; a[2] = r[2]; a[3] = n;
  }

  using backward_rounds = NoRounds;
  template <class V>
  static inline void backward(const V *a, const V (&s)[S], const V (&)[S], const V (&dt)[S],
      V (&dx)[G], V (&dr)[G], V (&ds)[S], V (&total)[S]) {
    const V reset = a[0];
    const V z = a[1];
    const V r2 = a[2];
    const V n = a[3];
    const V ds0 = dt[0] * z;
    const V dx2 = (dt[0] - ds0) * (V(1) - n * n);
    const V dx1 = dt[0] * (s[0] - n) * (z * (V(1) - z));
    const V dx0 = dx2 * r2 * (reset * (V(1) - reset));
    dx[0] = dx0; dx[1] = dx1; dx[2] = dx2;
    dr[0] = dx0; dr[1] = dx1; dr[2] = dx2 * reset;
    ds[0] = ds0;
    total[0] = dt[0];
  }
};

struct GruResetBeforeCell {
  static constexpr const char *name = "gru_reset_before";
  static constexpr int G = 3, S = 1, P = 0, M = 0, D = 0, A = 3, Q = 1;
  static constexpr bool shared = true, recurrent = true, means = false;

  using forward_rounds = NoRounds;
  template <class V>
  static inline void forward(const V (&x)[G], const V (&r)[G], const V (&s)[S], V (&t)[S], V *a) {
    const V reset = sigmoid(x[0] + r[0]);
    const V z = sigmoid(x[1] + r[1]);
    const V n = tanh(x[2] + r[2]);
    t[0] = n + z * (s[0] - n);
    a[0] = reset; a[1] = z; a[2] = n;
  }

  using backward_rounds = NoRounds;
  template <class V>
  static inline void backward(const V *a, const V (&s)[S], const V (&)[S], const V (&dt)[S], const V &dv,
      V (&dx)[G], V (&dr)[G], V (&ds)[S], V (&total)[S]) {
    const V reset = a[0];
    const V z = a[1];
    const V n = a[2];
    const V u1 = dt[0] * z;
    const V dx2 = (dt[0] - u1) * (V(1) - n * n);
    const V dx1 = dt[0] * (s[0] - n) * (z * (V(1) - z));
    const V dx0 = dv * s[0] * (reset * (V(1) - reset));
    dx[0] = dx0; dx[1] = dx1; dx[2] = dx2;
    dr[0] = dx[0]; dr[1] = dx[1]; dr[2] = dx[2];
    ds[0] = u1 + dv * reset;
    total[0] = dt[0];
  }

  using operand_rounds = NoRounds;
  template <class V>
  static inline void operand(const V (&x)[G], const V (&r)[G], const V (&s)[S], V &v) {
    const V reset = sigmoid(x[0] + r[0]);
    v = reset * s[0];
  }

  using second_adjoint_rounds = NoRounds;
  template <class V>
  static inline void second_adjoint(const V *a, const V (&s)[S], const V (&)[S], const V (&dt)[S], V &v, V (&dr)[Q]) {
    const V reset = a[0];
    const V z = a[1];
    const V n = a[2];
    v = reset * s[0];
    dr[0] = (dt[0] - dt[0] * z) * (V(1) - n * n);
  }
};

struct RnnTanhCell {
  static constexpr const char *name = "rnn_tanh";
  static constexpr int G = 1, S = 1, P = 0, M = 0, D = 0, A = 0, Q = 0;
  static constexpr bool shared = true, recurrent = true, means = false;

  using forward_rounds = NoRounds;
  template <class V>
  static inline void forward(const V (&x)[G], const V (&r)[G], const V (&)[S], V (&t)[S], V *) {
    t[0] = tanh(x[0] + r[0]);
  }

  using backward_rounds = NoRounds;
  template <class V>
  static inline void backward(const V *, const V (&)[S], const V (&t)[S], const V (&dt)[S],
      V (&dx)[G], V (&dr)[G], V (&ds)[S], V (&total)[S]) {
    const V dx0 = dt[0] * (V(1) - t[0] * t[0]);
    dx[0] = dx0;
    dr[0] = dx[0];
    ds[0] = V(0);
    total[0] = dt[0];
  }
};

struct RnnReluCell {
  static constexpr const char *name = "rnn_relu";
  static constexpr int G = 1, S = 1, P = 0, M = 0, D = 0, A = 0, Q = 0;
  static constexpr bool shared = true, recurrent = true, means = false;

  using forward_rounds = NoRounds;
  template <class V>
  static inline void forward(const V (&x)[G], const V (&r)[G], const V (&)[S], V (&t)[S], V *) {
    t[0] = relu(x[0] + r[0]);
  }

  using backward_rounds = NoRounds;
  template <class V>
  static inline void backward(const V *, const V (&)[S], const V (&t)[S], const V (&dt)[S],
      V (&dx)[G], V (&dr)[G], V (&ds)[S], V (&total)[S]) {
    const V dx0 = where(t[0] <= V(0), V(0), dt[0]);
    dx[0] = dx0;
    dr[0] = dx[0];
    ds[0] = V(0);
    total[0] = dt[0];
  }
};

struct RnnSigmoidCell {
  static constexpr const char *name = "rnn_sigmoid";
  static constexpr int G = 1, S = 1, P = 0, M = 0, D = 0, A = 0, Q = 0;
  static constexpr bool shared = true, recurrent = true, means = false;

  using forward_rounds = NoRounds;
  template <class V>
  static inline void forward(const V (&x)[G], const V (&r)[G], const V (&)[S], V (&t)[S], V *) {
    t[0] = sigmoid(x[0] + r[0]);
  }

  using backward_rounds = NoRounds;
  template <class V>
  static inline void backward(const V *, const V (&)[S], const V (&t)[S], const V (&dt)[S],
      V (&dx)[G], V (&dr)[G], V (&ds)[S], V (&total)[S]) {
    const V dx0 = dt[0] * (t[0] * (V(1) - t[0]));
    dx[0] = dx0;
    dr[0] = dx[0];
    ds[0] = V(0);
    total[0] = dt[0];
  }
};

// f(Cell{}) of the cell of that name.
template <class F> auto with_cell(const std::string &name, F f) -> decltype(f(LstmCell{})) {
  if (name == LstmCell::name) return f(LstmCell{});
  if (name == GruCell::name) return f(GruCell{});
  if (name == GruResetBeforeCell::name) return f(GruResetBeforeCell{});
  if (name == RnnTanhCell::name) return f(RnnTanhCell{});
  if (name == RnnReluCell::name) return f(RnnReluCell{});
  if (name == RnnSigmoidCell::name) return f(RnnSigmoidCell{});
  throw std::invalid_argument("no compiled cell '" + name + "'");
}

} // namespace gk
