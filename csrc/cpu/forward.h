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

  static constexpr bool kConverts = !std::is_same_v<T, A>;

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

  struct Terms {
    A pivot, rstd, offset;  // xhat = (x - pivot) * rstd + offset
    double mean;            // of deviations from the pivot
  };

  const ForwardParams& p;
  const ParallelFor parallel;
  const ForwardPlan plan = ForwardPlan::of(p);
  const double inverse_count = 1.0 / static_cast<double>(p.cols);
  const A* const weight = plan.given ? nullptr : parameter<T>(p, parallel, p.weight, 1, p.workspace);
  const A* const bias =
      plan.given ? nullptr : parameter<T>(p, parallel, p.bias, 0, static_cast<A*>(p.workspace) + padded(p.cols));

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
  void run_by_rows(int64_t begin, int64_t end) const {
    int64_t row = begin;
    if constexpr (!kConverts)
      if (plan.overlaps) row = run_by_twos(begin, end);
    for (; row < end; row += plan.group) {
      if (plan.chunks > 1)
        run_by_chunks(row);
      else
        run_group(row, end - row < plan.group ? end - row : plan.group);
    }
    if (plan.reach == Reach::past) fence();
  }

  void run_by_chunks(int64_t row) const {
    alignas(64) T copy[kChunk];
    const A about = pivot(row);
    const auto moments = [&](int64_t c) { return moments_of(row, c, about, copy); };
    const Terms t = finish(row, about, pairwise(0, plan.chunks, moments));
    with_parameters(0, [&](const auto& weights, const auto& biases)
                           LNC_LAMBDA { normalise(row, 0, p.cols, t, again(row, 0, about), weights, biases); });
  }

  // Short rows go in groups that stay in the first-level cache, one step for all before the next: independent work for
  // the processor to do while it waits for one row's reductions.
  void run_group(int64_t first, int64_t rows) const {
    constexpr int64_t kMax = ForwardPlan::kMaxGroup;
    alignas(64) T copy[kChunk];
    A pivots[kMax];
    LaneLook looks[kMax];
    Terms terms[kMax];
    const int64_t stride = padded(p.cols);
    for (int64_t r = 0; r < rows; r++) {
      pivots[r] = about(first + r);
      looks[r] = pivots[r] == 0 ? first_look<false>(first + r, 0, 0, copy + r * stride)
                                : first_look<N == Norm::layer>(first + r, 0, pivots[r], copy + r * stride);
    }
    int64_t r = 0;
    for (; r + kTogether <= rows; r += kTogether)
      set_terms(terms + r, first + r, pivots + r, looks + r, copy + r * stride, Lanes{});
    for (; r < rows; r++) set_terms(terms[r], first + r, pivots[r], looks[r], copy + r * stride);
    with_parameters(0, [&](const auto& weights, const auto& biases)
                           LNC_LAMBDA { normalise_group(first, rows, terms, copy, weights, biases); });
  }

  // Long rows: two, and meanwhile a look at the next two, while there are two more. Returns the first row not done.
  int64_t run_by_twos(int64_t row, int64_t end) const {
    if (end - row < 4) return row;
    Terms terms[2];
    for (int i = 0; i < 2; i++) look_at<true>(terms[i], row + i, about(row + i), Nothing{});
    for (; end - row >= 4; row += 2) {
      const A next[2] = {about(row + 2), about(row + 3)};
      const bool about_zero = terms[0].pivot == 0 && terms[1].pivot == 0 && next[0] == 0 && next[1] == 0;
      with_parameters(0, [&](const auto& weights, const auto& biases) LNC_LAMBDA {
        about_zero ? normalise_two_and_look<false>(row, terms, next, weights, biases)
                   : normalise_two_and_look<N == Norm::layer>(row, terms, next, weights, biases);
      });
    }
    with_parameters(0, [&](const auto& weights, const auto& biases) LNC_LAMBDA {
      for (int i = 0; i < 2; i++)
        normalise(row + i, 0, p.cols, terms[i], again(row + i, 0, terms[i].pivot), weights, biases);
    });
    return row + 2;
  }

  template <bool Centred>
  LNC_INLINE auto values(int64_t row, A pivot) const {
    if constexpr (Centred)
      return again(row, 0, pivot);
    else
      return Elements<V, T>{input(row)};
  }

  template <bool Centred, class Meanwhile>
  LNC_INLINE void look_at(Terms& t, int64_t row, A about, const Meanwhile& meanwhile) const {
    set_terms(t, row, about, look(p.cols, values<Centred>(row, about), meanwhile), nullptr);
  }

  // The same chunks and merges as by rows, hence the same bits.
  void run_by_columns() const {
    auto* parts = reinterpret_cast<Moments*>(static_cast<char*>(p.workspace) + plan.parameters_bytes);
    for_ranges(parallel, p.rows * plan.chunks, grain_of(kChunk), [&](int64_t begin, int64_t end) {
      alignas(64) T copy[kChunk];
      for (int64_t i = begin; i < end; i++)
        parts[i] = moments_of(i / plan.chunks, i % plan.chunks, pivot(i / plan.chunks), copy);
    });
    Terms terms[ForwardPlan::kMaxSplitRows];
    for (int64_t row = 0; row < p.rows; row++)
      terms[row] =
          finish(row, pivot(row), pairwise(0, plan.chunks, [&](int64_t c) { return parts[row * plan.chunks + c]; }));
    for_ranges(parallel, p.rows * plan.chunks, grain_of(kChunk), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / plan.chunks, start = i % plan.chunks * kChunk;
        with_parameters(start, [&](const auto& weights, const auto& biases) LNC_LAMBDA {
          normalise(row, start, start + chunk_size(i % plan.chunks), terms[row], again(row, start, terms[row].pivot),
                    weights, biases);
        });
      }
      if (plan.reach == Reach::past) fence();
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
  // Of a row whose sum has gone past the caches there is a copy.
  bool copies_sum() const { return kWritesPast && plan.past_sum; }
  const T* source(int64_t row, const T* copy) const { return copies_sum() ? copy : source(row); }

  A pivot(int64_t row) const {
    if (N == Norm::rms) return 0;
    if (!p.residual) return first_of(input(row));
    // Not from the sum: another thread may be writing it.
    T sum[kLanes<V>];
    store(sum, set<V>(first_of(input(row)) + first_of(residual(row))), Full{});
    return first_of(sum);
  }

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

  LNC_INLINE A about(int64_t row) const { return N == Norm::rms || is_about_zero(row) ? A(0) : pivot(row); }

  // Deviations read from the row itself.
  struct Again {
    const T* x;
    V pivot;
    template <class Where>
    LNC_INLINE V operator()(int64_t i, Where where) const {
      const V v = load<V>(x + i, where);
      return N == Norm::layer ? v - pivot : v;
    }
  };
  Again again(int64_t row, int64_t start, A pivot) const { return {source(row) + start, set<V>(pivot)}; }

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
      return copies_sum() ? added(std::bool_constant<kWritesPast>{}) : added(std::false_type{});
    }
    return look(n, [=](int64_t i, auto where) LNC_LAMBDA { return deviation(load<V>(x + i, where)); });
  }

  bool is_lost(const Look& first) const {
    return std::is_same_v<T, bf16> && p.residual && !(first.squares < kMostSquares);
  }

  Moments moments_of(int64_t row, int64_t chunk, A pivot, T* copy) const {
    constexpr bool centred = N == Norm::layer;
    Look first = over_lanes(chunk_size(chunk), first_look<centred>(row, chunk, pivot, copy));
    if (LNC_UNLIKELY(is_lost(first)))
      first = over_lanes(chunk_size(chunk), first_look<centred, false>(row, chunk, pivot, copy));
    return moments_of(row, chunk, pivot, copy, first);
  }

  Moments moments_of(int64_t row, int64_t chunk, A pivot, const T* copy, const Look& first) const {
    const int64_t n = chunk_size(chunk);
    if (N == Norm::rms || is_near(n, first)) return moments(n, first);
    return second_look(n, first.mean, Again{source(row, copy) + chunk * kChunk, set<V>(pivot)});
  }

  // Of a row of one chunk, after a first look. In place: returned, they would be copied in pieces wider than those they
  // were written in, and wait for the stores.
  LNC_INLINE void set_terms(Terms& t, int64_t row, A pivot, const LaneLook& lanes, T* copy) const {
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
  LNC_INLINE void set_terms(Terms* t, int64_t row, const A* pivots, const LaneLook* lanes, T* copy,
                            std::integer_sequence<int, i...>) const {
    const LookOf<Together> first = over_lanes<Together>(p.cols, lanes[i]...);
    if (LNC_UNLIKELY(!all(is_near(p.cols, first)))) {
      (set_terms(t[i], row + i, pivots[i], lanes[i], copy + i * padded(p.cols)), ...);
    } else {
      const Together rstd = rstd_of(squares_about_mean(p.cols, first), 1), offset = -first.mean * rstd;
      ((t[i] = {pivots[i], static_cast<A>(lane(rstd, i)), static_cast<A>(lane(offset, i)), lane(first.mean, i)}), ...);
      (save(row + i, t[i]), ...);
    }
  }

  LNC_NOINLINE Terms terms_of_far(int64_t row, A pivot, const Look& first, T* copy) const {
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
  static LNC_INLINE auto is_near(int64_t n, const LookOf<S>& l) {
    const auto in_range = (l.squares > 1e-20) & (l.squares < kMostSquares);
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

  Terms finish(int64_t row, A pivot, const Moments& m) const {
    constexpr double largest = sizeof(A) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
    constexpr double tiny = sizeof(A) == 8 ? 1e-240 : 1e-30, scale = sizeof(A) == 8 ? 0x1p500 : 0x1p100;
    const double variance = m.squares * inverse_count + p.eps;  // below zero only for an eps below zero: NaN, as native
    const Terms t = !(m.squares <= largest)               ? rescued(row, pivot, 1 / scale)
                    : variance < tiny && variance > -tiny ? rescued(row, pivot, scale)
                                                          : scaled(pivot, m, 1);
    save(row, t);
    return t;
  }

  LNC_INLINE void save(int64_t row, const Terms& t) const {
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

  LNC_INLINE Terms scaled(A pivot, const Moments& m, double scale) const {
    const double rstd = rstd_of(m.squares, scale), mean = m.mean / scale;
    return {pivot, static_cast<A>(rstd), static_cast<A>(-mean * rstd), mean};
  }

  // Where squares have left the range of A, on either side: once more, of values scaled into it.
  LNC_NOINLINE Terms rescued(int64_t row, A pivot, double scale) const {
    const V factor = set<V>(static_cast<A>(scale));
    const Moments m = pairwise(0, plan.chunks, [&](int64_t c) {
      const Again chunk = again(row, c * kChunk, pivot);
      const auto values = [=](int64_t i, auto where) LNC_LAMBDA { return chunk(i, where) * factor; };
      const Look first = over_lanes(chunk_size(c), look(chunk_size(c), values));
      return N == Norm::rms ? moments(chunk_size(c), first) : second_look(chunk_size(c), first.mean, values);
    });
    return scaled(pivot, m, scale);
  }

  // Calls body with the weight and the bias from a column on.
  template <class Body>
  LNC_INLINE void with_parameters(int64_t begin, const Body& body) const {
    using Given = Elements<V, T>;
    using Made = std::conditional_t<kConverts, Buffer<V, A>, Given>;
    const T* const w = static_cast<const T*>(p.weight);
    if (!plan.given)
      body(Made{weight + begin}, Made{bias + begin});
    else if (p.bias)
      body(Given{w + begin}, Given{static_cast<const T*>(p.bias) + begin});
    else if (w)
      body(Given{w + begin}, Constant<V, 0>{});
    else
      body(Constant<V, 1>{}, Constant<V, 0>{});
  }

  // A group of rows of one chunk.
  template <class Weights, class Biases>
  LNC_NOINLINE void normalise_group(int64_t first, int64_t rows, const Terms* terms, T* copy, const Weights& weights,
                                    const Biases& biases) const {
    const int64_t stride = padded(p.cols);
    // Rows [r, r + n) are read in one way: values(r) of the function that body is called with.
    const auto with_values = [&](int64_t r, int64_t n, const auto& body) LNC_LAMBDA {
      bool about_zero = true;
      for (int64_t i = r; i < r + n; i++) about_zero = about_zero && terms[i].pivot == 0;
      if (about_zero)
        body([&](int64_t i) LNC_LAMBDA { return Elements<V, T>{source(first + i, copy + i * stride)}; });
      else
        body([&](int64_t i) LNC_LAMBDA { return Again{source(first + i, copy + i * stride), set<V>(terms[i].pivot)}; });
    };
    int64_t r = 0;
    if constexpr (kConverts && !std::is_same_v<Weights, Constant<V, 1>>)
      for (; plan.reach == Reach::cached && r + 2 <= rows; r += 2)
        with_values(r, 2, [&](const auto& values) LNC_LAMBDA {
          normalise_two(first + r, terms + r, values(r), values(r + 1), weights, biases);
        });
    for (; r < rows; r++)
      with_values(r, 1, [&](const auto& values) LNC_LAMBDA {
        normalise(first + r, 0, p.cols, terms[r], values(r), weights, biases);
      });
  }

  // Two rows of 16-bit data, which share the parameters. From far away, rows are better fetched one by one.
  template <class Values, class Weights, class Biases>
  LNC_NOINLINE void normalise_two(int64_t first, const Terms* terms, const Values& values0, const Values& values1,
                                  const Weights& weights, const Biases& biases) const {
    sweep<V, 2>(p.cols, columns_of_two(first, terms, values0, values1, weights, biases));
  }

  // Two rows, and then the terms of the next two, which are looked at meanwhile: what comes from further away is read
  // while this is computed and written. For each of their columns, two are looked at: of one row, then of the other.
  template <bool Centred, class Weights, class Biases>
  LNC_NOINLINE void normalise_two_and_look(int64_t first, Terms* terms, const A* next, const Weights& weights,
                                           const Biases& biases) const {
    constexpr int step = kUnroll<V> / 2;
    const auto two = columns_of_two(first, terms, values<Centred>(first, terms[0].pivot),
                                    values<Centred>(first + 1, terms[1].pivot), weights, biases);
    int64_t done = 0;
    const auto meanwhile = [&]() LNC_LAMBDA {
      unrolled<step>([&](int u) LNC_LAMBDA { two(done + u * kLanes<V>, Full{}, u); });
      done += step * kLanes<V>;
    };
    for (int i = 0; i < 2; i++) look_at<Centred>(terms[i], first + 2 + i, next[i], meanwhile);
    sweep<V, 2>(p.cols - done, [&](int64_t i, auto where, int u) LNC_LAMBDA { two(done + i, where, u); });
  }

  template <class Values, class Weights, class Biases>
  LNC_INLINE auto columns_of_two(int64_t first, const Terms* terms, const Values& values0, const Values& values1,
                                 const Weights& weights, const Biases& biases) const {
    const V rstd0 = set<V>(terms[0].rstd), offset0 = set<V>(terms[0].offset);
    const V rstd1 = set<V>(terms[1].rstd), offset1 = set<V>(terms[1].offset);
    O *const y0 = static_cast<O*>(p.output) + first * p.cols, *const y1 = y0 + p.cols;
    return [=](int64_t i, auto where, int) LNC_LAMBDA {
      const V w = weights(i, where), b = biases(i, where);
      store(y0 + i, fma(normalised(values0(i, where), rstd0, offset0), w, b), where);
      store(y1 + i, fma(normalised(values1(i, where), rstd1, offset1), w, b), where);
    };
  }

  static LNC_INLINE V normalised(V v, V rstd, V offset) { return N == Norm::layer ? fma(v, rstd, offset) : v * rstd; }

  // Columns [begin, end) of a row, from their deviations. Meanwhile the next group is fetched, where rows are adjacent.
  template <class Values, class Weights, class Biases>
  LNC_INLINE void normalise(int64_t row, int64_t begin, int64_t end, const Terms& t, const Values& values,
                            const Weights& weights, const Biases& biases) const {
    if constexpr (kWritesPast)
      if (plan.reach == Reach::past) return normalise<Reach::past>(row, begin, end, t, values, weights, biases);
    if (plan.reach == Reach::cached)
      normalise<Reach::cached>(row, begin, end, t, values, weights, biases);
    else
      normalise<Reach::fetched>(row, begin, end, t, values, weights, biases);
  }

  template <Reach R, class Values, class Weights, class Biases>
  void normalise(int64_t row, int64_t begin, int64_t end, const Terms& t, const Values& values, const Weights& weights,
                 const Biases& biases) const {
    O* const y = static_cast<O*>(p.output) + row * p.cols + begin;
    const T* const x = R == Reach::cached ? nullptr : input(row) + begin;
    const T* const r = R != Reach::cached && p.residual ? residual(row) + begin : x;
    const int64_t ahead = plan.group * p.cols;
    const V rstd = set<V>(t.rstd), offset = set<V>(t.offset);
    sweep<V>(end - begin, [=](int64_t i, auto where, int u) LNC_LAMBDA {
      if (R != Reach::cached && starts_line<T>(u)) prefetch(x, i + ahead), prefetch(r, i + ahead);
      store(y + i, fma(normalised(values(i, where), rstd, offset), weights(i, where), biases(i, where)), where,
            R == Reach::past);
    });
  }
};

}  // namespace lnc::cpu::LNC_ISA
