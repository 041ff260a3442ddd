// Forward. A row that fits the registers of one group of threads is read once (forward_rows). A longer one is cut into
// slices, whose moments are taken one by one and merged. Where rows are many, a block or a cluster of blocks keeps the
// row in shared memory meanwhile (forward_staged); where they are few, or longer still, one launch leaves the moments
// in the workspace and the next one normalises (forward_slice_moments, forward_slices), so that a single row can fill
// the device. Which of the two it is changes no bit.
#pragma once
#include "cluster.cuh"
#include "group.cuh"
#include "pack.cuh"
#include "params.h"
#include "plan.h"

namespace lnc {

struct ForwardArgs {
  ForwardParams p;
  bool even;          // every thread of a group has the same number of elements
  bool plain;         // there are weight and bias (weight alone for rms), as narrow as the data, and so is the output
  bool plain_weight;  // the same without a bias
  bool output_aligned;
  bool wide_params, wide_output;  // stored in the accumulation type while the data are narrower
  double inverse_cols;
  int64_t slice_cols, slices;
  int cluster;      // blocks that share a row
  uint64_t* board;  // where they are a team
};

// What a slice leaves behind; the deviation keeps its range where the squares do not.
template <class A>
struct SliceMoments {
  A mean;       // from the row's pivot
  A deviation;  // sqrt(sum of squared deviations / n)
};

template <int SIZE>
constexpr int kForwardThreads = SIZE == kWarps      ? 512
                                : SIZE == kTeam     ? kTeamThreads
                                : kWithinWarp<SIZE> ? 128
                                                    : SIZE;
// Whether a persistent grid walks the rows, the next one on its way while this one is reduced and written: where a warp
// has rows of its own and registers suffice for two, or where a team has them. Others have one row a group.
template <class T, int SIZE, bool WHOLE>
constexpr bool kForwardAhead = WHOLE && (kWithinWarp<SIZE> || SIZE == kTeam) && sizeof(T) < 8;
// Blocks that a multiprocessor holds at least: as many as the plan gives it, or where a row has a block and that spills
// nothing, what leaves 64 registers a thread, so that rows enough are on their way.
template <class T, int SIZE, int VECS, bool WHOLE>
constexpr int kForwardBlocks =
    SIZE == kTeam                               ? kTeamBlocks
    : kForwardAhead<T, SIZE, WHOLE>             ? forward_threads(SIZE, VECS, kPack<T>) / kForwardThreads<SIZE>
    : WHOLE && SIZE == kWarps && sizeof(T) == 4 ? 2
    : WHOLE && SIZE == 64                       ? at_most(kMostBlocks, sizeof(T) == 2 ? 20 : 12)
                                                : 1;

// Packs of weight and bias that are on their way ahead of the one in use.
template <int VECS, bool PLAIN>
constexpr int kParamsAhead = PLAIN ? (VECS < 2 ? VECS : 2) : 0;
// Of a row whose threads have few packs each they leave with the row itself: asked for when its sums are known, they
// would wait behind the rows that other blocks have begun to read.
template <int SIZE, int VECS, bool WHOLE>
constexpr bool kParamsWithRow = WHOLE && (SIZE == 64 || (SIZE == kWarps && VECS <= 2));

// The packs of a row, or of a stretch of it from column begin on, and the row's first element, its pivot (none for
// rms), with the residual added; writes the sum if asked to. All as they lie in memory: a conversion would wait for
// them.
template <class T, Norm norm, int VECS, class E, class G>
__device__ inline void fetch(Raw<T> (&raw)[VECS], T& pivot, const ForwardArgs& args, int64_t row, int64_t begin,
                             const E& extent, bool write_sum, G group) {
  constexpr int N = kPack<T>;
  const ForwardParams& p = args.p;
  const bool layer = is_layer<norm>(p);
  const T* const input = static_cast<const T*>(p.input) + row_offset(p.input_rows, row);
  load_row(raw, input + begin, extent, group);
  if (p.residual) {
    forget(group.rank);
    const T* const residual = static_cast<const T*>(p.residual) + row_offset(p.residual_rows, row);
    Raw<T> more[VECS];
    load_row(more, residual + begin, extent, group);
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      Accumulate<T> a[N], b[N];
      unpack<T>(raw[v], a);
      unpack<T>(more[v], b);
#pragma unroll
      for (int e = 0; e < N; ++e) a[e] += b[e];
      raw[v] = pack<T>(a);
    }
    if (write_sum) store_row(static_cast<T*>(p.sum) + row * p.cols + begin, raw, extent, group);
  }
  pivot = layer ? *input : T{};
  if (layer && p.residual)
    pivot = narrow<T>(widen(pivot) + widen(static_cast<const T*>(p.residual)[row_offset(p.residual_rows, row)]));
}

