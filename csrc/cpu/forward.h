// Forward, for one instruction set (see kernels.h):
//   y = (x - mean) * rstd * weight + bias,  or for rms  y = x * rstd * weight + bias
#pragma once
#include "statistics.h"

namespace lnc::cpu::LNC_ISA {

template <class T, class O, Norm N>
class Forward {
  using Stats = Statistics<T, N>;
  using A = typename Stats::A;
  using V = typename Stats::V;
  static constexpr int64_t kChunk = Stats::kChunk;
  static constexpr bool kConverts = Stats::kConverts;

  const ForwardParams& p;
  const ParallelFor parallel;
  const ForwardPlan plan = ForwardPlan::of(p);
  const Stats statistics{p, plan};
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
    const A pivot = statistics.pivot(row);
    const auto moments = [&](int64_t c) { return statistics.moments_of(row, c, pivot, copy); };
    const Terms<A> t = statistics.finish(row, pivot, pairwise(0, plan.chunks, moments));
    with_parameters(0, [&](const auto& weights, const auto& biases)
                           LNC_LAMBDA { normalise(row, 1, 0, p.cols, &t, copy, weights, biases); });
  }

  void run_group(int64_t first, int64_t rows) const {
    alignas(64) T copies[kChunk];
    Terms<A> terms[ForwardPlan::kMaxGroup];
    statistics.look_at_group(terms, first, rows, copies);
    with_parameters(0, [&](const auto& weights, const auto& biases)
                           LNC_LAMBDA { normalise_group(first, rows, terms, copies, weights, biases); });
  }

  // Long rows: two, and meanwhile a look at the next two, while there are two more. Returns the first row not done.
  int64_t run_by_twos(int64_t row, int64_t end) const {
    if (end - row < 4) return row;
    Terms<A> terms[2];
    for (int i = 0; i < 2; i++) {
      const A pivot = statistics.about(row + i);
      const auto deviations = values<N == Norm::layer>(statistics.input(row + i), pivot);
      statistics.look_at(terms[i], row + i, pivot, deviations, Nothing{});
    }
    for (; end - row >= 4; row += 2) {
      const A next[2] = {statistics.about(row + 2), statistics.about(row + 3)};
      const bool about_zero = terms[0].pivot == 0 && terms[1].pivot == 0 && next[0] == 0 && next[1] == 0;
      with_parameters(0, [&](const auto& weights, const auto& biases) LNC_LAMBDA {
        if constexpr (N == Norm::layer)
          if (!about_zero) return normalise_two_and_look<true>(row, terms, next, weights, biases);
        normalise_two_and_look<false>(row, terms, next, weights, biases);
      });
    }
    with_parameters(0, [&](const auto& weights, const auto& biases)
                           LNC_LAMBDA { normalise(row, 2, 0, p.cols, terms, nullptr, weights, biases); });
    return row + 2;
  }

