// A recurrent layer forward and backward in double, one row, one step and one unit after the other: nothing of the
// kernels but the cell's own arithmetic. What is not computed (steps past the end of a row) is NaN.
#pragma once
#include "../../csrc/cpu/recurrent.h"
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace walk {

struct Scalar {
  double v;
  Scalar() = default;
  Scalar(double x) : v(x) {}
  friend Scalar operator+(Scalar a, Scalar b) { return a.v + b.v; }
  friend Scalar operator-(Scalar a, Scalar b) { return a.v - b.v; }
  friend Scalar operator*(Scalar a, Scalar b) { return a.v * b.v; }
  friend Scalar operator/(Scalar a, Scalar b) { return a.v / b.v; }
  friend Scalar operator-(Scalar a) { return -a.v; }
  friend bool operator<(Scalar a, Scalar b) { return a.v < b.v; }
  friend bool operator>(Scalar a, Scalar b) { return a.v > b.v; }
  friend bool operator<=(Scalar a, Scalar b) { return a.v <= b.v; }
  friend bool operator>=(Scalar a, Scalar b) { return a.v >= b.v; }
  friend Scalar where(bool c, Scalar a, Scalar b) { return c ? a : b; }
  friend Scalar min(Scalar a, Scalar b) { return std::fmin(a.v, b.v); }
  friend Scalar max(Scalar a, Scalar b) { return std::fmax(a.v, b.v); }
  friend Scalar exp(Scalar a) { return std::exp(a.v); }
  friend Scalar sigmoid(Scalar a) { return 1 / (1 + std::exp(-a.v)); }
  friend Scalar tanh(Scalar a) { return std::tanh(a.v); }
  friend Scalar relu(Scalar a) { return a.v < 0 ? 0 : a.v; }
  friend Scalar softplus(Scalar a) { return std::fmax(a.v, 0) + std::log1p(std::exp(-std::fabs(a.v))); }
  friend Scalar sqrt(Scalar a) { return std::sqrt(a.v); }
  friend Scalar erf(Scalar a) { return std::erf(a.v); }
  friend Scalar sin(Scalar a) { return std::sin(a.v); }
  friend Scalar cos(Scalar a) { return std::cos(a.v); }
};

// The random word of a place, one round after the other.
inline uint32_t philox(uint64_t seed, uint64_t row, uint64_t column) {
  uint32_t x[4] = {uint32_t(column / 4), uint32_t(row), uint32_t(row >> 32), 0};
  uint32_t k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; round++, k[0] += 0x9e3779b9u, k[1] += 0xbb67ae85u) {
    const uint64_t a = uint64_t(x[0]) * 0xd2511f53u, b = uint64_t(x[2]) * 0xcd9e8d57u;
    const uint32_t next[] = {uint32_t(b >> 32) ^ x[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ k[1],
                             uint32_t(a)};
    std::copy(next, next + 4, x);
  }
  return x[column % 4];
}

using Values = std::vector<double>;

enum class Layout { dense, padded, packed };

// Dims: N tokens, T steps, B rows, I inputs, H units, R width of h, G gates, S states, P parameters, A kept values.
struct Layer {
  int64_t T, B, I, H, R, heads;
  bool projected, gates_given, reverse;
  Layout layout;
  std::vector<int64_t> lengths;           // [B] of each row; longest first where packed
  Values x, w_ih, b_ih, w_hh, b_hh, w_hr; // x [N, I] or [N, G * H]; empty where absent
  Values params, flags;                   // [P, H], [N]
  std::vector<gk::Noise> noise;           // of each mask
  bool seeded;
  int64_t seed, first_number, skip;
  double clip;
  std::vector<Values> s0, seq, final;    // [S] of [B, R or H], [N, R or H]
  Values raw, acts;                      // [N, H], [N, A, H]
  std::vector<Values> dseq, dfinal, ds0; // [S]; empty is zero
  Values dx, dw_ih, db_ih, dw_hh, db_hh, dw_hr;
  Values dparams, dp;                 // [P, H], [N, P * H]
  Values dgates, dr, v, dproj, norms; // [N, G * H], [N, G * H], [N, H], [N, R], [T, S + 1]

  int64_t size(int k) const { return k ? H : R; }
  int64_t head() const { return R / heads; }
  int64_t sees(int64_t row) const { return heads > 1 ? row % H / head() * head() : 0; } // from which value of h on
  int64_t tokens() const {
    return layout == Layout::packed ? std::accumulate(lengths.begin(), lengths.end(), int64_t(0)) : T * B;
  }
  int64_t rows_at(int64_t t) const {
    int64_t n = 0;
    for (int64_t length : lengths) n += t < length;
    return n;
  }
  std::vector<int64_t> starts() const { // [T] the token where a step begins
    std::vector<int64_t> at(T);
    for (int64_t t = 0, n = 0; t < T; n += layout == Layout::packed ? rows_at(t) : B, t++) at[t] = n;
    return at;
  }
};

template <class Cell> class Walk {
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q;
  Layer &q;
  const int64_t N = q.tokens(), H = q.H, R = q.R, I = q.I;
  const std::vector<int64_t> start = q.starts();

  // sum over k of w[row, k] * a[k]
  static double dot(const Values &w, int64_t row, const double *a, int64_t n) {
    double sum = 0;
    const double *const p = w.data() + row * n;
    for (int64_t k = 0; k < n; k++) sum += p[k] * a[k];
    return sum;
  }
  // to[k] += d * a[k]
  static void add(double *to, double d, const double *a, int64_t n) {
    for (int64_t k = 0; k < n; k++) to[k] += d * a[k];
  }
  static std::vector<Values> of(int count, const Values &v) { return std::vector<Values>(count, v); }

public:
  explicit Walk(Layer &layer) : q(layer) {}

  void forward() {
    q.seq.clear(), q.final = q.s0;
    for (int k = 0; k < S; k++) q.seq.emplace_back(N * q.size(k), NAN);
    q.raw.assign(q.projected ? N * H : 0, NAN), q.acts.assign(N * A * H, NAN);
    std::vector<Values> x = of(G, Values(H)), r = of(G, Values(H));
    Values operand(H);
    for (int64_t b = 0; b < q.B; b++)
      for (int64_t i = 0; i < q.lengths[b]; i++) {
        const int64_t t = q.reverse ? q.lengths[b] - 1 - i : i, n = start[t] + b;
        const double *const h = &q.final[0][b * R];
        const auto recurrent = [&](int from, int to, const double *a) {
          for (int g = from; g < to; g++)
            for (int64_t j = 0; j < H; j++)
              r[g][j] = dot(q.w_hh, g * H + j, a + q.sees(j), q.head()) + (q.b_hh.empty() ? 0 : q.b_hh[g * H + j]);
        };
        for (int g = 0; g < G; g++)
          for (int64_t j = 0; j < H; j++)
            x[g][j] = q.gates_given ? q.x[(n * G + g) * H + j]
                                    : dot(q.w_ih, g * H + j, &q.x[n * I], I) + (q.b_ih.empty() ? 0 : q.b_ih[g * H + j]);
        if (Cell::recurrent) recurrent(0, G - Q, h);
        Scalar cx[G], cr[G], cs[S], ct[S], ca[A + 1], *const kept_a = ca;
        gk::Extras<Cell, Scalar> extra;
        const auto gather = [&](int64_t j) {
          for (int g = 0; g < G; g++) cx[g] = x[g][j], cr[g] = r[g][j];
          for (int k = 0; k < S; k++) cs[k] = k == 0 && q.projected ? 0 : q.final[k][b * H + j];
          extras(extra, b, i, n, j);
          return std::tuple_cat(std::tie(cx, cr, cs), extra.groups());
        };
        if constexpr (Q > 0) {
          using Operand = typename gk::Functions<Cell>::Operand;
          row<Operand>([&](auto round, int64_t j, Scalar *kept, Scalar *mean, Scalar *out) {
            Scalar v;
            if constexpr (gk::number(round) < Operand::Rounds::count)
              gk::evaluate<Cell, Operand>(round, gather(j), kept, mean, out);
            else {
              gk::evaluate<Cell, Operand>(round, gather(j), kept, mean, v);
              operand[j] = v.v;
            }
          });
          recurrent(G - Q, G, operand.data());
        }
        Values out(H);
        std::vector<Values> after(S, Values(H));
        using Step = typename gk::Functions<Cell>::Forward;
        row<Step>([&](auto round, int64_t j, Scalar *kept, Scalar *mean, Scalar *means_of) {
          if constexpr (gk::number(round) < Step::Rounds::count)
            gk::evaluate<Cell, Step>(round, gather(j), kept, mean, means_of);
          else {
            gk::evaluate<Cell, Step>(round, gather(j), kept, mean, ct, kept_a);
            for (int k = 0; k < A; k++) q.acts[(n * A + k) * H + j] = ca[k].v;
            for (int k = 0; k < S; k++) after[k][j] = ct[k].v;
          }
        });
        for (int64_t j = 0; j < H; j++) {
          for (int k = 1; k < S; k++) q.seq[k][n * H + j] = q.final[k][b * H + j] = after[k][j];
          out[j] = after[0][j];
        }
        if (q.projected)
          for (int64_t j = 0; j < H; j++) q.raw[n * H + j] = out[j];
        for (int64_t j = 0; j < R; j++)
          q.seq[0][n * R + j] = q.final[0][b * R + j] = q.projected ? dot(q.w_hr, j, out.data(), H) : out[j];
      }
  }

  // Of what q holds as kept by forward.
  void backward() {
    const int64_t K = G * H;
    q.ds0.clear();
    for (int k = 0; k < S; k++) q.ds0.push_back(q.dfinal[k].empty() ? Values(q.B * q.size(k), 0) : q.dfinal[k]);
    q.dx.assign(q.gates_given ? 0 : N * I, NAN), q.dgates.assign(N * K, NAN), q.dr = q.dgates;
    q.v.assign(N * H, NAN), q.dproj.assign(N * R, NAN), q.norms.assign(q.T * (S + 1), 0);
    q.dw_ih.assign(q.w_ih.size(), 0), q.dw_hh.assign(q.w_hh.size(), 0), q.dw_hr.assign(q.w_hr.size(), 0);
    q.db_ih.assign(K, 0), q.db_hh.assign(K, 0);
    q.dparams.assign(Cell::P * H, 0), q.dp.assign(N * Cell::P * H, NAN), owed.assign(Cell::D ? N * H : 0, 0);
    for (int64_t b = 0; b < q.B; b++)
      for (int64_t i = q.lengths[b] - 1; i >= 0; i--) step(b, i);
  }

private:
  Values owed; // [N, H] what delayed values add to the adjoint of a token's output

  int64_t token(int64_t b, int64_t i) const { return start[q.reverse ? q.lengths[b] - 1 - i : i] + b; }

  // f(Round<k>, j, kept, mean, out) for all units of a row, round after round.
  template <class F, int k = 0, class Each>
  void row(Each each, std::vector<Scalar> kept = {}, std::vector<Scalar> mean = {}) {
    constexpr int values = F::Rounds::kept, known = gk::known_of_row<typename F::Rounds>(k), more = F::Rounds::means[k];
    kept.resize(H * values + 1), mean.resize(gk::all_of_row<typename F::Rounds>() + 1);
    Scalar out[more + 1], sum[more + 1] = {};
    for (int64_t j = 0; j < H; j++) {
      each(gk::Round<k>{}, j, &kept[j * values], mean.data(), out);
      for (int m = 0; m < more; m++) sum[m] = sum[m] + out[m];
    }
    for (int m = 0; m < more; m++) mean[known + m] = sum[m] / double(H);
    if constexpr (F::Rounds::rows[k] > 0) F::call(gk::Row<k>{}, mean.data());
    if constexpr (k < F::Rounds::count) row<F, k + 1>(each, kept, mean);
  }

  // Of unit j of row b in step i, whose token is n.
  void extras(gk::Extras<Cell, Scalar> &to, int64_t b, int64_t i, int64_t n, int64_t j) const {
    for (int k = 0; k < Cell::P; k++) to.p[k] = q.params[k * H + j];
    for (int k = 0; k < Cell::M; k++) {
      const gk::Noise &noise = q.noise[k];
      const uint64_t place = (uint64_t(k) << 32) + uint64_t(noise.source == gk::Noise::fixed ? b : q.first_number + n);
      const bool dropped = philox(uint64_t(q.seed), place, uint64_t(j)) < std::min(noise.p * 0x1p32, 4294967295.);
      to.m[k] = noise.source == gk::Noise::given ? q.flags[n]
                : q.seeded                       ? dropped ? 0 : noise.high
                                                 : (1 - noise.p) * noise.high;
    }
    if (Cell::D) to.d[0] = i >= q.skip ? q.seq[0][token(b, i - q.skip) * H + j] : 0;
  }

  void step(int64_t b, int64_t i) {
    const int64_t K = G * H, last = q.lengths[b] - 1;
    const auto time = [&](int64_t step) { return q.reverse ? last - step : step; };
    const int64_t t = time(i), n = start[t] + b;
    const auto entering = [&](int k) {
      return i ? &q.seq[k][(start[time(i - 1)] + b) * q.size(k)] : &q.s0[k][b * q.size(k)];
    };
    double *const norms = &q.norms[t * (S + 1)];
    norms[S] += 1;
    double *carry[S];
    for (int k = 0; k < S; k++) carry[k] = &q.ds0[k][b * q.size(k)];
    const auto given = [&](int k, int64_t j) { return q.dseq[k].empty() ? 0 : q.dseq[k][n * q.size(k) + j]; };

    Values dh(R), dt0(H, 0);
    for (int64_t j = 0; j < R; j++) {
      dh[j] = carry[0][j] + given(0, j) + (Cell::D ? owed[n * H + j] : 0);
      carry[0][j] = 0;
      if (q.clip > 0) dh[j] = std::fmin(std::fmax(dh[j], -q.clip), q.clip);
    }
    if (q.projected)
      for (int64_t j = 0; j < R; j++) {
        q.dproj[n * R + j] = dh[j], norms[0] += dh[j] * dh[j];
        add(dt0.data(), dh[j], &q.w_hr[j * H], H);
        add(&q.dw_hr[j * H], dh[j], &q.raw[n * H], H);
      }
    else
      dt0 = dh;

    Scalar values[A + 1], *const a = values, s[S], now[S], dt[S], dx[G], dr[G], ds[S], total[S];
    gk::Extras<Cell, Scalar> extra;
    gk::ExtraAdjoints<Cell, Scalar> found;
    const auto gather = [&](int64_t j) {
      for (int k = 0; k < A; k++) a[k] = q.acts[(n * A + k) * H + j];
      for (int k = 0; k < S; k++) {
        const bool inner = k == 0 && q.projected;
        s[k] = inner ? 0 : entering(k)[j], now[k] = inner ? q.raw[n * H + j] : q.seq[k][n * H + j];
        dt[k] = k ? carry[k][j] + given(k, j) : dt0[j];
      }
      extras(extra, b, i, n, j);
      return std::tuple_cat(std::tie(a, s, now), extra.groups(), std::tie(dt));
    };
    Values dv(H, 0);
    if constexpr (Q > 0) {
      Values second(Q * H);
      using Early = typename gk::Functions<Cell>::SecondAdjoint;
      row<Early>([&](auto round, int64_t j, Scalar *kept, Scalar *mean, Scalar *out) {
        Scalar v, d[Q];
        if constexpr (gk::number(round) < Early::Rounds::count)
          gk::evaluate<Cell, Early>(round, gather(j), kept, mean, out);
        else {
          gk::evaluate<Cell, Early>(round, gather(j), kept, mean, v, d);
          q.v[n * H + j] = v.v;
          for (int g = 0; g < Q; g++) second[g * H + j] = d[g].v;
        }
      });
      for (int64_t m = 0; m < Q * H; m++) {
        const int64_t row = K - Q * H + m;
        add(&dv[q.sees(row)], second[m], &q.w_hh[row * q.head()], q.head());
        add(&q.dw_hh[row * q.head()], second[m], &q.v[n * H + q.sees(row)], q.head());
      }
    }
    using Step = typename gk::Functions<Cell>::Backward;
    std::vector<Values> entered(S, Values(H));
    row<Step>([&](auto round, int64_t j, Scalar *kept, Scalar *mean, Scalar *out) {
      Scalar of_operand = dv[j];
      const auto known = [&] {
        if constexpr (Q > 0)
          return std::tuple_cat(gather(j), std::tie(of_operand));
        else
          return gather(j);
      }();
      if constexpr (gk::number(round) < Step::Rounds::count) {
        gk::evaluate<Cell, Step>(round, known, kept, mean, out);
        return;
      }
      found.then([&](auto &...groups) {
        if constexpr (gk::number(round) == Step::Rounds::count)
          gk::evaluate<Cell, Step>(round, known, kept, mean, dx, dr, ds, groups..., total);
      });
      for (int g = 0; g < G; g++) q.dgates[n * K + g * H + j] = dx[g].v, q.dr[n * K + g * H + j] = dr[g].v;
      for (int k = 0; k < Cell::P; k++) {
        q.dp[(n * Cell::P + k) * H + j] = found.p[k].v;
        q.dparams[k * H + j] += found.p[k].v;
      }
      if (Cell::D && i >= q.skip) owed[token(b, i - q.skip) * H + j] += found.d[0].v;
      for (int k = q.projected; k < S; k++) entered[k][j] = ds[k].v, norms[k] += total[k].v * total[k].v;
    });
    for (int k = q.projected; k < S; k++) std::copy(entered[k].begin(), entered[k].end(), carry[k]);
    for (int64_t m = 0; m < K; m++) {
      const double in = q.dgates[n * K + m], back = q.dr[n * K + m];
      q.db_ih[m] += in, q.db_hh[m] += back;
      if (Cell::recurrent && m < K - Q * H) {
        add(&q.dw_hh[m * q.head()], back, entering(0) + q.sees(m), q.head());
        add(carry[0] + q.sees(m), back, &q.w_hh[m * q.head()], q.head());
      }
      if (!q.gates_given) add(&q.dw_ih[m * I], in, &q.x[n * I], I);
    }
    if (!q.gates_given) {
      for (int64_t k = 0; k < I; k++) q.dx[n * I + k] = 0;
      for (int64_t m = 0; m < K; m++) add(&q.dx[n * I], q.dgates[n * K + m], &q.w_ih[m * I], I);
    }
  }
};

} // namespace walk