// A thread's part of a row (or of a slice of it) as deviations from the row's pivot.
template <class T, Norm norm, int VECS, class E>
struct RowPart {
  using A = Accumulate<T>;
  static constexpr int N = kPack<T>;
  A d[VECS][N];
  const E& extent;

  __device__ explicit RowPart(const E& extent) : extent(extent) {}

  __device__ void take(const Raw<T> (&raw)[VECS], T pivot) {
    const A first = widen(pivot);
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      unpack<T>(raw[v], d[v]);
      if (norm != Norm::rms) {
#pragma unroll
        for (int e = 0; e < N; ++e) d[v][e] -= first;
      }
    }
  }

  // The sum of f(d) over the elements that exist, in four chains.
  template <class G, class F>
  __device__ A sum(const G& group, F f) const {
    A part[4] = {0, 0, 0, 0};
#pragma unroll
    for (int v = 0; v < VECS; ++v) extent.each(v, group, [&](int e) { f(part[e % 4], d[v][e]); });
    return N == 2 ? part[0] + part[1] : (part[0] + part[1]) + (part[2] + part[3]);
  }

  // Of all the group's parts: mean from the pivot (0 for rms) and sum of squared deviations from it.
  template <class G>
  __device__ Moments<A> moments(const ForwardParams& p, bool even, A inverse_cols, G& group) const {
    if (!is_layer<norm>(p)) return {A(0), A(0), squares(A(0), A(1), group)};
    if constexpr (kNarrow<T>) return moments_of_narrow(inverse_cols, group);
    constexpr int kAll = VECS * N;
    const A n = even ? A(kAll) : A(extent.template count<VECS>(group));
    const A inverse = even ? A(1) / A(kAll) : n > A(0) ? divide(A(1), n) : A(0);
    const A total = sum(group, [](A& total, A x) { total += x; });
    const A mean = total * inverse;
    const A m2 = sum(group, [&](A& total, A x) { total = multiply_add(x - mean, x - mean, total); });
    return even ? group.template merge_equal<kAll>(total, m2, inverse_cols) : group.merge(Moments<A>{n, mean, m2});
  }

  // The group's sum of squared deviations from mean with everything scaled by a power of two.
  template <class G>
  __device__ A squares(A mean, A scale, G& group) const {
    A total[1] = {sum(group, [&](A& total, A x) {
      const A t = (x - mean) * scale;
      total = multiply_add(t, t, total);
    })};
    group.sum(total);
    return total[0];
  }

 private:
  // Sum and squares from the pivot in one look and one exchange, the squares corrected by the mean's distance from it
  // where that costs at most four of the 24 bits that they are summed in, of which 16-bit data have 11 or 8 themselves.
  template <class G>
  __device__ Moments<A> moments_of_narrow(A inverse_cols, G& group) const {
    A sums[2];
    sums[0] = sum(group, [](A& total, A x) { total += x; });
    sums[1] = sum(group, [](A& total, A x) { total = multiply_add(x, x, total); });
    group.sum(sums);
    const A mean = sums[0] * inverse_cols, m2 = multiply_add(-mean, sums[0], sums[1]);
    return {A(0), mean, m2 >= A(0.0625) * sums[1] ? m2 : squares(mean, A(1), group)};
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

// 1 / sqrt(m2 / cols + eps), 0 for a row without either. Where that leaves the range, again from scaled_m2(scale), the
// squares of scaled deviations.
template <class A, class F>
__device__ inline A rstd_of(A m2, A inverse_cols, A eps, F scaled_m2) {
  const A variance = m2 * inverse_cols + eps;
  if (in_range(variance)) return inverse_sqrt(variance);
  const A scale = rescue_scale(variance);
  const A v = scaled_m2(scale) * inverse_cols + eps * scale * scale;
  return v == A(0) ? A(0) : scale * inverse_sqrt(v);
}

// Weight and bias of a thread's columns, EARLY packs of each ahead.
template <class T, int VECS, int EARLY, bool KEEP = false>
struct Affine {
  Param<T, VECS, EARLY, KEEP> weight, bias;
  __device__ Affine(const ForwardArgs& args, int64_t begin)
      : weight(args.p.weight, begin, args.wide_params), bias(args.p.bias, begin, args.wide_params) {}
  template <bool PLAIN, bool BIAS, class E, class G>
  __device__ void load(const E& extent, const G& group) {
    weight.template load<PLAIN>(extent, group);
    if (BIAS) bias.template load<PLAIN>(extent, group);
  }
};

// y = xhat * weight + bias, written to the output. Leaves nothing of d. PLAIN promises what args.plain says, and that
// there is a bias where BIAS. LOADED: weight and bias are on their way already.
template <bool PLAIN, bool BIAS, bool LOADED, class T, Norm norm, int VECS, int EARLY, bool KEEP, class E, class G>
__device__ inline void write_output(RowPart<T, norm, VECS, E>& x, Affine<T, VECS, EARLY, KEEP>& affine,
                                    Accumulate<T> shift, Accumulate<T> rstd, const ForwardArgs& args, int64_t row,
                                    int64_t begin, const G& group) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  const ForwardParams& p = args.p;
  const E& extent = x.extent;
  const bool wide_output = !PLAIN && kNarrow<T> && args.wide_output;
  const A centre = -shift * rstd;
  const int64_t offset = row * p.cols + begin;
  if (!LOADED) affine.template load<PLAIN, BIAS>(extent, group);
  Raw<T> raw[VECS];
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    if (E::kWhole && !extent.has(v, group)) continue;
    A w[N], b[N] = {};
    affine.weight.template values<PLAIN>(v, w, A(1), extent, group);
    if (BIAS) affine.bias.template values<PLAIN>(v, b, A(0), extent, group);
#pragma unroll
    for (int e = 0; e < N; ++e) x.d[v][e] = multiply_add(multiply_add(x.d[v][e], rstd, centre), w[e], b[e]);
    if (wide_output)
      store_wide<T>(static_cast<A*>(p.output) + offset, x.d[v], v * group.size + group.rank, extent.end(),
                    E::kWhole || args.output_aligned);
    else if (E::kWhole)
      thread_packs(static_cast<T*>(p.output) + offset, group)[v * group.size] = pack<T>(x.d[v]);
    else
      raw[v] = pack<T>(x.d[v]);
  }
  if (!E::kWhole && !wide_output) store_row(static_cast<T*>(p.output) + offset, raw, extent, group);
}