  // The same chunks and merges as by rows, hence the same bits.
  void run_by_columns() const {
    auto* parts = reinterpret_cast<Moments*>(static_cast<char*>(p.workspace) + plan.parameters_bytes);
    for_ranges(parallel, p.rows * plan.chunks, grain_of(kChunk), [&](int64_t begin, int64_t end) {
      alignas(64) T copy[kChunk];
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / plan.chunks;
        parts[i] = statistics.moments_of(row, i % plan.chunks, statistics.pivot(row), copy);
      }
    });
    Terms<A> terms[ForwardPlan::kMaxSplitRows];
    for (int64_t row = 0; row < p.rows; row++) {
      const auto moments = [&](int64_t c) { return parts[row * plan.chunks + c]; };
      terms[row] = statistics.finish(row, statistics.pivot(row), pairwise(0, plan.chunks, moments));
    }
    for_ranges(parallel, p.rows * plan.chunks, grain_of(kChunk), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row = i / plan.chunks, start = i % plan.chunks * kChunk;
        with_parameters(start, [&](const auto& weights, const auto& biases) LNC_LAMBDA {
          normalise(row, 1, start, start + statistics.chunk_size(i % plan.chunks), terms + row, nullptr, weights,
                    biases);
        });
      }
      if (plan.reach == Reach::past) fence();
    });
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

  template <bool Centred>
  static LNC_INLINE auto values(const T* x, A pivot) {
    if constexpr (Centred)
      return Deviations<V, T>{x, set<V>(pivot)};
    else
      return Elements<V, T>{x};
  }

  // A group of rows of one chunk.
  template <class Weights, class Biases>
  LNC_NOINLINE void normalise_group(int64_t first, int64_t rows, const Terms<A>* terms, const T* copies,
                                    const Weights& weights, const Biases& biases) const {
    int64_t r = 0;
    if constexpr (kConverts && !std::is_same_v<Weights, Constant<V, 1>>)
      for (; plan.reach == Reach::cached && r + 2 <= rows; r += 2) normalise_two(first + r, terms + r, weights, biases);
    if (r < rows) normalise(first + r, rows - r, 0, p.cols, terms + r, copies + r * padded(p.cols), weights, biases);
  }

  // Two rows of 16-bit data, which share the parameters. From far away, rows are better fetched one by one.
  template <class Weights, class Biases>
  LNC_INLINE void normalise_two(int64_t first, const Terms<A>* terms, const Weights& weights,
                                const Biases& biases) const {
    if constexpr (N == Norm::layer)
      if (terms[0].pivot != 0 || terms[1].pivot != 0) return normalise_two<true>(first, terms, weights, biases);
    normalise_two<false>(first, terms, weights, biases);
  }

  template <bool Centred, class Weights, class Biases>
  LNC_NOINLINE void normalise_two(int64_t first, const Terms<A>* terms, const Weights& weights,
                                  const Biases& biases) const {
    sweep<V, 2>(p.cols, columns_of_two<Centred>(first, terms, weights, biases));
  }

  // Two rows, and then the terms of the next two, which are looked at meanwhile: what comes from further away is read
  // while this is computed and written. For each of their columns, two are looked at: of one row, then of the other.
  template <bool Centred, class Weights, class Biases>
  LNC_NOINLINE void normalise_two_and_look(int64_t first, Terms<A>* terms, const A* next, const Weights& weights,
                                           const Biases& biases) const {
    constexpr int step = kUnroll<V> / 2;
    const auto two = columns_of_two<Centred>(first, terms, weights, biases);
    int64_t done = 0;
    const auto meanwhile = [&]() LNC_LAMBDA {
      unrolled<step>([&](int u) LNC_LAMBDA { two(done + u * kLanes<V>, Full{}, u); });
      done += step * kLanes<V>;
    };
    for (int i = 0; i < 2; i++) {
      const int64_t row = first + 2 + i;
      statistics.look_at(terms[i], row, next[i], values<Centred>(statistics.input(row), next[i]), meanwhile);
    }
    sweep<V, 2>(p.cols - done, [&](int64_t i, auto where, int u) LNC_LAMBDA { two(done + i, where, u); });
  }

  template <bool Centred, class Weights, class Biases>
  LNC_INLINE auto columns_of_two(int64_t first, const Terms<A>* terms, const Weights& weights,
                                 const Biases& biases) const {
    const auto values0 = values<Centred>(statistics.source(first), terms[0].pivot);
    const auto values1 = values<Centred>(statistics.source(first + 1), terms[1].pivot);
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

  // Columns [begin, end) of rows, of which copies are read where their sums have gone past the caches.
  template <class Weights, class Biases>
  LNC_INLINE void normalise(int64_t first, int64_t rows, int64_t begin, int64_t end, const Terms<A>* terms,
                            const T* copies, const Weights& weights, const Biases& biases) const {
    bool about_zero = true;
    for (int64_t r = 0; r < rows; r++) about_zero &= terms[r].pivot == 0;
    about_zero ? normalise<false>(first, rows, begin, end, terms, copies, weights, biases)
               : normalise<N == Norm::layer>(first, rows, begin, end, terms, copies, weights, biases);
  }

  template <bool Centred, class Weights, class Biases>
  LNC_INLINE void normalise(int64_t first, int64_t rows, int64_t begin, int64_t end, const Terms<A>* terms,
                            const T* copies, const Weights& weights, const Biases& biases) const {
    if constexpr (kWritesPast)
      if (plan.reach == Reach::past)
        return normalise<Reach::past, Centred>(first, rows, begin, end, terms, copies, weights, biases);
    if (plan.reach == Reach::cached)
      normalise<Reach::cached, Centred>(first, rows, begin, end, terms, copies, weights, biases);
    else
      normalise<Reach::fetched, Centred>(first, rows, begin, end, terms, copies, weights, biases);
  }

  // Meanwhile the next group is fetched, where rows are adjacent.
  template <Reach R, bool Centred, class Weights, class Biases>
  LNC_NOINLINE void normalise(int64_t first, int64_t rows, int64_t begin, int64_t end, const Terms<A>* terms,
                              const T* copies, const Weights& weights, const Biases& biases) const {
    const int64_t ahead = plan.group * p.cols;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = first + r;
      O* const y = static_cast<O*>(p.output) + row * p.cols + begin;
      const T* const x = R == Reach::cached ? nullptr : statistics.input(row) + begin;
      const T* const residual = R != Reach::cached && p.residual ? statistics.residual(row) + begin : x;
      const V rstd = set<V>(terms[r].rstd), offset = set<V>(terms[r].offset);
      const auto value = values<Centred>(statistics.source(row, copies, r) + begin, terms[r].pivot);
      sweep<V>(end - begin, [=](int64_t i, auto where, int u) LNC_LAMBDA {
        if (R != Reach::cached && starts_line<T>(u)) prefetch(x, i + ahead), prefetch(residual, i + ahead);
        store(y + i, fma(normalised(value(i, where), rstd, offset), weights(i, where), biases(i, where)), where,
              R == Reach::past);
      });
    }
  }
};

}  // namespace lnc::cpu::LNC_ISA
