// Walks random shapes through the recurrent driver, to be built with sanitizers: recurrent_walk SEED FIRST LAST CELL...
// runs the cases FIRST .. LAST - 1 of that seed, on the cells in turn. One line per failure, and a status of 1.
//
// One storage type a program, GK_STORAGE. Nothing here knows Python or torch.
#ifndef GK_OTHER_CELLS
#include "../../csrc/cells.gen.h"
#endif
#include "../../csrc/cpu/backward.h"
#include "../../csrc/cpu/forward.h"
#include "memory.h"
#include "reference.h"
#include <mutex>
#include <string>
#include <thread>

namespace walk {

using namespace gk;
using T = GK_STORAGE;

// ---- what is asked

struct Wish {
  int keep; // 0: outputs; 1: every state; 2: what backward needs
  bool dx, dw_ih, db_ih, dw_hh, db_hh, dw_hr, dgates, dr, v, dproj, norms, dparams, dp;
};

void round(Values &v) {
  for (double &x : v)
    if (!std::isnan(x)) x = rounded<T>(x);
}

class Draw {
  Random &random;
  Values values(int64_t n, double scale) {
    Values v(n);
    for (double &x : v) x = scale * (2 * random.uniform() - 1);
    round(v);
    return v;
  }
  Values maybe(int64_t n, double scale) { return random.chance(0.7) ? values(n, scale) : Values(); }

public:
  explicit Draw(Random &r) : random(r) {}

  template <class Cell> Layer layer() {
    static constexpr int64_t steps[] = {1, 2, 5, 17}, batch[] = {1, 2, 3, 7, 13, 24},
                             sizes[] = {1, 3, 15, 16, 17, 33, 63};
    static constexpr int64_t small[] = {1, 3, 15, 17};
    Layer q{};
    q.T = random.of(steps), q.B = random.of(batch);
    q.I = random.of(sizes), q.H = random.of(sizes), q.R = random.of(sizes);
    if (random.chance(0.06)) // several chunks of backward
      q.T = 60, q.B = 24, q.I = random.of(small), q.H = random.of(small), q.R = random.of(small);
    else if (random.chance(0.03)) // a step that is more than a chunk
      q.T = 2, q.B = 530, q.I = random.of(small), q.H = random.of(small), q.R = random.of(small);
    else if (random.chance(0.06)) // many vectors of units for few rows
      q.T = 3, q.B = 2, q.I = 5, q.H = 129;
    q.projected = std::string(Cell::name) == "lstm" && random.chance(0.4);
    q.heads = !q.projected && Cell::recurrent && random.chance(0.3) ? 2 + random.below(3) : 1;
    if (q.heads > 1) q.H = q.heads * lanes<T> * (1 + random.below(2));
    if (!q.projected) q.R = q.H;
    q.gates_given = random.chance(0.2), q.reverse = random.chance(0.4);
    q.layout = Layout(random.below(3));
    const bool none = random.chance(0.03);
    for (int64_t b = 0; b < q.B; b++) {
      const int64_t least = q.layout == Layout::packed ? 1 : 0;
      q.lengths.push_back(q.layout == Layout::dense ? q.T : none ? least : least + random.below(q.T + 1 - least));
    }
    if (q.layout == Layout::packed) {
      std::sort(q.lengths.rbegin(), q.lengths.rend());
      q.T = q.lengths[0]; // a PackedSequence has no empty steps
    }

    constexpr int G = Cell::G, S = Cell::S;
    const int64_t N = q.tokens(), K = G * q.H;
    const double in = 2 / std::sqrt(double(q.I)), back = 1.2 / std::sqrt(double(q.head()));
    if (q.gates_given)
      q.x = values(N * K, 2);
    else {
      q.x = values(N * q.I, 1.5), q.w_ih = values(K * q.I, in);
      q.b_ih = maybe(K, 0.5);
    }
    q.w_hh = values(Cell::recurrent ? K * q.head() : 0, back), q.b_hh = maybe(K, 0.5);
    if (q.projected) q.w_hr = values(q.R * q.H, 1.5 / std::sqrt(double(q.H)));
    for (int k = 0; k < S; k++) {
      q.s0.push_back(values(q.B * q.size(k), 1));
      q.dseq.push_back(maybe(N * q.size(k), 1)), q.dfinal.push_back(maybe(q.B * q.size(k), 1));
    }
    q.params = values(Cell::P * q.H, 1), q.flags = values(N, 1);
    q.seeded = random.chance(0.8), q.seed = int64_t(random.bits()), q.first_number = random.chance(0.5) ? 0 : 1234567;
    static constexpr int64_t skips[] = {1, 2, 3, 30};
    q.skip = random.of(skips), q.clip = random.chance(0.3) ? 0.3 : 0;
    for (int k = 0; k < Cell::M; k++)
      q.noise.push_back({random.chance(0.8) ? 0.3 : 1., 1.25, gk::Noise::Source(random.below(3))});
    unvisited(q, G);
    return q;
  }

