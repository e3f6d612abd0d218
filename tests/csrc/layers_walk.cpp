// Walks random shapes through attention, residual norm and causal convolution, forward and backward, and squared norms,
// to be built with sanitizers: layers_walk SEED FIRST LAST runs the cases FIRST .. LAST - 1 of that seed. One line per
// failure, and a status of 1.
//
// One storage type a program, GK_STORAGE. What is compared with is written out in double, without blocks and threads.
#include "../../csrc/cpu/attention_backward.h"
#include "../../csrc/cpu/attention_forward.h"
#include "../../csrc/cpu/causal_conv.h"
#include "../../csrc/cpu/residual_norm.h"
#include "../../csrc/cpu/squares.h"
#include "memory.h"
#include <map>
#include <string>

namespace walk {

using namespace gk;
using T = GK_STORAGE;
using F = Real<T>;
using Values = std::vector<double>;

struct Tally {
  size_t tensors = 0, failures = 0;
  double worst = 0;
};

struct Case {
  Random &random;
  std::string name;
  Tally &tally;
  std::map<std::string, Buffer> outputs{};

  template <class E> Values values(int64_t n, double scale = 1) {
    Values v(n);
    for (double &x : v) x = rounded<E>(scale * (2 * random.uniform() - 1));
    return v;
  }
  template <class E> void *out(const char *what, int64_t n) {
    return outputs.emplace(what, Buffer(n * sizeof(E), random)).first->second.data();
  }
  // A few roundings of the largest value, more where many products are added up.
  template <class E> void compare(const char *what, const Values &want, double terms) {
    const Buffer &b = outputs.at(what);
    const double eps = sizeof(E) == 2   ? (std::is_same_v<E, bfloat16> ? 0x1p-7 : 0x1p-10)
                       : sizeof(E) == 4 ? 0x1p-22
                                        : 0x1p-50;
    double most = 0;
    for (double x : want)
      if (std::isfinite(x)) most = std::max(most, std::fabs(x));
    const double allowed = eps * (4 + std::sqrt(terms)) * (most + 1);
    tally.tensors++;
    for (size_t i = 0; i < want.size(); i++) {
      const double got = value(reinterpret_cast<const E *>(b.data())[i]), off = std::fabs(got - want[i]);
      if (got == want[i]) continue;
      if (!(off <= allowed)) {
        std::printf("%s: %s[%zu] is %g instead of %g, allowed is %g\n", name.c_str(), what, i, got, want[i], allowed);
        tally.failures++;
        return;
      }
      tally.worst = std::max(tally.worst, off / allowed);
    }
  }
};

// The words of a place, one at a time.
uint32_t word(uint64_t seed, uint64_t row, uint64_t column) {
  uint32_t x[4] = {uint32_t(column / 4), uint32_t(row), uint32_t(row >> 32), 0},
           k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; round++, k[0] += 0x9e3779b9u, k[1] += 0xbb67ae85u) {
    const uint64_t a = uint64_t(x[0]) * 0xd2511f53u, b = uint64_t(x[2]) * 0xcd9e8d57u;
    const uint32_t next[4] = {uint32_t(b >> 32) ^ x[1] ^ k[0], uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ k[1],
                              uint32_t(a)};
    std::copy(next, next + 4, x);
  }
  return x[column % 4];
}
double keep(double p, uint64_t seed, uint64_t row, uint64_t column) {
  if (p == 0) return 1;
  return word(seed, row, column) < uint32_t(p * 4294967296.0) ? 0 : 1 / (1 - p);
}

// ---------------------------------------------------------------- squared norms

