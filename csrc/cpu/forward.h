// Forward, for one instruction set (see kernels.h):
//   y = (x - mean) * rstd * weight + bias,  or for rms  y = x * rstd * weight + bias
#pragma once
#include "rows.h"

namespace lnc::cpu::LNC_ISA {

template <class T, class O, Norm N>
class Forward {
  using A = typename Computed<T>::Scalar;
  using V = typename Computed<T>::Vector;
  static constexpr int64_t kChunk = chunk_columns(sizeof(A) == 8 ? DType::f64 : DType::f32);

  struct Terms {
    A pivot, shift, rstd;
  };

  const ForwardParams& p;
  const ParallelFor parallel;
  const ForwardPlan plan = ForwardPlan::of(p);
  const double inverse_count = 1.0 / static_cast<double>(p.cols);
  const A* const weight = parameter<T>(p, parallel, p.weight, 1, p.workspace);
  const A* const bias = parameter<T>(p, parallel, p.bias, 0, static_cast<A*>(p.workspace) + padded(p.cols));

 public:
  Forward(const ForwardParams& params, ParallelFor parallel_for) : p(params), parallel(parallel_for) {}

  void run() const {
    will_write(p.output, p.rows * p.cols * int64_t{sizeof(O)});
    if (p.residual) will_write(p.sum, p.rows * p.cols * int64_t{sizeof(T)});
    if (plan.split_columns)
      run_by_columns();
    else
      for_ranges(parallel, p.rows, grain_of(p.cols), [this](int64_t begin, int64_t end) { run_by_rows(begin, end); });
  }

 private:
  // Short rows go in groups that stay in the first-level cache: independent work for the processor to do
  // while it waits for one row's reductions.
  void run_by_rows(int64_t begin, int64_t end) const {
    Terms terms[ForwardPlan::kMaxGroup];
    for (int64_t first = begin; first < end; first += plan.group) {
      const int64_t last = end - first < plan.group ? end : first + plan.group;
      for (int64_t row = first; row < last; row++)
        terms[row - first] = finish(row, pairwise(0, plan.chunks, [&](int64_t c) { return moments_of(row, c); }));
      for (int64_t row = first; row < last; row++) normalise(row, 0, p.cols, terms[row - first]);
    }
  }

