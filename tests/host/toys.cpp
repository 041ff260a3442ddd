// Small kernels, right and wrong on purpose: what the machine must compute and what it must catch.
#include <cuda_host.h>

#include <cstring>

namespace {

struct Params {
  const float* x;
  float* y;
  int n, variant;
};

__device__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// variant 1: without the barrier
__global__ void reverse(const Params p) {
  __shared__ float row[128];
  const int i = threadIdx.x;
  row[i] = p.x[i];
  if (p.variant != 1) __syncthreads();
  p.y[i] = row[blockDim.x - 1 - i];
}

// The row's buffer is used twice. variant 1: the second write comes before every read of the first
__global__ void reuse(const Params p) {
  __shared__ float row[128];
  const int i = threadIdx.x, last = blockDim.x - 1;
  row[i] = p.x[i];
  __syncthreads();
  const float reversed = row[last - i];
  if (p.variant != 1) __syncthreads();
  row[i] = 2 * reversed;
  __syncthreads();
  p.y[i] = row[last - i];
}

// Neighbours exchange within a warp. variant 1: nothing orders them; 2: a shuffle, which does not order memory
__global__ void exchange_lanes(const Params p) {
  __shared__ float row[128];
  const int i = threadIdx.x;
  row[i] = p.x[i];
  if (p.variant == 0) __syncwarp();
  if (p.variant == 2) __shfl_xor_sync(0xffffffffu, i, 1);
  if (p.variant == 3) __syncwarp(3u << (i % 32 & ~1));
  p.y[i] = row[i ^ 1];
}

// variant 0: the second warp has left; 1: each warp comes to a barrier of its own
__global__ void divergent_barrier(const Params p) {
  const int i = threadIdx.x;
  if (p.variant == 0 && i >= 32) return;
  if (i < 32) {
    __syncthreads();
    p.y[i] = 1;
  } else {
    __syncthreads();
    p.y[i] = 2;
  }
}

// variant 0: upper lanes have left; 1: they wait at the barrier; 2: the mask leaves the caller out;
// 3: the source lane is not in the mask; 4: two lanes disagree about the mask
__global__ void absent_lane(const Params p) {
  const unsigned i = threadIdx.x;
  float v = p.x[i];
  if (p.variant == 0 && i >= 16) return;
  if (p.variant == 1 && i >= 16) {
    __syncthreads();
  } else if (p.variant == 2) {
    v = __shfl_sync(0xfffffffeu, v, 0);
  } else if (p.variant == 3) {
    if (i < 16) v = __shfl_sync(0xffffu, v, 20);
  } else if (p.variant == 4) {
    v = __shfl_sync(i == 5 ? 0x3fu : 0xffffffffu, v, 0);
  } else {
    v = warp_sum(v);
  }
  p.y[i] = v;
}

// Reads one past the end. variant 0: a static array; 1: dynamic shared memory; 2: far beyond; 3: global; 4: writes
// global
__global__ void out_of_bounds(const Params p) {
  __shared__ float row[33];
  float* dynamic = lnc::dynamic_shared<float>();
  const int i = threadIdx.x, past = p.variant == 0 ? 33 : p.variant == 2 ? 100000 : 32;
  row[i] = dynamic[i] = p.x[i];
  if (i == 0) row[32] = 0;
  __syncthreads();
  float v = 0;
  if (p.variant == 0 || p.variant == 2) v = row[i == 7 ? past : i];
  if (p.variant == 1) v = dynamic[i == 7 ? past : i];
  if (p.variant == 3) v = p.x[i == 7 ? p.n : i];
  p.y[p.variant == 4 && i == 7 ? p.n : i] = v;
}

// variant 0: shared memory nobody wrote; 1: an output nobody wrote; 2: writes its input
__global__ void undefined_memory(const Params p) {
  __shared__ float row[64];
  const int i = threadIdx.x;
  if (i != 5) row[i] = p.x[i];
  __syncthreads();
  if (p.variant == 0) p.y[i] = row[i];
  if (p.variant == 1) p.y[i] += 1;
  if (p.variant == 2) const_cast<float*>(p.x)[i] = row[i == 5 ? 4 : i];
}

// A float4 for each thread. variant: elements by which the pointers are off
__global__ void copy_vectors(const Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const auto* from = reinterpret_cast<const float4*>(p.x + p.variant);
  auto* to = reinterpret_cast<float4*>(p.y + p.variant);
  if (i < p.n / 4) __stcs(to + i, __ldg(from + i));
}

// One element a thread, each block its own. variant: distance between the elements that neighbours read; 0: all read
// one
__global__ void gather(const Params p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  p.y[i] = p.x[i * p.variant];
}

// Pairs of warps exchange their halves, each pair at its own pace. variant 1: the pairs share one barrier's name;
// 2: the barrier waits for more threads than come
__global__ void exchange_warps(const Params p) {
  __shared__ float row[128];
  const int i = threadIdx.x, pair = i / 64;
  float v = p.x[i];
  for (int turn = 0; turn <= pair; ++turn) {
    row[i] = v;
    lnc::group_barrier(p.variant == 1 ? 1 : pair + 1, p.variant == 2 ? 96 : 64);
    v = row[i ^ 32];
    lnc::group_barrier(pair + 1, 64);
  }
  p.y[i] = v;
}

// Every block writes the same element.
__global__ void conflict(const Params p) { p.y[threadIdx.x] = static_cast<float>(blockIdx.x); }

// A cluster's blocks add up their rows. variant 1: nobody waits before reading; 2: nobody waits before leaving;
// 3: the barrier in two halves; 4: a block does not come
__global__ void cluster_sum(const Params p) {
  using namespace lnc::host;
  __shared__ float mine[32];
  const int i = threadIdx.x;
  mine[i] = p.x[blockIdx.x * 32 + i];
  if (p.variant == 4 && cluster_rank() == 1) return;
  if (p.variant == 3) {
    cluster_arrive();
    cluster_wait();
  } else if (p.variant != 1) {
    cluster_sync();
  }
  float sum = 0;
  for (int r = 0; r < cluster_size(); ++r) sum += *map_shared(&mine[i], r);
  p.y[blockIdx.x * 32 + i] = sum;
  if (p.variant != 2) cluster_sync();
}

// Blocks that run together add up their rows through words behind y. variant 1: one of them tells the others nothing
__global__ void team_sum(const Params p) {
  using namespace lnc::host;
  auto* const words = reinterpret_cast<uint64_t*>(p.y + 128) + threadIdx.x;
  const float mine = p.x[blockIdx.x * 32 + threadIdx.x];
  if (p.variant != 1 || cluster_rank() != 2)
    post(words + 32 * cluster_rank(), uint64_t{1} << 32 | __float_as_uint(mine));
  float sum = 0;
  for (int r = 0; r < cluster_size(); ++r) {
    uint64_t word;
    do word = look(words + 32 * r);
    while (word >> 32 != 1);
    sum += __uint_as_float(static_cast<uint32_t>(word));
  }
  p.y[blockIdx.x * 32 + threadIdx.x] = sum;
}

__global__ void shuffles(const Params p) {
  const int i = threadIdx.x, width = p.n;
  const double v = i;
  for (int k = 0; k < 32; ++k) {
    float* y = p.y + k * 5 * 32 + i;
    y[0] = static_cast<float>(__shfl_sync(0xffffffffu, v, k, width));
    y[32] = static_cast<float>(__shfl_xor_sync(0xffffffffu, v, k, width));
    y[64] = static_cast<float>(__shfl_up_sync(0xffffffffu, v, k, width));
    y[96] = static_cast<float>(__shfl_down_sync(0xffffffffu, v, k, width));
    y[128] = static_cast<float>(__ballot_sync(0xffffffffu, i == k) == 1u << k);
  }
}

// A layer norm of one row a block: Welford's recurrence in each thread, Chan's merge between.
struct Welford {
  float mean, m2, count;
};
__device__ Welford merge(Welford a, Welford b) {
  const float count = a.count + b.count, delta = b.mean - a.mean;
  const float part = count > 0 ? b.count / count : 0;
  return {fmaf(delta, part, a.mean), a.m2 + b.m2 + delta * delta * a.count * part, count};
}
__device__ Welford shuffle_merge(Welford w) {
  for (int offset = 16; offset > 0; offset /= 2) {
    w = merge(w, {__shfl_down_sync(0xffffffffu, w.mean, offset), __shfl_down_sync(0xffffffffu, w.m2, offset),
                  __shfl_down_sync(0xffffffffu, w.count, offset)});
  }
  return w;
}
__global__ void layer_norm(const Params p) {
  __shared__ Welford partial[32];
  const float* x = p.x + static_cast<int64_t>(blockIdx.x) * p.n;
  Welford w{0, 0, 0};
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    const float delta = x[i] - w.mean;
    w.mean += delta / (w.count += 1);
    w.m2 = fmaf(delta, x[i] - w.mean, w.m2);
  }
  w = shuffle_merge(w);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = w;
  __syncthreads();
  if (threadIdx.x < 32) {
    w = shuffle_merge(threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : Welford{0, 0, 0});
    if (threadIdx.x == 0) partial[0] = w;
  }
  __syncthreads();
  const float mean = partial[0].mean, rstd = rsqrtf(partial[0].m2 / static_cast<float>(p.n) + 1e-5f);
  for (int i = threadIdx.x; i < p.n; i += blockDim.x)
    p.y[static_cast<int64_t>(blockIdx.x) * p.n + i] = (x[i] - mean) * rstd;
}

