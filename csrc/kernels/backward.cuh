// Backward. With g = grad_output * weight and means over the row's columns,
//
//   grad_input = rstd * (g - mean(g) - xhat * mean(g * xhat))      (without mean(g) for rms)
//   grad_weight = sum over rows of grad_output * xhat,    grad_bias = sum over rows of grad_output
//
// A persistent grid walks the rows: each is read once, and a thread adds up weight and bias gradients of its own
// columns in registers over all the rows it meets (backward_rows). What the blocks end with goes to the workspace
// as [2, blocks, cols], and fold_partials adds it up in a fixed order. Of rows too long for a block's registers the
// blocks of a cluster or a team have a slice each. What is longer still takes two launches, of the slices' sums and of
// what is made of them (backward_slice_sums, backward_slices).
#pragma once
#include "cluster.cuh"
#include "group.cuh"
#include "pack.cuh"
#include "params.h"

namespace lnc {

constexpr int kBackwardThreads = 512;
// Groups that share a warp.
template <int SIZE>
constexpr int kTogether = kWithinWarp<SIZE> ? 32 / SIZE : 1;

struct BackwardArgs {
  BackwardParams p;
  bool grad_output_aligned;
  bool wide_params;
  bool param_grads;  // whether weight or bias gradients are wanted: then partials are written
  double inverse_cols;
  const void* rstd;  // A [rows], of p.stats
  int64_t slice_cols, slices, row_blocks;
  int cluster;      // blocks that share a row
  uint64_t* board;  // where they are a team; else null
  void* partials;   // A [2, row_blocks, cols]: weight, bias
  void* sums;       // A [rows, slices, 2]: of g and of g * xhat
};

// A thread's part of a row as it lies in memory.
template <class T, class D, int VECS>
struct Incoming {
  using A = Accumulate<T>;
  static constexpr int N = kPack<T>;
  static constexpr int M = N / kPack<D>;  // packs of grad_output to one of the input: more than one where it is wider
  Raw<T> x[VECS];
  Raw<D> dy[VECS][M];
  T pivot;  // as it lies in memory: a conversion would wait for it
  A shift, rstd;

  template <Norm norm, class E, class G>
  __device__ void load(const BackwardArgs& args, int64_t row, int64_t begin, const E& extent, const G& group) {
    const BackwardParams& p = args.p;
    const T* input = static_cast<const T*>(p.input) + row_offset(p.input_rows, row);
    const D* grad = static_cast<const D*>(p.grad_output) + row_offset(p.grad_output_rows, row) + begin;
    load_row(x, input + begin, extent, group);
    if constexpr (M == 1) {
      Raw<T> raw[VECS];
      load_row(raw, reinterpret_cast<const T*>(grad), extent, group);
#pragma unroll
      for (int v = 0; v < VECS; ++v) dy[v][0] = raw[v];
    } else {
#pragma unroll
      for (int v = 0; v < VECS; ++v) {
        A value[N];
        load_wide<T>(value, grad, v * group.size + group.rank, extent.cols, E::kWhole || args.grad_output_aligned);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          A part[kPack<A>];
#pragma unroll
          for (int k = 0; k < kPack<A>; ++k) part[k] = value[m * kPack<A> + k];
          dy[v][m] = pack<A>(part);
        }
      }
    }
    const bool layer = is_layer<norm>(p);
    pivot = layer ? *input : T{};
    shift = layer ? static_cast<const A*>(p.stats)[row] : A(0);
    rstd = static_cast<const A*>(args.rstd)[row];
  }

