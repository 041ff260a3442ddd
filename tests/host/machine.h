// The machine that kernels see in host execution: threads, meetings of threads, clusters, the launch.
// A fault (an absent lane, a race, ...) is recorded, and the launch answers cudaErrorLaunchFailure.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorLaunchFailure = 719,
};
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
using cudaStream_t = struct CUstream_st*;

namespace lnc::host {

// A point in the source at which threads meet.
struct Site {
  const char* file;
  int line;
};

enum class Meeting : uint8_t {
  none,
  block_barrier,
  named_barrier,
  cluster_barrier,
  syncwarp,
  shfl,
  shfl_xor,
  shfl_up,
  shfl_down,
  ballot
};

// Constant for the whole of a kernel's call in one thread, so the compiler may keep them.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_dim();
__attribute__((const)) dim3 grid_dim();

void block_barrier(Site);
void named_barrier(int id, int threads, Site);
// Waits until every lane of `mask` is here with the same meeting, mask, width and site; the lane's result.
uint64_t meet(Meeting, unsigned mask, uint64_t value, int argument, int width, Site);
unsigned active_mask();  // one lane: which others run beside it is not defined
void* dynamic_shared();

// Thread-block clusters.
__attribute__((const)) int cluster_rank();
__attribute__((const)) int cluster_size();
void cluster_arrive(Site);
void cluster_wait(Site);
void cluster_sync(Site);
inline void cluster_arrive(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cluster_arrive(Site{file, line});
  asm volatile("" ::: "memory");
}
inline void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cluster_wait(Site{file, line});
  asm volatile("" ::: "memory");
}
inline void cluster_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cluster_sync(Site{file, line});
  asm volatile("" ::: "memory");
}
// The address that `p` of this block's shared memory has in the shared memory of block `rank` of the cluster.
void* map_shared_address(const void* p, int rank);
template <class T>
T* map_shared(T* p, int rank) {
  return static_cast<T*>(map_shared_address(p, rank));
}

// Words of global memory through which blocks that run together wait for each other.
void post(volatile uint64_t* word, uint64_t value);
uint64_t look(volatile uint64_t* word);  // others run first

struct Launch {
  void (*kernel)();
  void (*call)(void (*kernel)(), const void* params);
  const void* params;
  size_t params_bytes;
  dim3 grid, block;
  size_t dynamic_shared;
  int cluster;
  bool team;
};
cudaError_t launch(const Launch&);

// Blocks [r * cluster, (r + 1) * cluster) of grid.x form a cluster; or a team, which only runs together.
template <class P>
cudaError_t launch(void (*kernel)(P), dim3 grid, dim3 block, size_t dynamic_shared, int cluster, bool team,
                   cudaStream_t, const P& params) {
  const auto call = [](void (*kernel)(), const void* params) {
    reinterpret_cast<void (*)(P)>(kernel)(*static_cast<const P*>(params));
  };
  return launch(
      {reinterpret_cast<void (*)()>(kernel), call, &params, sizeof(P), grid, block, dynamic_shared, cluster, team});
}

// What the pretended device is.
struct Device {
  int arch = 90;  // 10 * major + minor
  int sm_count = 4;
  uint64_t seed = 0;     // other than 0: blocks, warps and lanes run in an order drawn from it
  int room = INT32_MAX;  // blocks of a launch of teams
};
Device& device();

}  // namespace lnc::host

// The reports and counts, for ctypes.
extern "C" {
// Forgets reports, counts and arrays.
void lnc_host_reset();
// Global memory that kernels may touch until the next reset. Without any, global accesses are not checked.
// access 'r': read only; 'w': written before it is read; 'b': both.
void lnc_host_array(const char* name, const void* base, int64_t bytes, char access);
// Which checks an instrumented build makes. Bytes and sectors are always counted, bounds always checked.
void lnc_host_check(int races, int distinct);
void lnc_host_device(int arch, int sm_count, uint64_t seed, int room);
// {"instrumented": bool, "reports": [...], "launches": [...]} as JSON; valid until the next call.
const char* lnc_host_report();
}