void squares(Case &c) {
  static constexpr int64_t outer[] = {1, 2, 5}, steps[] = {1, 3, 40}, inner[] = {1, 15, 16, 17, 257, 9001};
  const int64_t M = c.random.of(outer), steps_ = c.random.of(steps), N = c.random.of(inner), all = M * steps_ * N;
  const int threads = int(1 + c.random.below(5));
  const double scale = sizeof(T) == 4 && c.random.chance(0.5) ? 1e-30 : 1; // its square is no float
  const Values x = c.values<T>(all, scale), less = c.values<T>(all, scale);
  const Buffer bx = stored<T>(x, c.random), bless = stored<T>(less, c.random);
  const bool subtracts = c.random.chance(0.5);
  // compared after division by the scale: one allowance for both
  const auto unscaled = [&](void *p, int64_t n) {
    for (int64_t i = 0; i < n; i++) static_cast<double *>(p)[i] /= scale * scale;
  };
  const auto rounded_difference = [&](double a, double b) { return double(F(F(a) - F(b))); };

  double *const out = static_cast<double *>(c.out<double>("squares", steps_));
  Squares<T>::run({M, steps_, N, bx.data(), subtracts ? bless.data() : nullptr, out, threads});
  unscaled(out, steps_);
  Values want(steps_);
  for (int64_t i = 0; i < all; i++) {
    const double v = (subtracts ? rounded_difference(x[i], less[i]) : x[i]) / scale;
    want[i / N % steps_] += v * v;
  }
  c.compare<double>("squares", want, double(M * N) * double(M * N));

  double *const three = static_cast<double *>(c.out<double>("norms of a sum", 3));
  void *const sum = c.out<T>("sum of two", all);
  Squares<T>::joined({all, bx.data(), bless.data(), sum, three, threads});
  unscaled(three, 3);
  Values both(all), norms(3);
  for (int64_t i = 0; i < all; i++) {
    both[i] = x[i] + less[i];
    const double v = double(F(both[i])) / scale, a = x[i] / scale, b = less[i] / scale;
    norms[0] += v * v, norms[1] += a * a, norms[2] += b * b;
  }
  c.compare<double>("norms of a sum", norms, double(all) * double(all));
  c.compare<T>("sum of two", both, 1);
}

// ---------------------------------------------------------------- residual norm

void norm(Case &c) {
  static constexpr int64_t rows[] = {1, 2, 7, 40, 130}, widths[] = {1, 3, 15, 16, 17, 31, 33, 64, 257, 1025};
  NormBackwardArgs q{};
  q.M = c.random.of(rows), q.N = c.random.of(widths), q.rms = c.random.chance(0.4), q.eps = 1e-3;
  q.p = c.random.chance(0.5) ? 0.3 : 0, q.seed = c.random.bits(), q.threads = int(1 + c.random.below(5));
  const int64_t M = q.M, N = q.N;
  const bool has_residual = c.random.chance(0.6), weighs = c.random.chance(0.7), shifts = c.random.chance(0.5);
  const Values x = c.values<T>(M * N, 2), residual = c.values<T>(M * N), w = c.values<F>(N), b = c.values<F>(N);
  const Values dy = c.values<T>(M * N), ds = c.values<T>(M * N);
  const Buffer bx = stored<T>(x, c.random), br = stored<T>(residual, c.random), bw = stored<F>(w, c.random);
  const Buffer bb = stored<F>(b, c.random), bdy = stored<T>(dy, c.random), bds = stored<T>(ds, c.random);

  NormForwardArgs f{};
  static_cast<NormArgs &>(f) = q;
  f.weight = weighs ? bw.data() : nullptr, f.bias = shifts ? bb.data() : nullptr;
  f.x = bx.data(), f.residual = has_residual ? br.data() : nullptr;
  f.y = c.out<T>("y", M * N), f.sum = c.out<T>("sum", M * N);
  f.mean = c.out<F>("mean", M), f.rstd = c.out<F>("rstd", M);
  ResidualNorm<T>::forward(f);

  const bool from_sum = c.random.chance(0.5), wants_x = c.random.chance(0.8), wants_weights = c.random.chance(0.8);
  q.weight = f.weight, q.dy = bdy.data(), q.dsum = from_sum ? bds.data() : nullptr, q.sum = f.sum;
  q.mean = f.mean, q.rstd = f.rstd, q.dx = wants_x ? c.out<T>("dx", M * N) : nullptr;
  q.dresidual = c.out<T>("dresidual", M * N);
  if (wants_weights) q.dweight = c.out<F>("dweight", N), q.dbias = c.out<F>("dbias", N);
  ResidualNorm<T>::backward(q);

  Values y(M * N), s(M * N), dx(M * N), dr(M * N), dw(N), db(N);
  for (int64_t m = 0; m < M; m++) {
    double mean = 0, square = 0, level = 0, tilt = 0;
    for (int64_t n = 0; n < N; n++) {
      double &v = s[m * N + n] = x[m * N + n] * keep(q.p, q.seed, m, n) + (has_residual ? residual[m * N + n] : 0);
      v = value(reinterpret_cast<const T *>(f.sum)[m * N + n]) - v; // compared below; from here on as it was rounded
      if (!(std::fabs(v) <= (sizeof(T) == 2 ? 0.04 : 1e-5))) v = NAN;
      v = std::isnan(v) ? NAN : value(reinterpret_cast<const T *>(f.sum)[m * N + n]);
      mean += q.rms ? 0 : v / N;
    }
    for (int64_t n = 0; n < N; n++) square += (s[m * N + n] - mean) * (s[m * N + n] - mean) / N;
    const double rstd = 1 / std::sqrt(square + q.eps);
    for (int64_t n = 0; n < N; n++) {
      const double unit = (s[m * N + n] - mean) * rstd, g = dy[m * N + n] * (weighs ? w[n] : 1);
      y[m * N + n] = unit * (weighs ? w[n] : 1) + (shifts ? b[n] : 0);
      level += q.rms ? 0 : g / N, tilt += g * unit / N, dw[n] += dy[m * N + n] * unit, db[n] += dy[m * N + n];
    }
    for (int64_t n = 0; n < N; n++) {
      const double unit = (s[m * N + n] - mean) * rstd, g = dy[m * N + n] * (weighs ? w[n] : 1);
      dr[m * N + n] = (g - level - unit * tilt) * rstd + (from_sum ? ds[m * N + n] : 0);
      dx[m * N + n] = dr[m * N + n] * keep(q.p, q.seed, m, n);
    }
  }
  const double much = 60; // 1 / sqrt(eps), which small rows reach
  c.compare<T>("sum", s, 1), c.compare<T>("y", y, much * N), c.compare<T>("dresidual", dr, much * much * N);
  if (wants_x) c.compare<T>("dx", dx, much * much * N);
  if (wants_weights) c.compare<F>("dweight", dw, much * much * M), c.compare<F>("dbias", db, M);
}

