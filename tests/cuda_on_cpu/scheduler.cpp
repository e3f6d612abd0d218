// Who runs when, and what is said when nobody can.
#include "state.h"
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <set>
#include <sstream>
#include <sys/mman.h>

namespace gk::twin {

std::unique_ptr<Machine> machine;
Fiber *self;
ucontext_t scheduler;
void *scheduler_tsan;

namespace {

constexpr size_t stack_bytes = 256 << 10, page = 4 << 10;
std::mutex one_launch;
std::string report_text, sites_text;

bool sanitized() { return __tsan_create_fiber || __asan_init; }

// Pages between two that nobody may touch. An address sanitizer watches what comes from malloc more closely.
class Pages {
public:
  explicit Pages(size_t bytes) : size((bytes + page - 1) / page * page) {
    memory = static_cast<char *>(
        mmap(nullptr, size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory + page, size, PROT_READ | PROT_WRITE)) abort();
  }
  Pages(const Pages &) = delete;
  ~Pages() { munmap(memory, size + 2 * page); }
  char *begin() const { return memory + page; }
  char *end() const { return begin() + size; }
  const size_t size;

private:
  char *memory;
};

// A thread that touches what is not there ends the launch, not the process: its stack is too small, or an address
// wrong.
class Watch {
public:
  Watch() : stack(64 << 10) {
    if (sanitized()) return;
    stack_t own{};
    own.ss_sp = stack.begin(), own.ss_size = stack.size;
    struct sigaction action{};
    action.sa_sigaction = touched, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaltstack(&own, &stack_before);
    for (int i = 0; i < 2; i++) sigaction(signals[i], &action, &before[i]);
  }
  ~Watch() {
    if (sanitized()) return;
    for (int i = 0; i < 2; i++) sigaction(signals[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }

private:
  static void touched(int, siginfo_t *info, void *) {
    if (!self) abort(); // the scheduler's own
    char text[100];
    snprintf(text, sizeof text, "nothing is at address %p", info->si_addr);
    say_fault(text);
    setcontext(&scheduler);
  }
  static constexpr int signals[2] = {SIGSEGV, SIGBUS};
  Pages stack;
  stack_t stack_before;
  struct sigaction before[2];
};

} // namespace

bool Fiber::runnable() const {
  switch (state) {
  case Ready:
    return true;
  case AtBarrier:
    return static_cast<const Barrier *>(at)->phase != value;
  case AtCounter:
    return int(*static_cast<const unsigned *>(at) - unsigned(value)) >= 0;
  case AtWord:
    return *static_cast<const unsigned *>(at) >= unsigned(value);
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

namespace {

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

// Where a launch is: stacks and shared memory, until its end.
struct Memory {
  std::vector<std::unique_ptr<Pages>> pages;
  std::vector<std::unique_ptr<char, decltype(&free)>> watched;

  char *stack() {
    pages.push_back(std::make_unique<Pages>(stack_bytes));
    return pages.back()->begin();
  }
  char *shared(int bytes) { // full of NaN, with nothing behind it
    char *memory;
    if (sanitized()) {
      void *p = nullptr;
      if (posix_memalign(&p, 128, std::max(bytes, 1))) abort();
      watched.emplace_back(memory = static_cast<char *>(p), free);
    } else {
      pages.push_back(std::make_unique<Pages>(bytes));
      memory = pages.back()->end() - (bytes + 127) / 128 * 128;
    }
    return static_cast<char *>(memset(memory, 0xff, bytes));
  }
};

void build(Machine &m, Memory &memory, std::mt19937 &random) {
  const Launch &how = m.how;
  const int warps = how.threads / warp_size;
  m.clusters = std::vector<Cluster>(how.blocks / how.cluster);
  for (int i = 0; i < how.blocks; i++) {
    auto b = std::make_unique<Block>();
    b->index = i, b->alive = b->barrier.size = how.threads;
    b->cluster = &m.clusters[i / how.cluster];
    b->cluster->barrier.size += how.threads;
    b->cluster->blocks.push_back(b.get());
    b->shared = memory.shared(how.shared_bytes);
    b->warps = std::make_unique<Warp[]>(warps);
    for (int w = 0; w < warps; w++) {
      b->warps[w].meeting.size = b->warps[w].ordered.size = warp_size;
      b->warps[w].priority = how.order == Order::Starve ? how.seed != unsigned(i * warps + w) : random();
    }
    for (int t = 0; t < how.threads; t++) {
      auto f = std::make_unique<Fiber>();
      f->block = b.get(), f->thread = t;
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = memory.stack(), f->context.uc_stack.ss_size = stack_bytes;
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

// Words of one thread or block that are still on their way, of the last that has any: nothing says who is first.
bool land_some(Machine &m) {
  auto some = [](auto &all) {
    for (auto one = all.rbegin(); one != all.rend(); ++one)
      if (!(*one)->told.empty()) {
        land((*one)->told);
        return true;
      }
    return false;
  };
  return some(m.fibers) || some(m.grid);
}

void run_all(Machine &m, std::mt19937 &random) {
  std::vector<Fiber *> ready;
  for (size_t alive = m.fibers.size(); alive && m.outcome == Done;) {
    ready.clear();
    const size_t limit = started(m);
    for (size_t i = 0; i < limit; i++)
      if (m.fibers[i]->runnable()) ready.push_back(m.fibers[i].get());
    if (ready.empty()) {
      if (land_some(m)) continue;
      return describe_hang(m);
    }
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
      self = nullptr;
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
    Memory memory;
    const Watch watch;
    release(&m.start);
    build(m, memory, random);
    run_all(m, random);
    while (land_some(m)) {}
    acquire(&m.end);
    for (auto &f : m.fibers)
      if (f->tsan) __tsan_destroy_fiber(f->tsan);
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