  __device__ void forget() {
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      lnc::forget(x[v]);
#pragma unroll
      for (int m = 0; m < M; ++m) lnc::forget(dy[v][m]);
    }
  }

  // xhat and grad_output of pack v.
  template <Norm norm>
  __device__ void values(int v, A (&xhat)[N], A (&grad)[N]) const {
    unpack<T>(x[v], xhat);
    const A centre = -shift * rstd, first = widen(pivot);
#pragma unroll
    for (int e = 0; e < N; ++e)
      xhat[e] = norm == Norm::rms ? xhat[e] * rstd : multiply_add(xhat[e] - first, rstd, centre);
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

  // Adds up what the groups of a block have: those that share a warp, whose lanes hold the same columns at the same
  // place in their groups, then the upper half of the warps' or groups' parts to the lower, through shared memory, and
  // at last all that is left, every thread of the block a share of it: write(is_bias, column, value), whole lines a
  // warp.
  template <int SIZE, class G, class F>
  __device__ void fold(A* shared, const G& group, F write) {
#pragma unroll
    for (int offset = SIZE; kWithinWarp<SIZE> && offset < 32; offset *= 2)
      each_pack([&](int, A(&values)[M]) {
#pragma unroll
        for (int k = 0; k < M; ++k) values[k] += __shfl_xor_sync(0xffffffffu, values[k], offset);
      });
    const int part = group.index / kTogether<SIZE>, parts = group.count() / kTogether<SIZE>, half = (parts + 1) / 2;
    const bool first = group.index % kTogether<SIZE> == 0;
    const int part_packs = kPacks * group.size;
    // In the order of the columns, but that threads with two packs side by side do not meet in the same banks.
    constexpr int kTurn = kEach == 2 && (SIZE == kWarps || SIZE >= 8);
    Raw<A>* const packs = reinterpret_cast<Raw<A>*>(shared) + part % half * part_packs + group.rank * kEach;
    const int turn = group.rank / 4 & kTurn;
    auto place = [&](int i) -> Raw<A>& { return packs[i / kEach * kEach * group.size + (i % kEach ^ turn)]; };
    if (first && part >= half && part < parts) each_pack([&](int i, A(&values)[M]) { place(i) = pack<A>(values); });
    __syncthreads();
    if (first && part < half) {
      each_pack([&](int i, A(&values)[M]) {
        if (part < parts - half) add(values, place(i));
        place(i) = pack<A>(values);
      });
    }
    __syncthreads();
    // A warp takes as many packs at a time as it has lanes, a lane every 32nd of their columns: it writes whole lines.
    constexpr bool kFull = SIZE == kWarps || SIZE * kPacks % 32 == 0;
    const int threads = group.count() * group.size, columns = part_packs * M / 2;
    for (int o = group.index * group.size + group.rank; (o & ~31) < part_packs; o += threads) {
      const int pack = (o & ~31) + (o & 31) / M, column = (o & ~31) * M + (o & 31);
      A total[M] = {};
      for (int k = 0; k < half; ++k)
#pragma unroll
        for (int m = 0; m < M; ++m)
          if (kFull || column + m * 32 < 2 * columns)
            total[m] += shared[(k * part_packs + m * (32 / M) + (pack ^ (m & kTurn))) * M + o % M];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int c = column + m * 32;
        if (c < columns)
          write(false, c, total[m]);
        else if (kFull || c < 2 * columns)
          write(true, c - columns, total[m]);
      }
    }
  }

 private:
  // Packs as they are added up: of one of a thread's packs of a row, of all that it has.
  static constexpr int M = kPack<A>, kEach = N / M, kPacks = 2 * VECS * kEach;

  __device__ static void add(A (&values)[M], const Raw<A>& more) {
    A other[M];
    unpack<A>(more, other);
#pragma unroll
    for (int k = 0; k < M; ++k) values[k] += other[k];
  }

  template <class F>
  __device__ void each_pack(F f) {
#pragma unroll
    for (int i = 0; i < kPacks / 2; ++i) {
      f(i, reinterpret_cast<A(&)[M]>(weight[i * M / N][i * M % N]));
      f(kPacks / 2 + i, reinterpret_cast<A(&)[M]>(bias[i * M / N][i * M % N]));
    }
  }
};

// A thread's xhat, and grad_output times weight, of a row or a slice of it.
template <class T, class D, Norm norm, int VECS>
struct BackwardPart {
  using A = Accumulate<T>;
  static constexpr int N = kPack<T>;
  A xhat[VECS][N], g[VECS][N];
  A rstd;