template <bool PLAIN, bool BIAS, class T, Norm norm, int VECS, class E, class G>
__device__ inline void load_and_write(RowPart<T, norm, VECS, E>& x, Accumulate<T> shift, Accumulate<T> rstd,
                                      const ForwardArgs& args, int64_t row, int64_t begin, const G& group) {
  Affine<T, VECS, kParamsAhead<VECS, PLAIN>> affine(args, begin);
  write_output<PLAIN, BIAS, false>(x, affine, shift, rstd, args, row, begin, group);
}

// loaded: weight and bias where they are on their way, if args.plain; or null.
template <class T, Norm norm, int VECS, class E, class G, class F = Affine<T, VECS, VECS>>
__device__ inline void finish_row(RowPart<T, norm, VECS, E>& x, Accumulate<T> shift, Accumulate<T> rstd,
                                  const ForwardArgs& args, int64_t row, int64_t begin, const G& group,
                                  F* loaded = nullptr) {
  constexpr bool kPlain = E::kWhole, kBias = norm != Norm::rms;
  // Rows in blocks gain nothing from a path of their own for a weight alone.
  constexpr bool kWeightAlone = kPlain && kBias && G::kInWarp;
  if (kPlain && args.plain) {
    if (loaded)
      write_output<kPlain, kBias, true>(x, *loaded, shift, rstd, args, row, begin, group);
    else
      load_and_write<kPlain, kBias>(x, shift, rstd, args, row, begin, group);
  } else if (kWeightAlone && args.plain_weight) {
    load_and_write<kWeightAlone, false>(x, shift, rstd, args, row, begin, group);
  } else {
    load_and_write<false, true>(x, shift, rstd, args, row, begin, group);
  }
}

