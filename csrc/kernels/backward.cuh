// Backward. With g = grad_output * weight and means over the row's columns,
//
//   grad_input = rstd * (g - mean(g) - xhat * mean(g * xhat))      (without mean(g) for rms)
//   grad_weight = sum over rows of grad_output * xhat,    grad_bias = sum over rows of grad_output
//
// A persistent grid walks the rows: each is read once, and a thread adds up weight and bias gradients of its own
// columns in registers over all the rows it meets (backward_rows). What the blocks end with goes to the workspace
// as [2, blocks, cols], and fold_partials adds it up in a fixed order. Rows too long for registers are cut into
// slices: one launch takes their sums, the next one finishes them (backward_slice_sums, backward_slices).
#pragma once
#include "group.cuh"
#include "pack.cuh"
#include "params.h"

namespace lnc {

struct BackwardArgs {
  BackwardParams p;
  int threads_per_row;
  bool input_aligned, grad_output_aligned, grad_sum_aligned, grad_input_aligned;
  bool all_aligned;  // input and grad_output
  bool wide_params;
  bool param_grads;  // whether weight or bias gradients are wanted: then partials are written
  double inverse_cols;
  int64_t slice_cols, slices, row_blocks;
  void* partials;  // A [2, row_blocks, cols]: weight, bias
  void* sums;      // A [rows, slices, 2]: of g and of g * xhat
};

// A thread's part of a row as it lies in memory, so that the next row can be on its way while this one is used.
template <class T, class D, int VECS>
struct Incoming {
  using A = Accumulate<T>;
  static constexpr int N = kPack<T>;
  static constexpr int M = N / kPack<D>;  // packs of grad_output to one of the input: more than one where it is wider
  uint4 x[VECS], dy[VECS][M];
  A pivot, shift, rstd;

  template <Norm norm, bool ALIGNED = false, class G>
  __device__ void load(const BackwardArgs& args, int64_t row, int64_t begin, int cols, const G& group) {
    const BackwardParams& p = args.p;
    const T* input = static_cast<const T*>(p.input) + row_offset(p.input_rows, row);
    const D* grad = static_cast<const D*>(p.grad_output) + row_offset(p.grad_output_rows, row) + begin;
    load_row<ALIGNED>(x, input + begin, cols, args.input_aligned, group);
    if constexpr (M == 1) {
      uint4 raw[VECS];
      load_row<ALIGNED>(raw, grad, cols, args.grad_output_aligned, group);
#pragma unroll
      for (int v = 0; v < VECS; ++v) dy[v][0] = raw[v];
    } else {
#pragma unroll
      for (int v = 0; v < VECS; ++v) {
        A value[N];
        load_wide<T>(value, grad, v * group.size + group.rank, cols, args.grad_output_aligned);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          A part[kPack<A>];
#pragma unroll
          for (int k = 0; k < kPack<A>; ++k) part[k] = value[m * kPack<A> + k];
          dy[v][m] = pack<A>(part);
        }
      }
    }
    const A* stats = static_cast<const A*>(p.stats);
    pivot = norm == Norm::layer ? A(widen(*input)) : A(0);
    shift = norm == Norm::layer ? stats[row] : A(0);
    rstd = stats[(norm == Norm::layer ? p.rows : 0) + row];
  }

  __device__ void forget() {
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      lnc::forget(x[v]);
#pragma unroll
      for (int m = 0; m < M; ++m) lnc::forget(dy[v][m]);
    }
  }

  // xhat and grad_output of pack v. Beyond the row's end grad_output is 0, and so is all that is made of it.
  __device__ void values(int v, A (&xhat)[N], A (&grad)[N]) const {
    unpack<T>(x[v], xhat);
#pragma unroll
    for (int e = 0; e < N; ++e) xhat[e] = multiply_add(xhat[e] - pivot, rstd, -shift * rstd);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      A part[kPack<D>];
      unpack<D>(dy[v][m], part);
#pragma unroll
      for (int k = 0; k < kPack<D>; ++k) grad[m * kPack<D> + k] = part[k];
    }
  }
};

