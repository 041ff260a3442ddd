// Forward. A row that fits the registers of one group of threads is read once (forward_rows); a longer one is cut
// into slices, whose moments one launch leaves in the workspace and whose values the next one normalises
// (forward_slice_moments, forward_slices): so a single row can fill the device.
#pragma once
#include "group.cuh"
#include "pack.cuh"
#include "params.h"

namespace lnc {

struct ForwardArgs {
  ForwardParams p;
  int threads_per_row;
  bool even;  // every thread of a group has the same number of elements
  bool input_aligned, residual_aligned, sum_aligned, output_aligned;
  bool wide_params, wide_output;  // stored in the accumulation type while the data are narrower
  double inverse_cols;
  int64_t slice_cols, slices;
};

// What a slice leaves behind; the deviation keeps its range where the squares do not.
template <class A>
struct SliceMoments {
  A mean;       // from the row's pivot
  A deviation;  // sqrt(sum of squared deviations / n)
};

// A thread's part of a row (or of a slice of it) as deviations from the row's pivot.
template <class T, Norm norm, int SIZE, int VECS>
struct RowPart {
  using A = Accumulate<T>;
  static constexpr int N = kPack<T>;
  A d[VECS][N];
  A pivot;

  // cols elements from column begin on; adds the residual and writes the sum where there is one.
  template <class G>
  __device__ void load(const ForwardArgs& args, int64_t row, int64_t begin, int cols, bool write_sum, const G& group) {
    const ForwardParams& p = args.p;
    const T* first = static_cast<const T*>(p.input) + row_offset(p.input_rows, row);
    uint4 raw[VECS];
    load_row(raw, first + begin, cols, args.input_aligned, group);
    pivot = norm == Norm::layer ? A(widen(*first)) : A(0);
    if (p.residual) {
      const T* other = static_cast<const T*>(p.residual) + row_offset(p.residual_rows, row);
      uint4 more[VECS];
      load_row(more, other + begin, cols, args.residual_aligned, group);
      if (norm == Norm::layer) pivot = widen(narrow<T>(pivot + widen(*other)));
#pragma unroll
      for (int v = 0; v < VECS; ++v) {
        A a[N], b[N];
        unpack<T>(raw[v], a);
        unpack<T>(more[v], b);
#pragma unroll
        for (int e = 0; e < N; ++e) a[e] += b[e];
        raw[v] = pack<T>(a);
      }
      if (write_sum) store_row(static_cast<T*>(p.sum) + row * p.cols + begin, raw, cols, args.sum_aligned, group);
    }
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      unpack<T>(raw[v], d[v]);
#pragma unroll
      for (int e = 0; e < N; ++e) d[v][e] -= pivot;
    }
  }

  // Calls f(value) for each element that lies before cols; only the pack across the end looks at every one.
  template <class G, class F>
  __device__ void each(int cols, const G& group, F f) const {
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      const int left = cols - (v * group.size + group.rank) * N;
      if (left >= N) {
#pragma unroll
        for (int e = 0; e < N; ++e) f(d[v][e]);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e)
          if (e < left) f(d[v][e]);
      }
    }
  }

  template <class G>
  __device__ int count(int cols, const G& group) const {
    int n = 0;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      const int left = cols - (v * group.size + group.rank) * N;
      n += left >= N ? N : left > 0 ? left : 0;
    }
    return n;
  }

  // Of all the group's parts: mean from the pivot (0 for rms) and sum of squared deviations from it.
  template <class G>
  __device__ Moments<A> moments(int cols, bool even, G& group) const {
    if constexpr (norm == Norm::rms) {
      A squares[1] = {0};
      each(cols, group, [&](A x) { squares[0] = multiply_add(x, x, squares[0]); });
      group.sum(squares);
      return {A(cols), A(0), squares[0]};
    } else {
      const A n = even ? A(VECS * N) : A(count(cols, group));
      A sum = 0;
      each(cols, group, [&](A x) { sum += x; });
      const A mean = n > A(0) ? sum * divide(A(1), n) : A(0);
      A m2 = 0;
      each(cols, group, [&](A x) { m2 = multiply_add(x - mean, x - mean, m2); });
      return group.merge(Moments<A>{n, mean, m2}, even);
    }
  }

  // The sum of squared deviations from mean with everything scaled by a power of two.
  template <class G>
  __device__ A scaled_squares(int cols, A mean, A scale, G& group) const {
    A squares[1] = {0};
    each(cols, group, [&](A x) {
      const A t = (x - mean) * scale;
      squares[0] = multiply_add(t, t, squares[0]);
    });
    group.sum(squares);
    return squares[0];
  }
};

