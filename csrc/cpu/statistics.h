// Mean and rstd of rows, for one instruction set (see kernels.h). On the way a residual is added, where there is one.
#pragma once
#include "rows.h"

namespace lnc::cpu::LNC_ISA {

// What the columns of a row need to know of it: xhat = (x - pivot) * rstd + offset.
template <class A>
struct Terms {
  A pivot, rstd, offset;
  double mean;  // of deviations from the pivot
};

template <class T, Norm N>
class Statistics {
 public:
  using A = typename Computed<T>::Scalar;
  using V = typename Computed<T>::Vector;
  static constexpr int64_t kChunk = chunk_columns(sizeof(A) == 8 ? DType::f64 : DType::f32);
  static constexpr bool kConverts = !std::is_same_v<T, A>;

 private:
  // At a chunk's deviations from a pivot: their mean, and the sum of their squares; of one row, or of some together.
  template <class S>
  struct LookOf {
    S mean, squares;
  };
  using Look = LookOf<double>;
  // Lane by lane: their sum.
  struct LaneLook {
    V sum, squares;
  };

  const ForwardParams& p;
  const ForwardPlan& plan;
  const double inverse_count = 1.0 / static_cast<double>(p.cols);
  // Sums of squares that may have lost some to underflow; beside such an eps, of no account.
  const double smallest_squares = p.eps > 1e-30 ? -1 : 1e-20;

 public:
  Statistics(const ForwardParams& params, const ForwardPlan& its_plan) : p(params), plan(its_plan) {}

  int64_t chunk_size(int64_t chunk) const {
    const int64_t left = p.cols - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  }

  const T* input(int64_t row) const { return row_of<T>(p.input, p.input_rows, row); }
  const T* residual(int64_t row) const { return row_of<T>(p.residual, p.residual_rows, row); }
  T* sum_row(int64_t row) const { return static_cast<T*>(p.sum) + row * p.cols; }
  const T* source(int64_t row) const { return p.residual ? sum_row(row) : input(row); }
  // Of rows whose sums have gone past the caches there are copies, of which this is the r-th.
  bool copies_sum() const { return kWritesPast && plan.past_sum; }
  const T* source(int64_t row, const T* copies, int64_t r) const {
    return copies_sum() ? copies + r * padded(p.cols) : source(row);
  }

  A pivot(int64_t row) const {
    if (N == Norm::rms) return 0;
    if (!p.residual) return first_of(input(row));
    // Not from the sum: another thread may be writing it.
    T sum[kLanes<V>];
    store(sum, set<V>(first_of(input(row)) + first_of(residual(row))), Full{});
    return first_of(sum);
  }

  LNC_INLINE A about(int64_t row) const { return N == Norm::rms || is_about_zero(row) ? A(0) : pivot(row); }

  // Terms of short rows, which lie in the first-level cache together, one step for all before the next: independent
  // work for the processor to do while it waits for one row's reductions.
  LNC_INLINE void look_at_group(Terms<A>* terms, int64_t first, int64_t rows, T* copies) const {
    constexpr int64_t kMax = ForwardPlan::kMaxGroup;
    A pivots[kMax];
    LaneLook looks[kMax];
    const int64_t stride = padded(p.cols);
    for (int64_t r = 0; r < rows; r++) {
      pivots[r] = about(first + r);
      looks[r] = first_look(first + r, pivots[r], copies + r * stride);
    }
    int64_t r = 0;
    for (; r + kTogether <= rows; r += kTogether)
      set_terms(terms + r, first + r, pivots + r, looks + r, copies + r * stride, Lanes{});
    for (; r < rows; r++) set_terms(terms[r], first + r, pivots[r], looks[r], copies + r * stride);
  }

  // Terms of a row of one chunk, from values: its deviations from about. Calls meanwhile() between them.
  template <class Values, class Meanwhile>
  LNC_INLINE void look_at(Terms<A>& t, int64_t row, A about, const Values& values, const Meanwhile& meanwhile) const {
    set_terms(t, row, about, look(p.cols, values, meanwhile), nullptr);
  }

  LNC_NOINLINE Moments moments_of(int64_t row, int64_t chunk, A pivot, T* copy) const {
    constexpr bool centred = N == Norm::layer;
    Look first = over_lanes(chunk_size(chunk), first_look<centred>(row, chunk, pivot, copy));
    if constexpr (std::is_same_v<T, bf16>)
      if (LNC_UNLIKELY(is_lost(first)))
        first = over_lanes(chunk_size(chunk), first_look<centred, false>(row, chunk, pivot, copy));
    return moments_of(row, chunk, pivot, copy, first);
  }

