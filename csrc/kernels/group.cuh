// The threads that share a row, and what they add up together.
#pragma once
#include "platform.cuh"
#include "welford.cuh"

namespace lnc {

constexpr int kWarps = 0;  // for SIZE below: whole warps, as many as the launch says
constexpr int kMaxWarps = 32;

#ifndef LNC_HOST_EXECUTION
// A barrier of the threads of one group: named, since the groups of a block walk their rows each at its own pace.
__device__ inline void group_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

template <class A>
struct GroupScratch {
  A value[2][kMaxWarps][3];
};

// SIZE threads of a warp (a power of two), or kWarps. Every thread of a group must make the same calls; results are
// the same bits in all of them.
template <class A, int SIZE>
struct Group {
  static constexpr int kWidth = SIZE == kWarps ? 32 : SIZE;
  int size;   // threads
  int index;  // of the group in its block
  int rank;   // of the thread in its group
  unsigned mask;
  GroupScratch<A>* scratch;
  int turn = 0;  // which half of the scratch: one barrier a reduction is enough when two alternate

  __device__ Group(int threads, GroupScratch<A>* s) : scratch(s) {
    size = SIZE == kWarps ? threads : SIZE;
    index = SIZE == kWarps && size == int(blockDim.x) ? 0 : int(threadIdx.x) / size;
    rank = int(threadIdx.x) - index * size;
    mask = kWidth == 32 ? 0xffffffffu : ((1u << (kWidth % 32)) - 1) << (threadIdx.x % 32 / kWidth * kWidth);
  }

  __device__ int count() const { return int(blockDim.x) / size; }
  __device__ int lane() const { return rank % kWidth; }

  // Component-wise sums over the group.
  template <int K>
  __device__ void sum(A (&v)[K]) {
    within_warp(v, kWidth);
    if constexpr (SIZE == kWarps) {
      if (size == 32) return;
      const int warps = size / 32, first = index * warps;
      auto& values = scratch->value[turn];
      turn ^= 1;
      if (lane() < K) values[first + rank / 32][lane()] = pick(v, lane());
      group_barrier(index + 1, size);
      const int part = lane() % span(warps);
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] = part < warps ? values[first + part][k] : A(0);
      within_warp(v, warps);
    }
  }

  // The group's moments from its threads'. even: every thread has the same count.
  __device__ Moments<A> merge(Moments<A> m, bool even) {
    m = even ? within_warp_equal(m) : within_warp(m, kWidth);
    if constexpr (SIZE == kWarps) {
      if (size == 32) return m;
      const int warps = size / 32, first = index * warps;
      auto& values = scratch->value[turn];
      turn ^= 1;
      if (lane() == 0) {
        A* mine = values[first + rank / 32];
        mine[0] = m.n, mine[1] = m.mean, mine[2] = m.m2;
      }
      group_barrier(index + 1, size);
      const int part = lane() % span(warps);
      const bool here = part < warps;
      const A* theirs = values[first + (here ? part : 0)];
      m = {here ? theirs[0] : A(0), here ? theirs[1] : A(0), here ? theirs[2] : A(0)};
      m = within_warp(m, warps);
    }
    return m;
  }

 private:
  // The power of two that holds so many warps' parts: every stretch of so many lanes adds up all of them.
  __device__ static int span(int warps) {
    int lanes = 1;
    while (lanes < warps) lanes *= 2;
    return lanes;
  }

  __device__ A exchange(A v, int offset) const { return __shfl_xor_sync(mask, v, offset, kWidth); }

  template <int K>
  __device__ static A pick(const A (&v)[K], int i) {
    A value = v[0];
#pragma unroll
    for (int k = 1; k < K; ++k) value = i == k ? v[k] : value;
    return value;
  }

  template <int K>
  __device__ void within_warp(A (&v)[K], int lanes) const {
#pragma unroll
    for (int offset = 1; offset < kWidth; offset *= 2) {
      if (offset >= lanes) break;
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] += exchange(v[k], offset);
    }
  }

  __device__ Moments<A> within_warp_equal(Moments<A> m) const {
#pragma unroll
    for (int offset = 1; offset < kWidth; offset *= 2)
      m = merge_equal(m, Moments<A>{m.n, exchange(m.mean, offset), exchange(m.m2, offset)});
    return m;
  }

  // The lower lane's part comes first on both sides of an exchange, so that both get the same bits.
  __device__ Moments<A> within_warp(Moments<A> m, int lanes) const {
#pragma unroll
    for (int offset = 1; offset < kWidth; offset *= 2) {
      if (offset >= lanes) break;
      const Moments<A> other = {exchange(m.n, offset), exchange(m.mean, offset), exchange(m.m2, offset)};
      const bool upper = rank & offset;
      m = lnc::merge(Moments<A>{upper ? other.n : m.n, upper ? other.mean : m.mean, upper ? other.m2 : m.m2},
                     Moments<A>{upper ? m.n : other.n, upper ? m.mean : other.mean, upper ? m.m2 : other.m2});
    }
    return m;
  }
};

}  // namespace lnc