template <Norm norm, class A>
__device__ inline void save_stats(const ForwardParams& p, int64_t row, A shift, A rstd) {
  A* stats = static_cast<A*>(p.stats);
  if (!stats) return;
  if (is_layer<norm>(p)) stats[row] = shift;
  stats[(is_layer<norm>(p) ? p.rows : 0) + row] = rstd;
}

// A row a group, the row in the group's registers.
template <class T, Norm norm, int SIZE, int VECS, bool WHOLE>
__global__ void __launch_bounds__(kForwardThreads<SIZE>, kForwardBlocks<T, SIZE, VECS, WHOLE>)
    forward_rows(const ForwardArgs args) {
  using A = Accumulate<T>;
  __shared__ GroupScratch<A> scratch;
  auto group = [&] {
    if constexpr (SIZE == kTeam)
      return Group<A, SIZE, true>(args.board, args.cluster);
    else
      return Group<A, SIZE, !kWithinWarp<SIZE>>(&scratch);
  }();
  const int blocks = SIZE == kTeam ? args.cluster : 1;  // to a row
  const ForwardParams& p = args.p;
  const Extent<T, WHOLE, kSurePacks<VECS, WHOLE>> extent{static_cast<int>(p.cols)};
  constexpr bool kAhead = kForwardAhead<T, SIZE, WHOLE>;
  using Row = std::conditional_t<SIZE == kTeam, int, int64_t>;  // of so many columns there are no more in any memory
  const Row stride = Row(gridDim.x / blocks) * group.count();
  Row row = Row(blockIdx.x / blocks) * group.count() + group.index;
  constexpr bool kWithRow = kParamsWithRow<SIZE, VECS, WHOLE>;
  // A team's blocks keep weight and bias of their columns for all the rows they walk, as far as registers go.
  constexpr bool kKeep = SIZE == kTeam;
  Affine<T, VECS, kKeep && VECS == 8 ? 7 : VECS, kKeep> affine(args, 0);
  Raw<T> raw[VECS];
  T pivot{};
  auto load = [&](Row r) {
    fetch<T, norm>(raw, pivot, args, r, 0, extent, true, group);
    if (kWithRow && args.plain) affine.template load<kWithRow, norm != Norm::rms>(extent, group);
  };
  if (kAhead && row < Row(p.rows)) load(row);
  if (kKeep && args.plain) affine.template load<kKeep, norm != Norm::rms>(extent, group);
  for (; row < Row(p.rows); row += stride) {
    if (!kAhead) load(row);
    if (!kWithinWarp<SIZE>) forget(group.rank);
    RowPart<T, norm, VECS, decltype(extent)> x(extent);
    x.take(raw, pivot);
    if (kAhead && row + stride < Row(p.rows)) load(row + stride);

    const A inverse_cols = A(args.inverse_cols), eps = A(p.eps);
    const Moments<A> m = x.moments(p, args.even, inverse_cols, group);
    const A rstd = rstd_of(m.m2, inverse_cols, eps, [&](A scale) { return x.squares(m.mean, scale, group); });
    if (!kWithinWarp<SIZE>) forget(group.rank);
    if (group.rank == 0) save_stats<norm>(p, row, m.mean, rstd);
    finish_row(x, m.mean, rstd, args, row, 0, group, kWithRow || kKeep ? &affine : nullptr);
    if (!kAhead && !kKeep) break;
  }
}