  Wish wish() {
    const auto flag = [&] { return random.chance(0.7); };
    return {int(random.below(3)),
            flag(),
            flag(),
            flag(),
            flag(),
            flag(),
            flag(),
            flag(),
            flag(),
            flag(),
            flag(),
            flag(),
            flag(),
            flag()};
  }

private:
  // Nobody may look at tokens past the end of a row.
  static void unvisited(Layer &q, int G) {
    if (q.layout != Layout::padded) return;
    const auto clear = [&](Values &v, int64_t n, int64_t width) {
      if (!v.empty()) std::fill_n(v.begin() + n * width, width, NAN);
    };
    for (int64_t b = 0; b < q.B; b++)
      for (int64_t t = q.lengths[b]; t < q.T; t++) {
        clear(q.x, t * q.B + b, q.gates_given ? G * q.H : q.I), clear(q.flags, t * q.B + b, 1);
        for (size_t k = 0; k < q.dseq.size(); k++) clear(q.dseq[k], t * q.B + b, q.size(int(k)));
      }
  }
};

// ---- what is given, by every caller of a case at once

class Inputs {
  std::vector<Buffer> held;
  Random random;

  const void *put(const Values &v) {
    if (v.empty()) return nullptr;
    held.push_back(stored<T>(v, random));
    return held.back().data();
  }
  const int64_t *put(const std::vector<int64_t> &v) {
    held.emplace_back(v.size() * sizeof(int64_t), random);
    std::memcpy(held.back().data(), v.data(), held.back().size());
    held.back().seal();
    return reinterpret_cast<const int64_t *>(held.back().data());
  }
  template <class Args> Args sequence(const Layer &q) {
    Args args{};
    args.params = put(q.params), args.flags = put(q.flags), args.noise = q.noise.data();
    args.seed = q.seeded ? &q.seed : nullptr, args.first_number = q.first_number, args.skip = q.skip,
    args.heads = q.heads;
    args.T = q.T, args.B = q.B, args.I = q.gates_given ? 0 : q.I, args.H = q.H, args.R = q.R, args.reverse = q.reverse;
    if (q.layout == Layout::dense) return args;
    std::vector<int64_t> rows(q.T), order(q.B);
    for (int64_t t = 0; t < q.T; t++) rows[t] = q.rows_at(t);
    args.rows = put(rows);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return q.lengths[a] > q.lengths[b]; });
    if (q.layout == Layout::padded)
      args.order = put(order);
    else
      args.first = put(q.starts());
    return args;
  }

public:
  ForwardArgs forward;
  BackwardArgs backward;
  Inputs(const Layer &q, uint64_t seed) : random{seed} {
    forward = sequence<ForwardArgs>(q), backward = sequence<BackwardArgs>(q);
    forward.x = backward.x = put(q.x);
    forward.w_ih = backward.w_ih = put(q.w_ih), forward.b_ih = put(q.b_ih);
    forward.w_hh = backward.w_hh = put(q.w_hh), forward.b_hh = put(q.b_hh);
    forward.w_hr = backward.w_hr = put(q.w_hr);
    backward.clip = q.clip;
    backward.raw = put(q.raw), backward.acts = put(q.acts);
    for (size_t k = 0; k < q.s0.size(); k++) {
      forward.s0[k] = backward.s0[k] = put(q.s0[k]), backward.seq[k] = put(q.seq[k]);
      backward.dseq[k] = put(q.dseq[k]), backward.dfinal[k] = put(q.dfinal[k]);
    }
  }
};

// ---- what comes out

// Errors are allowed to be this part of a tensor's largest value, or of the largest term of the sums that it is made
// of: products of bfloat16 round the state in every step.
template <class P> constexpr double allowed() {
  return std::is_same_v<T, double>     ? 1e-12
         : std::is_same_v<T, float>    ? 1e-5
         : std::is_same_v<T, half>     ? 4e-3
         : std::is_same_v<P, bfloat16> ? 6e-2
                                       : 2e-2;
}

double largest(const Values &v) {
  double most = 0;
  for (double x : v) most = std::fmax(most, std::fabs(x)); // of a NaN and a number, the number
  return most;
}