// What a thread gathers over the rows it meets.
template <class T, int VECS>
struct ParamGrads {
  using A = Accumulate<T>;
  static constexpr int N = kPack<T>;
  A weight[VECS][N], bias[VECS][N];

  __device__ ParamGrads() {
#pragma unroll
    for (int v = 0; v < VECS; ++v)
#pragma unroll
      for (int e = 0; e < N; ++e) weight[v][e] = bias[v][e] = A(0);
  }

  __device__ void add(int v, const A (&xhat)[N], const A (&grad)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      weight[v][e] = multiply_add(grad[e], xhat[e], weight[v][e]);
      bias[v][e] += grad[e];
    }
  }

  // Adds up the groups that share a warp, whose lanes hold the same columns at the same place in their groups.
  template <int SIZE>
  __device__ void fold_warp() {
    if constexpr (SIZE != kWarps) {
#pragma unroll
      for (int offset = SIZE; offset < 32; offset *= 2)
#pragma unroll
        for (int v = 0; v < VECS; ++v)
#pragma unroll
          for (int e = 0; e < N; ++e) {
            weight[v][e] += __shfl_xor_sync(0xffffffffu, weight[v][e], offset);
            bias[v][e] += __shfl_xor_sync(0xffffffffu, bias[v][e], offset);
          }
    }
  }
};

// dx = rstd * (g - mean_g - xhat * mean_gx) + grad_sum
template <class T, class D, int VECS, bool KEEP, class G>
__device__ inline void write_grad_input(const BackwardArgs& args, const Incoming<T, D, VECS>& in,
                                        const Params<T, VECS, KEEP>& weight, Accumulate<T> mean_g,
                                        Accumulate<T> mean_gx, int64_t row, int64_t begin, int cols, const G& group) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  const BackwardParams& p = args.p;
  uint4 raw[VECS];
  if (p.grad_sum)
    load_row(raw, static_cast<const T*>(p.grad_sum) + row_offset(p.grad_sum_rows, row) + begin, cols,
             args.grad_sum_aligned, group);
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    A xhat[N], grad[N], w[N];
    in.values(v, xhat, grad);
    weight.values(v, w, A(1), group);
#pragma unroll
    for (int e = 0; e < N; ++e) grad[e] = in.rstd * multiply_add(-xhat[e], mean_gx, multiply(grad[e], w[e]) - mean_g);
    if (p.grad_sum) {
      unpack<T>(raw[v], xhat);
#pragma unroll
      for (int e = 0; e < N; ++e) grad[e] += xhat[e];
    }
    raw[v] = pack<T>(grad);
  }
  store_row(static_cast<T*>(p.grad_input) + row * p.cols + begin, raw, cols, args.grad_input_aligned, group);
}

// A thread's columns of one array of partials, added over the groups of the block in the order of their index.
template <class T, int VECS, bool MANY>
__device__ inline void write_partials(Accumulate<T>* out, const Accumulate<T> (&grads)[VECS][kPack<T>],
                                      Accumulate<T>* shared, int part, int parts, int rank, int size, int cols) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  const int width = VECS * size * N;
  if (parts == 1) {
    if (part < 0) return;
#pragma unroll
    for (int v = 0; v < VECS; ++v)
      store_wide<T>(out, grads[v], v * size + rank, cols, reinterpret_cast<uintptr_t>(out) % 16 == 0);
    return;
  }
  if constexpr (MANY) {
    __syncthreads();
    if (part >= 0) {
#pragma unroll
      for (int v = 0; v < VECS; ++v)
#pragma unroll
        for (int e = 0; e < N; ++e) shared[part * width + (v * size + rank) * N + e] = grads[v][e];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
      A sum = 0;
      for (int i = 0; i < parts; ++i) sum += shared[i * width + c];
      out[c] = sum;
    }
  }
}