// ---- rows in slices ---------------------------------------------------------------------------------------------

// Where slice number i of a row begins and ends.
struct Slice {
  int64_t begin;
  int cols;
  __device__ Slice(const ForwardArgs& args, int64_t i) : begin(i * args.slice_cols), cols(slice_cols(args, begin)) {}
};

template <class T, Norm norm, int VECS, class E, class G>
__device__ inline SliceMoments<Accumulate<T>> slice_moments(const ForwardParams& p, const RowPart<T, norm, VECS, E>& x,
                                                            G& group) {
  using A = Accumulate<T>;
  const int cols = x.extent.cols;
  const A inverse = A(1) / A(cols);
  const Moments<A> m = x.moments(p, cols == VECS * kPack<T> * group.size, inverse, group);
  A variance = m.m2 * inverse, scale = A(1);
  if (!in_range(variance)) {
    scale = rescue_scale(variance);
    variance = x.squares(m.mean, scale, group) * inverse;
  }
  return {m.mean, sqrt(variance) / scale};
}

// The row's shift and rstd from its slices' moments, the same in every thread and every block that asks.
template <class A, class G>
__device__ inline void merge_slices(const SliceMoments<A>* slices, const ForwardArgs& args, A& shift, A& rstd,
                                    G& group) {
  const ForwardParams& p = args.p;
  auto merged = [&](A scale) {
    Moments<A> m = {0, 0, 0};
    for (int64_t i = group.rank; i < args.slices; i += group.size) {
      const A n = A(Slice(args, i).cols);
      const A deviation = slices[i].deviation * scale;
      m = merge(m, Moments<A>{n, slices[i].mean * scale, n * deviation * deviation});
    }
    return group.merge(m);
  };
  const Moments<A> m = merged(A(1));
  shift = m.mean;
  rstd = rstd_of(m.m2, A(args.inverse_cols), A(p.eps), [&](A scale) { return merged(scale).m2; });
}

// Moments of slice blockIdx.x of row blockIdx.y + k * gridDim.y.
template <class T, Norm norm, int VECS, bool WHOLE>
__global__ void __launch_bounds__(512, 1) forward_slice_moments(const ForwardArgs args) {
  using A = Accumulate<T>;
  __shared__ GroupScratch<A> scratch;
  Group<A, kWarps, true> group(&scratch);
  const Slice slice(args, blockIdx.x);
  const Extent<T, WHOLE, 0> extent{slice.cols};
  for (int64_t row = blockIdx.y; row < args.p.rows; row += gridDim.y) {
    Raw<T> raw[VECS];
    T pivot;
    fetch<T, norm>(raw, pivot, args, row, slice.begin, extent, true, group);
    RowPart<T, norm, VECS, decltype(extent)> x(extent);
    x.take(raw, pivot);
    const SliceMoments<A> m = slice_moments(args.p, x, group);
    if (group.rank == 0) static_cast<SliceMoments<A>*>(args.p.workspace)[row * args.slices + blockIdx.x] = m;
  }
}