  // What lies in memory, as it is computed with. Whole packs beyond the row's end are left out.
  template <class E, class G>
  __device__ void read(const Incoming<T, D, VECS>& in, const E& extent, const G& group) {
    rstd = in.rstd;
#pragma unroll
    for (int v = 0; v < VECS; ++v)
      if (!E::kWhole || extent.has(v, group)) in.template values<norm>(v, xhat[v], g[v]);
  }

  // Beyond the row's end grad_output is 0, and so is all that is made of it. GRADS: they are gathered, wanted or not: a
  // branch would cost more. The thread's share of sum(g) and sum(g * xhat), each in two chains.
  template <bool GRADS, int EARLY, class E, class G>
  __device__ void take(Param<T, VECS, EARLY>& weight, ParamGrads<T, VECS>& grads, A (&sums)[2], const E& extent,
                       const G& group) {
    A part[4] = {0, 0, 0, 0};
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      if (E::kWhole && !extent.has(v, group)) continue;
      if (GRADS) grads.add(v, xhat[v], g[v]);
      A w[N];
      weight.template values<E::kWhole>(v, w, A(1), extent, group);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        g[v][e] = multiply(g[v][e], w[e]);
        if (norm != Norm::rms) part[e % 2] += g[v][e];
        part[2 + e % 2] = multiply_add(g[v][e], xhat[v][e], part[2 + e % 2]);
      }
    }
    sums[0] = part[0] + part[1], sums[1] = part[2] + part[3];
  }

  // dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_sum
  template <class E, class G>
  __device__ void write_grad_input(const BackwardArgs& args, const A (&sums)[2], int64_t row, int64_t begin,
                                   const E& extent, const G& group) {
    const BackwardParams& p = args.p;
    const A inverse_cols = A(args.inverse_cols), mean_g = is_layer<norm>(p) ? sums[0] * inverse_cols : A(0),
            minus_mean_gx = -sums[1] * inverse_cols;
    T* const out = static_cast<T*>(p.grad_input) + row * p.cols + begin;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      if (E::kWhole && !extent.has(v, group)) continue;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const A centred = norm == Norm::rms ? g[v][e] : g[v][e] - mean_g;
        g[v][e] = rstd * multiply_add(xhat[v][e], minus_mean_gx, centred);
      }
    }
    if (p.grad_sum) {
      Raw<T> raw[VECS];
      load_row(raw, static_cast<const T*>(p.grad_sum) + row_offset(p.grad_sum_rows, row) + begin, extent, group);
#pragma unroll
      for (int v = 0; v < VECS; ++v) {
        A more[N];
        unpack<T>(raw[v], more);
#pragma unroll
        for (int e = 0; e < N; ++e) g[v][e] += more[e];
      }
    }
    Raw<T> raw[VECS];
#pragma unroll
    for (int v = 0; v < VECS; ++v) raw[v] = pack<T>(g[v]);
    store_row(out, raw, extent, group);
  }
};

// A thread's columns of set number set of the partials, from column begin on.
template <class T, int VECS, class G>
__device__ inline void write_partials(const ParamGrads<T, VECS>& grads, const BackwardArgs& args, int64_t set,
                                      int64_t begin, int cols, const G& group) {
  auto write = [&](const Accumulate<T>(&values)[VECS][kPack<T>], int64_t row) {
    Accumulate<T>* out = static_cast<Accumulate<T>*>(args.partials) + row * args.p.cols + begin;
    const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
#pragma unroll
    for (int v = 0; v < VECS; ++v) store_wide<T>(out, values[v], v * group.size + group.rank, cols, aligned);
  };
  if (args.p.grad_weight) write(grads.weight, set);
  if (args.p.grad_bias) write(grads.bias, args.row_blocks + set);
}

