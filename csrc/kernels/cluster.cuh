// Blocks that share a row. On sm_90 and newer they are a thread-block cluster: they run at the same time and see each
// other's shared memory. Before that they are a team, of a cooperative launch, whose blocks run at the same time too,
// and tell each other through global memory what they have to.
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

// What the blocks of a team tell each other: words of a value and the number of the exchange it belongs to, written and
// read whole, so that who finds the number has the value and no fence is needed. Exchanges take turns with the halves:
// every warp must come to the next one for any to come to the one after it.
struct Board {
  uint64_t* words;  // [2, half], zero at first
  int half;
  uint32_t number = 0;

  __device__ void next() { ++number; }

  template <class A>
  __device__ void post(int i, A value) const {
    uint32_t part[kWords<A>];
    memcpy(part, &value, sizeof(A));
#pragma unroll
    for (int w = 0; w < kWords<A>; ++w) write(at(i * kWords<A> + w), part[w]);
  }

  template <class A>
  __device__ A wait(int i) const {
    uint32_t part[kWords<A>];
#pragma unroll
    for (int w = 0; w < kWords<A>; ++w)
      while (read(at(i * kWords<A> + w), part[w]) != number) {
      }
    A value;
    memcpy(&value, part, sizeof(A));
    return value;
  }

 private:
  template <class A>
  static constexpr int kWords = sizeof(A) / 4;
  __device__ uint64_t* at(int i) const { return words + (number & 1) * half + i; }

#ifdef LNC_HOST_EXECUTION
  void write(uint64_t* word, uint32_t value) const { host::post(word, uint64_t(number) << 32 | value); }
  static uint32_t read(uint64_t* word, uint32_t& value) {
    const uint64_t found = host::look(word);
    value = uint32_t(found);
    return uint32_t(found >> 32);
  }
#else
  __device__ void write(uint64_t* word, uint32_t value) const {
    asm volatile("{.reg .b64 word;\n\tmov.b64 word, {%1, %2};\n\tst.volatile.global.b64 [%0], word;}" ::"l"(word),
                 "r"(value), "r"(number)
                 : "memory");
  }
  __device__ static uint32_t read(uint64_t* word, uint32_t& value) {
    uint32_t found;
    asm volatile("{.reg .b64 word;\n\tld.volatile.global.b64 word, [%2];\n\tmov.b64 {%0, %1}, word;}"
                 : "=r"(value), "=r"(found)
                 : "l"(word)
                 : "memory");
    return found;
  }
#endif
};

}  // namespace lnc
