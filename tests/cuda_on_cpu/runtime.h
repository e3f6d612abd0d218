// The machine behind twin.h: every GPU thread is a fiber of one OS thread, so that a run is deterministic and its order
// is ours to choose. What a GPU leaves undefined is a fault.
#pragma once

extern "C" { // of sanitizers; null without them
__attribute__((weak)) void __asan_init(void);
__attribute__((weak)) void *__tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void *);
__attribute__((weak)) void *__tsan_get_current_fiber(void);
__attribute__((weak)) void __tsan_switch_to_fiber(void *, unsigned);
__attribute__((weak)) void __tsan_acquire(void *);
__attribute__((weak)) void __tsan_release(void *);
}

namespace gk::twin {

// ---------------------------------------------------------------- running a kernel

enum class Order : int {
  RoundRobin, // every thread runs until it has to wait, then the next
  Random,     // likewise, in an order drawn anew in every round
  Priorities, // every warp has a random priority, and runs as long as none above it can: some get far ahead of others
  Starve,     // one warp runs only when no other can: the one of number `seed`
};

struct Launch {
  int blocks, cluster; // cluster: blocks of one
  int threads, shared_bytes;
  int resident; // blocks that run at a time; others start when one ends
  Order order;
  unsigned seed;
  const char *left_out; // sites that do nothing, as `report` names them, one a line
};

enum Outcome : int { Done, Fault, Hang };

Outcome launch(const Launch &, void (*kernel)(const void *), const void *arguments);

// ---------------------------------------------------------------- for the primitives: where they were called

struct Site {
  const char *file;
  int line;
  static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Every primitive says first who it is. A synchronising one asks whether it is in force: it is a site that can be left
// out.
void enter(const char *primitive, Site);
bool in_force(const char *primitive, Site);
void converge(); // all 32 lanes of the warp have to come to the same call, as .aligned asks
[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char *, ...);

// ---------------------------------------------------------------- who am I

int thread();
int block();
int blocks();
int cluster_rank();
int cluster_size();
char *shared();

unsigned window(const void *,
                unsigned bytes); // offset in this block's shared memory; a fault unless all of it lies there
char *peer(const void *, int rank, unsigned bytes); // the same place in a running neighbour's
void aligned(const void *, unsigned bytes);

// ---------------------------------------------------------------- waiting

void warp_barrier();
void block_barrier();
void cluster_barrier();
const void *exchange(const void *mine,
                     unsigned bytes); // what all 32 lanes bring, lane_bytes apart, until two exchanges later
constexpr unsigned lane_bytes = 64;
void bank_conflicts(int);

// Copies under way, by group. The oldest that may not be under way any more when `pending` groups may; false: none.
struct Copy {
  void *to;
  const void *from;
  unsigned early[4]; // what was there when the copy began
};
void copy_begin(const Copy &);
void copy_commit();
bool copy_land(int pending, Copy &);

// A counter orders memory for those who wait for it, and for no more than they wait for.
void count(unsigned *, unsigned, bool release);
void reached(const unsigned *, unsigned target);

// Words that a thread tells others land as late as they may: when it, or after a block barrier a thread of its block,
// counts with release, or when nobody can go on without them.
void tell(void *to, unsigned long long word);
void heard(const unsigned *turn, unsigned target); // it is that of some word, or a later one

// A signal's bytes are counted when they are sent, and are there when its owner has waited for them.
void signal_begin(unsigned long long *);
void signal_open(unsigned long long *, unsigned bytes);
void signal_send(unsigned long long *, void *to, const void *from, unsigned bytes);
void signal_heard(unsigned long long *, unsigned parity);
constexpr unsigned long long signal_mark = 0x6b5f6c616e676973; // what an initialised one holds

} // namespace gk::twin

#pragma GCC visibility push(default)
extern "C" {
const char *gk_report(); // what went wrong in the last launch: one line, then who waits where
const char *gk_sites();  // the synchronising sites that the last launch met, one a line
int gk_bank_conflicts(); // how many of its load_tiles' accesses to shared memory had to be repeated
}
#pragma GCC visibility pop