// THREADS is the largest block that is launched. AHEAD: registers suffice to keep the next row's loads in flight;
// misaligned rows, which need more of them on the way, go without.
template <class T, class D, Norm norm, int SIZE, int VECS, int THREADS, bool AHEAD>
__global__ void __launch_bounds__(THREADS, 1) backward_rows(const BackwardArgs args) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  // Room for the gradients of all groups of a block.
  constexpr int kRoom = THREADS * VECS * N / (SIZE == kWarps ? 1 : 32 / SIZE);
  __shared__ __align__(16) A shared[kRoom];
  __shared__ GroupScratch<A> scratch;
  Group<A, SIZE> group(args.threads_per_row, &scratch);
  const BackwardParams& p = args.p;
  const int cols = static_cast<int>(p.cols);
  const int64_t stride = int64_t(gridDim.x) * group.count();
  const A inverse_cols = A(args.inverse_cols);

  Params<T, VECS, AHEAD> weight(p.weight, 0, cols, args.wide_params);
  weight.load(group);
  ParamGrads<T, VECS> grads;
  Incoming<T, D, VECS> in, next;
  int64_t row = int64_t(blockIdx.x) * group.count() + group.index;
  const bool ahead = AHEAD && args.all_aligned;
  if (ahead && row < p.rows) in.template load<norm, true>(args, row, 0, cols, group);
  for (; row < p.rows; row += stride) {
    if (ahead) {
      if (row + stride < p.rows) next.template load<norm, true>(args, row + stride, 0, cols, group);
    } else {
      in.template load<norm>(args, row, 0, cols, group);
    }
    A sums[2] = {0, 0};
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      A xhat[N], grad[N], w[N];
      in.values(v, xhat, grad);
      weight.values(v, w, A(1), group);
      if (args.param_grads) grads.add(v, xhat, grad);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const A g = multiply(grad[e], w[e]);
        sums[0] += g;
        sums[1] = multiply_add(g, xhat[e], sums[1]);
      }
    }
    if (p.grad_input) {
      group.sum(sums);
      in.forget();
      const A mean_g = norm == Norm::layer ? sums[0] * inverse_cols : A(0);
      write_grad_input(args, in, weight, mean_g, sums[1] * inverse_cols, row, 0, cols, group);
    }
    if (ahead) in = next;
  }
  if (!args.param_grads) return;
  grads.template fold_warp<SIZE>();
  const bool whole = SIZE == kWarps;
  const int parts = whole ? group.count() : int(blockDim.x) / 32;
  const int part = whole ? group.index : int(threadIdx.x) % 32 < SIZE ? int(threadIdx.x) / 32 : -1;
  A* out = static_cast<A*>(args.partials) + int64_t(blockIdx.x) * cols;
  if (p.grad_weight)
    write_partials<T, VECS, true>(out, grads.weight, shared, part, parts, group.rank, group.size, cols);
  out += int64_t(gridDim.x) * cols;
  if (p.grad_bias) write_partials<T, VECS, true>(out, grads.bias, shared, part, parts, group.rank, group.size, cols);
}

// Sums of g and g * xhat over slice blockIdx.x of row blockIdx.y + k * gridDim.y.
template <class T, class D, Norm norm, int VECS>
__global__ void __launch_bounds__(512) backward_slice_sums(const BackwardArgs args) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  __shared__ GroupScratch<A> scratch;
  Group<A, kWarps> group(blockDim.x, &scratch);
  const BackwardParams& p = args.p;
  const int64_t begin = blockIdx.x * args.slice_cols;
  const int cols = static_cast<int>(p.cols - begin < args.slice_cols ? p.cols - begin : args.slice_cols);
  Params<T, VECS, true> weight(p.weight, begin, cols, args.wide_params);
  weight.load(group);
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    Incoming<T, D, VECS> in;
    in.template load<norm>(args, row, begin, cols, group);
    A sums[2] = {0, 0};
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      A xhat[N], grad[N], w[N];
      in.values(v, xhat, grad);
      weight.values(v, w, A(1), group);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const A g = multiply(grad[e], w[e]);
        sums[0] += g;
        sums[1] = multiply_add(g, xhat[e], sums[1]);
      }
    }
    group.sum(sums);
    if (group.rank < 2)
      static_cast<A*>(args.sums)[(row * args.slices + blockIdx.x) * 2 + group.rank] = group.rank ? sums[1] : sums[0];
  }
}