// Sums that the blocks of a cluster or a team have each of their part of a row, added up in one order: the same bits in
// all. Halves alternate, so that one barrier is enough.
template <class A>
struct ClusterSums {
  A value[2][kMaxCluster][2];

  __device__ void add(A (&sums)[2], int turn, const Cluster& cluster) {
    auto& parts = value[turn];
    if (int(threadIdx.x) < cluster.size) {
      A* there = cluster.map(parts[blockIdx.x % cluster.size], threadIdx.x);
      there[0] = sums[0], there[1] = sums[1];
    }
    cluster.sync();
    sums[0] = sums[1] = 0;
    for (int i = 0; i < cluster.size; ++i) sums[0] += parts[i][0], sums[1] += parts[i][1];
  }

  // Every warp takes all parts itself: even lanes the first sums, odd lanes the second.
  __device__ static void add(A (&sums)[2], Board& board, const Cluster& team) {
    const int lane = threadIdx.x % 32;
    const bool odd = lane & 1;
    board.next();
    if (threadIdx.x < 2) board.post(blockIdx.x % team.size * 2 + lane, odd ? sums[1] : sums[0]);
    A mine = lane < 2 * team.size ? board.template wait<A>(lane) : A(0);
    constexpr unsigned kAll = 0xffffffffu;
    mine += exchange<2, 32>(mine, kAll);
    mine += exchange<4, 32>(mine, kAll);
    mine += exchange<8, 32>(mine, kAll);
    mine += exchange<16, 32>(mine, kAll);
    const A other = exchange<1, 32>(mine, kAll);
    sums[0] = odd ? other : mine;
    sums[1] = odd ? mine : other;
  }
};

// Every block needs all of the weights at the same moment, when its first rows have come, and a cache that has not yet
// got what it has just asked memory for serves only a few that ask for the same. So each block asks for a share first.
__device__ inline void ask_for_share(const void* weight, unsigned bytes) {
#ifndef LNC_HOST_EXECUTION
  const unsigned sector = blockIdx.x + (threadIdx.y * blockDim.x + threadIdx.x) * gridDim.x;
  if (sector < bytes / 32u)
    asm volatile(
        "{.reg .b32 ignored;\n\tld.global.b32 ignored, [%0];}" ::"l"(static_cast<const char*>(weight) + sector * 32u));
#endif
}