  LNC_NOINLINE Terms<A> finish(int64_t row, A pivot, const Moments& m) const {
    constexpr double largest = sizeof(A) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
    constexpr double tiny = sizeof(A) == 8 ? 1e-240 : 1e-30, scale = sizeof(A) == 8 ? 0x1p500 : 0x1p100;
    const double variance = m.squares * inverse_count + p.eps;  // below zero only for an eps below zero: NaN, as native
    const Terms<A> t = !(m.squares <= largest)               ? rescued(row, pivot, 1 / scale)
                       : variance < tiny && variance > -tiny ? rescued(row, pivot, scale)
                                                             : scaled(pivot, m, 1);
    save(row, t);
    return t;
  }

 private:
  // Whether zero looks like a pivot: of a row that is all on one side of it, eight elements hardly ever differ in sign.
  LNC_INLINE bool is_about_zero(int64_t row) const {
    constexpr int n = kLanes<V> > 8 ? kLanes<V> : 8;
    if (p.cols < n) return false;
    if (!p.residual) return has_both_signs(input(row));
    T eight[n];
    for (int i = 0; i < n; i += kLanes<V>)
      store(eight + i, load<V>(input(row) + i, Full{}) + load<V>(residual(row) + i, Full{}), Full{});
    return has_both_signs(eight);
  }

  LNC_INLINE LaneLook first_look(int64_t row, A pivot, T* copy) const {
    if constexpr (N == Norm::layer)
      if (pivot != 0) return first_look<true>(row, 0, pivot, copy);
    return first_look<false>(row, 0, pivot, copy);
  }

  // Adds the residual where there is one: if quickly, the squares show whether the sum was lost by it.
  template <bool Centred, bool Quick = true>
  LNC_INLINE LaneLook first_look(int64_t row, int64_t chunk, A pivot, T* copy) const {
    const int64_t start = chunk * kChunk, n = chunk_size(chunk);
    const V center = set<V>(pivot);
    const T* const x = input(row) + start;
    const auto deviation = [=](V v) LNC_LAMBDA { return Centred ? v - center : v; };
    if (p.residual) {
      const T* const r = residual(row) + start;
      T* const to = sum_row(row) + start;
      const auto added = [=](auto past) LNC_LAMBDA {
        return look(n, [=](int64_t i, auto where) LNC_LAMBDA {
          const auto sum = rounded<Quick, T>(load<V>(x + i, where) + load<V>(r + i, where));
          if constexpr (past) {
            write_past(to + i, sum.bits, where);
            write(copy + i, sum.bits, where);
          } else {
            write(to + i, sum.bits, where);
          }
          return deviation(sum.value);
        });
      };
      if constexpr (kWritesPast)
        if (copies_sum()) return added(std::true_type{});
      return added(std::false_type{});
    }
    return look(n, [=](int64_t i, auto where) LNC_LAMBDA { return deviation(load<V>(x + i, where)); });
  }

  bool is_lost(const Look& first) const {
    return std::is_same_v<T, bf16> && p.residual && !(first.squares < kMostSquares);
  }

  Moments moments_of(int64_t row, int64_t chunk, A pivot, const T* copy, const Look& first) const {
    const int64_t n = chunk_size(chunk);
    if constexpr (N == Norm::layer)
      if (!is_near(n, first))
        return second_look(n, first.mean, Deviations<V, T>{source(row, copy, 0) + chunk * kChunk, set<V>(pivot)});
    return moments(n, first);
  }

  // Of a row of one chunk, after a first look. In place: returned, they would be copied in pieces wider than those they
  // were written in, and wait for the stores.
  LNC_INLINE void set_terms(Terms<A>& t, int64_t row, A pivot, const LaneLook& lanes, T* copy) const {
    const Look first = over_lanes(p.cols, lanes);
    if (LNC_UNLIKELY(!is_near(p.cols, first))) {
      t = terms_of_far(row, pivot, first, copy);
    } else {
      t = scaled(pivot, moments(p.cols, first), 1);
      save(row, t);
    }
  }

  // Of rows that lie side by side, the same.
  using Lanes = std::make_integer_sequence<int, kTogether>;
  template <int... i>
  LNC_INLINE void set_terms(Terms<A>* t, int64_t row, const A* pivots, const LaneLook* lanes, T* copy,
                            std::integer_sequence<int, i...>) const {
    const LookOf<Together> first = over_lanes<Together>(p.cols, lanes[i]...);
    if (LNC_UNLIKELY(!all(is_near(p.cols, first)))) {
      for (int r = 0; r < kTogether; r++) set_terms(t[r], row + r, pivots[r], lanes[r], copy + r * padded(p.cols));
    } else {
      const Together rstd = rstd_of(squares_about_mean(p.cols, first), 1), offset = -first.mean * rstd;
      ((t[i] = {pivots[i], static_cast<A>(lane(rstd, i)), static_cast<A>(lane(offset, i)), lane(first.mean, i)}), ...);
      (save(row + i, t[i]), ...);
    }
  }