// ---------------------------------------------------------------- causal convolution

template <class P> void conv(Case &c) {
  static constexpr int64_t lengths[] = {1, 2, 63, 64, 65, 130, 300}, widths[] = {1, 3, 15, 16, 17, 33, 50};
  ConvBackwardArgs q{};
  q.B = 1 + c.random.below(3), q.T = c.random.of(lengths), q.C = c.random.of(widths), q.O = c.random.of(widths);
  q.K = 1 + c.random.below(4), q.dilation = 1 + c.random.below(70), q.threads = int(1 + c.random.below(5));
  const int64_t B = q.B, L = q.T, C = q.C, O = q.O, K = q.K;
  const Values x = c.values<T>(B * L * C), w = c.values<T>(O * C * K, 0.3), bias = c.values<T>(O),
               dy = c.values<T>(B * L * O);
  const Buffer bx = stored<T>(x, c.random), bw = stored<T>(w, c.random), bb = stored<T>(bias, c.random);
  const Buffer bdy = stored<T>(dy, c.random);
  q.x = bx.data(), q.weight = bw.data(), q.dy = bdy.data();
  ConvForwardArgs f{};
  static_cast<ConvArgs &>(f) = q;
  const bool shifts = c.random.chance(0.6);
  f.bias = shifts ? bb.data() : nullptr, f.y = c.out<T>("y", B * L * O);
  CausalConv<T, P>::forward(f);
  const bool wants_x = c.random.chance(0.8), wants_w = c.random.chance(0.8), wants_b = c.random.chance(0.6);
  if (wants_x) q.dx = c.out<T>("dx", B * L * C);
  if (wants_w) q.dweight = c.out<T>("dweight", O * C * K);
  if (wants_b) q.dbias = c.out<T>("dbias", O);
  CausalConv<T, P>::backward(q);

  Values y(B * L * O), dx(B * L * C), dw(O * C * K), db(O);
  for (int64_t b = 0; b < B; b++)
    for (int64_t t = 0; t < L; t++)
      for (int64_t o = 0; o < O; o++) {
        const double d = dy[(b * L + t) * O + o];
        double &sum = y[(b * L + t) * O + o] = shifts ? bias[o] : 0;
        db[o] += d;
        for (int64_t k = 0; k < K; k++) {
          const int64_t from = t - (K - 1 - k) * q.dilation;
          for (int64_t i = 0; from >= 0 && i < C; i++) {
            const int64_t at = (b * L + from) * C + i, weight = (o * C + i) * K + k;
            sum += w[weight] * x[at], dx[at] += w[weight] * d, dw[weight] += x[at] * d;
          }
        }
      }
  c.compare<T>("y", y, K * C);
  if (wants_x) c.compare<T>("dx", dx, K * O);
  if (wants_w) c.compare<T>("dweight", dw, B * L);
  if (wants_b) c.compare<T>("dbias", db, B * L);
}

// ---------------------------------------------------------------- attention