template <class A>
__device__ inline bool in_range(A variance) {
  return variance > Range<A>::kSmallest && variance < Range<A>::kLargest;
}

template <class A>
__device__ inline A rescue_scale(A variance) {
  return variance < A(1) ? Range<A>::kUp : Range<A>::kDown;  // what overflowed is not below anything
}

// 1 / sqrt(variance + eps) from both scaled, 0 for a row without either.
template <class A>
__device__ inline A rescued_rstd(A scaled_variance, A eps, A scale) {
  const A v = scaled_variance + eps * scale * scale;
  return v == A(0) ? A(0) : scale * inverse_sqrt(v);
}

// Parameters wait in registers beside up to 4 packs of a row; beside more they come in two halves, since whole they
// would push it out.
template <int VECS>
constexpr int kParamPacks = VECS > 4 ? VECS / 2 : VECS;
template <class T, int VECS>
using ForwardParam = Params<T, kParamPacks<VECS>, true>;

// y = xhat * weight + bias, written to the output. Leaves nothing of d.
template <class T, Norm norm, int SIZE, int VECS, class G>
__device__ inline void finish_row(RowPart<T, norm, SIZE, VECS>& x, ForwardParam<T, VECS>& weight,
                                  ForwardParam<T, VECS>& bias, Accumulate<T> shift, Accumulate<T> rstd,
                                  const ForwardArgs& args, int64_t row, int64_t begin, int cols, bool write,
                                  const G& group) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  const ForwardParams& p = args.p;
  const A centre = -shift * rstd;
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    constexpr int kept = kParamPacks<VECS>;
    if (v > 0 && v % kept == 0) weight.load(group, v), bias.load(group, v);
    A w[N], b[N];
    weight.values(v % kept, w, A(1), group);
    bias.values(v % kept, b, A(0), group);
#pragma unroll
    for (int e = 0; e < N; ++e) x.d[v][e] = multiply_add(multiply_add(x.d[v][e], rstd, centre), w[e], b[e]);
  }
  if (!write) return;
  const int64_t offset = row * p.cols + begin;
  if (args.wide_output) {
#pragma unroll
    for (int v = 0; v < VECS; ++v)
      store_wide<T>(static_cast<A*>(p.output) + offset, x.d[v], v * group.size + group.rank, cols, args.output_aligned);
  } else {
    uint4 raw[VECS];
#pragma unroll
    for (int v = 0; v < VECS; ++v) raw[v] = pack<T>(x.d[v]);
    store_row(static_cast<T*>(p.output) + offset, raw, cols, args.output_aligned, group);
  }
}

template <Norm norm, class A>
__device__ inline void save_stats(const ForwardParams& p, int64_t row, A shift, A rstd) {
  A* stats = static_cast<A*>(p.stats);
  if (!stats) return;
  if (norm == Norm::layer) stats[row] = shift;
  stats[(norm == Norm::layer ? p.rows : 0) + row] = rstd;
}

// A row a group, the row in the group's registers.
template <class T, Norm norm, int SIZE, int VECS>
__global__ void __launch_bounds__(SIZE == kWarps ? 512 : 128) forward_rows(const ForwardArgs args) {
  using A = Accumulate<T>;
  __shared__ GroupScratch<A> scratch;
  Group<A, SIZE> group(args.threads_per_row, &scratch);
  const ForwardParams& p = args.p;
  const int64_t mine = int64_t(blockIdx.x) * group.count() + group.index;
  const bool active = mine < p.rows;  // a group without a row repeats the last one and writes nothing
  const int64_t row = active ? mine : p.rows - 1;
  const int cols = static_cast<int>(p.cols);

  RowPart<T, norm, SIZE, VECS> x;
  x.load(args, row, 0, cols, active, group);
  ForwardParam<T, VECS> weight(p.weight, 0, cols, args.wide_params);
  weight.load(group);
  ForwardParam<T, VECS> bias(p.bias, 0, cols, args.wide_params);
  bias.load(group);

  const Moments<A> m = x.moments(cols, args.even, group);
  const A inverse_cols = A(args.inverse_cols), eps = A(p.eps);
  const A variance = m.m2 * inverse_cols + eps;
  A rstd;
  if (in_range(variance)) {
    rstd = inverse_sqrt(variance);
  } else {
    const A scale = rescue_scale(variance);
    rstd = rescued_rstd(x.scaled_squares(cols, m.mean, scale, group) * inverse_cols, eps, scale);
  }
  if (group.rank == 0 && active) save_stats<norm>(p, row, m.mean, rstd);
  finish_row(x, weight, bias, m.mean, rstd, args, row, 0, cols, active, group);
}