template <class T, Norm norm, int VECS, bool WHOLE>
__global__ void __launch_bounds__(512, 1) forward_slices(const ForwardArgs args) {
  using A = Accumulate<T>;
  __shared__ GroupScratch<A> scratch;
  Group<A, kWarps, true> group(&scratch);
  const ForwardParams& p = args.p;
  const Slice slice(args, blockIdx.x);
  const Extent<T, WHOLE, 0> extent{slice.cols};
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    Raw<T> raw[VECS];
    T pivot;
    fetch<T, norm>(raw, pivot, args, row, slice.begin, extent, false, group);
    RowPart<T, norm, VECS, decltype(extent)> x(extent);
    x.take(raw, pivot);
    A shift, rstd;
    merge_slices(static_cast<const SliceMoments<A>*>(p.workspace) + row * args.slices, args, shift, rstd, group);
    if (group.rank == 0 && blockIdx.x == 0) save_stats<norm>(p, row, shift, rstd);
    if (!WHOLE) forget(group.rank);  // rows that begin anywhere are short of registers
    finish_row(x, shift, rstd, args, row, slice.begin, group);
  }
}

// What comes before the slices in the shared memory of forward_staged.
template <class A>
struct __align__(16) ForwardShared {
  GroupScratch<A> scratch;
  SliceMoments<A> moments[kMaxStagedSlices];
};
static_assert(sizeof(ForwardShared<double>) <= kReservedShared, "the plan leaves room for it");

// A row a cluster of args.cluster blocks (one is enough for what its shared memory holds), whose blocks take slices in
// turn. A thread finds in shared memory only what it has put there itself; only the moments are shared.
template <class T, Norm norm, int VECS, bool WHOLE>
__global__ void __launch_bounds__(512, 1) forward_staged(const ForwardArgs args) {
  using A = Accumulate<T>;
  using E = Extent<T, WHOLE, 0>;
  auto* const shared = dynamic_shared<ForwardShared<A>>();
  SliceMoments<A>* const moments = shared->moments;
  Raw<T>* const stage = reinterpret_cast<Raw<T>*>(shared + 1) + threadIdx.x;
  Group<A, kWarps, true> group(&shared->scratch);
  const ForwardParams& p = args.p;
  const Cluster cluster(args.cluster);
  const int64_t row = blockIdx.x / args.cluster;
  const int first = int(blockIdx.x % args.cluster), slices = int(args.slices);

  cluster.arrive();
  Raw<T>* kept = stage;
  T pivot;
  Raw<T> raw[VECS];
  Slice slice(args, first);
  fetch<T, norm>(raw, pivot, args, row, slice.begin, E{slice.cols}, true, group);
  cluster.wait();  // no block writes to another before that has begun
  for (int i = first; i < slices; i += args.cluster) {
    const E extent{slice.cols};
    RowPart<T, norm, VECS, E> x(extent);
    x.take(raw, pivot);
#pragma unroll
    for (int v = 0; v < VECS; ++v, kept += group.size) *kept = raw[v];
    if (i + args.cluster < slices) {  // on its way while this one is reduced
      slice = Slice(args, i + args.cluster);
      T same;
      fetch<T, norm>(raw, same, args, row, slice.begin, E{slice.cols}, true, group);
    }
    if (!WHOLE) forget(group.rank);
    const SliceMoments<A> m = slice_moments(args.p, x, group);
    if (group.rank < args.cluster) *cluster.map(&moments[i], group.rank) = m;
  }
  cluster.sync();
  A shift, rstd;
  merge_slices(moments, args, shift, rstd, group);
  if (group.rank == 0 && first == 0) save_stats<norm>(p, row, shift, rstd);

  kept = stage;
  if (!WHOLE) forget(group.rank);
  for (int i = first; i < slices; i += args.cluster) {
#pragma unroll
    for (int v = 0; v < VECS; ++v, kept += group.size) raw[v] = *kept;
    if (!WHOLE) forget(group.rank);
    const Slice here(args, i);
    const E extent{here.cols};
    RowPart<T, norm, VECS, E> x(extent);
    x.take(raw, pivot);
    finish_row(x, shift, rstd, args, row, here.begin, group);
  }
}

}  // namespace lnc
