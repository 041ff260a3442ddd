// Backward, for one instruction set (see kernels.h):
//   g = dy * weight,  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dw = sum of dy * xhat,  db = sum of dy
#pragma once
#include "rows.h"

namespace lnc::cpu::LNC_ISA {

template <class T, class O, Norm N>
class Backward {
  using A = typename Computed<T>::Scalar;
  using V = typename Computed<T>::Vector;
  static constexpr int64_t kChunk = chunk_columns(sizeof(A) == 8 ? DType::f64 : DType::f32);

  // Rows of 16-bit data, bound by arithmetic, need no pivot where zero is within so many standard deviations of the
  // mean.
  static constexpr bool kAboutZero = N == Norm::layer && !std::is_same_v<T, A>;
  static constexpr double kNear = 2;

  // dy is float32, and may be any NaN.
  static constexpr bool kAnyNan = std::is_same_v<T, bf16> && !std::is_same_v<T, O>;

  // What the columns of a row need to know of it.
  struct Row {
    const T* x;
    const O* dy;
    const T* grad_sum;
    T* dx;
    A pivot, rstd, offset, minus_mean_g, minus_mean_g_xhat;
  };
  struct Block {
    Row rows[BackwardPlan::kMaxBlock];
    int64_t first;
    int count;
    bool starts_chunk;
  };
  // Of a chunk of a row: sums of g and g * xhat, lane by lane.
  struct LaneSums {
    V g, g_xhat;
  };
  struct Gradients {
    A *weight, *bias;
  };

  const BackwardParams& p;
  const ParallelFor parallel;
  const BackwardPlan plan = BackwardPlan::of(p);
  const double inverse_count = 1.0 / static_cast<double>(p.cols);
  const A* const weight = parameter<T>(p, parallel, p.weight, 1, p.workspace);

 public:
  Backward(const BackwardParams& params, ParallelFor parallel_for) : p(params), parallel(parallel_for) {}

  void run() const {
    if (p.grad_input) will_write(p.grad_input, p.rows * p.cols * int64_t{sizeof(T)});
    if (plan.split_columns)
      for (int64_t chunk = 0; chunk < plan.row_chunks; chunk++) run_by_columns(chunk);
    else
      for_ranges(parallel, plan.row_chunks, grain_of(plan.rows_a_chunk * p.cols), [this](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; chunk++) run_by_rows(chunk);
        if (plan.reach == Reach::past) fence();
      });
    if ((p.grad_weight || p.grad_bias) && !plan.direct) fold();
  }

 private:
  void run_by_rows(int64_t chunk) const {
    for_blocks(chunk, [&](Block& block) {
      if (p.grad_input) set_means(block);
      apply(block, 0, p.cols, gradients(chunk));
    });
  }

