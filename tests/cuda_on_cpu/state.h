// The state of a launch: blocks and threads, what each of them waits for, and what is under way between them.
#pragma once
#include "runtime.h"
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <ucontext.h>
#include <vector>

namespace gk::twin {

constexpr int warp_size = 32;

inline const char *base_name(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

struct Call {
  const char *primitive = "nothing";
  Site site{"", 0};
  bool operator==(const Call &c) const {
    return site.line == c.site.line && !strcmp(primitive, c.primitive) && !strcmp(site.file, c.site.file);
  }
  std::string text() const {
    return std::string(base_name(site.file)) + ":" + std::to_string(site.line) + " " + primitive;
  }
};

// Whoever passes is ordered after all who came. The next phase has an order of its own: nobody can be two ahead.
struct Barrier {
  int size = 0, arrived = 0;
  long phase = 0;
  char order[2];
};

struct Word { // on its way through L2
  void *to;
  unsigned long long value;
};
using Words = std::vector<Word>;

struct Block;
struct Warp {
  Barrier ordered, meeting; // of warp_sync; of calls that exchange values and order no memory
  Call call;                // of the lanes that are at the next .aligned call
  int there = 0;
  unsigned priority = 0;
  alignas(lane_bytes) char lanes[2][warp_size][lane_bytes];
};
struct Cluster {
  Barrier barrier;
  std::vector<Block *> blocks;
};
struct Block {
  Barrier barrier;
  Cluster *cluster = nullptr;
  int index = 0, alive = 0;
  std::unique_ptr<Warp[]> warps;
  char *shared = nullptr;
  Words told; // before a barrier
};

struct Counter {
  struct Add {
    unsigned before;
    char order;
  };
  std::deque<Add> adds; // those that ordered memory
};

struct Mailbox { // of a signal
  struct Parcel {
    long phase;
    void *to;
    unsigned bytes;
    char data[16];
  };
  long phase = 0, bytes = 0; // phases complete; bytes expected and not yet there, in the open one
  bool open = false;         // expected already
  std::vector<Parcel> parcels;
  std::map<long, char> order; // of every phase
};

struct Fiber {
  ucontext_t context;
  void *tsan = nullptr;
  Block *block = nullptr;
  int thread = 0;
  Call call;
  enum { Ready, AtBarrier, AtCounter, AtWord, AtSignal, Ended } state = Ready;
  const void *at = nullptr;
  long value = 0;
  std::deque<std::vector<Copy>> groups{1}; // of copies under way; the last is open
  Words told;                              // since the last barrier

  Warp &warp() const { return block->warps[thread / warp_size]; }
  bool runnable() const;
};

struct LeftOut {
  std::string file, primitive;
  int line;
};

struct Machine {
  Launch how;
  void (*kernel)(const void *);
  const void *arguments;
  std::vector<Cluster> clusters;
  std::vector<std::unique_ptr<Block>> grid;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::map<const void *, Counter> counters;
  std::map<const void *, Mailbox> mailboxes;
  std::vector<LeftOut> left_out;
  std::map<std::tuple<const char *, int, const char *>, bool> sites; // met (file, line, primitive): whether in force
  std::string report;
  Outcome outcome = Done;
  int conflicts = 0;
  char start, end; // of the launch: what came before it is ordered before, and so on
};

extern std::unique_ptr<Machine> machine; // of the launch at hand, or the last one
extern Fiber *self;                      // the one that runs
extern ucontext_t scheduler;
extern void *scheduler_tsan;

// ---------------------------------------------------------------- what a race detector is told

inline void acquire(const void *p) {
  if (__tsan_acquire) __tsan_acquire(const_cast<void *>(p));
}
inline void release(const void *p) {
  if (__tsan_release) __tsan_release(const_cast<void *>(p));
}
inline void become(void *tsan) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(tsan, 1); // 1: which orders nothing
}

// In the eyes of a race detector, book-keeping on behalf of a fiber is done by the scheduler: memory that one fiber
// allocated and another one frees would be a race otherwise.
struct AsScheduler {
  AsScheduler() { become(scheduler_tsan); }
  ~AsScheduler() { become(self->tsan); }
};

// A copy that no sanitizer sees, as it would see memcpy.
inline void copy_unseen(void *to, const void *from, unsigned bytes) {
  for (unsigned i = 0; i < bytes; i++)
    static_cast<volatile char *>(to)[i] = static_cast<const volatile char *>(from)[i];
}

inline void land(Words &words) {
  for (const Word &w : words) copy_unseen(w.to, &w.value, sizeof w.value);
  words.clear();
}

void yield();                     // to the scheduler
void say_fault(const char *text); // and who, and where; the launch ends when the scheduler runs

} // namespace gk::twin
