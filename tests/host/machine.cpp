// Fibers, their meetings and the launch.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <numeric>

#include "internal.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "host execution needs Linux on x86-64"
#endif

extern "C" void lnc_switch(void** save, void* load) __attribute__((visibility("hidden")));
// The jump through a register is predicted, a return to another stack is not.
asm(R"(
.text
.hidden lnc_switch
.type lnc_switch, @function
lnc_switch:
  pop %rcx
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  push %rcx
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %rcx
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  jmp *%rcx
.size lnc_switch, .-lnc_switch
)");

#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#else
#define __asan_unpoison_memory_region(p, bytes) static_cast<void>(0)
#endif

namespace lnc::host {

Machine machine;
Thread* self = nullptr;

namespace {

constexpr uint64_t canary = 0x5ca1ab1e0ddba11;
void* main_stack_pointer;
char* stacks = nullptr;
size_t stack_count = 0;
uint32_t live_threads, cluster_phase, cluster_arrived, looks;
Device pretended;
uint64_t random_state;

uint32_t random_below(uint32_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state >> 32) * n >> 32);
}

const char* name_of(Meeting m) {
  static const char* const names[] = {"nothing",          "__syncthreads", "a named barrier", "cluster barrier",
                                      "__syncwarp",       "__shfl_sync",   "__shfl_xor_sync", "__shfl_up_sync",
                                      "__shfl_down_sync", "vote"};
  return names[static_cast<int>(m)];
}

std::string text_of(Site site) {
  const std::string file = site.file ? site.file : "?";
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string hex(unsigned v) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", v);
  return text;
}

void leave_launch() {
  void* dropped;
  self = nullptr;
  lnc_switch(&dropped, main_stack_pointer);
}

void run_next(Thread* from);
void diagnose_stall();

// Which thread runs after `from`: the same warp's next lane, then the next warp that has one.
Thread* next_runnable(const Thread* from) {
  const uint32_t count = static_cast<uint32_t>(machine.warps.size());
  const uint32_t warp = from ? from->rank * machine.warps_per_block + from->number / 32 : 0;
  uint32_t start = warp, lane = from ? from->lane : 0;
  if (random_state) {
    start = random_below(count);
    lane = random_below(32);
  }
  for (uint32_t i = 0; i < count; ++i) {
    Warp& w = machine.warps[start + i < count ? start + i : start + i - count];
    if (!w.runnable) continue;
    const uint32_t above = w.runnable & (~0u << lane);
    return &w.threads[__builtin_ctz(above ? above : w.runnable)];
  }
  return nullptr;
}

void run_next(Thread* from) {
  Thread* next = next_runnable(from);
  if (next == from) return;
  if (!next) {
    if (live_threads > 0) return diagnose_stall();
    return leave_launch();
  }
  self = next;
  void* dropped;
  lnc_switch(from ? &from->stack_pointer : &dropped, next->stack_pointer);
}

void block_thread(Thread& t, Meeting meeting, Site site) {
  Warp& warp = machine.warp_of(t);
  t.waiting = meeting;
  t.site = site;
  warp.runnable &= ~(1u << t.lane);
  warp.waiting |= 1u << t.lane;
}

void release(Warp& warp, uint32_t lanes) {
  for (uint32_t rest = lanes; rest; rest &= rest - 1) warp.threads[__builtin_ctz(rest)].waiting = Meeting::none;
  warp.waiting &= ~lanes;
  warp.runnable |= lanes;
}

std::string doing(const Thread& t) {
  if (t.exited) return "has exited";
  if (t.waiting == Meeting::none) return "runs";
  std::string text = std::string("waits in ") + name_of(t.waiting) + " at " + text_of(t.site);
  if (t.waiting == Meeting::named_barrier)
    text += ", name " + std::to_string(t.argument) + " of " + std::to_string(t.width) + " threads";
  if (t.waiting >= Meeting::syncwarp) text += " with mask " + hex(t.mask);
  return text;
}

// Which thread runs instead of `from`, which waits for what another writes: any other in turn.
Thread* next_after(const Thread& from) {
  const size_t count = machine.threads.size(), number = &from - machine.threads.data();
  for (size_t i = 1; i < count; ++i) {
    Thread& t = machine.threads[(number + i) % count];
    if (machine.warp_of(t).runnable >> t.lane & 1) return &t;
  }
  return nullptr;
}