  LNC_NOINLINE Terms<A> terms_of_far(int64_t row, A pivot, const Look& first, T* copy) const {
    if (!is_lost(first) && (N == Norm::rms || pivot != 0))
      return finish(row, pivot, moments_of(row, 0, pivot, copy, first));
    pivot = this->pivot(row);
    return finish(row, pivot, moments_of(row, 0, pivot, copy));
  }

  // Squares are summed in two levels: where all values lie on a coarse grid, as beside a large offset, the rounding
  // errors of one long sum have one sign.
  static constexpr int64_t kBlock = 512;

  template <class Values, class Meanwhile = Nothing>
  static LNC_INLINE LaneLook look(int64_t n, const Values& values, const Meanwhile& meanwhile = {}) {
    Accumulators<V> sums, squares;
    for (int64_t start = 0; start < n; start += kBlock) {
      Accumulators<V> block;
      const auto add = [&](int64_t i, auto where, int u) LNC_LAMBDA {
        const V v = hold(keep(values(start + i, where), where));
        if constexpr (N == Norm::layer) sums.v[u] = sums.v[u] + v;
        block.v[u] = fma(v, v, block.v[u]);
      };
      sweep<V>(n - start < kBlock ? n - start : kBlock, add, meanwhile);
      squares.add(block);
    }
    return {sums.folded(), squares.folded()};
  }
  template <class S = double, class... Looks>
  static LNC_INLINE LookOf<S> over_lanes(int64_t n, const Looks&... l) {
    return {N == Norm::layer ? S{sum(l.sum)...} / static_cast<double>(n) : S{}, S{sum(l.squares)...}};
  }

  // Whether the pivot was so near to the mean that squared deviations from one give those from the other: half of them
  // are left, or of 16-bit data, which have digits to spare, a fifth. And no square may have left the range of A.
  static constexpr double kLeft = kConverts ? 1.25 : 2, kMostSquares = 1e38;
  template <class S>
  LNC_INLINE auto is_near(int64_t n, const LookOf<S>& l) const {
    const auto in_range = (l.squares > smallest_squares) & (l.squares < kMostSquares);
    if constexpr (N == Norm::rms)
      return in_range;
    else
      return in_range & (l.squares >= kLeft * static_cast<double>(n) * l.mean * l.mean);
  }
  template <class S>
  static LNC_INLINE S squares_about_mean(int64_t n, const LookOf<S>& l) {
    return l.squares - static_cast<double>(n) * l.mean * l.mean;
  }
  static LNC_INLINE Moments moments(int64_t n, const Look& l) {
    return {static_cast<double>(n), l.mean, squares_about_mean(n, l)};
  }

  // At the deviations from the mean: what is left of them on average is the error of the first look's long sum.
  template <class Values>
  static Moments second_look(int64_t n, double mean, const Values& values) {
    const A about = static_cast<A>(mean);
    const V center = set<V>(about);
    const Look l = over_lanes(n, look(n, [=](int64_t i, auto where) LNC_LAMBDA { return values(i, where) - center; }));
    return {static_cast<double>(n), about + l.mean, squares_about_mean(n, l)};
  }

  LNC_INLINE void save(int64_t row, const Terms<A>& t) const {
    if (!p.stats) return;
    A* stats = static_cast<A*>(p.stats);
    if (N == Norm::layer) stats[row] = static_cast<A>(t.mean + (double{t.pivot} - pivot(row)));
    stats[N == Norm::layer ? p.rows + row : row] = t.rstd;
  }

  template <class S>
  LNC_INLINE S rstd_of(S squares, double scale) const {
    const S variance = squares * inverse_count + p.eps * scale * scale;
    return variance == 0 ? S{} : scale / root(variance);
  }

  LNC_INLINE Terms<A> scaled(A pivot, const Moments& m, double scale) const {
    const double rstd = rstd_of(m.squares, scale), mean = m.mean / scale;
    return {pivot, static_cast<A>(rstd), static_cast<A>(-mean * rstd), mean};
  }

  // Where squares have left the range of A, on either side: once more, of values scaled into it.
  LNC_NOINLINE Terms<A> rescued(int64_t row, A pivot, double scale) const {
    const V factor = set<V>(static_cast<A>(scale));
    const Moments m = pairwise(0, plan.chunks, [&](int64_t c) {
      const Deviations<V, T> chunk{source(row) + c * kChunk, set<V>(pivot)};
      const auto values = [=](int64_t i, auto where) LNC_LAMBDA { return chunk(i, where) * factor; };
      const Look first = over_lanes(chunk_size(c), look(chunk_size(c), values));
      if constexpr (N == Norm::rms)
        return moments(chunk_size(c), first);
      else
        return second_look(chunk_size(c), first.mean, values);
    });
    return scaled(pivot, m, scale);
  }
};

}  // namespace lnc::cpu::LNC_ISA
