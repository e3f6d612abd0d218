// What the primitives call: meetings, copies, counters and signals. Built without a sanitizer, like all of the runtime:
// a race detector is to see the kernel, not this.
#include "state.h"
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace gk::twin {

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

void say_fault(const char *text) {
  become(scheduler_tsan);
  machine->outcome = Fault;
  machine->report = std::string(text) + " (block " + std::to_string(self->block->index) + " thread " +
                    std::to_string(self->thread) + " at " + self->call.text() + ")";
}

void fault(const char *format, ...) {
  char text[500];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  say_fault(text);
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

namespace {

template <class State> void wait(State state, const void *at, long value) {
  self->state = state, self->at = at, self->value = value;
  if (!self->runnable()) yield();
  self->state = Fiber::Ready;
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

} // namespace

namespace {
void hand_over_words() { // to whoever of the block releases memory next
  AsScheduler here;
  Words &mine = self->told, &all = self->block->told;
  all.insert(all.end(), mine.begin(), mine.end());
  mine.clear();
}
} // namespace

void warp_barrier() {
  converge();
  meet(self->warp().ordered, true);
}
void block_barrier() {
  converge();
  hand_over_words();
  meet(self->block->barrier, true);
}
void cluster_barrier() {
  converge();
  hand_over_words();
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
    land(self->block->told), land(self->told);
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

void tell(void *to, unsigned long long word) {
  AsScheduler here;
  self->told.push_back({to, word});
}
void heard(const unsigned *turn, unsigned target) { wait(Fiber::AtWord, turn, long(target)); }

namespace {

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

} // namespace gk::twin
