// The threads that share a row, and what they add up together.
#pragma once
#include "cluster.cuh"
#include "welford.cuh"

namespace lnc {

// For SIZE below: whole warps, as many as the launch says, of a block or of all the blocks of a team.
constexpr int kWarps = 0, kTeam = -1;
template <int SIZE>
constexpr bool kWithinWarp = SIZE > 0 && SIZE <= 32;
constexpr int kMaxWarps = 32;

#ifndef LNC_HOST_EXECUTION
// A barrier of the threads of one group: named, since the groups of a block walk their rows each at its own pace.
__device__ inline void group_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

// The value of the lane whose number differs in bit OFFSET, among WIDTH lanes. __shfl_xor_sync moves every constant
// into a register first.
template <int OFFSET, int WIDTH, class A>
__device__ inline A exchange(A v, unsigned mask) {
#ifndef LNC_HOST_EXECUTION
  if constexpr (sizeof(A) == 4) {
    float other;
    if constexpr (WIDTH == 32)
      asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(other) : "f"(v), "n"(OFFSET));
    else
      asm volatile("shfl.sync.bfly.b32 %0, %1, %2, %3, %4;"
                   : "=f"(other)
                   : "f"(v), "n"(OFFSET), "n"((32 - WIDTH) << 8 | 31), "r"(mask));
    return other;
  }
#endif
  return __shfl_xor_sync(mask, v, OFFSET, WIDTH);
}

template <class A>
struct GroupScratch {
  A value[2][kMaxWarps][3];
};

// The threads of a block with one threadIdx.y: SIZE threads (a power of two), of one warp up to 32, or kWarps; or those
// of a team. Every thread of a group must make the same calls; results are the same bits in all of them, and the same
// whether the warps are a block's or a team's. ALONE: the group is the block.
template <class A, int SIZE, bool ALONE = false>
struct Group {
  static constexpr bool kInWarp = kWithinWarp<SIZE>;
  static constexpr int kWidth = kInWarp ? SIZE : 32;
  int size;   // threads
  int index;  // of the group in its block
  int rank;   // of the thread in its group
  unsigned mask;
  GroupScratch<A>* scratch;
  int turn = 0;  // which half of the scratch: one barrier a reduction is enough when two alternate
  Board board{};

  // Of the team of blocks that this one belongs to.
  __device__ Group(uint64_t* boards, int blocks) : size(blocks * int(blockDim.x)), index(0), mask(0xffffffffu) {
    static_assert(SIZE == kTeam, "others have a scratch");
    rank = int(blockIdx.x % blocks * blockDim.x + threadIdx.x);
    board.half = kForwardBoard / 16;
    board.words = boards + blockIdx.x / blocks * (kForwardBoard / 8);
  }
  __device__ explicit Group(GroupScratch<A>* s) : scratch(s) {
    size = SIZE == kWarps ? int(blockDim.x) : SIZE;
    index = ALONE ? 0 : int(threadIdx.y);
    rank = int(threadIdx.x);
    constexpr unsigned kLanes = kWidth == 32 ? 0xffffffffu : (1u << (kWidth % 32)) - 1;
    mask = kLanes << (kWidth == 32 ? 0 : index * kWidth % 32);
  }

  __device__ int count() const { return ALONE ? 1 : int(blockDim.y); }
  __device__ int lane() const { return unsigned(rank) % kWidth; }
  __device__ int warps() const { return unsigned(size) / 32; }
  __device__ void sync() const {
    if constexpr (ALONE)
      __syncthreads();
    else
      group_barrier(index + 1, size);
  }

  // Component-wise sums over the group.
  template <int K>
  __device__ void sum(A (&v)[K]) {
    if constexpr (K == 2 && kWidth > 1 && SIZE != kTeam) return sum_pair(v);
    butterfly<kWidth>([&](auto offset) { add<decltype(offset)::value>(v); });
    if (kInWarp || size == 32) return;
    share(v);
    across_warps([&](auto offset) { add<decltype(offset)::value>(v); });
  }

  // The group's moments from its threads'.
  __device__ Moments<A> merge(Moments<A> m) {
    butterfly<kWidth>([&](auto offset) { m = merged<decltype(offset)::value>(m); });
    if (kInWarp || size == 32) return m;
    return merge_warps(m);
  }

