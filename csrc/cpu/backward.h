// Backward, for one instruction set (see kernels.h):
//   g = dy * weight,  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dw = sum of dy * xhat,  db = sum of dy
#pragma once
#include "rows.h"

//   g = dy * w,  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  dw = sum over rows of dy * xhat,  db = of dy

namespace lnc::cpu::LNC_ISA {

template <class T, class P, class O, Norm N>
class Backward {
 public:
  Backward(const BackwardParams& params, ParallelFor parallel_for)
      : p(params), parallel(parallel_for), plan(BackwardPlan::of(params)) {}

  void run() const {
    if (p.weight)
      run(static_cast<const P*>(p.weight));
    else
      run(Ones{});
    if (p.grad_weight || p.grad_bias) fold();
  }

 private:
  using A = Accumulate<T>;
  using V = Vector<A>;
  static constexpr int64_t kChunk = chunk_columns(kAccumulateType<A>);
  static constexpr int kUnroll = 4;

  // What the columns of a row need to know of it.
  struct Row {
    const T* x;
    const O* dy;
    const T* grad_sum;
    T* dx;
    A pivot, rstd, offset, mean_g, mean_g_xhat;
  };
  struct Block {
    Row rows[kMaxBlock];
    int count;
  };

  // Where a chunk of rows leaves its sums: [row_chunks, 2, cols] of the workspace, or at once the result.
  struct Gradients {
    A *weight, *bias;
  };

  const BackwardParams& p;
  const ParallelFor parallel;
  const BackwardPlan plan;

  template <class Weight>
  void run(Weight weight) const {
    if (plan.split_columns) {
      for (int64_t chunk = 0; chunk < plan.row_chunks; chunk++) run_by_columns(chunk, weight);
    } else {
      for_ranges(parallel, plan.row_chunks, grain_of(plan.rows_a_chunk * p.cols), [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; chunk++) run_by_rows(chunk, weight);
      });
    }
  }

  // Calls body(first row, rows) for the blocks of a chunk.
  template <class Body>
  void for_blocks(int64_t chunk, const Body& body) const {
    const int64_t begin = chunk * plan.rows_a_chunk, stop = begin + plan.rows_a_chunk;
    const int64_t end = stop < p.rows ? stop : p.rows;
    for (int64_t row = begin; row < end; row += plan.block)
      body(row, static_cast<int>(end - row < plan.block ? end - row : plan.block));
  }

  template <class Weight>
  void run_by_rows(int64_t chunk, Weight weight) const {
    Block block;
    for_blocks(chunk, [&](int64_t first, int count) {
      block.count = count;
      for (int r = 0; r < count; r++) {
        block.rows[r] = row_at(first + r);
        if (p.grad_input)
          set_means(block.rows[r], pairwise(0, plan.chunks, [&](int64_t c) { return sums(block.rows[r], c, weight); }));
      }
      apply(block, weight, 0, p.cols, gradients(chunk), first == chunk * plan.rows_a_chunk);
    });
  }