// No thread can run, and not all have exited.
void diagnose_stall() {
  for (Warp& warp : machine.warps) {
    for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
      Thread& t = warp.threads[__builtin_ctz(rest)];
      if (t.waiting < Meeting::syncwarp) continue;
      for (uint32_t named = t.mask; named; named &= named - 1) {
        const Thread& other = warp.threads[__builtin_ctz(named)];
        if (other.waiting == t.waiting && other.mask == t.mask && other.site.line == t.site.line &&
            other.width == t.width && !other.exited)
          continue;
        return fail(
            "absent lane",
            "the thread " + doing(t) + ", but lane " + std::to_string(other.lane) + " of that mask " + doing(other),
            &t);
      }
    }
  }
  for (Thread& t : machine.threads) {
    if (t.waiting == Meeting::none || t.waiting >= Meeting::syncwarp) continue;
    for (Thread& other : machine.threads) {
      if (other.waiting == t.waiting && (other.rank != t.rank || other.argument == t.argument)) continue;
      return fail("divergent barrier", "the thread " + doing(t) + ", but " + describe(other) + " " + doing(other), &t);
    }
  }
  fail("stall", "no thread can go on", nullptr);
}

void complete_cluster_barrier() {
  if (cluster_arrived < live_threads || live_threads == 0) return;
  const uint32_t slot = cluster_phase++ & 1;
  cluster_arrived = 0;
  ++machine.time;
  for (Thread& t : machine.threads)
    if (!t.exited) t.arrival_time[slot] = std::min(t.arrival_time[slot], machine.time);
  for (Warp& warp : machine.warps) {
    uint32_t lanes = 0;
    for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
      const Thread& t = warp.threads[__builtin_ctz(rest)];
      if (t.waiting == Meeting::cluster_barrier) lanes |= 1u << t.lane;
    }
    release(warp, lanes);
  }
}

void arrive(Site site, uint32_t time) {
  Thread& t = *self;
  if (t.arrivals != t.waits)
    return fail("divergent barrier", "the thread arrives twice at a cluster barrier, at " + text_of(site), &t);
  t.arrival_time[t.arrivals++ & 1] = time;
  ++cluster_arrived;
  complete_cluster_barrier();
}

void exit_thread() {
  Thread& t = *self;
  if (*reinterpret_cast<uint64_t*>(t.stack) != canary)
    return fail("stack overflow", "a thread's stack is too small", &t);
  Warp& warp = machine.warp_of(t);
  Block& block = machine.block_of(t);
  t.exited = true;
  warp.runnable &= ~(1u << t.lane);
  warp.exited |= 1u << t.lane;
  --block.live;
  --live_threads;
  if (block.arrived > 0)
    return fail("divergent barrier",
                "the thread has exited, but another waits in __syncthreads at " + text_of(block.site), &t);
  if (watching && warp.exited == warp.exists) flush(warp);
  if (t.arrivals > cluster_phase) --cluster_arrived;
  if (cluster_arrived > 0) complete_cluster_barrier();
  for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
    const Thread& other = warp.threads[__builtin_ctz(rest)];
    if (other.waiting >= Meeting::syncwarp && (other.mask >> t.lane & 1))
      return fail("absent lane",
                  "the thread " + doing(other) + ", but lane " + std::to_string(t.lane) + " of that mask has exited",
                  &other);
  }
  run_next(&t);
}

void fiber_main() {
  machine.launch.call(machine.launch.kernel, machine.launch.params);
  exit_thread();
}

void prepare_thread(Thread& t, uint32_t i) {
  // Tops of stacks a page apart share a cache set: move each by a few lines.
  char* low = stacks + i * stack_bytes;
  __asan_unpoison_memory_region(low, stack_bytes);  // frames that the thread before never returned from
  t.stack = reinterpret_cast<uintptr_t>(low);
  *reinterpret_cast<uint64_t*>(low) = canary;
  auto* top = reinterpret_cast<void**>(low + stack_bytes - 256 - (i % 31) * 128);
  top -= 8;
  top[0] = reinterpret_cast<void*>(fiber_main);
  for (int r = 1; r < 8; ++r) top[r] = nullptr;
  t.stack_pointer = top;
  t.rank = static_cast<uint16_t>(i / machine.threads_per_block);
  t.number = static_cast<uint16_t>(i % machine.threads_per_block);
  t.lane = t.number % 32;
  const dim3 d = machine.launch.block;
  t.index = {t.number % d.x, t.number / d.x % d.y, t.number / d.x / d.y};
  t.exited = false;
  t.waiting = Meeting::none;
  t.arrivals = t.waits = 0;
  if (watching) std::fill(t.knows, t.knows + 32, 0u);
}