  // The same where every thread has N values, from their sum and squared deviations. inverse: 1 / (N * size).
  template <int N>
  __device__ Moments<A> merge_equal(A sum, A m2, A inverse) {
    EqualMoments<A> m = {sum, m2, A(0.5) / A(N)};
    auto meet = [&](auto offset) {
      constexpr int lanes = decltype(offset)::value;
      m.merge(exchange<lanes, kWidth>(m.sum, mask), exchange<lanes, kWidth>(m.m2, mask));
    };
    butterfly<kWidth>(meet);
    if (!kInWarp && size != 32) {
      const int warps = this->warps();
      if (warps & (warps - 1)) return merge_warps(Moments<A>{A(32 * N), m.sum * (A(1) / A(32 * N)), m.m2});
      A v[2] = {m.sum, m.m2};
      share(v);
      m.sum = v[0], m.m2 = v[1];
      across_warps(meet);
    }
    return {A(N) * A(size), m.sum * inverse, m.m2};
  }

 private:
  // Of the scratch.
  __device__ A (&next_half()) [kMaxWarps][3] {
    auto& values = scratch->value[turn];
    turn ^= 1;
    return values;
  }

  // Two sums with half the exchanges: lanes of an even number go on with the first, the others with the second.
  __device__ void sum_pair(A (&v)[2]) {
    const bool odd = rank & 1;
    A mine = odd ? v[1] : v[0];
    mine += exchange<1, kWidth>(odd ? v[0] : v[1], mask);
    butterfly<kWidth, 2>([&](auto offset) { mine += exchange<decltype(offset)::value, kWidth>(mine, mask); });
    if (!kInWarp && size != 32) {
      const int warps = this->warps(), first = index * warps;
      A* const pairs = *next_half();
      if (lane() < 2) pairs[2 * (first + unsigned(rank) / 32) + lane()] = mine;
      sync();
      const int span = 1 << (32 - __clz(warps - 1)), part = lane() / 2 & (span - 1);
      mine = part < warps ? pairs[2 * (first + part) + lane() % 2] : A(0);
      across_warps([&](auto offset) {
        if constexpr (2 * decltype(offset)::value < 32)
          mine += exchange<2 * decltype(offset)::value, kWidth>(mine, mask);
      });
    }
    const A other = exchange<1, kWidth>(mine, mask);
    v[0] = odd ? other : mine;
    v[1] = odd ? mine : other;
  }

  // Calls step(offset) for 1, 2, 4 ... below LANES, known at compile time.
  template <int LANES, int OFFSET = 1, class F>
  __device__ static void butterfly(F step) {
    if constexpr (OFFSET < LANES) {
      step(std::integral_constant<int, OFFSET>{});
      butterfly<LANES, 2 * OFFSET>(step);
    }
  }

  // The same among the lanes that hold the warps' parts.
  template <int OFFSET = 1, class F>
  __device__ void across_warps(F step) const {
    if constexpr (OFFSET < kMaxWarps)
      if (OFFSET < warps()) {
        step(std::integral_constant<int, OFFSET>{});
        across_warps<2 * OFFSET>(step);
      }
  }

  // Leaves the warp's part where the others see it, and takes that of warp number lane, zeros where there is no such
  // warp. As many lanes as the next power of two hold one each, over and over.
  template <int K>
  __device__ void share(A (&v)[K]) {
    const int warps = this->warps(), first = index * warps, warp = first + unsigned(rank) / 32;
    const int span = 1 << (32 - __clz(warps - 1)), part = lane() & (span - 1);
    const bool here = part < warps;
    if constexpr (SIZE == kTeam) {
      board.next();
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (lane() == 0) board.post(warp * 3 + k, v[k]);
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] = here ? board.template wait<A>(part * 3 + k) : A(0);
    } else {
      auto& values = next_half();
      if (lane() == 0) {
#pragma unroll
        for (int k = 0; k < K; ++k) values[warp][k] = v[k];
      }
      sync();
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] = here ? values[first + part][k] : A(0);
    }
  }

  __device__ Moments<A> merge_warps(const Moments<A>& warp) {
    A v[3] = {warp.n, warp.mean, warp.m2};
    share(v);
    Moments<A> m = {v[0], v[1], v[2]};
    across_warps([&](auto offset) { m = merged<decltype(offset)::value>(m); });
    return m;
  }

  template <int OFFSET, int K>
  __device__ void add(A (&v)[K]) const {
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] += exchange<OFFSET, kWidth>(v[k], mask);
  }

  // The lower lane's part comes first on both sides of an exchange, so that both get the same bits.
  template <int OFFSET>
  __device__ Moments<A> merged(const Moments<A>& m) const {
    const Moments<A> other = {exchange<OFFSET, kWidth>(m.n, mask), exchange<OFFSET, kWidth>(m.mean, mask),
                              exchange<OFFSET, kWidth>(m.m2, mask)};
    const bool upper = rank & OFFSET;
    return lnc::merge(Moments<A>{upper ? other.n : m.n, upper ? other.mean : m.mean, upper ? other.m2 : m.m2},
                      Moments<A>{upper ? m.n : other.n, upper ? m.mean : other.mean, upper ? m.m2 : other.m2});
  }
};

}  // namespace lnc