template <class P> void attention(Case &c) {
  static constexpr int64_t lengths[] = {1, 2, 15, 63, 64, 65, 100, 130}, widths[] = {1, 3, 8, 15, 16, 17, 33, 64};
  AttentionBackwardArgs q{};
  q.B = 1 + c.random.below(3), q.Hk = 1 + c.random.below(2), q.Hq = q.Hk * (1 + c.random.below(3));
  q.Tq = c.random.of(lengths), q.Tk = c.random.of(lengths), q.D = c.random.of(widths), q.E = c.random.of(widths);
  q.causal = c.random.chance(0.4), q.left = c.random.chance(0.3) ? c.random.below(80) : -1;
  q.right = c.random.chance(0.3) ? c.random.below(80) : -1, q.scale = 0.4;
  q.p = c.random.chance(0.4) ? 0.3 : 0, q.seed = c.random.bits(), q.threads = int(1 + c.random.below(7));
  const bool together = c.random.chance(0.3); // sequences one after the other
  const int64_t B = q.B, Hq = q.Hq, Hk = q.Hk, D = q.D, E = q.E, group = Hq / Hk;
  std::vector<int32_t> cu_q{0}, cu_k{0};
  for (int64_t s = 0; s < B; s++) {
    cu_q.push_back(int32_t(cu_q.back() + (c.random.chance(0.2) ? 0 : q.Tq)));
    cu_k.push_back(int32_t(cu_k.back() + (c.random.chance(0.2) ? 0 : q.Tk)));
  }
  if (together) q.Tq = cu_q[B], q.Tk = cu_k[B], q.cu_q = cu_q.data(), q.cu_k = cu_k.data();
  if (q.Tq == 0 || q.Tk == 0) return;
  const int64_t Tq = q.Tq, Tk = q.Tk, Nq = together ? Tq : B * Tq, Nk = together ? Tk : B * Tk;
  const bool by_token = c.random.chance(0.5); // [.., T, H, D], else [.., H, T, D]
  const auto heads = [&](int64_t H, int64_t T_, int64_t n) {
    return by_token ? Heads{nullptr, T_ * H * n, n, H * n} : Heads{nullptr, H * T_ * n, T_ * n, n};
  };
  const Values vq = c.values<T>(Nq * Hq * D), vk = c.values<T>(Nk * Hk * D), vv = c.values<T>(Nk * Hk * E);
  const Values vd = c.values<T>(Nq * Hq * E), vl = c.values<F>(Nq * Hq);
  const Buffer bq = stored<T>(vq, c.random), bk = stored<T>(vk, c.random), bv = stored<T>(vv, c.random);
  const Buffer bd = stored<T>(vd, c.random), bl = stored<F>(vl, c.random);
  q.q = heads(Hq, Tq, D), q.k = heads(Hk, Tk, D), q.v = heads(Hk, Tk, E), q.out = q.dout = heads(Hq, Tq, E);
  q.dq = q.q, q.dk = q.k, q.dv = q.v;
  q.q.data = bq.data(), q.k.data = bk.data(), q.v.data = bv.data(), q.dout.data = bd.data();
  const bool biased = !together && c.random.chance(0.3), sloped = c.random.chance(0.3),
             hidden = !together && c.random.chance(0.3);
  const Values vb = c.values<F>(biased ? Hq * Tq * Tk : 0), vs = c.values<F>(Hq, 0.1);
  const Buffer bb = stored<F>(vb, c.random), bs = stored<F>(vs, c.random);
  if (biased) q.bias = bb.data(), q.bias_h = Tq * Tk, q.bias_i = Tk, q.bias_j = 1;
  if (sloped) q.slopes = bs.data();
  Buffer shown(B * Tk, c.random);
  for (int64_t i = 0; i < B * Tk; i++) shown.data()[i] = c.random.chance(0.7);
  if (hidden) q.key_mask = reinterpret_cast<const bool *>(shown.data());
  q.lse = c.out<F>("lse", Nq * Hq), q.out.data = c.out<T>("out", Nq * Hq * E);
  AttentionForwardArgs f{};
  static_cast<AttentionArgs &>(f) = q;
  f.out = q.out;
  AttentionForward<T, P>{f}();
  if (c.random.chance(0.5)) q.dlse = bl.data();
  q.dq.data = c.out<T>("dq", vq.size()), q.dk.data = c.out<T>("dk", vk.size()), q.dv.data = c.out<T>("dv", vv.size());
  if (biased) {
    q.dscores = c.out<T>("dscores", B * Hq * Tq * Tk);
    std::memset(q.dscores, 0, B * Hq * Tq * Tk * sizeof(T));
  }
  AttentionBackward<T, P>{q}();

  Values out(Nq * Hq * E), lse(Nq * Hq), dq(vq.size()), dk(vk.size()), dv(vv.size()), ds(biased ? B * Hq * Tq * Tk : 0);
  for (int64_t s = 0; s < B; s++)
    for (int64_t h = 0; h < Hq; h++) {
      const int64_t q0 = together ? cu_q[s] : 0, k0 = together ? cu_k[s] : 0, n = together ? cu_q[s + 1] - q0 : Tq;
      const int64_t m = together ? cu_k[s + 1] - k0 : Tk, batch = together ? 0 : s;
      const auto at = [&](const Heads &v, int64_t head, int64_t t) { return batch * v.b + head * v.h + t * v.t; };
      for (int64_t i = 0; i < n; i++) {
        Values score(m), weight(m), kept(m), d(m);
        double total = 0, sum = 0;
        const int64_t here = i + m - n, row = together ? (q0 + i) * Hq + h : (s * Hq + h) * Tq + i;
        const int64_t where_lse = together ? h * Tq + q0 + i : (s * Hq + h) * Tq + i;
        const int64_t aq = at(q.q, h, q0 + i), ao = at(q.out, h, q0 + i);
        for (int64_t j = 0; j < m; j++) {
          const bool seen = (!q.causal || j <= here) && (q.left < 0 || j >= here - q.left) &&
                            (q.right < 0 || j <= here + q.right) && (!hidden || shown.data()[s * Tk + j]);
          double x = 0;
          for (int64_t e = 0; e < D; e++) x += vq[aq + e] * vk[at(q.k, h / group, k0 + j) + e];
          x = x * q.scale + (biased ? vb[(h * Tq + i) * Tk + j] : 0) - (sloped ? vs[h] * std::abs(here - j) : 0);
          total += weight[j] = seen ? std::exp(x) : 0;
        }
        lse[where_lse] = std::log(total);
        for (int64_t j = 0; j < m; j++) {
          weight[j] = total > 0 ? weight[j] / total : 0;
          kept[j] = keep(q.p, q.seed, row, j);
          const int64_t av = at(q.v, h / group, k0 + j);
          for (int64_t e = 0; e < E; e++) {
            out[ao + e] += weight[j] * kept[j] * vv[av + e], d[j] += kept[j] * vd[ao + e] * vv[av + e];
            dv[av + e] += weight[j] * kept[j] * vd[ao + e];
          }
          sum += weight[j] * d[j];
        }
        for (int64_t j = 0; j < m; j++) {
          const double g = weight[j] * (d[j] - sum + (q.dlse ? vl[where_lse] : 0));
          const int64_t ak = at(q.k, h / group, k0 + j);
          if (biased) ds[((s * Hq + h) * Tq + i) * Tk + j] = g;
          for (int64_t e = 0; e < D; e++)
            dq[aq + e] += q.scale * g * vk[ak + e], dk[ak + e] += q.scale * g * vq[aq + e];
        }
      }
    }
  const double terms = sizeof(T) == 2 ? 64 : double(Tk + D); // products of rounded weights
  c.compare<T>("out", out, terms), c.compare<F>("lse", lse, sizeof(T) == 2 ? 64 : D);
  c.compare<T>("dq", dq, terms * 4), c.compare<T>("dk", dk, terms * 4 + group * Tq),
      c.compare<T>("dv", dv, terms * 4 + group * Tq);
  if (biased) c.compare<T>("dscores", ds, terms * 4);
}