// CLUSTER: the blocks of a cluster share a row, each with a slice of it, or those of a team where there are no
// clusters.
template <class T, class D, Norm norm, int SIZE, int VECS, bool WHOLE, bool CLUSTER = false>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_rows(const BackwardArgs args) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  const bool team = CLUSTER && (kIsHost ? args.board != nullptr : !kHasClusters);
  // Whether registers suffice for the next row too, on its way as soon as this one is unpacked, and for what was made
  // of this one until it is used; and for the weights, for which a row would wait behind the next one's loads. Where
  // not, a row is taken from its bytes twice.
  constexpr bool kAhead = WHOLE;
  // Room for both gradients of half a block's groups, or rather of its warps where several groups share one: two of
  // three groups of 160 threads are the most.
  constexpr int kRoom = CLUSTER ? 4 : (SIZE == kWarps ? 640 : kBackwardThreads) * VECS * N / kTogether<SIZE>;
  __shared__ __align__(16) A shared[kRoom];
  __shared__ GroupScratch<A> scratch;
  __shared__ ClusterSums<A> cluster_sums;
  Group<A, SIZE, CLUSTER> group(&scratch);
  const Cluster cluster(CLUSTER ? args.cluster : 1);
  const BackwardParams& p = args.p;
  const int64_t begin = CLUSTER ? blockIdx.x % cluster.size * args.slice_cols : 0;
  const int cols = CLUSTER ? slice_cols(args, begin) : static_cast<int>(p.cols);
  const Extent<T, WHOLE, kSurePacks<VECS, WHOLE && !CLUSTER>> extent{cols};
  const int walker = blockIdx.x / cluster.size;  // the block, or the cluster, among those that walk the rows

  Param<T, VECS, kAhead ? VECS : 0> weight(p.weight, begin, args.wide_params);
  ParamGrads<T, VECS> grads;
  Incoming<T, D, VECS> in;
  // The rows of a last, partial round go to as many multiprocessors as there are, those of one warp side by side.
  const int walkers = gridDim.x / cluster.size;
  using Row = std::conditional_t<CLUSTER, int, int64_t>;  // of so many columns there are no more in any memory
  const Row stride = Row(walkers) * group.count();
  Row row = (Row(group.index / kTogether<SIZE>) * walkers + walker) * kTogether<SIZE> + group.index % kTogether<SIZE>;
  if (kAhead && !CLUSTER && p.weight) ask_for_share(p.weight, cols * unsigned(sizeof(T)));
  if (kAhead && row < Row(p.rows)) in.template load<norm>(args, row, begin, extent, group);
  // <WHOLE> would hold too, but orders the kernel's instructions worse.
  weight.template load<false>(extent, group);
  if (CLUSTER && !team) cluster.arrive(), cluster.wait();  // no block writes to another before that has begun
  Board board{team ? args.board + walker * (kBackwardBoard / 8) : nullptr, int(kBackwardBoard / 16)};
  for (int turn = 0; row < Row(p.rows); row += stride, turn ^= 1) {
    if (!kAhead) in.template load<norm>(args, row, begin, extent, group);
    BackwardPart<T, D, norm, VECS> part;
    A sums[2] = {0, 0}, again[2] = {0, 0};
    part.read(in, extent, group);
    if (kAhead && row + stride < Row(p.rows)) in.template load<norm>(args, row + stride, begin, extent, group);
    part.template take<true>(weight, grads, sums, extent, group);
    if (p.grad_input) {
      if (!kAhead) forget(group.rank);
      group.sum(sums);
      if (CLUSTER) {
        if (team)
          cluster_sums.add(sums, board, cluster);
        else
          cluster_sums.add(sums, turn, cluster);
        forget(group.rank);
      }
      if (!kAhead) {
        in.forget();
        part.read(in, extent, group);
        part.template take<false>(weight, grads, again, extent, group);
      }
      part.write_grad_input(args, sums, row, begin, extent, group);
    }
  }
  if (!args.param_grads) return;
  if (CLUSTER || group.count() == 1) return write_partials(grads, args, walker, begin, cols, group);
  grads.template fold<SIZE>(shared, group, [&](bool is_bias, int column, A value) {
    A* out = static_cast<A*>(args.partials) + (is_bias ? args.row_blocks + walker : walker) * p.cols;
    if (column < cols && (is_bias ? p.grad_bias : p.grad_weight)) out[column] = value;
  });
}

// Sums of g and g * xhat over slice blockIdx.x of row blockIdx.y + k * gridDim.y.
template <class T, class D, Norm norm, int VECS, bool WHOLE>
__global__ void __launch_bounds__(512) backward_slice_sums(const BackwardArgs args) {
  using A = Accumulate<T>;
  __shared__ GroupScratch<A> scratch;
  Group<A, kWarps, true> group(&scratch);
  const BackwardParams& p = args.p;
  const int64_t begin = blockIdx.x * args.slice_cols;
  const Extent<T, WHOLE, 0> extent{slice_cols(args, begin)};
  Param<T, VECS, VECS> weight(p.weight, begin, args.wide_params);
  weight.template load<false>(extent, group);
  ParamGrads<T, VECS> none;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    Incoming<T, D, VECS> in;
    in.template load<norm>(args, row, begin, extent, group);
    BackwardPart<T, D, norm, VECS> part;
    A sums[2] = {0, 0};
    part.read(in, extent, group);
    part.template take<false>(weight, none, sums, extent, group);
    group.sum(sums);
    if (group.rank < 2)
      static_cast<A*>(args.sums)[(row * args.slices + blockIdx.x) * 2 + group.rank] = group.rank ? sums[1] : sums[0];
  }
}

