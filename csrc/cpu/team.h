// A team of threads that walks a whole sequence together, and the barrier between its steps.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace gk {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Each thread writes a line of its own and reads those of the others: one transfer between cores a step, where a
// counter and a flag take three. Spins for about as long as a step takes, then offers the core to others, then sleeps:
// two processes on two cores must not stop each other, and who waits for a preempted thread must not burn its time
// slice.
class Barrier {
  static constexpr int spins = 2000, yields = 64;
  struct alignas(64) Line {
    std::atomic<int> epoch{0};
  };
  std::vector<Line> lines;
  alignas(64) std::atomic<int> sleepers{0};

  void wait_for(std::atomic<int> &other, int now) {
    const auto behind = [&] { return other.load(std::memory_order_acquire) - now < 0; };
    for (int i = 0; i < spins; i++, relax())
      if (!behind()) return;
    waits.fetch_add(1, std::memory_order_relaxed);
    for (int i = 0; i < yields; i++, std::this_thread::yield())
      if (!behind()) return;
#if defined(__linux__)
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while (other.load(std::memory_order_seq_cst) - now < 0) // a signal, too, ends the call: look again
      syscall(SYS_futex, &other, FUTEX_WAIT_PRIVATE, now - 1, nullptr, nullptr, 0);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
#else
    while (behind()) std::this_thread::yield();
#endif
  }

public:
  std::atomic<int> waits{0}; // how often someone waited so long that a core must have been missing
  explicit Barrier(int size) : lines(size) {}
  void wait(int id) {
    const int size = int(lines.size());
    if (size == 1) return;
    std::atomic<int> &own = lines[id].epoch;
    const int now = own.load(std::memory_order_relaxed) + 1;
    own.store(now, std::memory_order_seq_cst);
#if defined(__linux__)
    if (sleepers.load(std::memory_order_seq_cst))
      syscall(SYS_futex, &own, FUTEX_WAKE_PRIVATE, size, nullptr, nullptr, 0);
#endif
    for (int other = 1; other < size; other++) wait_for(lines[(id + other) % size].epoch, now);
  }
};

// Where others use the cores, a team whose steps are short waits for time slices and not for work: after a call like
// that the next ones are left to one thread, whose results are the same bits.
class Crowd {
  static constexpr int many = 8, rest = 64;               // waits of a call, calls until the next try
  static constexpr int64_t short_step = int64_t(1) << 21; // multiply-adds
  static std::atomic<int> &calls() {
    static std::atomic<int> left{0};
    return left;
  }

public:
  static int threads(int wanted, int64_t multiply_adds_per_step) {
    if (wanted == 1 || multiply_adds_per_step > short_step || calls().load(std::memory_order_relaxed) <= 0)
      return wanted;
    calls().fetch_sub(1, std::memory_order_relaxed);
    return 1;
  }
  static void note(int waits) {
    if (waits >= many) calls().store(rest, std::memory_order_relaxed);
  }
};

// OpenMP's threads do not survive a fork, and its next parallel region would wait for them for ever.
inline bool &forked() {
  static bool flag = false;
#if defined(__unix__) || defined(__APPLE__)
  static const int once = pthread_atfork(nullptr, nullptr, [] { forked() = true; });
  (void)once;
#endif
  return flag;
}

// f(id) on `threads` threads at once. The OpenMP runtime is torch's own where both name the same library, so that the
// threads that wait after a torch operation are the ones that do this work.
template <class F> inline void run_team(int threads, F f) {
  if (threads <= 1) return f(0);
#ifdef _OPENMP
  if (!forked() && !omp_in_parallel()) {
    int got = 0;
#pragma omp parallel num_threads(threads)
    {
      const int id = omp_get_thread_num(), size = omp_get_num_threads();
      if (id == 0) got = size;
      if (size == threads) f(id);
    }
    if (got == threads) return;
  }
#endif
  std::vector<std::thread> team;
  for (int id = 1; id < threads; id++) team.emplace_back([f, id] { f(id); });
  f(0);
  for (auto &t : team) t.join();
}

// Whoever calls takes pieces 0 .. count - 1 until none is left; what a piece computes must not depend on who has it.
template <class Each> inline void share(std::atomic<int64_t> &next, int64_t count, Each each) {
  for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < count;) each(k);
}

} // namespace gk