class Outputs {
  struct Output {
    const char *name;
    const Values *expected; // NaN where nothing may be written
    double term;
    Buffer got;
    bool bits; // the same for any number of threads
  };
  std::vector<Output> all;
  Random random;

  template <class E> static void compare(const Output &o, double allowed, double &worst, std::string &wrong) {
    const Values &expected = *o.expected;
    const double least = std::is_same_v<E, half> ? 1e-5 : 1e-35; // where a type has no more bits to be exact with
    const double scale = std::fmax(std::fmax(least, o.term), largest(expected));
    for (size_t i = 0; i < expected.size(); i++) {
      const char *const at = o.got.data() + i * sizeof(E);
      E element;
      std::memcpy(&element, at, sizeof(E));
      bool untouched = true;
      for (size_t k = 0; k < sizeof(E); k++) untouched = untouched && at[k] == char(0xff);
      const double error = std::fabs(value(element) - expected[i]) / (allowed * scale);
      if (!std::isnan(expected[i])) worst = std::fmax(worst, error);
      if (std::isnan(expected[i]) ? untouched : error <= 1) continue;
      char text[200];
      if (std::isnan(expected[i]))
        std::snprintf(text, sizeof text, " %s[%zu of %zu] is nobody's, but was written;", o.name, i, expected.size());
      else
        std::snprintf(text, sizeof text, " %s[%zu of %zu] is %g, not %g;", o.name, i, expected.size(), value(element),
                      expected[i]);
      wrong += text;
      return;
    }
  }

public:
  explicit Outputs(uint64_t seed) : random{seed} {}
  void *add(const char *name, const Values &expected, double term, bool wanted = true) {
    if (!wanted) return nullptr;
    all.push_back({name, &expected, term, Buffer(expected.size() * sizeof(T), random), true});
    return all.back().got.data();
  }
  double *add_norms(const Values &expected, bool wanted) {
    if (!wanted) return nullptr;
    all.push_back({"norms", &expected, 0, Buffer(expected.size() * sizeof(double), random), false});
    return reinterpret_cast<double *>(all.back().got.data());
  }
  // What is wrong, or nothing.
  std::string check(double allowed, double &worst) const {
    std::string wrong;
    for (const Output &o : all)
      if (o.bits)
        compare<T>(o, allowed, worst, wrong);
      else
        compare<double>(o, allowed, worst, wrong);
    return wrong;
  }
  std::string differ(const Outputs &other) const {
    for (size_t i = 0; i < all.size(); i++)
      if (all[i].bits && std::memcmp(all[i].got.data(), other.all[i].got.data(), all[i].got.size()))
        return std::string(" ") + all[i].name + " depends on the number of threads;";
    return {};
  }
  size_t count() const { return all.size(); }
};

// Scratch memory full of NaN: what the driver reads before it has written shows.
void spoil_scratch() {
  constexpr int64_t size = 4 << 20;
  Arena &arena = Arena::of_this_thread();
  arena.reset();
  std::memset(arena.take<char>(size), 0xff, size);
}

template <class Cell, class P> void call(const Layer &q, const Wish &w, const Inputs &in, int threads, Outputs &out) {
  constexpr int S = Cell::S;
  ForwardArgs f = in.forward;
  f.threads = threads;
  constexpr double state = 0.3; // states are about one, but one alone may happen to be small
  for (int k = 0; k < S; k++) {
    f.seq[k] = out.add(k ? "every c" : "y", q.seq[k], state, k == 0 || w.keep > 0);
    f.final[k] = out.add(k ? "final c" : "final h", q.final[k], state);
  }
  f.raw = out.add("raw", q.raw, state, q.projected && w.keep == 2);
  f.acts = out.add("acts", q.acts, state, w.keep == 2);
  spoil_scratch();
  recurrent_forward<Cell, T, P>(f);

  BackwardArgs b = in.backward;
  b.threads = threads;
  double given = 0;
  for (int k = 0; k < S; k++) given = std::fmax(given, std::fmax(largest(q.dseq[k]), largest(q.dfinal[k])));
  const double dx = largest(q.dgates), dr = largest(q.dr), dy = largest(q.dproj);
  const bool project = !q.gates_given;
  b.dx = out.add("dx", q.dx, dx * largest(q.w_ih), w.dx && project);
  b.dw_ih = out.add("dw_ih", q.dw_ih, dx * largest(q.x), w.dw_ih && project);
  b.dw_hh = out.add("dw_hh", q.dw_hh, dr * largest(q.seq[0]), w.dw_hh && Cell::recurrent);
  b.dw_hr = out.add("dw_hr", q.dw_hr, dy * largest(q.raw), w.dw_hr && q.projected);
  b.db_ih = out.add("db_ih", q.db_ih, dx, w.db_ih);
  b.db_hh = out.add("db_hh", q.db_hh, dr, w.db_hh);
  for (int k = 0; k < S; k++) b.ds0[k] = out.add(k ? "dc0" : "dh0", q.ds0[k], dr * largest(q.w_hh));
  b.dgates = out.add("dgates", q.dgates, given / 10, w.dgates);
  b.dr = out.add("dr", q.dr, given / 10, w.dr && !Cell::shared);
  b.v = out.add("v", q.v, 0, w.v && Cell::Q > 0);
  b.dproj = out.add("dproj", q.dproj, given / 10, w.dproj && q.projected);
  b.dparams = out.add("dparams", q.dparams, given, w.dparams && Cell::P > 0);
  b.dp = out.add("dp", q.dp, given / 10, w.dp && Cell::P > 0);
  b.norms = out.add_norms(q.norms, w.norms);
  spoil_scratch();
  recurrent_backward<Cell, T, P>(b);
}