// Moments of slice blockIdx.x of row blockIdx.y + k * gridDim.y.
template <class T, Norm norm, int VECS>
__global__ void __launch_bounds__(512) forward_slice_moments(const ForwardArgs args) {
  using A = Accumulate<T>;
  __shared__ GroupScratch<A> scratch;
  Group<A, kWarps> group(blockDim.x, &scratch);
  const ForwardParams& p = args.p;
  const int64_t begin = blockIdx.x * args.slice_cols;
  const int cols = static_cast<int>(p.cols - begin < args.slice_cols ? p.cols - begin : args.slice_cols);
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    RowPart<T, norm, kWarps, VECS> x;
    x.load(args, row, begin, cols, true, group);
    const Moments<A> m = x.moments(cols, cols == VECS * kPack<T> * int(blockDim.x), group);
    A variance = m.m2 / A(cols), scale = A(1);
    if (!in_range(variance)) {
      scale = rescue_scale(variance);
      variance = x.scaled_squares(cols, m.mean, scale, group) / A(cols);
    }
    if (group.rank == 0)
      static_cast<SliceMoments<A>*>(p.workspace)[row * args.slices + blockIdx.x] = {m.mean, sqrt(variance) / scale};
  }
}

// The row's shift and rstd from its slices' moments, the same in every thread and every block that asks.
template <class T, Norm norm, class G>
__device__ inline void merge_slices(const ForwardArgs& args, int64_t row, Accumulate<T>& shift, Accumulate<T>& rstd,
                                    G& group) {
  using A = Accumulate<T>;
  const ForwardParams& p = args.p;
  const SliceMoments<A>* slices = static_cast<const SliceMoments<A>*>(p.workspace) + row * args.slices;
  auto merged = [&](A scale) {
    Moments<A> m = {0, 0, 0};
    for (int64_t i = group.rank; i < args.slices; i += group.size) {
      const int64_t left = p.cols - i * args.slice_cols;
      const A n = A(left < args.slice_cols ? left : args.slice_cols);
      const A deviation = slices[i].deviation * scale;
      m = merge(m, Moments<A>{n, slices[i].mean * scale, n * deviation * deviation});
    }
    return group.merge(m, false);
  };
  const Moments<A> m = merged(A(1));
  const A inverse_cols = A(args.inverse_cols), eps = A(p.eps);
  const A variance = m.m2 * inverse_cols + eps;
  shift = m.mean;
  if (in_range(variance)) {
    rstd = inverse_sqrt(variance);
  } else {
    const A scale = rescue_scale(variance);
    rstd = rescued_rstd(merged(scale).m2 * inverse_cols, eps, scale);
  }
}

template <class T, Norm norm, int VECS>
__global__ void __launch_bounds__(512) forward_slices(const ForwardArgs args) {
  using A = Accumulate<T>;
  __shared__ GroupScratch<A> scratch;
  Group<A, kWarps> group(blockDim.x, &scratch);
  const ForwardParams& p = args.p;
  const int64_t begin = blockIdx.x * args.slice_cols;
  const int cols = static_cast<int>(p.cols - begin < args.slice_cols ? p.cols - begin : args.slice_cols);
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    RowPart<T, norm, kWarps, VECS> x;
    x.load(args, row, begin, cols, false, group);
    ForwardParam<T, VECS> weight(p.weight, begin, cols, args.wide_params);
    weight.load(group);
    ForwardParam<T, VECS> bias(p.bias, begin, cols, args.wide_params);
    bias.load(group);
    A shift, rstd;
    merge_slices<T, norm>(args, row, shift, rstd, group);
    if (group.rank == 0 && blockIdx.x == 0) save_stats<norm>(p, row, shift, rstd);
    finish_row(x, weight, bias, shift, rstd, args, row, begin, cols, true, group);
  }
}

}  // namespace lnc
