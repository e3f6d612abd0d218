// BPTT for any cell, in chunks of steps. The gate gradients of a chunk stay in cache: the cell writes them once, the
// next step's product, the input gradient and the weight gradients read them, and the chunk after the next overwrites
// them. Two rings let a thread run one chunk ahead. What forward kept is only read.
#pragma once
#include "gradients.h"
#include "masks.h"
#include "means.h"
#include <optional>

namespace gk {

template <class Cell, class T, class P> class Backward {
  using F = Real<T>;
  using V = Vec<F>;
  using Step = typename Functions<Cell>::Backward;
  using Early = typename SecondProduct<Cell>::Adjoint;
  using First = std::conditional_t<(Cell::Q > 0), Early, Step>;
  using InRounds = Rounds<Cell, T, Step, Early>;
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q, L = lanes<T>, depth = Dot<P>::depth;
  static constexpr bool split = !Cell::shared, recurrent = Cell::recurrent;
  static constexpr bool again = Q > 0 || Cell::means; // what reaches the output is needed after it was made
  static constexpr int64_t chunk = 512;               // tokens whose gate gradients are kept in cache

  // Steps [lo, hi) of the walk.
  struct Chunk {
    int64_t lo, hi, tokens;
  };

  const BackwardArgs &q;
  const int64_t K = G * q.H, K1 = (G - Q) * q.H;
  const int64_t NV = vectors<T>(q.H), RV = vectors<T>(q.R), IV = vectors<T>(q.I);
  const int64_t width = std::max(NV, RV) * L;
  Arena &arena = Arena::of_this_thread();
  Team team;
  const int64_t blocks = (q.B + team.block - 1) / team.block; // of rows
  Packed<P> w_ih, w_first, w_second, w_hr;
  F *carry;                          // [S, B, width] adjoints on their way to the step before, each thread its own
  F *reached;                        // [B, width] what reaches the output in this step, where it is needed again
  F *second;                         // [B, width] adjoints of the operand of a second product, likewise
  F *pulled;                         // [B, width] sums of several products, where there are heads
  F *owed;                           // [skip, B, width] adjoints of delayed states, until the walk is at their step
  std::vector<Share> shares;         // of each thread that walks
  std::vector<InRounds> rounds;      // of each thread that walks, where there are means
  std::vector<Masks<Cell, T>> masks; // of each thread that walks, where there are masks
  std::vector<Chunk> chunks;
  std::vector<int64_t> place, token; // [T] where a step lies in the rings; [2 * room] the token of a place
  int64_t room = 1;
  Ring<P> ring_x, ring_r, ring_v, ring_h; // adjoints of gates, operand of the second product, adjoint of projected h
  Factor<P> x, h, v, raw;
  Weights<T> dw_ih, dw_hh, dw_hr;
  F *db_x, *db_r;            // [K] each
  F *dp_rows, *dp;           // [2, blocks of rows, NV, P, L] of a chunk, [NV, P, L] of all
  std::vector<P *> pairs;    // of a thread: adjoints of a chunk, two tokens side by side
  std::vector<double> norms; // [walking threads, T, S]

  const T *at(const void *p) const { return static_cast<const T *>(p); }
  T *at(void *p) const { return static_cast<T *>(p); }
  F *second_at(int64_t b, int64_t v) const { return second + b * width + v * L; }
  F *carry_at(int k, int64_t b, int64_t v) const { return carry + (k * q.B + b) * width + v * L; }
  const T *entering(int k, int64_t i, int64_t b, int64_t n) const { // a row of the state that entered step i
    return b < q.rows_at(i - 1) ? at(q.seq[k]) + q.token(i - 1, b) * n : at(q.s0[k]) + q.column(b) * n;
  }

  // ---- once

  void plan() {
    for (int64_t hi = q.T; hi > 0;) {
      Chunk c{hi, hi, 0};
      while (c.lo > 0 && (c.lo == hi || c.tokens + q.rows_at(c.lo - 1) <= chunk)) c.tokens += q.rows_at(--c.lo);
      room = std::max(room, c.tokens);
      chunks.push_back(c);
      hi = c.lo;
    }
    place.resize(q.T);
    token.resize(2 * room);
    for (size_t n = 0; n < chunks.size(); n++) {
      int64_t at = int64_t(n % 2) * room;
      for (int64_t i = chunks[n].lo; i < chunks[n].hi; at += q.rows_at(i++)) place[i] = at;
    }
  }
  void pack(int id) {
    const int n = team.size;
    const auto rows = [&](const void *w, Packed<P> &to, int64_t k, int64_t columns) {
      const int64_t CV = vectors<T>(columns);
      pack_rows<P>([&](int64_t j) { return at(w) + j * columns; }, to.panels, to.matrix.panel, k, columns, CV * id / n,
                   CV * (id + 1) / n);
    };
    if (q.dx) rows(q.w_ih, w_ih, K, q.I);
    if (recurrent) rows(q.w_hh, w_first, K1, q.head());
    if (Q) rows(at(q.w_hh) + K1 * q.head(), w_second, K - K1, q.head());
    if (q.w_hr) rows(q.w_hr, w_hr, q.R, q.H);
  }
  void enter(const Part &p) {
    for (int k = 0; k < S; k++)
      for (int64_t b = p.b0; b < p.b1; b++)
        for (int64_t n = k ? q.H : q.R, v = k ? p.v0 : p.r0; v < (k ? p.v1 : p.r1); v++)
          (q.dfinal[k] ? load(at(q.dfinal[k]) + q.column(b) * n + v * L, n - v * L) : V(0)).store(carry_at(k, b, v));
  }
  void leave(const Part &p) {
    for (int k = 0; k < S; k++)
      for (int64_t b = p.b0; b < p.b1; b++)
        for (int64_t n = k ? q.H : q.R, v = k ? p.v0 : p.r0; v < (k ? p.v1 : p.r1); v++)
          store(at(q.ds0[k]) + q.column(b) * n + v * L, V::load(carry_at(k, b, v)), n - v * L);
  }

  // ---- a step

  struct Unit {
    V a[A ? A : 1], s[S], t[S], dt[S];
    Extras<Cell, V> extra;
    auto after() const { return std::tuple_cat(std::tie(a, s, t), extra.groups(), std::tie(dt)); }
  };
  // What the cell's derivative sees of a row and a vector of units; dh: what reaches the output.
  GK_ALWAYS_INLINE void gather(const Part &p, int64_t i, int64_t b, int64_t v, V dh, Unit &u) const {
    u.dt[0] = dh;
    for (int j = 1; j < S; j++) u.dt[j] = V::load(carry_at(j, b, v)) + given(j, i, b, v, q.H);
    const int64_t token = q.token(i, b), unit = v * L, m = q.H - unit;
#pragma GCC unroll 32
    for (int k = 0; k < A; k++) u.a[k] = load(at(q.acts) + (token * A + k) * q.H + unit, m);
    for (int k = 0; k < S; k++) {
      if (k == 0 && q.w_hr) {
        u.s[0] = 0, u.t[0] = load(at(q.raw) + token * q.H + unit, m);
        continue;
      }
      u.s[k] = load(entering(k, i, b, q.H) + unit, m);
      u.t[k] = load(at(q.seq[k]) + token * q.H + unit, m);
    }
    gather_extras<Cell, T>(q, Cell::M ? &masks[p.id] : nullptr, q.seq[0], i, b, v, u.extra);
  }
  F *reached_at(int64_t b, int64_t v) const { return reached + b * width + v * L; }
  F *owed_at(int64_t i, int64_t b, int64_t v) const { return owed + (i % q.skip * q.B + b) * width + v * L; }
  V given(int k, int64_t i, int64_t b, int64_t v, int64_t n) const {
    return q.dseq[k] ? load(at(q.dseq[k]) + q.token(i, b) * n + v * L, n - v * L) : V(0);
  }
  // n values of a unit, a plane of H each.
  template <int n>
  GK_ALWAYS_INLINE void put(const Ring<P> *ring, void *out, int64_t i, int64_t b, int64_t column, const V *d, int64_t m,
                            int64_t out_width) const {
    const auto all = [&](auto *to) GK_ALWAYS_INLINE {
#pragma GCC unroll 16
      for (int k = 0; k < n; k++) store(to + k * q.H, d[k], m);
    };
    if (ring) all(ring->row(place[i] + b) + column);
    if (out) all(at(out) + q.token(i, b) * out_width + column);
  }
  // A round of the early adjoint of the last gates or of the step itself; dv: adjoint of the operand.
  template <class Function, int k>
  GK_ALWAYS_INLINE void run(int64_t i, int64_t b, int64_t v, const Unit &u, const V &dv, V *kept, const V *mean, V *out,
                            Norm<F> *norm) const {
    const auto known = [&] {
      if constexpr (Q > 0 && std::is_same_v<Function, Step>)
        return std::tuple_cat(u.after(), std::tie(dv));
      else
        return u.after();
    }();
    if constexpr (k < Function::Rounds::count)
      evaluate<Cell, Function>(Round<k>{}, known, kept, mean, out);
    else if constexpr (std::is_same_v<Function, Early>) {
      V operand, dr[Q];
      evaluate<Cell, Function>(Round<k>{}, known, kept, mean, operand, dr);
      const int64_t unit = v * L, m = q.H - unit;
      put<Q>(&ring_r, nullptr, i, b, K1 + unit, dr, m, K);
      put<1>(&ring_v, q.v, i, b, unit, &operand, m, q.H);
    } else
      finish(i, b, v, known, kept, mean, norm);
  }
  // All of it, for the rows that this thread has to itself; others have made the products.
  template <class Function> void whole_rows(const Part &p, int64_t i, int64_t last, Norm<F> *norm) const {
    p.meet();
    shares[p.id].each_row(last, [&](int64_t b) {
      rounds[p.id].template row<Function>([&](auto round, int64_t v, V *kept, const V *mean, V *out) GK_ALWAYS_INLINE {
        Unit u;
        gather(p, i, b, v, V::load(reached_at(b, v)), u);
        const V dv = Q ? V::load(second_at(b, v)) : V(0);
        run<Function, number(round)>(i, b, v, u, dv, kept, mean, out, norm);
      });
    });
  }
  template <class Given>
  GK_ALWAYS_INLINE void finish(int64_t i, int64_t b, int64_t v, const Given &given, V *kept, const V *mean,
                               Norm<F> *norm) const {
    const int64_t unit = v * L, m = q.H - unit;
    V dx[G], dr[G], ds[S], total[S];
    ExtraAdjoints<Cell, V> extra;
    extra.then([&](auto &...groups) GK_ALWAYS_INLINE {
      evaluate<Cell, Step>(Round<Step::Rounds::count>{}, given, kept, mean, dx, dr, ds, groups..., total);
    });
    // Those of the last gates were written before the second product, which others may still be reading.
    put<G - Q>(&ring_x, q.dgates, i, b, unit, dx, m, K);
    put<Q>(split ? &ring_x : nullptr, q.dgates, i, b, K1 + unit, dx + (G - Q), m, K);
    if (split) put<G - Q>(&ring_r, q.dr, i, b, unit, dr, m, K);
    if (split) put<Q>(nullptr, q.dr, i, b, K1 + unit, dr + (G - Q), m, K);
    if (Cell::P > 0 && q.dparams) {
      F *const sum = dp_rows + (((place[i] >= room) * blocks + b / team.block) * NV + v) * Cell::P * L;
#pragma GCC unroll 16
      for (int k = 0; k < Cell::P; k++) (V::load(sum + k * L) + extra.p[k]).store(sum + k * L);
    }
    put<Cell::P>(nullptr, q.dp, i, b, unit, extra.p, m, Cell::P * q.H);
    if (Cell::D && i >= q.skip) extra.d[0].store(owed_at(i, b, v));
    for (int k = q.w_hr ? 1 : 0; k < S; k++) {
      ds[k].store(carry_at(k, b, v));
      if (norm) norm[k].add(total[k], m, b);
    }
  }

  // Adjoints row(k) of `gates` gates times their recurrent weights, for n rows of the batch from b on and the vectors
  // [v0, v1) of what these are multiplied with. A head's part of every gate is a product by itself.
  template <class Row, class Done>
  void pull(int64_t n, int64_t b, int64_t v0, int64_t v1, int gates, const Packed<P> &w, Row row, Done done) const {
    if (q.heads == 1) return product<1>(n, v0, v1, w.matrix, row, depth, done);
    by_heads<T>(q, v0, v1, [&](int64_t head, int64_t lo, int64_t hi) {
      const int64_t first = head * vectors<T>(q.head());
      for (int g = 0; g < gates; g++) {
        const int64_t at = g * q.H + head * q.head();
        const Matrix<P> part{w.panels + at * L, w.matrix.panel, sum_steps<P>(q.head()), nullptr};
        product<1>(
            n, lo - first, hi - first, part, [&](int64_t k) { return row(k) + at; }, depth,
            [&](int64_t k, int64_t v, const F *acc) {
              F *const sum = pulled + (b + k) * width + (first + v) * L;
              (g ? V::load(sum) + V::load(acc) : V::load(acc)).store(sum);
              if (g + 1 == gates) done(k, first + v, sum);
            });
      }
    });
  }

  // Rows that step i + 1 went on with take the adjoint through it; rows that end here take that of the final state.
  void rows_of_step(const Part &p, int64_t i, int64_t lo, int64_t hi, bool through, bool here, Norm<F> *norm) {
    lo = p.within(lo), hi = p.within(hi);
    const auto each = [&](int64_t k, int64_t v, const F *acc) {
      const int64_t b = lo + k;
      V dh = V::load(carry_at(0, b, v));
      if (acc) dh += V::load(acc);
      if (!here) return dh.store(carry_at(0, b, v));
      dh += given(0, i, b, v, q.R);
      if (Cell::D && b < q.rows_at(i + q.skip)) dh += V::load(owed_at(i, b, v));
      if (q.clip > 0) dh = at_least(at_most(dh, V(q.clip)), V(-q.clip));
      if (q.w_hr) {
        put<1>(&ring_h, q.dproj, i, b, v * L, &dh, q.R - v * L, q.R);
        V(0).store(carry_at(0, b, v));
        if (norm) norm[0].add(dh, q.R - v * L, b);
        return;
      }
      begin(p, i, b, v, dh, norm);
    };
    if (through && recurrent) {
      if constexpr (recurrent)
        pull(
            hi - lo, lo, p.r0, p.r1, G - Q, w_first, [&](int64_t k) { return ring_r.row(place[i + 1] + lo + k); },
            each);
    } else
      for (int64_t k = 0; k < hi - lo; k++)
        for (int64_t v = p.r0; v < p.r1; v++) each(k, v, nullptr);
  }
  // What `gather` reads in a step, and no step before it has: asked for while that one computes.
  void ask(int64_t i, int64_t b, int64_t v) const {
    if (b >= q.rows_at(i)) return;
    const int64_t token = q.token(i, b), unit = v * L;
#pragma GCC unroll 32
    for (int k = 0; k < A; k++) prefetch(at(q.acts) + (token * A + k) * q.H + unit);
    for (int k = q.w_hr ? 1 : 0; k < S; k++) prefetch(entering(k, i, b, q.H) + unit);
    if (q.w_hr) prefetch(at(q.raw) + token * q.H + unit);
    for (int k = 0; k < S; k++)
      if (q.dseq[k]) prefetch(at(q.dseq[k]) + token * (k ? q.H : q.R) + unit);
  }
  // All that reaches the output of a unit is known.
  void begin(const Part &p, int64_t i, int64_t b, int64_t v, V dh, Norm<F> *norm) {
    ask(i - 1, b, v);
    if (again) dh.store(reached_at(b, v));
    if constexpr (!Cell::means) {
      Unit u;
      gather(p, i, b, v, dh, u);
      run<First, 0>(i, b, v, u, V(0), nullptr, nullptr, nullptr, norm);
    }
  }

  void step(const Part &p, int64_t i) {
    Norm<F> norm[S], *const wanted = q.norms && i >= 0 ? norm : nullptr;
    const int64_t now = q.rows_at(i), after = q.rows_at(i + 1), both = std::min(now, after);
    if constexpr (Cell::M > 0) masks[p.id].draw(i);
    rows_of_step(p, i, 0, both, true, true, wanted);
    rows_of_step(p, i, both, now, false, true, wanted);
    rows_of_step(p, i, both, after, true, false, wanted);
    const int64_t last = p.within(now), n = last - p.b0;
    if (q.w_hr) {
      p.meet();
      product<1>(
          n, p.v0, p.v1, w_hr.matrix, [&](int64_t k) { return ring_h.row(place[i] + p.b0 + k); }, depth,
          [&](int64_t k, int64_t v, const F *acc) { begin(p, i, p.b0 + k, v, V::load(acc), wanted); });
    }
    if constexpr (Cell::means) whole_rows<First>(p, i, last, wanted);
    if constexpr (Q > 0) {
      p.meet();
      pull(
          n, p.b0, p.v0, p.v1, Q, w_second, [&](int64_t k) { return ring_r.row(place[i] + p.b0 + k) + K1; },
          [&](int64_t k, int64_t v, const F *acc) {
            const int64_t b = p.b0 + k;
            if constexpr (Cell::means)
              V::load(acc).store(second_at(b, v));
            else {
              Unit u;
              gather(p, i, b, v, V::load(reached_at(b, v)), u);
              run<Step, 0>(i, b, v, u, V::load(acc), nullptr, nullptr, nullptr, wanted);
            }
          });
      if constexpr (Cell::means) whole_rows<Step>(p, i, last, wanted);
    }
    if (wanted)
      for (int k = 0; k < S; k++) norms[(p.id * q.T + q.time(i)) * S + k] = norm[k].sum();
    p.meet();
  }

  // ---- a chunk

  // The factors that are known before the walk: x, the h that entered, the output before projection.
  void pack_factors(const Chunk &c, int parity, int id) {
    const int n = team.size;
    if (id == 0)
      for (int64_t i = c.lo; i < c.hi; i++)
        for (int64_t b = 0; b < q.rows_at(i); b++) token[place[i] + b] = q.token(i, b);
    int64_t i = c.lo, b = 0;
    const auto all = [&](Factor<P> &f, auto row) {
      if (!f.C) return;
      i = c.lo, b = 0;
      const int64_t CV = vectors<T>(f.C);
      pack_rows<P>(
          [&](int64_t) {
            while (b == q.rows_at(i)) i++, b = 0;
            return row(i, b++);
          },
          f.panels[parity].panels, f.panels[parity].matrix.panel, c.tokens, f.C, CV * id / n, CV * (id + 1) / n);
    };
    all(x, [&](int64_t i, int64_t b) { return at(q.x) + q.token(i, b) * q.I; });
    all(h, [&](int64_t i, int64_t b) { return entering(0, i, b, q.R); });
    all(raw, [&](int64_t i, int64_t b) { return at(q.raw) + q.token(i, b) * q.H; });
  }

  // The rows [m0, m1) of a gradient of weights take what a chunk adds; those of a head have columns of f for
  // themselves.
  void add(const Chunk &c, int parity, int id, bool first, const Ring<P> &ring, int64_t m0, int64_t m1,
           const Factor<P> &f, const Weights<T> &w, int64_t heads = 1) const {
    for (int64_t m = m0; w.out && m < m1;) {
      const int64_t block = m / w.C, end = heads > 1 ? std::min(m1, (block + 1) * w.C) : m1;
      Matrix<P> factor = f.panels[parity].matrix;
      factor.panels += block % heads * vectors<T>(w.C) * factor.panel;
      accumulate(ring.row(place[c.lo]), ring.stride, c.tokens, m, end, factor, w, first, pairs[id]);
      m = end;
    }
  }
  void input_gradient(const Chunk &c, int id) {
    constexpr int64_t block = 48; // tokens whose gate gradients stay near while all columns of x pass
    const int64_t n1 = c.tokens * (id + 1) / team.size;
    for (int64_t n0 = c.tokens * id / team.size; n0 < n1; n0 += block) {
      const int64_t at0 = place[c.lo] + n0;
      product<1>(
          std::min(block, n1 - n0), 0, IV, w_ih.matrix, [&](int64_t k) { return ring_x.row(at0 + k); }, depth,
          [&](int64_t k, int64_t v, const F *acc) {
            store(at(q.dx) + token[at0 + k] * q.I + v * L, V::load(acc), q.I - v * L);
          });
    }
  }
  // Adjoints of parameters: what the rows of a chunk have come to, block after block.
  void add_rows(int parity, int id) const {
    const int64_t n = Cell::P * NV;
    for (int64_t u = n * id / team.size; u < n * (id + 1) / team.size; u++) {
      V sum = V::load(dp + u * L);
      for (int64_t k = 0; k < blocks; k++) {
        F *const block = dp_rows + ((parity * blocks + k) * n + u) * L;
        sum += V::load(block);
        V(0).store(block);
      }
      sum.store(dp + u * L);
    }
  }
  void gradients(const Chunk &c, int parity, int id, bool first) {
    const int64_t m0 = K * id / team.size, m1 = K * (id + 1) / team.size;
    if constexpr (Q > 0) {
      if (v.C) {
        pack_rows<P>([&](int64_t t) -> const P * { return ring_v.row(place[c.lo] + t); }, v.panels[parity].panels,
                     v.panels[parity].matrix.panel, c.tokens, q.H, NV *id / team.size, NV * (id + 1) / team.size);
      }
      team.all.wait(id);
    }
    add(c, parity, id, first, ring_x, m0, m1, x, dw_ih);
    add(c, parity, id, first, ring_r, std::min(m0, K1), std::min(m1, K1), h, dw_hh, q.heads);
    if (Q) add(c, parity, id, first, ring_r, std::max(m0, K1), std::max(m1, K1), v, dw_hh, q.heads);
    add(c, parity, id, first, ring_h, q.R * id / team.size, q.R * (id + 1) / team.size, raw, dw_hr);
    if (db_x) add_columns(ring_x.row(place[c.lo]), ring_x.stride, c.tokens, m0, m1, db_x, first);
    if (db_r) add_columns(ring_r.row(place[c.lo]), ring_r.stride, c.tokens, m0, m1, db_r, first);
    if (dp) add_rows(parity, id);
    if (q.dx) input_gradient(c, id);
  }
  static Team make_team(const BackwardArgs &q) {
    const int64_t width = (recurrent ? q.head() : 0) + 2 * q.I;
    const int64_t step = work_of_a_step<Cell>(q), after = std::min(chunk, q.T * q.B) * G * q.H * width;
    const int threads = q.norms ? q.threads : Crowd::threads(q.threads, step); // norms are summed thread by thread
    const Grid grid = choose_grid(worth(threads, step), q.B, vectors<T>(std::min(q.H, q.R)), max_rows<1>,
                                  recurrent ? G * q.H * q.head() * int64_t(sizeof(P)) : 0);
    return Team(q, grid, std::max(grid.rows * grid.units, worth(threads, after / 16)), apart<Cell>(q, grid.units),
                block_of_rows<Cell>(q.B));
  }

public:
  explicit Backward(const BackwardArgs &args) : q(args), team(make_team(args)) {
    arena.reset();
    plan();
    if (q.dx) w_ih = take_panels<P>(arena, q.I, 1, K);
    if (recurrent) w_first = take_panels<P>(arena, q.head(), 1, K1);
    if (Q) w_second = take_panels<P>(arena, q.head(), 1, K - K1);
    if (q.w_hr) w_hr = take_panels<P>(arena, q.H, 1, q.R);
    carry = arena.zeros<F>(S * q.B * width);
    reached = again ? arena.take<F>(q.B * width) : nullptr;
    second = Q && Cell::means ? arena.take<F>(q.B * width) : nullptr;
    pulled = q.heads > 1 ? arena.take<F>(q.B * width) : nullptr;
    owed = Cell::D && q.skip < q.T ? arena.take<F>(q.skip * q.B * width) : nullptr;
    for (int id = 0; team.walks(id); id++) {
      shares.push_back(Share::of<Cell>(team.part(id, NV, RV), team.grid.units, NV, team.block));
      if (Cell::means) rounds.emplace_back(arena, q.H);
      if (Cell::M) masks.emplace_back(q, shares[id], arena);
    }
    ring_x = Ring<P>::take(arena, 2 * room, K);
    ring_r = split ? Ring<P>::take(arena, 2 * room, K) : ring_x;
    if (Q) ring_v = Ring<P>::take(arena, 2 * room, q.H);
    if (q.w_hr) ring_h = Ring<P>::take(arena, 2 * room, q.R);
    dp_rows = q.dparams ? arena.zeros<F>(2 * blocks * Cell::P * NV * L) : nullptr;
    dp = q.dparams ? arena.zeros<F>(Cell::P * NV * L) : nullptr;
    if (q.dw_ih) x = Factor<P>::take(arena, room, q.I), dw_ih = Weights<T>::take(arena, q.dw_ih, K, q.I);
    if (q.dw_hh) h = Factor<P>::take(arena, room, q.R), dw_hh = Weights<T>::take(arena, q.dw_hh, K, q.head());
    if (Q && q.dw_hh) v = Factor<P>::take(arena, room, q.H);
    if (q.dw_hr) raw = Factor<P>::take(arena, room, q.H), dw_hr = Weights<T>::take(arena, q.dw_hr, q.R, q.H);
    db_x = q.db_ih || (q.db_hh && !split) ? arena.take<F>(K) : nullptr;
    db_r = q.db_hh && split ? arena.take<F>(K) : nullptr;
    const bool weights = q.dw_ih || q.dw_hh || q.dw_hr;
    for (int id = 0; id < team.size; id++) {
      const int64_t most = std::max(K, q.R) / team.size + 1;
      pairs.push_back(depth > 1 && weights ? arena.take<P>(sum_steps<P>(room) * row_stride<P>((most + L) * depth))
                                           : nullptr);
    }
    if (q.norms) norms.resize(team.grid.rows * team.grid.units * q.T * S);
  }

  void run() {
    run_team(team.size, [&](int id) {
      std::optional<Part> walker;
      if (team.walks(id)) walker = team.part(id, NV, RV);
      pack(id);
      if (walker) {
        enter(*walker);
        if constexpr (Cell::M > 0) masks[id].once();
      }
      team.all.wait(id);
      for (size_t n = 0; n < chunks.size(); n++) {
        const Chunk &c = chunks[n];
        pack_factors(c, n % 2, id);
        for (int64_t i = c.hi - 1; walker && i >= c.lo; i--) step(*walker, i);
        team.all.wait(id);
        gradients(c, n % 2, id, n == 0);
      }
      if (walker) {
        step(*walker, -1);
        leave(*walker);
      }
      for (const Weights<T> *w : {&dw_ih, &dw_hh, &dw_hr}) w->round(w->M * id / team.size, w->M * (id + 1) / team.size);
      team.all.wait(id); // as in forward
    });
    for (int64_t m = 0; m < K; m += L) {
      if (q.db_ih) store(at(q.db_ih) + m, load(db_x + m, K - m), K - m);
      if (q.db_hh) store(at(q.db_hh) + m, load((split ? db_r : db_x) + m, K - m), K - m);
    }
    for (int64_t v = 0; q.dparams && v < NV; v++)
      for (int k = 0; k < Cell::P; k++)
        store(at(q.dparams) + k * q.H + v * L, V::load(dp + (v * Cell::P + k) * L), q.H - v * L);
    for (int64_t t = 0; q.norms && t < q.T; t++) {
      double *const to = q.norms + t * (S + 1);
      for (int k = 0; k < S; k++) {
        to[k] = 0;
        for (int id = 0; team.walks(id); id++) to[k] += norms[(id * q.T + t) * S + k];
      }
      to[S] = double(q.rows ? q.rows[t] : q.B);
    }
  }
};

template <class Cell, class T, class P> void recurrent_backward(const BackwardArgs &q) {
  Backward<Cell, T, P>(q).run();
}

} // namespace gk