void run_cluster(uint32_t first_block) {
  const dim3 g = machine.launch.grid;
  const uint32_t count = static_cast<uint32_t>(machine.threads.size());
  machine.first_block = first_block;
  machine.cluster_time = ++machine.time;
  for (uint32_t i = 0; i < count; ++i) prepare_thread(machine.threads[i], i);
  for (size_t b = 0; b < machine.blocks.size(); ++b) {
    const uint32_t n = first_block + static_cast<uint32_t>(b);
    machine.blocks[b] = {{n % g.x, n / g.x % g.y, n / g.x / g.y},
                         0,
                         machine.threads_per_block,
                         machine.threads_per_block,
                         {},
                         machine.time};
    for (uint32_t w = 0; w < machine.warps_per_block; ++w) {
      const uint32_t lanes = std::min(32u, machine.threads_per_block - 32 * w);
      const uint32_t exists = lanes == 32 ? ~0u : (1u << lanes) - 1;
      machine.warps[b * machine.warps_per_block + w] = {
          exists, 0, exists, 0, machine.time, {}, &machine.threads[b * machine.threads_per_block + 32 * w]};
    }
  }
  live_threads = count;
  cluster_phase = cluster_arrived = looks = 0;
  start_cluster();
  self = next_runnable(nullptr);
  lnc_switch(&main_stack_pointer, self->stack_pointer);
  self = nullptr;
}

bool reserve_stacks(size_t count) {
  if (count > stack_count) {
    if (stacks) {
      __asan_unpoison_memory_region(stacks, stack_count * stack_bytes);  // whoever maps them next knows of no frames
      munmap(stacks, stack_count * stack_bytes);
    }
    void* p =
        mmap(nullptr, count * stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks = p == MAP_FAILED ? nullptr : static_cast<char*>(p);
    stack_count = stacks ? count : 0;
  }
  return stacks != nullptr;
}

const char* invalid(const Launch& l) {
  const uint64_t threads = uint64_t{l.block.x} * l.block.y * l.block.z;
  if (threads == 0 || threads > 1024) return "a block has 1 to 1024 threads";
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0) return "the grid is empty";
  if (l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535)
    return "the grid is larger than 2^31-1, 65535, 65535";
  if (l.cluster < 1 || l.cluster > largest_cluster || (!l.team && (l.cluster & (l.cluster - 1))))
    return "a cluster has 1, 2, 4, 8 or 16 blocks, a team 1 to 16";
  if (l.cluster > 1 && !l.team && pretended.arch < 90) return "clusters need sm_90";
  if (l.grid.x % l.cluster) return "the cluster does not divide the grid";
  if (l.params_bytes > 4096) return "more than 4096 bytes of parameters";
  return nullptr;
}

}  // namespace

Device& device() { return pretended; }