struct Toy {
  const char* name;
  void (*kernel)(Params);
};
const Toy toys[] = {{"reverse", reverse},
                    {"reuse", reuse},
                    {"exchange_lanes", exchange_lanes},
                    {"divergent_barrier", divergent_barrier},
                    {"absent_lane", absent_lane},
                    {"out_of_bounds", out_of_bounds},
                    {"undefined_memory", undefined_memory},
                    {"copy_vectors", copy_vectors},
                    {"gather", gather},
                    {"exchange_warps", exchange_warps},
                    {"conflict", conflict},
                    {"cluster_sum", cluster_sum},
                    {"team_sum", team_sum},
                    {"shuffles", shuffles},
                    {"layer_norm", layer_norm}};

}  // namespace

extern "C" int run_toy(const char* name, int grid, int block, int dynamic_shared, int cluster, const float* x, float* y,
                       int n, int variant) {
  for (const Toy& toy : toys)
    if (!std::strcmp(toy.name, name))
      return lnc::host::launch(toy.kernel, grid, block, dynamic_shared, cluster, toy.kernel == team_sum, nullptr,
                               Params{x, y, n, variant});
  return -1;
}

extern "C" void convert_halves(const float* from, uint16_t* half, uint16_t* bfloat16, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    half[i] = __float2half_rn(from[i]).bits;
    bfloat16[i] = __float2bfloat16_rn(from[i]).bits;
  }
}

extern "C" void convert_floats(float* from_half, float* from_bfloat16) {
  for (int i = 0; i < 65536; ++i) {
    from_half[i] = __half2float(__half{static_cast<uint16_t>(i)});
    from_bfloat16[i] = __bfloat162float(__nv_bfloat16{static_cast<uint16_t>(i)});
  }
}
