// Fibers, what they wait for, and the scheduler. Built without a sanitizer: a race detector is to see the kernel, not
// this.
#include "runtime.h"
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <sys/mman.h>
#include <tuple>
#include <ucontext.h>
#include <vector>

namespace gk::twin {
namespace {

constexpr int warp_size = 32;
constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4 << 10;

const char *base_name(const char *path) {
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
  enum { Ready, AtBarrier, AtCounter, AtSignal, Ended } state = Ready;
  const void *at = nullptr;
  long value = 0;
  std::deque<std::vector<Copy>> groups{1}; // of copies under way; the last is open

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

std::mutex one_launch;
std::unique_ptr<Machine> machine; // of the launch at hand, or the last one
std::string report_text, sites_text;
Fiber *self;
ucontext_t scheduler;
void *scheduler_tsan;

void acquire(const void *p) {
  if (__tsan_acquire) __tsan_acquire(const_cast<void *>(p));
}
void release(const void *p) {
  if (__tsan_release) __tsan_release(const_cast<void *>(p));
}
void become(void *tsan) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(tsan, 1); // 1: which orders nothing
}

// In the eyes of a race detector, book-keeping on behalf of a fiber is done by the scheduler: memory that one fiber
// allocated and another one frees would be a race otherwise.
struct AsScheduler {
  AsScheduler() { become(scheduler_tsan); }
  ~AsScheduler() { become(self->tsan); }
};

// A copy that no sanitizer sees, as it would see memcpy.
void copy_unseen(void *to, const void *from, unsigned bytes) {
  for (unsigned i = 0; i < bytes; i++)
    static_cast<volatile char *>(to)[i] = static_cast<const volatile char *>(from)[i];
}

bool Fiber::runnable() const {
  switch (state) {
  case Ready:
    return true;
  case AtBarrier:
    return static_cast<const Barrier *>(at)->phase != value;
  case AtCounter:
    return int(*static_cast<const unsigned *>(at) - unsigned(value)) >= 0;
  case AtSignal:
    return (static_cast<const Mailbox *>(at)->phase & 1) != value;
  case Ended:
    break;
  }
  return false;
}

void yield() {
  become(scheduler_tsan);
  swapcontext(&self->context, &scheduler);
}
template <class State> void wait(State state, const void *at, long value) {
  self->state = state, self->at = at, self->value = value;
  if (!self->runnable()) yield();
  self->state = Fiber::Ready;
}

std::string name_of(const Fiber &f) {
  return "block " + std::to_string(f.block->index) + " thread " + std::to_string(f.thread);
}

void meet(Barrier &b, bool orders) {
  const long phase = b.phase;
  if (orders) release(&b.order[phase & 1]);
  if (++b.arrived == b.size)
    b.arrived = 0, b.phase++;
  else
    wait(Fiber::AtBarrier, &b, phase);
  if (orders) acquire(&b.order[phase & 1]);
}

void check_end_of_block(const Block &b) {
  for (auto &[signal, box] : machine->mailboxes) {
    const long at = static_cast<const char *>(signal) - b.shared;
    if (at >= 0 && at < machine->how.shared_bytes && !box.parcels.empty())
      fault("block %d ends while %zu pushes are on their way to it, or were never waited for", b.index,
            box.parcels.size());
  }
}

void run_fiber() {
  acquire(&machine->start);
  machine->kernel(machine->arguments);
  release(&machine->end);
  self->call = {"end", {"", 0}};
  if (self->groups.size() > 1 || !self->groups.back().empty()) fault("a thread ends while copies of it are under way");
  self->state = Fiber::Ended;
  if (--self->block->alive == 0) check_end_of_block(*self->block);
  yield();
}

Mailbox &mailbox(const void *signal) {
  AsScheduler here;
  return machine->mailboxes[signal];
}
char *order_of(Mailbox &box, long phase) {
  AsScheduler here;
  return &box.order[phase];
}
void land(Mailbox &box) { // what phases that are complete have counted
  AsScheduler here;
  auto complete = [&](const Mailbox::Parcel &p) { return p.phase < box.phase; };
  for (auto p = box.parcels.rbegin(); p != box.parcels.rend(); ++p)
    if (complete(*p)) copy_unseen(p->to, p->data, p->bytes);
  box.parcels.erase(std::remove_if(box.parcels.begin(), box.parcels.end(), complete), box.parcels.end());
}
void settle(Mailbox &box) {
  if (std::labs(box.bytes) >= 1 << 20) fault("a signal counts to less than 2^20 bytes, not to %ld", box.bytes);
  if (box.open && box.bytes == 0) box.open = false, box.phase++;
}

} // namespace

// ---------------------------------------------------------------- where primitives were called

void enter(const char *primitive, Site site) { self->call = {primitive, site}; }

bool in_force(const char *primitive, Site site) {
  enter(primitive, site);
  AsScheduler here;
  auto [found, first] = machine->sites.try_emplace({site.file, site.line, primitive}, true);
  if (first) // no strings here: the race detector would see them on this fiber's stack
    for (const LeftOut &s : machine->left_out)
      found->second &= s.line != site.line || s.primitive != primitive || s.file != base_name(site.file);
  return found->second;
}

void converge() {
  Warp &w = self->warp();
  if (w.there == 0)
    w.call = self->call;
  else if (!(w.call == self->call))
    fault("the warp is apart: some of its lanes are at %s, this one is not", w.call.text().c_str());
  w.there = (w.there + 1) % warp_size;
}

void fault(const char *format, ...) {
  char text[500];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  become(scheduler_tsan);
  machine->outcome = Fault;
  machine->report = text + (" (" + name_of(*self) + " at " + self->call.text() + ")");
  for (;;) swapcontext(&self->context, &scheduler);
}

// ---------------------------------------------------------------- who am I

int thread() { return self->thread; }
int block() { return self->block->index; }
int blocks() { return machine->how.blocks; }
int cluster_rank() { return self->block->index % machine->how.cluster; }
int cluster_size() { return machine->how.cluster; }
char *shared() { return self->block->shared; }

unsigned window(const void *p, unsigned bytes) {
  const long at = static_cast<const char *>(p) - shared(), size = machine->how.shared_bytes;
  if (at < 0 || at + long(bytes) > size)
    fault("bytes %ld to %ld are not all of the %ld of shared memory", at, at + bytes, size);
  return at;
}

char *peer(const void *p, int rank, unsigned bytes) {
  const unsigned at = window(p, bytes);
  if (rank < 0 || rank >= machine->how.cluster) fault("rank %d in a cluster of %d", rank, machine->how.cluster);
  const Block &b = *self->block->cluster->blocks[rank];
  if (!b.alive) fault("the memory of block %d, which has ended", b.index);
  return b.shared + at;
}

void aligned(const void *p, unsigned bytes) {
  if (reinterpret_cast<size_t>(p) % bytes) fault("address %p is not a multiple of %u", p, bytes);
}

void bank_conflicts(int n) { machine->conflicts += n; }

// ---------------------------------------------------------------- waiting

void warp_barrier() {
  converge();
  meet(self->warp().ordered, true);
}
void block_barrier() {
  converge();
  meet(self->block->barrier, true);
}
void cluster_barrier() {
  converge();
  meet(self->block->cluster->barrier, true);
}

// Lanes meet, and memory is not ordered. Two sets of slots take turns: nobody writes to one that is still read.
const void *exchange(const void *mine, unsigned bytes) {
  converge();
  Warp &w = self->warp();
  auto &lanes = w.lanes[w.meeting.phase & 1];
  char *slot = lanes[self->thread % warp_size];
  copy_unseen(slot, mine, bytes);
  meet(w.meeting, false);
  return lanes;
}

void copy_begin(const Copy &c) {
  AsScheduler here;
  self->groups.back().push_back(c);
}
void copy_commit() {
  AsScheduler here;
  self->groups.emplace_back();
}
bool copy_land(int pending, Copy &c) {
  AsScheduler here;
  while (int(self->groups.size()) - 1 > pending) {
    auto &group = self->groups.front();
    if (!group.empty()) {
      c = group.back();
      group.pop_back();
      return true;
    }
    self->groups.pop_front();
  }
  return false;
}

void count(unsigned *p, unsigned v, bool releases) {
  Counter::Add *add = nullptr;
  if (releases) {
    AsScheduler here;
    auto &adds = machine->counters[p].adds;
    adds.push_back({*p, 0});
    add = &adds.back();
  }
  if (add) release(&add->order);
  *p += v;
}

void reached(const unsigned *p, unsigned target) {
  wait(Fiber::AtCounter, p, long(target));
  std::deque<Counter::Add> *adds;
  {
    AsScheduler here;
    adds = &machine->counters[p].adds;
  }
  for (auto &add : *adds)
    if (int(target - add.before) > 0) acquire(&add.order);
}

void signal_begin(unsigned long long *s) {
  Mailbox &box = mailbox(s);
  AsScheduler here;
  box = {};
}

void signal_open(unsigned long long *s, unsigned bytes) {
  Mailbox &box = mailbox(s);
  if (box.open) fault("a phase of a signal is expected again while %ld bytes of it are still to come", box.bytes);
  release(order_of(box, box.phase));
  AsScheduler here;
  box.open = true, box.bytes += bytes;
  settle(box);
}

void signal_send(unsigned long long *s, void *to, const void *from, unsigned bytes) {
  Mailbox &box = mailbox(s);
  release(order_of(box, box.phase));
  AsScheduler here;
  Mailbox::Parcel parcel{box.phase, to, bytes, {}};
  copy_unseen(parcel.data, from, bytes);
  box.parcels.push_back(parcel);
  box.bytes -= bytes;
  settle(box);
}

void signal_heard(unsigned long long *s, unsigned parity) {
  Mailbox &box = mailbox(s);
  converge();
  wait(Fiber::AtSignal, &box, parity);
  acquire(order_of(box, box.phase - 1));
  land(box);
  meet(self->warp().meeting, false); // whole warps go on
}

// ---------------------------------------------------------------- the scheduler

namespace {

void describe_hang(Machine &m) {
  std::map<std::pair<std::string, int>, std::vector<int>> waiting; // (call, block) -> threads
  int ended = 0;
  for (auto &f : m.fibers) {
    if (f->state == Fiber::Ended) {
      ended++;
      continue;
    }
    std::ostringstream where;
    if (f->state == Fiber::Ready)
      where << "not started: only " << m.how.resident << " blocks are resident";
    else
      where << "waits at " << f->call.text();
    if (f->state == Fiber::AtBarrier) {
      const Barrier &b = *static_cast<const Barrier *>(f->at);
      where << ", where " << b.arrived << " of " << b.size << " threads are";
    } else if (f->state == Fiber::AtCounter)
      where << " for " << unsigned(f->value) << ", reached is " << *static_cast<const unsigned *>(f->at);
    else if (f->state == Fiber::AtSignal) {
      const Mailbox &box = *static_cast<const Mailbox *>(f->at);
      where << " for parity " << f->value << ", phases complete " << box.phase;
      if (box.open)
        where << ", bytes to come " << box.bytes;
      else
        where << ", nothing expected, bytes that came " << -box.bytes;
    }
    waiting[{where.str(), f->block->index}].push_back(f->thread);
  }
  std::ostringstream text;
  text << "nobody can go on; " << ended << " of " << m.fibers.size() << " threads have ended";
  int lines = 0;
  for (auto &[key, threads] : waiting) {
    if (++lines > 24) {
      text << "\n  ... and " << waiting.size() - 24 << " more";
      break;
    }
    text << "\n  block " << key.second << ", " << threads.size() << " threads from " << threads.front() << " to "
         << threads.back() << ": " << key.first;
  }
  m.outcome = Hang, m.report = text.str();
}

void build(Machine &m, char *stacks, std::mt19937 &random) {
  const Launch &how = m.how;
  m.clusters = std::vector<Cluster>(how.blocks / how.cluster);
  for (int i = 0; i < how.blocks; i++) {
    auto b = std::make_unique<Block>();
    b->index = i, b->alive = b->barrier.size = how.threads;
    b->cluster = &m.clusters[i / how.cluster];
    b->cluster->barrier.size += how.threads;
    b->cluster->blocks.push_back(b.get());
    b->warps = std::make_unique<Warp[]>(how.threads / warp_size);
    for (int w = 0; w < how.threads / warp_size; w++)
      b->warps[w].meeting.size = b->warps[w].ordered.size = warp_size,
      b->warps[w].priority =
          how.order == Order::Starve ? how.seed != unsigned(i * how.threads / warp_size + w) : random();
    void *memory = nullptr;
    if (posix_memalign(&memory, 128, std::max(how.shared_bytes, 1))) abort();
    b->shared = static_cast<char *>(memset(memory, 0xff, how.shared_bytes)); // NaN
    for (int t = 0; t < how.threads; t++) {
      auto f = std::make_unique<Fiber>();
      f->block = b.get(), f->thread = t;
      getcontext(&f->context);
      char *stack = stacks + m.fibers.size() * (stack_bytes + guard_bytes);
      mprotect(stack, guard_bytes, PROT_NONE);
      f->context.uc_stack.ss_sp = stack + guard_bytes, f->context.uc_stack.ss_size = stack_bytes;
      makecontext(&f->context, run_fiber, 0);
      if (__tsan_create_fiber) f->tsan = __tsan_create_fiber(0);
      m.fibers.push_back(std::move(f));
    }
    m.grid.push_back(std::move(b));
  }
}

// Blocks start in order, as many as are resident, a whole cluster at a time.
size_t started(const Machine &m) {
  const int clusters = m.how.resident / m.how.cluster;
  int running = 0, upto = 0;
  for (; upto < int(m.clusters.size()) && running < clusters; upto++) {
    bool alive = false;
    for (Block *b : m.clusters[upto].blocks) alive |= b->alive > 0;
    running += alive;
  }
  return size_t(upto) * m.how.cluster * m.how.threads;
}

void run_all(Machine &m, std::mt19937 &random) {
  std::vector<Fiber *> ready;
  for (size_t alive = m.fibers.size(); alive && m.outcome == Done;) {
    ready.clear();
    const size_t limit = started(m);
    for (size_t i = 0; i < limit; i++)
      if (m.fibers[i]->runnable()) ready.push_back(m.fibers[i].get());
    if (ready.empty()) return describe_hang(m);
    if (m.how.order == Order::Random) std::shuffle(ready.begin(), ready.end(), random);
    if (m.how.order >= Order::Priorities) {
      unsigned top = 0;
      for (Fiber *f : ready) top = std::max(top, f->warp().priority);
      ready.erase(std::remove_if(ready.begin(), ready.end(), [&](Fiber *f) { return f->warp().priority != top; }),
                  ready.end());
    }
    for (Fiber *f : ready) {
      if (!f->runnable()) continue;
      self = f;
      become(f->tsan);
      swapcontext(&scheduler, &f->context);
      if (f->state == Fiber::Ended) alive--;
      if (m.outcome != Done) break;
    }
  }
}

} // namespace

Outcome launch(const Launch &how, void (*kernel)(const void *), const void *arguments) {
  std::lock_guard<std::mutex> lock(one_launch);
  machine = std::make_unique<Machine>();
  Machine &m = *machine;
  m.how = how, m.kernel = kernel, m.arguments = arguments;
  std::istringstream left_out(how.left_out ? how.left_out : "");
  for (LeftOut s; std::getline(left_out >> std::ws, s.file, ':') >> s.line >> s.primitive;) m.left_out.push_back(s);
  if (how.blocks < 1 || how.cluster < 1 || how.blocks % how.cluster || how.threads % warp_size || how.threads < 1 ||
      how.threads > 1024) {
    m.outcome = Fault, m.report = "no such launch";
  } else {
    std::mt19937 random(how.seed);
    scheduler_tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
    const size_t bytes = size_t(how.blocks) * how.threads * (stack_bytes + guard_bytes);
    void *stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) abort();
    release(&m.start);
    build(m, static_cast<char *>(stacks), random);
    run_all(m, random);
    acquire(&m.end);
    for (auto &f : m.fibers)
      if (f->tsan) __tsan_destroy_fiber(f->tsan);
    for (auto &b : m.grid) free(b->shared);
    munmap(stacks, bytes);
  }
  report_text = m.report;
  sites_text.clear();
  std::set<std::string> sites;
  for (auto &[key, on] : m.sites) sites.insert(Call{std::get<2>(key), {std::get<0>(key), std::get<1>(key)}}.text());
  for (const std::string &site : sites) sites_text += site + "\n";
  return m.outcome;
}

} // namespace gk::twin

const char *gk_report() { return gk::twin::report_text.c_str(); }
const char *gk_sites() { return gk::twin::sites_text.c_str(); }
int gk_bank_conflicts() { return gk::twin::machine ? gk::twin::machine->conflicts : 0; }