std::string describe(const Thread& t) {
  const Block& b = machine.block_of(t);
  const auto triple = [](uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  return "thread " + triple(t.index) + " of block " + triple(b.index);
}

void record(const char* kind, std::string message, const Thread* t, uintptr_t pc) {
  for (const Report& r : machine.reports)
    if (r.kind == kind && r.pc == pc && pc != 0) return;
  if (machine.reports.size() >= 100) return;
  machine.reports.push_back(
      {kind, machine.kernel + ": " + message, t ? machine.block_of(*t).index : uint3{}, t ? t->index : uint3{}, pc});
}

void fail(const char* kind, std::string message, const Thread* t, uintptr_t pc) {
  record(kind, std::move(message), t, pc);
  leave_launch();
}

uint3 thread_index() { return self->index; }
uint3 block_index() { return machine.block_of(*self).index; }
dim3 block_dim() { return machine.launch.block; }
dim3 grid_dim() { return machine.launch.grid; }
int cluster_rank() { return self->rank; }
int cluster_size() { return machine.launch.cluster; }
unsigned active_mask() { return 1u << self->lane; }

void block_barrier(Site site) {
  Thread& t = *self;
  Block& block = machine.block_of(t);
  if (block.live < block.threads)
    return fail("divergent barrier",
                "the thread comes to __syncthreads at " + text_of(site) + ", but " +
                    std::to_string(block.threads - block.live) + " threads of the block have exited",
                &t);
  if (block.arrived > 0 && block.site.line != site.line)
    return fail("divergent barrier",
                "the thread comes to __syncthreads at " + text_of(site) + ", but another waits in the one at " +
                    text_of(block.site),
                &t);
  block.site = site;
  Warp* warps = &machine.warps[t.rank * machine.warps_per_block];
  if (++block.arrived < block.threads) {
    block_thread(t, Meeting::block_barrier, site);
    return run_next(&t);
  }
  block.arrived = 0;
  block.synced = ++machine.time;
  for (uint32_t w = 0; w < machine.warps_per_block; ++w) {
    if (watching) flush(warps[w]);
    release(warps[w], warps[w].waiting);
  }
}

namespace {

// Out of the way of meet, whose frame stays small: a thousand fibers' frames must fit the cache.
__attribute__((noinline)) void refuse_mask(Thread& t, Meeting meeting, Site site) {
  const Warp& warp = machine.warp_of(t);
  const char* what = !(t.mask >> t.lane & 1)                  ? " does not name the lane itself"
                     : t.mask & ~(warp.exists & ~warp.exited) ? " names a lane that has exited or never was"
                                                              : ": the width is not 1, 2, 4, 8, 16 or 32";
  fail("absent lane", "mask " + hex(t.mask) + " of " + name_of(meeting) + " at " + text_of(site) + what, &t);
}

__attribute__((noinline)) void refuse_source(const Thread& t, Meeting meeting, int source) {
  fail("absent lane",
       std::string(name_of(meeting)) + " at " + text_of(t.site) + " reads lane " + std::to_string(source) +
           ", which mask " + hex(t.mask) + " does not name",
       &t);
}

// All lanes of `mask` are here: each gets its result.
__attribute__((noinline)) void exchange(Warp& warp, Meeting meeting, uint32_t mask) {
  if (meeting == Meeting::ballot) {
    uint64_t votes = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      votes |= (warp.threads[lane].value & 1) << lane;
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1) warp.threads[__builtin_ctz(rest)].value = votes;
  } else if (meeting != Meeting::syncwarp) {
    uint64_t values[32];
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      values[lane] = warp.threads[lane].value;
    }
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      Thread& t = warp.threads[lane];
      const int first = lane & ~(t.width - 1), last = first + t.width - 1, n = t.argument & 31;
      int source = meeting == Meeting::shfl       ? first + (n & (t.width - 1))
                   : meeting == Meeting::shfl_xor ? lane ^ n
                   : meeting == Meeting::shfl_up  ? lane - n
                                                  : lane + n;
      if (source > last || (meeting == Meeting::shfl_up && source < first)) source = lane;
      if (!(mask >> source & 1)) return refuse_source(t, meeting, source);
      t.value = values[source];
    }
  }
  if (!watching) return;
  if (meeting == Meeting::syncwarp) {
    ++machine.time;
    order_lanes(warp, mask);
  }
  if (mask == (warp.exists & ~warp.exited)) return flush(warp);
  for (uint32_t rest = mask; rest; rest &= rest - 1) mark(warp.threads[__builtin_ctz(rest)]);
}

}  // namespace

void named_barrier(int id, int threads, Site site) {
  Thread& t = *self;
  Block& block = machine.block_of(t);
  if (id < 0 || id > 15 || threads % 32 || threads < 32 || threads > static_cast<int>(block.threads))
    return fail("divergent barrier",
                "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads at " + text_of(site) +
                    ": names are 0 to 15, threads whole warps of the block",
                &t);
  t.argument = id;
  t.width = threads;
  block_thread(t, Meeting::named_barrier, site);
  if (++block.named[id] < static_cast<uint32_t>(threads)) return run_next(&t);
  block.named[id] = 0;
  ++machine.time;
  uint32_t warps = 0;
  for (uint32_t w = 0; w < machine.warps_per_block; ++w) {
    Warp& warp = machine.warps[t.rank * machine.warps_per_block + w];
    uint32_t here = 0;
    for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
      const Thread& other = warp.threads[__builtin_ctz(rest)];
      if (other.waiting == Meeting::named_barrier && other.argument == id && other.width == threads)
        here |= 1u << other.lane;
    }
    if (!here) continue;
    if (here != warp.exists)
      return fail("divergent barrier",
                  "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads at " + text_of(site) +
                      " is complete without all lanes of the warp",
                  &warp.threads[__builtin_ctz(here)]);
    warps |= 1u << w;
    if (watching) flush(warp);
    release(warp, here);
  }
  order_warps(block, warps);
}

