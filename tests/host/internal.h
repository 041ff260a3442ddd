// What machine.cpp (threads) and memory.cpp (addresses) know of each other.
#pragma once
#include <string>
#include <vector>

#include "machine.h"

namespace lnc::host {

struct Access {
  uintptr_t pc;  // 0: the lane met others here
  uintptr_t address;
  uint16_t size, array;
  bool write;
};

struct Thread {
  // What meetings touch comes first, in as few cache lines as it goes.
  void* stack_pointer;
  uint16_t rank, number, lane;  // block's rank in the cluster, thread's number in the block, lane in the warp
  bool exited;
  Meeting waiting;
  unsigned mask;
  int argument, width;  // of a named barrier: its name, its threads
  uint64_t value;
  Site site;
  uintptr_t stack;  // lowest address
  uint3 index;
  uint32_t arrivals, waits;  // cluster barriers
  uint32_t arrival_time[2];  // what was done before is seen by those who waited; by parity
  uint32_t knows[32];        // what lane i of the warp did before this time is visible here
  std::vector<Access> log;   // global accesses since the warp's last full meeting
};

struct Warp {
  uint32_t exists, exited, runnable, waiting;
  uint32_t synced;     // time of the last __syncwarp of all lanes
  uint32_t knows[32];  // what warp i of the block did before this time is visible to every lane here
  Thread* threads;
};

struct Block {
  uint3 index;
  uint32_t arrived, live, threads;
  Site site;
  uint32_t synced;     // time of the last __syncthreads
  uint32_t named[16];  // threads that have arrived at each named barrier
};

struct Report {
  std::string kind, message;
  uint3 block, thread;
  uintptr_t pc;
};

struct Machine {
  Launch launch;
  std::string kernel;
  std::vector<Thread> threads;  // of the cluster's blocks, one after another
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  uint32_t warps_per_block, threads_per_block, first_block;
  uint32_t time = 1;  // grows with every meeting that orders memory
  uint32_t launch_time, cluster_time;
  std::vector<Report> reports;

  Block& block_of(const Thread& t) { return blocks[t.rank]; }
  Warp& warp_of(const Thread& t) { return warps[t.rank * warps_per_block + t.number / 32]; }
};

extern Machine machine;
extern Thread* self;  // the running thread; null outside kernels
constexpr size_t stack_bytes = 64 << 10;
constexpr int largest_cluster = 16;

void record(const char* kind, std::string message, const Thread* thread, uintptr_t pc = 0);
// Records, and leaves the launch: every thread of it is dropped.
void fail(const char* kind, std::string message, const Thread* thread, uintptr_t pc = 0);
std::string describe(const Thread&);

// memory.cpp
extern bool watching;  // the kernels are instrumented
std::string name_of(void (*kernel)());
bool prepare_memory(const Launch&);
void start_cluster();
void flush(Warp&);   // accounts for the lanes' logs
void mark(Thread&);  // the lane met others
void order_lanes(Warp&, uint32_t mask);
void order_warps(Block&, uint32_t warps);
void finish_launch();

}  // namespace lnc::host
