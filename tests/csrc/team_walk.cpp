// The barrier and the team by themselves: team_walk barrier SIZE ROUNDS, or team_walk fork.
#include "../../csrc/cells.gen.h"
#include "../../csrc/cpu/forward.h"
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

using namespace gk;

namespace {

// Plain memory, written by one thread and read by all others between two waits: only the barrier keeps them in order.
// Some threads come late by more than the others spin, so that those sleep and have to be woken.
int barrier(int size, int rounds) {
  Barrier barrier(size);
  std::vector<int> slots(size, -1), wrong(size, 0);
  run_team(size, [&](int id) {
    for (int round = 0; round < rounds; round++) {
      if ((round * 7 + id) % (size * 31) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      slots[id] = round * size + id;
      barrier.wait(id);
      for (int other = 0; other < size; other++) wrong[id] += slots[other] != round * size + other;
      barrier.wait(id);
    }
  });
  int all = 0;
  for (int n : wrong) all += n;
  std::printf("%d threads met %d times, %d values out of order\n", size, 2 * rounds, all);
  return all ? 1 : 0;
}

struct Net {
  static constexpr int64_t T = 9, B = 24, H = 64;
  std::vector<float> x = numbers(T * B * H), w_ih = numbers(H * H), w_hh = numbers(H * H), h0 = numbers(B * H);

  static std::vector<float> numbers(int64_t n) {
    std::vector<float> v(n);
    for (int64_t i = 0; i < n; i++) v[i] = float(i * 7919 % 1009 - 504) / 4096;
    return v;
  }
  std::vector<float> run(int threads) const {
    std::vector<float> y(T * B * H), last(B * H);
    ForwardArgs q{};
    q.T = T, q.B = B, q.I = H, q.H = H, q.R = H, q.threads = threads;
    q.x = x.data(), q.w_ih = w_ih.data(), q.w_hh = w_hh.data(), q.s0[0] = h0.data();
    q.seq[0] = y.data(), q.final[0] = last.data();
    recurrent_forward<RnnTanhCell, float, float>(q);
    return y;
  }
};

// Threads of before a fork are not there after it; a child that counts on them waits for ever.
int forks() {
  const Net net;
  const std::vector<float> expected = net.run(1);
  int wrong = net.run(2) != expected;
  for (int round = 0; round < 3; round++) {
    const pid_t child = fork();
    if (child < 0) return std::perror("fork"), 2;
    if (child == 0) _exit(net.run(2) == expected && net.run(3) == expected ? 0 : 1);
    int status = 0, waited = 0;
    while (waitpid(child, &status, WNOHANG) == 0) {
      if (++waited > 2000) {
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        std::printf("the child of fork %d hangs\n", round);
        return 1;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    const bool good = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    if (!good) std::printf("the child of fork %d ended with status %x\n", round, status);
    wrong += !good;
    wrong += net.run(2) != expected; // and the parent goes on
  }
  std::printf("3 forks, %d wrong\n", wrong);
  return wrong ? 1 : 0;
}

} // namespace

int main(int count, char **args) {
  const std::string what = count > 1 ? args[1] : "";
  if (what == "barrier" && count == 4) return barrier(std::atoi(args[2]), std::atoi(args[3]));
  if (what == "fork" && count == 2) return forks();
  return std::fprintf(stderr, "usage: %s barrier SIZE ROUNDS | fork\n", args[0]), 2;
}