// ---- cases

struct Tally {
  int failures = 0;
  size_t tensors = 0;
  double worst = 0;
};

template <class F> void at_once(int callers, [[maybe_unused]] bool inside, F f) {
#ifdef _OPENMP
  if (inside) { // a team within a team
#pragma omp parallel for num_threads(callers) schedule(static, 1)
    for (int k = 0; k < callers; k++) f(k);
    return;
  }
#endif
  std::vector<std::thread> others;
  for (int k = 1; k < callers; k++) others.emplace_back(f, k);
  f(0);
  for (auto &t : others) t.join();
}

template <class Cell, class P> void walk(Random &random, const std::string &label, Tally &tally) {
  Layer q = Draw(random).layer<Cell>();
  const Wish w = Draw(random).wish();
  Walk<Cell> reference(q);
  reference.forward();
  for (Values &v : q.seq) round(v);
  round(q.raw), round(q.acts);
  reference.backward();
  const Inputs in(q, random.bits());

  const int callers = random.chance(0.7) ? 1 : 2 + int(random.below(2)), threads = int(random.below(4));
  std::vector<Outputs> out;
  for (int k = 0; k < callers; k++) out.emplace_back(random.bits());
  at_once(callers, random.chance(0.3), [&](int k) { call<Cell, P>(q, w, in, 1 + (threads + k) % 4, out[k]); });

  for (int k = 0; k < callers; k++) {
    const std::string wrong = out[k].check(allowed<P>(), tally.worst) + (k ? out[k].differ(out[0]) : "");
    tally.tensors += out[k].count();
    if (wrong.empty()) continue;
    static constexpr const char *layouts[] = {"dense", "padded", "packed"};
    std::printf("%s %s%s%s, T=%d B=%d I=%d H=%d R=%d heads=%d, %s%s, keep %d, %d threads, caller %d of %d:%s\n",
                label.c_str(), Cell::name, std::is_same_v<T, P> ? "" : " (panels of another type)",
                q.gates_given ? " from gates" : "", int(q.T), int(q.B), int(q.I), int(q.H), int(q.R), int(q.heads),
                layouts[int(q.layout)], q.reverse ? " reversed" : "", w.keep, 1 + (threads + k) % 4, k + 1, callers,
                wrong.c_str());
    tally.failures++;
  }
}

// As recurrent.cpp chooses panels, and the other way too.
template <class F> void with_panels([[maybe_unused]] bool other, F f) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bfloat16>)
    if (has_bf16_dots() && !other) return f(bfloat16{});
#endif
  f(Real<T>{});
}

} // namespace walk

int main(int count, char **args) {
  if (count < 5) return std::fprintf(stderr, "usage: %s SEED FIRST LAST CELL...\n", args[0]), 2;
  const uint64_t seed = std::strtoull(args[1], nullptr, 10);
  const int first = std::atoi(args[2]), last = std::atoi(args[3]);
  walk::Tally tally;
  for (int i = first; i < last; i++) {
    walk::Random random{seed * 1000003 + uint64_t(i)};
    random.state = random.bits(); // neighbours have nothing in common
    gk::with_cell(args[4 + i % (count - 4)], [&](auto cell) {
      walk::with_panels(random.chance(0.3), [&](auto panel) {
        walk::walk<decltype(cell), decltype(panel)>(random, "case " + std::to_string(i), tally);
      });
    });
  }
  std::printf("%d cases, %zu tensors, %d failures; the worst error is %.2f of what is allowed\n", last - first,
              tally.tensors, tally.failures, tally.worst);
  return tally.failures ? 1 : 0;
}
