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
#pragma omp single
      got = omp_get_num_threads();
      if (got == threads) f(omp_get_thread_num());
    }
    if (got == threads) return;
  }
#endif
  std::vector<std::thread> team;
  for (int id = 1; id < threads; id++) team.emplace_back([f, id] { f(id); });
  f(0);
  for (auto &t : team) t.join();
}

} // namespace gk