// Slice blockIdx.x of the rows blockIdx.y + k * gridDim.y.
template <class T, class D, Norm norm, int VECS>
__global__ void __launch_bounds__(512, 1) backward_slices(const BackwardArgs args) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  __shared__ GroupScratch<A> scratch;
  Group<A, kWarps> group(blockDim.x, &scratch);
  const BackwardParams& p = args.p;
  const int64_t begin = blockIdx.x * args.slice_cols;
  const int cols = static_cast<int>(p.cols - begin < args.slice_cols ? p.cols - begin : args.slice_cols);
  const A inverse_cols = A(args.inverse_cols);
  Params<T, VECS, true> weight(p.weight, begin, cols, args.wide_params);
  weight.load(group);
  ParamGrads<T, VECS> grads;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    Incoming<T, D, VECS> in;
    in.template load<norm>(args, row, begin, cols, group);
    if (args.param_grads) {
#pragma unroll
      for (int v = 0; v < VECS; ++v) {
        A xhat[N], grad[N];
        in.values(v, xhat, grad);
        grads.add(v, xhat, grad);
      }
    }
    if (p.grad_input) {
      A sums[2] = {0, 0};
      const A* parts = static_cast<const A*>(args.sums) + row * args.slices * 2;
      for (int64_t i = group.rank; i < args.slices; i += group.size) {
        sums[0] += parts[2 * i];
        sums[1] += parts[2 * i + 1];
      }
      group.sum(sums);
      in.forget();
      const A mean_g = norm == Norm::layer ? sums[0] * inverse_cols : A(0);
      write_grad_input(args, in, weight, mean_g, sums[1] * inverse_cols, row, begin, cols, group);
    }
  }
  if (!args.param_grads) return;
  A* out = static_cast<A*>(args.partials) + int64_t(blockIdx.y) * p.cols + begin;
  if (p.grad_weight) write_partials<T, VECS, false>(out, grads.weight, nullptr, 0, 1, group.rank, group.size, cols);
  out += int64_t(gridDim.y) * p.cols;
  if (p.grad_bias) write_partials<T, VECS, false>(out, grads.bias, nullptr, 0, 1, group.rank, group.size, cols);
}

// grad_weight (blockIdx.y 0) and grad_bias (1): the sum over row_blocks of partials. A warp takes 32 columns, the
// warps of a block every so many-th partial, and lane by lane their sums meet in shared memory.
constexpr int kFoldWarps = 16;

template <class A, class P>
__global__ void __launch_bounds__(32 * kFoldWarps) fold_partials(const BackwardArgs args) {
  __shared__ A shared[kFoldWarps][32];
  const BackwardParams& p = args.p;
  P* out = static_cast<P*>(blockIdx.y == 0 ? p.grad_weight : p.grad_bias);
  if (!out) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  A sum = 0;
  if (column < p.cols) {
    const A* partials = static_cast<const A*>(args.partials) + int64_t(blockIdx.y) * args.row_blocks * p.cols + column;
    int64_t i = warp;
    for (; i + 3 * kFoldWarps < args.row_blocks; i += 4 * kFoldWarps) {
      A part[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) part[k] = partials[(i + k * kFoldWarps) * p.cols];
      sum += (part[0] + part[1]) + (part[2] + part[3]);
    }
    for (; i < args.row_blocks; i += kFoldWarps) sum += partials[i * p.cols];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < p.cols) {
    A total = 0;
#pragma unroll
    for (int k = 0; k < kFoldWarps; ++k) total += shared[k][lane];
    out[column] = narrow<P>(total);
  }
}

}  // namespace lnc
