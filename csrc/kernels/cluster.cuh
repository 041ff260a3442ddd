// Thread-block clusters of sm_90 and newer, whose blocks run at the same time and see each other's shared memory.
#pragma once
#include "plan.h"
#include "platform.cuh"

namespace lnc {

#ifndef LNC_HOST_EXECUTION
// The launch's dynamic shared memory, 16-byte aligned. Kernels that take it have no other beside it, which simulators
// have been seen to lay over it.
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ uint4 lnc_dynamic_shared[];
  return reinterpret_cast<T*>(lnc_dynamic_shared);
}
#endif

#ifdef LNC_HOST_EXECUTION
constexpr bool kIsHost = true;
#else
constexpr bool kIsHost = false;
#endif
#if defined(LNC_HOST_EXECUTION) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// Of one block where an architecture has no clusters; the barriers are the block's own then.
struct Cluster {
  int size;  // blocks
  __device__ explicit Cluster(int size) : size(size) {}

  // arrive ... wait: what any thread wrote before arriving, every thread sees after waiting.
  __device__ void arrive() const {
    if (size == 1) return;
#ifdef LNC_HOST_EXECUTION
    host::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
  }
  __device__ void wait() const {
    if (size == 1) return;
#ifdef LNC_HOST_EXECUTION
    host::cluster_wait();
#elif __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
  }
  __device__ void sync() const {
    if (size == 1) return __syncthreads();
    arrive();
    wait();
  }

  // Where p of this block's shared memory lies in block number rank's.
  template <class T>
  __device__ T* map(T* p, int rank) const {
    if (size == 1) return p;
#ifdef LNC_HOST_EXECUTION
    return host::map_shared(p, rank);
#elif __CUDA_ARCH__ >= 900
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
    return there;
#else
    return p;
#endif
  }
};

}  // namespace lnc