uint64_t meet(Meeting meeting, unsigned mask, uint64_t value, int argument, int width, Site site) {
  Thread& t = *self;
  Warp& warp = machine.warp_of(t);
  const uint32_t me = 1u << t.lane;
  t.value = value;
  t.mask = mask;
  t.argument = argument;
  t.width = width;
  if (!(mask & me) || (mask & ~(warp.exists & ~warp.exited)) || width < 1 || width > 32 || (width & (width - 1))) {
    refuse_mask(t, meeting, site);
    return 0;
  }
  bool all = !(mask & ~(warp.waiting | me));
  for (uint32_t rest = all ? mask & ~me : 0; rest && all; rest &= rest - 1) {
    const Thread& other = warp.threads[__builtin_ctz(rest)];
    all = other.waiting == meeting && other.mask == mask && other.width == width && other.site.line == site.line;
  }
  if (all) {
    t.site = site;
    exchange(warp, meeting, mask);
    release(warp, mask & ~me);
  } else {
    block_thread(t, meeting, site);
    run_next(&t);
  }
  return t.value;
}

void post(volatile uint64_t* word, uint64_t value) {
  *word = value;
  looks = 0;
}

uint64_t look(volatile uint64_t* word) {
  Thread& t = *self;
  if (++looks > 1000 * machine.threads.size())
    fail("stall", "threads wait for a word of global memory that none of those which run together writes", &t);
  if (Thread* next = next_after(t)) {
    self = next;
    lnc_switch(&t.stack_pointer, next->stack_pointer);
  }
  return *word;
}

void cluster_arrive(Site site) { arrive(site, ++machine.time); }

void cluster_wait(Site site) {
  Thread& t = *self;
  if (t.arrivals == t.waits)
    return fail("divergent barrier", "the thread waits for a cluster barrier before it arrives, at " + text_of(site),
                &t);
  if (cluster_phase < t.arrivals) {
    block_thread(t, Meeting::cluster_barrier, site);
    run_next(&t);
  }
  ++t.waits;
}

void cluster_sync(Site site) {
  arrive(site, ~0u);  // its time is when the last comes
  cluster_wait(site);
}

cudaError_t launch(const Launch& l) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  machine.launch = l;
  machine.kernel = name_of(l.kernel);
  if (const char* why = invalid(l)) {
    record("invalid launch", why, nullptr);
    return cudaErrorInvalidConfiguration;
  }
  if (l.team && l.grid.x > static_cast<unsigned>(pretended.room)) return cudaErrorCooperativeLaunchTooLarge;
  machine.threads_per_block = l.block.x * l.block.y * l.block.z;
  machine.warps_per_block = (machine.threads_per_block + 31) / 32;
  machine.threads.resize(size_t{machine.threads_per_block} * l.cluster);
  machine.warps.resize(size_t{machine.warps_per_block} * l.cluster);
  machine.blocks.resize(l.cluster);
  if (!reserve_stacks(machine.threads.size())) return cudaErrorMemoryAllocation;
  if (!prepare_memory(l)) {
    record("invalid launch", "more shared memory than a block of this device has", nullptr);
    return cudaErrorInvalidValue;
  }
  const size_t before = machine.reports.size();
  const uint32_t clusters = l.grid.x / l.cluster * l.grid.y * l.grid.z;
  machine.launch_time = ++machine.time;
  random_state = pretended.seed * 0x9e3779b97f4a7c15u;
  std::vector<uint32_t> order(random_state ? clusters : 0);
  std::iota(order.begin(), order.end(), 0u);
  for (uint32_t i = 1; i < order.size(); ++i) std::swap(order[i], order[random_below(i + 1)]);
  for (uint32_t i = 0; i < clusters; ++i) {
    run_cluster((order.empty() ? i : order[i]) * l.cluster);
    if (live_threads > 0) break;  // left by a fault
  }
  for (Thread& t : machine.threads) t.log.clear();
  finish_launch();
  return machine.reports.size() > before ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace lnc::host

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "unknown error";
}

const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = cudaGetErrorName(error);
  if (error != cudaSuccess && !lnc::host::machine.reports.empty()) text = lnc::host::machine.reports.back().message;
  return text.c_str();
}

void lnc_host_device(int arch, int sm_count, uint64_t seed, int room) {
  lnc::host::device() = {arch, sm_count, seed, room};
}

#ifdef LNC_HOST_MUTANTS
int lnc_host_mutant = 0;
#endif