  // The same chunks and merges as by rows, hence the same bits.
  void run_by_columns(int64_t chunk) const {
    constexpr int64_t tile = 64;
    auto* parts = reinterpret_cast<Sums*>(static_cast<char*>(p.workspace) + plan.parameters_bytes);
    for_blocks(chunk, [&](Block& block) {
      if (p.grad_input) {
        for_ranges(parallel, block.count * plan.chunks, grain_of(kChunk), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++) parts[i] = sums(block.rows[i / plan.chunks], i % plan.chunks);
        });
        for (int r = 0; r < block.count; r++)
          set_means(block.rows[r], pairwise(0, plan.chunks, [&](int64_t c) { return parts[r * plan.chunks + c]; }));
      }
      for_ranges(parallel, ceil_div(p.cols, tile), grain_of(tile * block.count), [&](int64_t begin, int64_t end) {
        apply(block, begin * tile, end * tile < p.cols ? end * tile : p.cols, gradients(chunk));
        if (plan.reach == Reach::past) fence();
      });
    });
  }

  // Calls body for each block of rows of a chunk.
  template <class Body>
  void for_blocks(int64_t chunk, const Body& body) const {
    const int64_t begin = chunk * plan.rows_a_chunk, stop = begin + plan.rows_a_chunk;
    const int64_t end = stop < p.rows ? stop : p.rows;
    Block block;
    for (block.first = begin; block.first < end; block.first += plan.block) {
      block.count = static_cast<int>(end - block.first < plan.block ? end - block.first : plan.block);
      block.starts_chunk = block.first == begin;
      for (int r = 0; r < block.count; r++) block.rows[r] = row_at(block.first + r);
      body(block);
    }
  }

  LNC_INLINE Row row_at(int64_t row) const {
    const A* stats = static_cast<const A*>(p.stats);
    Row r;
    r.x = row_of<T>(p.input, p.input_rows, row);
    r.dy = row_of<O>(p.grad_output, p.grad_output_rows, row);
    r.grad_sum = p.grad_sum ? row_of<T>(p.grad_sum, p.grad_sum_rows, row) : nullptr;
    r.dx = p.grad_input ? static_cast<T*>(p.grad_input) + row * p.cols : nullptr;
    // Of a single column nothing is left: not even rounding errors, times what 1 / sqrt(eps) is.
    r.rstd = N == Norm::rms ? stats[row] : p.cols == 1 ? A(0) : stats[p.rows + row];
    r.pivot = N == Norm::layer ? first_of(r.x) : A(0);
    r.offset = N == Norm::layer ? -stats[row] * r.rstd : A(0);
    r.minus_mean_g = r.minus_mean_g_xhat = 0;
    if constexpr (kAboutZero) {
      const double offset = -(double{r.pivot} + stats[row]) * r.rstd;
      const bool constant = stats[row] == 0;  // and xhat is exactly zero
      if (!constant && offset < kNear && offset > -kNear) r.pivot = 0, r.offset = static_cast<A>(offset);
    }
    return r;
  }

  // Rows of one chunk are added up over their lanes all together, or each would wait for its own chain of additions.
  void set_means(Block& block) const {
    if (plan.chunks > 1) {
      for (int r = 0; r < block.count; r++)
        set_means(block.rows[r], pairwise(0, plan.chunks, [&](int64_t c) { return sums(block.rows[r], c); }));
      return;
    }
    LaneSums lanes[BackwardPlan::kMaxBlock];
    for (int r = 0; r < block.count; r++) lanes[r] = lane_sums(block.rows[r], 0);
    for (int r = 0; r < block.count; r++) set_means(block.rows[r], sums(block.rows[r], lanes[r]));
  }

  LNC_INLINE void set_means(Row& r, const Sums& s) const {
    r.minus_mean_g = static_cast<A>(-s.g * inverse_count);
    r.minus_mean_g_xhat = static_cast<A>(-s.g_xhat * inverse_count);
  }

  template <bool Centred>
  static LNC_INLINE V normalised(V x, V pivot, V rstd, V offset) {
    return N == Norm::rms ? x * rstd : fma(Centred ? x - pivot : x, rstd, offset);
  }

  LNC_NOINLINE Sums sums(const Row& row, int64_t chunk) const { return sums(row, lane_sums(row, chunk)); }

  LNC_INLINE Sums sums(const Row& row, const LaneSums& lanes) const {
    const double g = sum(lanes.g), g_x = sum(lanes.g_xhat);
    return is_centred(row) ? Sums{g, g_x} : Sums{g, row.rstd * g_x + row.offset * g};
  }

  static bool is_centred(const Row& row) { return !kAboutZero || row.pivot != 0; }

  LNC_INLINE LaneSums lane_sums(const Row& row, int64_t chunk) const {
    if constexpr (kAboutZero)
      if (row.pivot == 0) return lane_sums<false>(row, chunk);
    return lane_sums<true>(row, chunk);
  }

  // About zero, x stands for xhat.
  template <bool Centred>
  LNC_INLINE LaneSums lane_sums(const Row& row, int64_t chunk) const {
    const int64_t start = chunk * kChunk, left = p.cols - start;
    const T* x = row.x + start;
    const O* dy = row.dy + start;
    const A* w = weight + start;
    const V pivot = set<V>(row.pivot), rstd = set<V>(row.rstd), offset = set<V>(row.offset);
    const T* const dx = row.dx + start;
    Accumulators<V> g_sums, g_xhat_sums;
    const auto add_up = [&](auto fetches) LNC_LAMBDA {
      sweep<V>(left < kChunk ? left : kChunk, [&](int64_t i, auto where, int u) LNC_LAMBDA {
        if (fetches && starts_line<T>(u)) prefetch(dx, i);
        V v = load<V>(x + i, where);
        if constexpr (Centred) v = normalised<true>(v, pivot, rstd, offset);
        const V g = keep(load<V>(dy + i, where) * get<V>(w + i, where), where);
        if constexpr (N == Norm::layer) g_sums.v[u] = g_sums.v[u] + g;
        g_xhat_sums.v[u] = fma(g, keep(v, where), g_xhat_sums.v[u]);
      });
    };
    plan.fetches_dx ? add_up(std::true_type{}) : add_up(std::false_type{});
    return {g_sums.folded(), g_xhat_sums.folded()};
  }

  // Columns [begin, end) of a block of rows: dx, and what the rows add to the weight and bias gradients.
  void apply(const Block& block, int64_t begin, int64_t end, const Gradients& to) const {
    if (p.grad_bias)
      p.grad_input ? apply<true, true, true>(block, begin, end, to) : apply<false, true, true>(block, begin, end, to);
    else if (p.grad_weight)
      p.grad_input ? apply<true, true, false>(block, begin, end, to) : apply<false, true, false>(block, begin, end, to);
    else
      apply<true, false, false>(block, begin, end, to);
  }

  template <bool Dx, bool Dw, bool Db>
  void apply(const Block& block, int64_t begin, int64_t end, const Gradients& to) const {
    if constexpr (Dx && kWritesPast)
      if (plan.reach == Reach::past) return apply<Dx, Dw, Db, Reach::past>(block, begin, end, to);
    if constexpr (Dx)
      if (plan.reach == Reach::cached) return apply<Dx, Dw, Db, Reach::cached>(block, begin, end, to);
    apply<Dx, Dw, Db, Reach::fetched>(block, begin, end, to);
  }

  // Two rows at a time halve the traffic of the sums, which stay in the first-level cache for a tile of columns, long
  // enough for the processor's own prefetching.
  template <bool Dx, bool Dw, bool Db, Reach From>
  void apply(const Block& block, int64_t begin, int64_t end, const Gradients& to) const {
    constexpr int64_t tile = 2048;
    for (; begin < end; begin += tile) {
      const int64_t n = end - begin < tile ? end - begin : tile;
      if (block.starts_chunk)
        sweep<V>(n, [&](int64_t i, auto where, int) LNC_LAMBDA {
          if constexpr (Dw) put(to.weight + begin + i, set<V>(0), where);
          if constexpr (Db) put(to.bias + begin + i, set<V>(0), where);
        });
      int r = 0;
      for (; r + 2 <= block.count; r += 2) {
        if constexpr (kAboutZero)
          if (block.rows[r].pivot == 0 && block.rows[r + 1].pivot == 0) {
            columns<2, false, Dx, Dw, Db, From>(block.rows + r, begin, n, to);
            continue;
          }
        columns<2, true, Dx, Dw, Db, From>(block.rows + r, begin, n, to);
      }
      if (r < block.count) last_row<Dx, Dw, Db>(block.rows + r, begin, n, to);
    }
  }

  // Of an odd number: too few to compile for every reach.
  template <bool Dx, bool Dw, bool Db>
  LNC_NOINLINE void last_row(const Row* row, int64_t begin, int64_t n, const Gradients& to) const {
    columns<1, true, Dx, Dw, Db, Reach::cached>(row, begin, n, to);
  }

  template <int R, bool Centred, bool Dx, bool Dw, bool Db, Reach From>
  LNC_INLINE void columns(const Row* block_rows, int64_t begin, int64_t n, const Gradients& to) const {
    Row row[R];
    V pivot[R], rstd[R], offset[R], minus_mean_g[R], minus_mean_g_xhat[R];
    unrolled<R>([&](int r) LNC_LAMBDA {
      row[r] = block_rows[r];
      pivot[r] = set<V>(row[r].pivot), rstd[r] = set<V>(row[r].rstd), offset[r] = set<V>(row[r].offset);
      minus_mean_g[r] = set<V>(row[r].minus_mean_g), minus_mean_g_xhat[r] = set<V>(row[r].minus_mean_g_xhat);
    });
    const A* const w = weight;
    const int64_t ahead = plan.split_columns ? 0 : plan.block * p.cols;  // the next block, where rows are adjacent
    const bool adds = p.grad_sum;
    A *const weight_sums = to.weight, *const bias_sums = to.bias;
    const auto step = [&](int64_t j, auto where, int u, const auto& put_dx) LNC_LAMBDA {
      V dw, db, shared_w;
      if constexpr (Dx && kHolds) shared_w = hold(get<V>(w + j, where));
      if constexpr (Dw) dw = get<V>(weight_sums + j, where);
      if constexpr (Db) db = get<V>(bias_sums + j, where);
      unrolled<R>([&](int r) LNC_LAMBDA {
        if constexpr (From != Reach::cached) {
          if (starts_line<T>(u)) prefetch(row[r].x, j + ahead);
          if (starts_line<O>(u)) prefetch(row[r].dy, j + ahead);
        }
        const V xhat = normalised<Centred>(load<V>(row[r].x + j, where), pivot[r], rstd[r], offset[r]);
        const V dy = hold(load<V>(row[r].dy + j, where));
        if constexpr (Dw) dw = fma(dy, xhat, dw);
        if constexpr (Db) db = db + dy;
        if constexpr (Dx) {
          const V g = fma(dy, kHolds ? shared_w : get<V>(w + j, where), minus_mean_g[r]);
          const V projected = fma(minus_mean_g_xhat[r], xhat, g);
          V dx = rstd[r] * projected;
          if (LNC_UNLIKELY(adds)) dx = fma(rstd[r], projected, load<V>(row[r].grad_sum + j, where));
          if constexpr (kAnyNan) dx = clear_nan(dx);
          put_dx(r, dx);
        }
      });
      if constexpr (Dw) put(weight_sums + j, dw, where);
      if constexpr (Db) put(bias_sums + j, db, where);
    };
    constexpr int lanes = kLanes<V>, vectors = kLine<T> / lanes;  // of a cache line
    if constexpr (From == Reach::past) {
      // A row's whole lines: of rows that take turns within one, the processor would write out unfinished ones.
      using Stored = decltype(stored(row[0].x, V{}));
      for (int64_t j = begin; j < begin + n; j += kLine<T>) {
        Stored line[R][vectors];
        unrolled<vectors>([&](int u) LNC_LAMBDA {
          step(j + u * lanes, Full{}, u, [&](int r, V dx) LNC_LAMBDA { line[r][u] = stored(row[0].x, dx); });
        });
        unrolled<R>([&](int r) LNC_LAMBDA {
          unrolled<vectors>([&](int u) LNC_LAMBDA { write_past(row[r].dx + j + u * lanes, line[r][u]); });
        });
      }
    } else {
      sweep<V, clamp(vectors, 2, 4)>(n, [&](int64_t i, auto where, int u) LNC_LAMBDA {
        step(begin + i, where, u, [&](int r, V dx) LNC_LAMBDA { store(row[r].dx + begin + i, dx, where); });
      });
    }
  }

  // Where a chunk of rows leaves its sums: [row_chunks, 2, padded cols] of the workspace, or at once the result.
  Gradients gradients(int64_t chunk) const {
    A* const sums = partials() + chunk * 2 * padded(p.cols);
    Gradients to{sums, sums + padded(p.cols)};
    if (plan.direct && p.grad_weight) to.weight = static_cast<A*>(p.grad_weight);
    if (plan.direct && p.grad_bias) to.bias = static_cast<A*>(p.grad_bias);
    return to;
  }

  A* partials() const {
    return reinterpret_cast<A*>(static_cast<char*>(p.workspace) + plan.parameters_bytes + plan.sums_bytes);
  }

  void fold() const {
    if (p.grad_weight) fold(p.grad_weight, partials());
    if (p.grad_bias) fold(p.grad_bias, partials() + padded(p.cols));
  }

  // Adds pairs of chunks, then pairs of pairs, in place; then rounds once.
  void fold(void* result, A* sums) const {
    constexpr int64_t tile = 512;
    const int64_t stride = 2 * padded(p.cols);
    for_ranges(parallel, ceil_div(p.cols, tile), grain_of(tile * plan.row_chunks), [&](int64_t begin, int64_t end) {
      for (int64_t start = begin * tile; start < end * tile && start < p.cols; start += tile) {
        const int64_t n = p.cols - start < tile ? p.cols - start : tile;
        for (int64_t step = 1; step < plan.row_chunks; step *= 2)
          for (int64_t chunk = 0; chunk + step < plan.row_chunks; chunk += 2 * step) {
            A* const to = sums + chunk * stride + start;
            const A* const from = to + step * stride;
            sweep<V>(n, [=](int64_t i, auto where, int)
                            LNC_LAMBDA { put(to + i, get<V>(to + i, where) + get<V>(from + i, where), where); });
          }
        sweep<V>(n, [&](int64_t i, auto where, int) LNC_LAMBDA {
          const int64_t j = start + i;
          const V total = get<V>(sums + j, where);
          if (p.param_dtype == p.dtype)
            store(static_cast<T*>(result) + j, total, where);
          else
            store(static_cast<A*>(result) + j, total, where);
        });
      }
    });
  }
};

}  // namespace lnc::cpu::LNC_ISA