// Slice blockIdx.x of the rows blockIdx.y + k * gridDim.y.
template <class T, class D, Norm norm, int VECS, bool WHOLE>
__global__ void __launch_bounds__(kBackwardThreads, 1) backward_slices(const BackwardArgs args) {
  using A = Accumulate<T>;
  __shared__ GroupScratch<A> scratch;
  Group<A, kWarps, true> group(&scratch);
  const BackwardParams& p = args.p;
  const int64_t begin = blockIdx.x * args.slice_cols;
  const Extent<T, WHOLE, 0> extent{slice_cols(args, begin)};
  Param<T, VECS, 0> weight(p.weight, begin, args.wide_params);
  ParamGrads<T, VECS> grads;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    Incoming<T, D, VECS> in;
    in.template load<norm>(args, row, begin, extent, group);
    BackwardPart<T, D, norm, VECS> part;
    A ignored[2] = {0, 0}, sums[2] = {0, 0};
    part.read(in, extent, group);
    part.template take<true>(weight, grads, ignored, extent, group);
    if (p.grad_input) {
      const A* parts = static_cast<const A*>(args.sums) + row * args.slices * 2;
      for (int64_t i = group.rank; i < args.slices; i += group.size) {
        sums[0] += parts[2 * i];
        sums[1] += parts[2 * i + 1];
      }
      group.sum(sums);
      part.write_grad_input(args, sums, row, begin, extent, group);
    }
  }
  if (!args.param_grads) return;
  write_partials(grads, args, blockIdx.y, begin, extent.cols, group);
}

// grad_weight (blockIdx.y 0) and grad_bias (1): the sum over row_blocks of partials. A thread takes M columns (as many
// as 16 bytes hold, where those of a partial begin at a multiple of 16), the WARPS of a block every so many-th partial.
// All that a thread has to read of up to 64 partials is on its way at once, and little is done where they are fewer:
// of small problems this kernel is a good part. So few that a thread can have them all on their way are left to one
// warp.
constexpr int kFoldWarps = 8, kFoldAhead = 8;

template <class A, class P, int M, int WARPS>
__global__ void __launch_bounds__(32 * WARPS) fold_partials(const BackwardArgs args) {
  constexpr int kColumns = 32 * M;  // of a block
  __shared__ __align__(16) A shared[WARPS * kColumns];
  struct __align__(M * sizeof(A)) Columns {
    A value[M];
  };
  const BackwardParams& p = args.p;
  P* out = static_cast<P*>(blockIdx.y == 0 ? p.grad_weight : p.grad_bias);
  if (!out) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = int64_t(blockIdx.x) * kColumns, column = first + lane * M;
  const int row_blocks = static_cast<int>(args.row_blocks);
  Columns sum = {};
  if (column < p.cols) {
    const A* from = static_cast<const A*>(args.partials) + (blockIdx.y * args.row_blocks + warp) * p.cols + column;
    const int64_t step = WARPS * p.cols;
    for (int i = warp; i < row_blocks; i += WARPS * kFoldAhead) {
      Columns part[kFoldAhead] = {};
#pragma unroll
      for (int k = 0; k < kFoldAhead; ++k, from += step) {
        if (i + k * WARPS >= row_blocks) break;
        part[k] = *reinterpret_cast<const Columns*>(from);
      }
#pragma unroll
      for (int k = 0; k < kFoldAhead; ++k)
#pragma unroll
        for (int m = 0; m < M; ++m) sum.value[m] += part[k].value[m];
    }
  }
  reinterpret_cast<Columns*>(shared)[warp * 32 + lane] = sum;
  __syncthreads();
#pragma unroll
  for (int c = threadIdx.x; c < kColumns; c += 32 * WARPS) {
    if (first + c >= p.cols) break;
    A part[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < WARPS; ++k) part[k % 4] += shared[k * kColumns + c];
    out[first + c] = narrow<P>((part[0] + part[1]) + (part[2] + part[3]));
  }
}

}  // namespace lnc