  // The same chunks and merges as by rows, hence the same bits.
  void run_by_columns() const {
    auto* parts = reinterpret_cast<Moments*>(static_cast<char*>(p.workspace) + plan.parameters_bytes);
    for_ranges(parallel, p.rows * plan.chunks, grain_of(kChunk), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) parts[i] = moments_of(i / plan.chunks, i % plan.chunks);
    });
    Terms terms[ForwardPlan::kMaxSplitRows];
    for (int64_t row = 0; row < p.rows; row++)
      terms[row] = finish(row, pairwise(0, plan.chunks, [&](int64_t c) { return parts[row * plan.chunks + c]; }));
    for_ranges(parallel, p.rows * plan.chunks, grain_of(kChunk), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / plan.chunks, start = i % plan.chunks * kChunk;
        normalise(row, start, start + chunk_size(i % plan.chunks), terms[row]);
      }
    });
  }

  int64_t chunk_size(int64_t chunk) const {
    const int64_t left = p.cols - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  }

  const T* input(int64_t row) const { return row_of<T>(p.input, p.input_rows, row); }
  const T* residual(int64_t row) const { return row_of<T>(p.residual, p.residual_rows, row); }
  T* sum_row(int64_t row) const { return static_cast<T*>(p.sum) + row * p.cols; }
  const T* source(int64_t row) const { return p.residual ? sum_row(row) : input(row); }

  A pivot(int64_t row) const {
    if (N == Norm::rms) return 0;
    if (!p.residual) return first_of(input(row));
    T first;  // not from the sum: another thread may be writing it
    store(&first, load<V>(input(row), Part{1}) + load<V>(residual(row), Part{1}), Part{1});
    return first_of(&first);
  }

  // Adds the residual where there is one, then takes the chunk's moments while it is in cache.
  Moments moments_of(int64_t row, int64_t chunk) const {
    const int64_t start = chunk * kChunk, n = chunk_size(chunk);
    if (p.residual) {
      const T *x = input(row) + start, *r = residual(row) + start;
      T* to = sum_row(row) + start;
      sweep<V>(n, [=](int64_t i, auto where, int)
                      LNC_LAMBDA { store(to + i, load<V>(x + i, where) + load<V>(r + i, where), where); });
    }
    return moments<false>(source(row) + start, n, pivot(row), 1);
  }

  // About the pivot: the mean, then squared deviations from it. Scaled: of all deviations times scale.
  template <bool Scaled>
  static Moments moments(const T* x, int64_t n, A pivot, A scale) {
    const V center = set<V>(pivot), factor = set<V>(scale);
    const auto deviation = [=](int64_t i, auto where) LNC_LAMBDA {
      V v = load<V>(x + i, where);
      if constexpr (N == Norm::layer) v = v - center;
      if constexpr (Scaled) v = v * factor;
      return v;
    };
    A mean = 0;
    if constexpr (N == Norm::layer) {
      Accumulators<V> sums;
      sweep<V>(n, [&](int64_t i, auto where, int u)
                      LNC_LAMBDA { sums.v[u] = sums.v[u] + keep(deviation(i, where), where); });
      mean = sums.total() / static_cast<A>(n);
    }
    const V about = set<V>(mean);
    // In two levels: where all values lie on a coarse grid, as beside a large offset, the rounding errors of one long
    // sum have one sign.
    constexpr int64_t kBlock = 512;
    Accumulators<V> squares;
    for (int64_t start = 0; start < n; start += kBlock) {
      Accumulators<V> block;
      sweep<V>(n - start < kBlock ? n - start : kBlock, [&](int64_t i, auto where, int u) LNC_LAMBDA {
        V v = deviation(start + i, where);
        if constexpr (N == Norm::layer) v = keep(v - about, where);
        block.v[u] = fma(v, v, block.v[u]);
      });
      for (int u = 0; u < kUnroll<V>; u++) squares.v[u] = squares.v[u] + block.v[u];
    }
    return {static_cast<double>(n), static_cast<double>(mean), static_cast<double>(squares.total())};
  }

  Terms finish(int64_t row, const Moments& m) const {
    constexpr double largest = sizeof(A) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
    constexpr double tiny = sizeof(A) == 8 ? 1e-240 : 1e-30, scale = sizeof(A) == 8 ? 0x1p500 : 0x1p100;
    const Terms t = !(m.squares <= largest)                    ? rescued(row, 1 / scale)
                    : m.squares * inverse_count + p.eps < tiny ? rescued(row, scale)
                                                               : terms_of(pivot(row), m, 1);
    if (p.stats) {
      A* stats = static_cast<A*>(p.stats);
      if (N == Norm::layer) stats[row] = t.shift;
      stats[N == Norm::layer ? p.rows + row : row] = t.rstd;
    }
    return t;
  }

  LNC_INLINE Terms terms_of(A pivot, const Moments& m, double scale) const {
    const double variance = m.squares * inverse_count + p.eps * scale * scale;
    const double rstd = variance == 0 ? 0 : scale / root(variance);
    return {pivot, static_cast<A>(m.mean / scale), static_cast<A>(rstd)};
  }

  // Where squares have left the range of A, on either side: once more, of values scaled into it.
  LNC_NOINLINE Terms rescued(int64_t row, double scale) const {
    const A about = pivot(row);
    const Moments m = pairwise(0, plan.chunks, [&](int64_t c) {
      return moments<true>(source(row) + c * kChunk, chunk_size(c), about, static_cast<A>(scale));
    });
    return terms_of(about, m, scale);
  }

  // Columns [begin, end) of a row. Meanwhile the next group is fetched, where rows are adjacent.
  void normalise(int64_t row, int64_t begin, int64_t end, const Terms& t) const {
    const T* x = source(row) + begin;
    O* y = static_cast<O*>(p.output) + row * p.cols + begin;
    const int64_t ahead = plan.group * p.cols;
    const A *w = weight + begin, *b = bias + begin;
    const V pivot = set<V>(t.pivot), rstd = set<V>(t.rstd), offset = set<V>(-t.shift * t.rstd);
    sweep<V>(end - begin, [=](int64_t i, auto where, int u) LNC_LAMBDA {
      if (starts_line<T>(u)) prefetch(x, i + ahead);
      const V v = load<V>(x + i, where);
      const V xhat = N == Norm::layer ? fma(v - pivot, rstd, offset) : v * rstd;
      store(y + i, fma(xhat, get<V>(w + i, where), get<V>(b + i, where)), where);
    });
  }
};

}  // namespace lnc::cpu::LNC_ISA
