// Forward, for one instruction set (see kernels.h):
//   y = (x - mean) * rstd * weight + bias,  or for rms  y = x * rstd * weight
#pragma once
#include "rows.h"

namespace lnc::cpu::LNC_ISA {

template <class T, class P, class O, Norm N>
class Forward {
 public:
  Forward(const ForwardParams& params, ParallelFor parallel_for)
      : p(params), parallel(parallel_for), plan(ForwardPlan::of(params)) {}

  void run() const {
    if (plan.split_columns)
      run_by_columns();
    else
      for_ranges(parallel, p.rows, grain_of(p.cols), [this](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
          const Terms terms = finish(row, pairwise(0, plan.chunks, [&](int64_t c) { return moments_of(row, c); }));
          normalise(row, 0, p.cols, terms);
        }
      });
  }

 private:
  using A = Accumulate<T>;
  using V = Vector<A>;
  static constexpr int64_t kChunk = chunk_columns(kAccumulateType<A>);

  struct Terms {
    A pivot, shift, rstd;
  };

  const ForwardParams& p;
  const ParallelFor parallel;
  const ForwardPlan plan;

  // The same chunks and merges as by rows, hence the same bits.
  void run_by_columns() const {
    auto* parts = static_cast<Moments*>(p.workspace);
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
    store(&first, load(input(row), Part{1}) + load(residual(row), Part{1}), Part{1});
    return first_of(&first);
  }

  // Adds the residual where there is one, then takes the chunk's moments while it is in cache.
  Moments moments_of(int64_t row, int64_t chunk) const {
    const int64_t start = chunk * kChunk, n = chunk_size(chunk);
    if (p.residual) {
      const T *x = input(row) + start, *r = residual(row) + start;
      T* to = sum_row(row) + start;
      sweep<A, 4>(n, [=](int64_t i, auto where, int)
                         LNC_LAMBDA { store(to + i, load(x + i, where) + load(r + i, where), where); });
    }
    return moments<false>(source(row) + start, n, pivot(row), 1);
  }

  // About the pivot: the mean, then squared deviations from it. Scaled: of all values times scale.
  template <bool Scaled>
  static Moments moments(const T* x, int64_t n, A pivot, A scale) {
    const V center = set(Scaled ? pivot * scale : pivot);
    const auto deviation = [=](int64_t i, auto where) LNC_LAMBDA {
      V v = load(x + i, where);
      if constexpr (Scaled) v = v * scale;
      if constexpr (N == Norm::layer) v = v - center;
      return v;
    };
    A mean = 0;
    if constexpr (N == Norm::layer) {
      Accumulators<A> sums;
      sweep<A, kAccumulators>(n, [&](int64_t i, auto where, int u)
                                     LNC_LAMBDA { sums.v[u] = sums.v[u] + keep(deviation(i, where), where); });
      mean = sums.total() / static_cast<A>(n);
    }
    const V about = set(mean);
    Accumulators<A> squares;
    sweep<A, kAccumulators>(n, [&](int64_t i, auto where, int u) LNC_LAMBDA {
      V v = deviation(i, where);
      if constexpr (N == Norm::layer) v = keep(v - about, where);
      squares.v[u] = fma(v, v, squares.v[u]);
    });
    return {static_cast<double>(n), static_cast<double>(mean), static_cast<double>(squares.total())};
  }

  Terms finish(int64_t row, const Moments& m) const {
    constexpr double largest = sizeof(A) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
    constexpr double tiny = sizeof(A) == 8 ? 1e-240 : 1e-30, scale = sizeof(A) == 8 ? 0x1p500 : 0x1p100;
    Terms t = !(m.squares <= largest)              ? rescued(row, 1 / scale)
              : m.squares / m.count + p.eps < tiny ? rescued(row, scale)
                                                   : terms_of(pivot(row), m, 1);
    if (p.stats) {
      A* stats = static_cast<A*>(p.stats);
      if (N == Norm::layer) stats[row] = t.shift;
      stats[N == Norm::layer ? p.rows + row : row] = t.rstd;
    }
    return t;
  }

  Terms terms_of(A pivot, const Moments& m, double scale) const {
    const double variance = m.squares / m.count + p.eps * scale * scale;
    const double rstd = variance == 0 ? 0 : scale / __builtin_sqrt(variance);
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

  void normalise(int64_t row, int64_t begin, int64_t end, const Terms& t) const {
    const auto with_bias = [&](auto weight) {
      if (p.bias)
        normalise(row, begin, end, t, weight, static_cast<const P*>(p.bias) + begin);
      else
        normalise(row, begin, end, t, weight, Zeros{});
    };
    if (p.weight)
      with_bias(static_cast<const P*>(p.weight) + begin);
    else
      with_bias(Ones{});
  }

  template <class Weight, class Bias>
  void normalise(int64_t row, int64_t begin, int64_t end, const Terms& t, Weight weight, Bias bias) const {
    const T* x = source(row) + begin;
    O* y = static_cast<O*>(p.output) + row * p.cols + begin;
    const V pivot = set(t.pivot), rstd = set(t.rstd), offset = set(-t.shift * t.rstd);
    sweep<A, 4>(end - begin, [=](int64_t i, auto where, int) LNC_LAMBDA {
      const V v = load(x + i, where);
      const V xhat = N == Norm::layer ? fma(v - pivot, rstd, offset) : v * rstd;
      store(y + i, fma(xhat, at<A>(weight, i, where), at<A>(bias, i, where)), where);
    });
  }
};

}  // namespace lnc::cpu::LNC_ISA