template <class P> void walk(Case &c) {
  switch (c.random.below(5)) {
  case 0:
    return norm(c);
  case 1:
    return conv<P>(c);
  case 2:
    return squares(c);
  default:
    return attention<P>(c);
  }
}

} // namespace walk

int main(int count, char **args) {
  if (count != 4) return std::fprintf(stderr, "usage: %s SEED FIRST LAST\n", args[0]), 2;
  const uint64_t seed = std::strtoull(args[1], nullptr, 10);
  const int first = std::atoi(args[2]), last = std::atoi(args[3]);
  walk::Tally tally;
  for (int i = first; i < last; i++) {
    walk::Random random{seed * 1000003 + uint64_t(i)};
    random.state = random.bits(); // neighbours have nothing in common
    walk::Case c{random, "case " + std::to_string(i), tally};
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<walk::T, gk::bfloat16>)
      if (gk::has_bf16_dots() && random.chance(0.7)) {
        walk::walk<gk::bfloat16>(c);
        continue;
      }
#endif
    walk::walk<walk::F>(c);
  }
  std::printf("%d cases, %zu tensors, %zu failures; the worst error is %.2f of what is allowed\n", last - first,
              tally.tensors, tally.failures, tally.worst);
  return tally.failures ? 1 : 0;
}
