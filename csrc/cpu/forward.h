// Sequence forward for any cell. A thread owns a rectangle rows x units for the whole sequence; each step is a product
// of the entering h with the recurrent matrix, tile by tile, and the cell on the tile while it is at hand. Input is
// projected a few steps at a time, so that gate pre-activations stay in cache.
#pragma once
#include "masks.h"
#include "means.h"

namespace gk {

template <class Cell, class T, class P> class Forward {
  using F = Real<T>;
  using V = Vec<F>;
  using Step = typename Functions<Cell>::Forward;
  using Operand = typename SecondProduct<Cell>::Operand;
  using First = std::conditional_t<(Cell::Q > 0), Operand, Step>;
  using InRounds = Rounds<Cell, T, Step, Operand>;
  static constexpr int G = Cell::G, S = Cell::S, A = Cell::A, Q = Cell::Q, L = lanes<T>, depth = Dot<P>::depth;
  static constexpr int64_t chunk = 64; // tokens projected at a time
  static constexpr int64_t few = 4;    // tokens for which weights are not worth packing
  static constexpr bool recurrent = Cell::recurrent;
  static constexpr bool again = recurrent && (Q > 0 || Cell::means); // products are needed after they were made

  const ForwardArgs &q;
  const int64_t NV = vectors<T>(q.H), RV = vectors<T>(q.R);
  const int64_t width = std::max(NV, RV) * L; // of a row of state
  const int64_t h_stride = row_stride<P>(std::max(NV, RV) * L);
  Arena &arena = Arena::of_this_thread();
  Team team;
  const bool packs = q.T * q.B > few;
  Packed<P> w_ih, w_first, w_second, w_hr;
  F *state;                          // [S, B, width], each thread its own
  P *h[2];                           // [B, h_stride] what enters a step, what leaves it
  P *between;                        // [B, h_stride] the operand of a second product, or the output before projection
  V *products;                       // [B, NV, G] of the step, where a unit is looked at again
  std::vector<Part> parts;           // of each thread
  std::vector<Share> shares;         // of each thread
  std::vector<InRounds> rounds;      // of each thread, where there are means
  std::vector<Masks<Cell, T>> masks; // of each thread, where there are masks
  std::vector<int> slice_of;         // [NV] who of a group has projected the input of a vector of units

  // What a thread has projected: steps of the span one after the other, rows within each.
  struct Projected {
    F *gates = nullptr;  // [tokens, vectors, G, L]
    P *inputs = nullptr; // [tokens, stride] where x cannot be read as it is
    std::vector<const P *> rows;
    int64_t at = 0, vectors = 0;
  };
  std::vector<Projected> projected;

  static constexpr bool plain = std::is_same_v<T, P>;
  bool reads_input() const { return plain && q.I % depth == 0; }
  int64_t input_stride() const { return row_stride<P>(q.I + depth); }
  const T *at(const void *p) const { return static_cast<const T *>(p); }
  T *at(void *p) const { return static_cast<T *>(p); }
  const T *last_gates() const { return at(q.w_hh) + (G - Q) * q.H * q.head(); } // whose product is the second one
  F *state_at(int k, int64_t b, int64_t v) const { return state + (k * q.B + b) * width + v * L; }

  void pack(int id) {
    if (!packs) return;
    const int n = team.size;
    const auto share = [&](int64_t all, auto f) { f(all * id / n, all * (id + 1) / n); };
    share(NV, [&](int64_t lo, int64_t hi) {
      if (q.w_ih) pack_gates(at(q.w_ih), w_ih.panels, w_ih.matrix.panel, G, q.H, q.I, lo, hi);
      const auto recur = [&](const Packed<P> &to, const T *w, int gates) {
        pack_gates(w, to.panels, to.matrix.panel, gates, q.H, q.head(), lo, hi);
      };
      if (recurrent) recur(w_first, at(q.w_hh), G - Q);
      if (Q) recur(w_second, last_gates(), Q);
    });
    if (q.w_hr)
      share(RV, [&](int64_t lo, int64_t hi) {
        pack_gates(at(q.w_hr), w_hr.panels, w_hr.matrix.panel, 1, q.R, q.H, lo, hi);
      });
  }

  // Rows times the weights [gates * units, K] of the vectors [v0, v1) of units.
  template <int N, class Row, class Done>
  void multiply(int64_t n, int64_t v0, int64_t v1, const Packed<P> &to, const T *w, int64_t units, int64_t K, Row row,
                Done done) const {
    if (packs)
      product<N>(n, v0, v1, to.matrix, row, depth, done);
    else
      product_unpacked<N, P>(n, v0, v1, w, units, K, to.matrix.bias, row, done);
  }

  // The first n rows of a thread, in `base`, times the recurrent weights of its units.
  template <int N, class Done>
  void recur(const Part &p, int64_t n, const P *base, const Packed<P> &to, const T *w, Done done) const {
    by_heads<T>(q, p.v0, p.v1, [&](int64_t head, int64_t v0, int64_t v1) {
      const P *const first = base + p.b0 * h_stride + head * q.head();
      multiply<N>(n, v0, v1, to, w, q.H, q.head(), [=](int64_t k) { return first + k * h_stride; }, done);
    });
  }

  void enter(const Part &p) {
    for (int64_t b = p.b0; b < p.b1; b++) {
      const int64_t c = q.column(b);
      for (int64_t v = p.r0; v < p.r1; v++) {
        const V s = load(at(q.s0[0]) + c * q.R + v * L, q.R - v * L);
        s.store(state_at(0, b, v));
        for (P *to : h)
          if (recurrent) store(to + b * h_stride + v * L, s);
      }
      for (int k = 1; k < S; k++)
        for (int64_t v = p.v0; v < p.v1; v++) load(at(q.s0[k]) + c * q.H + v * L, q.H - v * L).store(state_at(k, b, v));
    }
  }
  void leave(const Part &p) {
    for (int64_t b = p.b0; b < p.b1; b++) {
      const int64_t c = q.column(b);
      for (int64_t v = p.r0; v < p.r1; v++)
        store(at(q.final[0]) + c * q.R + v * L, V::load(state_at(0, b, v)), q.R - v * L);
      for (int k = 1; k < S; k++)
        for (int64_t v = p.v0; v < p.v1; v++)
          store(at(q.final[k]) + c * q.H + v * L, V::load(state_at(k, b, v)), q.H - v * L);
    }
  }

  void project(const Part &p, int64_t i0, int64_t i1) {
    Projected &own = projected[p.id];
    own.at = 0;
    if (!q.w_ih) return;
    int64_t n = 0;
    for (int64_t i = i0; i < i1; i++)
      for (int64_t b = p.b0; b < p.within(q.rows_at(i)); b++, n++) {
        const T *const x = at(q.x) + q.token(i, b) * q.I;
        if (reads_input()) {
          own.rows[n] = reinterpret_cast<const P *>(x);
          continue;
        }
        P *const to = own.inputs + n * input_stride();
        for (int64_t k = 0; k < q.I; k += L) store(to + k, load(x + k, q.I - k), q.I - k);
        own.rows[n] = to;
      }
    own.vectors = p.v1 - p.v0;
    multiply<G>(
        n, p.v0, p.v1, w_ih, at(q.w_ih), q.H, q.I, [&](int64_t k) { return own.rows[k]; },
        [&](int64_t k, int64_t v, const F *acc) {
          F *const to = own.gates + (k * own.vectors + v - p.v0) * G * L;
          for (int g = 0; g < G; g++) V::load(acc + g * L).store(to + g * L);
        });
  }

  struct Unit {
    V x[G], r[G], s[S];
    Extras<Cell, V> extra;
    auto entering() const { return std::tuple_cat(std::tie(x, r, s), extra.groups()); }
  };
  // What the cell sees of a row and a vector of units, recurrent products left to the caller.
  GK_ALWAYS_INLINE void gather(const Part &p, int64_t i, int64_t b, int64_t v, Unit &u) const {
    const Part &owner = Cell::means ? parts[p.id - p.slice + slice_of[v]] : p;
    const Projected &x = projected[owner.id];
    const int64_t n = projected[p.id].at + b - p.b0, unit = v * L;
#pragma GCC unroll 16
    for (int g = 0; g < G; g++)
      u.x[g] = q.w_ih ? V::load(x.gates + ((n * x.vectors + v - owner.v0) * G + g) * L)
                      : load(at(q.x) + (q.token(i, b) * G + g) * q.H + unit, q.H - unit);
    for (int k = 0; k < S; k++) u.s[k] = k == 0 && q.w_hr ? V(0) : V::load(state_at(k, b, v));
    gather_extras<Cell, T>(q, Cell::M ? &masks[p.id] : nullptr, q.seq[0], i, b, v, u.extra);
  }
  V *products_of(int64_t b, int64_t v) const { return products + (b * NV + v) * G; }

  // A round of the operand or of the step itself.
  template <class Function, int k>
  GK_ALWAYS_INLINE void run(int64_t i, int64_t b, int64_t v, const Unit &u, V *kept, const V *mean, V *out) const {
    if constexpr (k < Function::Rounds::count)
      evaluate<Cell, Function>(Round<k>{}, u.entering(), kept, mean, out);
    else if constexpr (std::is_same_v<Function, Operand>) {
      V operand;
      evaluate<Cell, Function>(Round<k>{}, u.entering(), kept, mean, operand);
      store(between + b * h_stride + v * L, operand, q.H - v * L);
    } else
      finish(i, b, v, u, kept, mean);
  }
  // All of it, for the rows that this thread has to itself; others have made the products.
  template <class Function> void whole_rows(const Part &p, int64_t i, int64_t last) const {
    p.meet();
    shares[p.id].each_row(last, [&](int64_t b) {
      rounds[p.id].template row<Function>([&](auto round, int64_t v, V *kept, const V *mean, V *out) GK_ALWAYS_INLINE {
        Unit u;
        gather(p, i, b, v, u);
#pragma GCC unroll 16
        for (int g = 0; g < G; g++) u.r[g] = recurrent ? products_of(b, v)[g] : V(0);
        run<Function, number(round)>(i, b, v, u, kept, mean, out);
      });
    });
  }

  GK_ALWAYS_INLINE void finish(int64_t i, int64_t b, int64_t v, const Unit &u, V *kept, const V *mean) const {
    const int64_t unit = v * L, token = q.token(i, b), m = q.H - unit;
    V t[S], values[A ? A : 1], *const a = values;
    evaluate<Cell, Step>(Round<Step::Rounds::count>{}, u.entering(), kept, mean, t, a);
    for (int k = 0; k < A && q.acts; k++) store(at(q.acts) + (token * A + k) * q.H + unit, a[k], m);
    for (int k = 1; k < S; k++) {
      t[k].store(state_at(k, b, v));
      if (q.seq[k]) store(at(q.seq[k]) + token * q.H + unit, t[k], m);
    }
    if (q.w_hr) {
      store(between + b * h_stride + unit, t[0], m);
      if (q.raw) store(at(q.raw) + token * q.H + unit, t[0], m);
    } else
      put(i, b, v, t[0]);
  }
  // Lanes past the end stay zero in what is multiplied: zero times what a cell makes of nothing may be no number.
  void put(int64_t i, int64_t b, int64_t v, V y) const {
    y.store(state_at(0, b, v));
    if (recurrent) store(h[(i + 1) % 2] + b * h_stride + v * L, y, q.R - v * L);
    store(at(q.seq[0]) + q.token(i, b) * q.R + v * L, y, q.R - v * L);
  }

  void step(const Part &p, int64_t i) {
    const int64_t last = p.within(q.rows_at(i)), n = last - p.b0;
    if constexpr (Cell::M > 0) masks[p.id].draw(i);
    const auto first = [&](int64_t k, int64_t v, const F *acc) {
      const int64_t b = p.b0 + k;
      if (again)
        for (int g = 0; g < G - Q; g++) products_of(b, v)[g] = V::load(acc + g * L);
      if constexpr (!Cell::means) {
        Unit u;
        gather(p, i, b, v, u);
        for (int g = 0; g < G; g++) u.r[g] = g < G - Q && acc ? V::load(acc + g * L) : V(0);
        run<First, 0>(i, b, v, u, nullptr, nullptr, nullptr);
      }
    };
    if constexpr (recurrent)
      recur<G - Q>(p, n, h[i % 2], w_first, at(q.w_hh), first);
    else if (!Cell::means)
      for (int64_t k = 0; k < n; k++)
        for (int64_t v = p.v0; v < p.v1; v++) first(k, v, nullptr);
    if constexpr (Cell::means) whole_rows<First>(p, i, last);
    if constexpr (Q > 0) {
      p.meet();
      recur<Q>(p, n, between, w_second, last_gates(), [&](int64_t k, int64_t v, const F *acc) {
        const int64_t b = p.b0 + k;
        V *const made = products_of(b, v);
        for (int g = 0; g < Q; g++) made[G - Q + g] = V::load(acc + g * L);
        if constexpr (!Cell::means) {
          Unit u;
          gather(p, i, b, v, u);
          for (int g = 0; g < G; g++) u.r[g] = made[g];
          run<Step, 0>(i, b, v, u, nullptr, nullptr, nullptr);
        }
      });
      if constexpr (Cell::means) whole_rows<Step>(p, i, last);
    }
    if (q.w_hr) {
      p.meet();
      multiply<1>(
          n, p.r0, p.r1, w_hr, at(q.w_hr), q.R, q.H, [&](int64_t k) { return between + (p.b0 + k) * h_stride; },
          [&](int64_t k, int64_t v, const F *acc) { put(i, p.b0 + k, v, V::load(acc)); });
    }
    projected[p.id].at += n;
    p.meet();
  }

  static Team make_team(const ForwardArgs &q) {
    const int64_t weights = G * q.H * ((recurrent ? q.head() : 0) + (q.w_ih ? q.I : 0));
    const int64_t step = work_of_a_step<Cell>(q);
    const Grid grid = choose_grid(worth(Crowd::threads(q.threads, step), step), q.B, vectors<T>(q.H), max_rows<G>,
                                  weights * int64_t(sizeof(P)));
    return Team(q, grid, grid.rows * grid.units, apart<Cell>(q, grid.units), block_of_rows<Cell>(q.B));
  }

public:
  explicit Forward(const ForwardArgs &args) : q(args), team(make_team(args)) {
    arena.reset();
    const auto room = [&](int64_t columns, int gates, int64_t K) {
      return packs ? take_panels<P>(arena, columns, gates, K) : Packed<P>{};
    };
    if (q.w_ih) {
      w_ih = room(q.H, G, q.I);
      w_ih.matrix.bias = pack_bias(arena, at(q.b_ih), G, q.H);
    }
    if (recurrent) {
      w_first = room(q.H, G - Q, q.head());
      w_first.matrix.bias = pack_bias(arena, at(q.b_hh), G - Q, q.H);
    }
    if (Q) {
      w_second = room(q.H, Q, q.head());
      w_second.matrix.bias = pack_bias(arena, q.b_hh ? at(q.b_hh) + (G - Q) * q.H : nullptr, Q, q.H);
    }
    if (q.w_hr) w_hr = room(q.R, 1, q.H);
    state = arena.zeros<F>(S * q.B * width);
    for (P *&to : h) to = recurrent ? arena.zeros<P>(q.B * h_stride) : nullptr;
    between = Q || q.w_hr ? arena.zeros<P>(q.B * h_stride) : nullptr;
    products = again ? arena.take<V>(q.B * NV * G) : nullptr;
    for (int id = 0; id < team.size; id++) {
      parts.push_back(team.part(id, NV, RV));
      shares.push_back(Share::of<Cell>(parts[id], team.grid.units, NV, team.block));
      if (Cell::means) rounds.emplace_back(arena, q.H);
      if (Cell::M) masks.emplace_back(q, shares[id], arena);
    }
    slice_of.resize(NV);
    for (int id = 0; id < team.grid.units; id++)
      for (int64_t v = parts[id].v0; v < parts[id].v1; v++) slice_of[v] = id;
    projected.resize(team.size);
    for (int id = 0; q.w_ih && id < team.size; id++) {
      const Part &p = parts[id];
      const int64_t n = std::max(chunk, p.b1 - p.b0);
      projected[id].gates = arena.take<F>(n * (p.v1 - p.v0) * G * L);
      projected[id].rows.resize(n);
      if (!reads_input()) projected[id].inputs = arena.zeros<P>(n * input_stride());
    }
  }

  void run() {
    run_team(team.size, [&](int id) {
      const Part &p = parts[id];
      pack(id);
      enter(p);
      if constexpr (Cell::M > 0) masks[id].once();
      team.all.wait(id);
      const int64_t span = std::max<int64_t>(1, chunk / std::max<int64_t>(1, p.b1 - p.b0));
      for (int64_t i0 = 0; i0 < q.T; i0 += span) {
        const int64_t i1 = std::min(q.T, i0 + span);
        project(p, i0, i1);
        for (int64_t i = i0; i < i1; i++) step(p, i);
      }
      leave(p);
      team.all.wait(id); // OpenMP's own waiting spins for milliseconds, on a core that another process may want
    });
  }
};

template <class Cell, class T, class P> void recurrent_forward(const ForwardArgs &q) { Forward<Cell, T, P>(q).run(); }

} // namespace gk