  // The same chunks and merges as by rows, hence the same bits.
  template <class Weight>
  void run_by_columns(int64_t chunk, Weight weight) const {
    constexpr int64_t tile = 64;
    auto* parts = static_cast<Sums*>(p.workspace);
    Block block;
    for_blocks(chunk, [&](int64_t first, int count) {
      block.count = count;
      for (int r = 0; r < count; r++) block.rows[r] = row_at(first + r);
      if (p.grad_input) {
        for_ranges(parallel, count * plan.chunks, grain_of(p.cols < kChunk ? p.cols : kChunk),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; i++)
                       parts[i] = sums(block.rows[i / plan.chunks], i % plan.chunks, weight);
                   });
        for (int r = 0; r < count; r++)
          set_means(block.rows[r], pairwise(0, plan.chunks, [&](int64_t c) { return parts[r * plan.chunks + c]; }));
      }
      for_ranges(parallel, ceil_div(p.cols, tile), grain_of(tile * count), [&](int64_t begin, int64_t end) {
        apply(block, weight, begin * tile, end * tile < p.cols ? end * tile : p.cols, gradients(chunk),
              first == chunk * plan.rows_a_chunk);
      });
    });
  }

  Row row_at(int64_t row) const {
    const A* stats = static_cast<const A*>(p.stats);
    Row r;
    r.x = row_of<T>(p.input, p.input_rows, row);
    r.dy = row_of<O>(p.grad_output, p.grad_output_rows, row);
    r.grad_sum = p.grad_sum ? row_of<T>(p.grad_sum, p.grad_sum_rows, row) : nullptr;
    r.dx = p.grad_input ? static_cast<T*>(p.grad_input) + row * p.cols : nullptr;
    r.pivot = N == Norm::layer ? first_of(r.x) : A(0);
    r.rstd = stats[N == Norm::layer ? p.rows + row : row];
    r.offset = N == Norm::layer ? -stats[row] * r.rstd : A(0);
    r.mean_g = r.mean_g_xhat = 0;
    return r;
  }

  void set_means(Row& r, const Sums& s) const {
    r.mean_g = static_cast<A>(s.g / p.cols);
    r.mean_g_xhat = static_cast<A>(s.g_xhat / p.cols);
  }

  static LNC_INLINE V normalised(V x, V pivot, V rstd, V offset) {
    return N == Norm::layer ? fma(x - pivot, rstd, offset) : x * rstd;
  }

  template <class Weight>
  Sums sums(const Row& row, int64_t chunk, Weight weight) const {
    const int64_t start = chunk * kChunk, left = p.cols - start;
    const T* x = row.x + start;
    const O* dy = row.dy + start;
    const V pivot = set(row.pivot), rstd = set(row.rstd), offset = set(row.offset);
    Accumulators<A> g_sums, g_xhat_sums;
    sweep<A, kAccumulators>(left < kChunk ? left : kChunk, [&](int64_t i, auto where, int u) LNC_LAMBDA {
      const V xhat = keep(normalised(load(x + i, where), pivot, rstd, offset), where);
      const V g = load(dy + i, where) * at<A>(weight, start + i, where);
      if constexpr (N == Norm::layer) g_sums.v[u] = g_sums.v[u] + g;
      g_xhat_sums.v[u] = fma(g, xhat, g_xhat_sums.v[u]);
    });
    return {static_cast<double>(g_sums.total()), static_cast<double>(g_xhat_sums.total())};
  }

  // Columns [begin, end) of a block of rows: dx, and the block's share of dw and db, summed over its rows
  // in registers before it goes to memory.
  template <class Weight>
  void apply(const Block& block, Weight weight, int64_t begin, int64_t end, const Gradients& to, bool first) const {
    constexpr int L = kLanes<A>;
    int64_t i = begin;
    for (; i + kUnroll * L <= end; i += kUnroll * L) columns<kUnroll>(block, weight, i, Full{}, to, first);
    for (; i + L <= end; i += L) columns<1>(block, weight, i, Full{}, to, first);
    if (i < end) columns<1>(block, weight, i, Part{static_cast<int>(end - i)}, to, first);
  }

  template <int U, class Weight, class Where>
  LNC_INLINE void columns(const Block& block, Weight weight, int64_t i, Where where, const Gradients& to,
                          bool first) const {
    constexpr int L = kLanes<A>;
    V dw_sum[U] = {}, db_sum[U] = {};
    for (int r = 0; r < block.count; r++) {
      const Row& row = block.rows[r];
      const V pivot = set(row.pivot), rstd = set(row.rstd), offset = set(row.offset);
      const V mean_g = set(row.mean_g), mean_g_xhat = set(row.mean_g_xhat);
      unrolled<U>([&](int u) LNC_LAMBDA {
        const int64_t j = i + u * L;
        const V xhat = normalised(load(row.x + j, where), pivot, rstd, offset);
        const V dy = load(row.dy + j, where);
        dw_sum[u] = fma(dy, xhat, dw_sum[u]);
        db_sum[u] = db_sum[u] + dy;
        if (!p.grad_input) return;
        const V g = dy * at<A>(weight, j, where);
        const V projected = fma(-mean_g_xhat, xhat, N == Norm::layer ? g - mean_g : g);
        const V dx = row.grad_sum ? fma(rstd, projected, load(row.grad_sum + j, where)) : rstd * projected;
        store(row.dx + j, dx, where);
      });
    }
    const auto add = [&](A* sums, const V* share) LNC_LAMBDA {
      unrolled<U>([&](int u) LNC_LAMBDA {
        A* sum = sums + i + u * L;
        store(sum, first ? share[u] : load(sum, where) + share[u], where);
      });
    };
    if (to.weight) add(to.weight, dw_sum);
    if (to.bias) add(to.bias, db_sum);
  }

  Gradients gradients(int64_t chunk) const {
    if (direct()) return {static_cast<A*>(p.grad_weight), static_cast<A*>(p.grad_bias)};
    A* sums = partials() + chunk * 2 * p.cols;
    return {p.grad_weight ? sums : nullptr, p.grad_bias ? sums + p.cols : nullptr};
  }
  A* partials() const { return reinterpret_cast<A*>(static_cast<char*>(p.workspace) + plan.sums_bytes); }
  bool direct() const { return plan.row_chunks == 1 && sizeof(P) == sizeof(A); }

  // Adds pairs of chunks, then pairs of pairs, in place; then rounds once.
  void fold() const {
    if (direct()) return;
    A* const sums = partials();
    const int64_t stride = 2 * p.cols, first = p.grad_weight ? 0 : p.cols, last = p.grad_bias ? stride : p.cols;
    for_ranges(parallel, last - first, grain_of(plan.row_chunks), [&](int64_t begin, int64_t end) {
      constexpr int64_t tile = 1024;
      for (int64_t start = first + begin; start < first + end; start += tile) {
        const int64_t n = first + end - start < tile ? first + end - start : tile;
        for (int64_t step = 1; step < plan.row_chunks; step *= 2)
          for (int64_t chunk = 0; chunk + step < plan.row_chunks; chunk += 2 * step) {
            A* to = sums + chunk * stride + start;
            const A* from = to + step * stride;
            sweep<A, 4>(n, [=](int64_t i, auto where, int)
                               LNC_LAMBDA { store(to + i, load(to + i, where) + load(from + i, where), where); });
          }
      }
    });
    if (p.grad_weight) round(static_cast<P*>(p.grad_weight), sums);
    if (p.grad_bias) round(static_cast<P*>(p.grad_bias), sums + p.cols);
  }

  void round(P* to, const A* from) const {
    for_ranges(parallel, p.cols, kGrain, [=](int64_t begin, int64_t end) {
      sweep<A, 4>(end - begin, [=](int64_t i, auto where, int)
                                   LNC_LAMBDA { store(to + begin + i, load(from + begin + i, where), where); });
    });
  }
};

}  // namespace lnc::cpu::LNC_ISA
