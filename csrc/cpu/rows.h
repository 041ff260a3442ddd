// Rows, partial results and their merges, for one instruction set (see kernels.h).
#pragma once
#include "vec.h"

namespace lnc::cpu::LNC_ISA {

template <class T>
LNC_INLINE const T* row_of(const void* base, const RowMap& map, int64_t row) {
  const int64_t offset = row < map.inner ? row * map.inner_stride
                                         : row / map.inner * map.outer_stride + row % map.inner * map.inner_stride;
  return static_cast<const T*>(base) + offset;
}

// Vectors of columns: of elements as they came, or about a pivot, or of a buffer of ours.
template <class V, class S>
struct Elements {
  const S* p;
  template <class Where>
  LNC_INLINE V operator()(int64_t i, Where where) const {
    return load<V>(p + i, where);
  }
};
template <class V, class S>
struct Deviations {
  const S* p;
  V pivot;
  template <class Where>
  LNC_INLINE V operator()(int64_t i, Where where) const {
    return load<V>(p + i, where) - pivot;
  }
};
template <class V, class A>
struct Buffer {
  const A* p;
  template <class Where>
  LNC_INLINE V operator()(int64_t i, Where where) const {
    return get<V>(p + i, where);
  }
};

// Vectors of a parameter that is not there.
template <class V, int value>
struct Constant {
  template <class Where>
  LNC_INLINE V operator()(int64_t, Where) const {
    return set<V>(value);
  }
};

template <class V>
struct Accumulators {
  V v[kUnroll<V>] = {};
  LNC_INLINE void add(const Accumulators& other) {
    unrolled<kUnroll<V>>([&](int u) LNC_LAMBDA { v[u] = v[u] + other.v[u]; });
  }
  LNC_INLINE V folded() const {
    if constexpr (kUnroll<V> == 4)
      return (v[0] + v[1]) + (v[2] + v[3]);
    else
      return v[0] + v[1];
  }
};

LNC_INLINE Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.squares + b.squares + delta * delta * a.count * share};
}

LNC_INLINE Sums merge(const Sums& a, const Sums& b) { return {a.g + b.g, a.g_xhat + b.g_xhat}; }

// Merges leaf(begin) ... leaf(end - 1) in a tree whose shape is fixed by their number.
template <class Leaf>
auto pairwise(int64_t begin, int64_t end, const Leaf& leaf) -> decltype(leaf(begin)) {
  if (end - begin == 1) return leaf(begin);
  const int64_t middle = begin + (end - begin + 1) / 2;
  return merge(pairwise(begin, middle, leaf), pairwise(middle, end, leaf));
}

template <class Body>
LNC_INLINE void for_ranges(ParallelFor parallel, int64_t count, int64_t grain, const Body& body) {
  struct Call {
    static void range(void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); }
  };
  if (count <= grain)
    body(int64_t{0}, count);
  else
    parallel(count, grain, &Call::range, const_cast<void*>(static_cast<const void*>(&body)));
}

// The parameter as the kernels want it: A, in the order of the lanes; a constant where there is none. It is
// read in place where it is so already, else written to a buffer.
template <class T, class Params>
auto* parameter(const Params& p, ParallelFor parallel, const void* from, double absent, void* buffer) {
  using A = typename Computed<T>::Scalar;
  using V = typename Computed<T>::Vector;
  if (from && reads_parameters(p)) return static_cast<const A*>(from);
  A* const to = static_cast<A*>(buffer);
  constexpr int64_t tile = 1024;
  for_ranges(parallel, ceil_div(p.cols, tile), kGrain / tile, [&](int64_t begin, int64_t end) {
    const int64_t start = begin * tile, n = (end * tile < p.cols ? end * tile : p.cols) - start;
    sweep<V>(n, [&](int64_t i, auto where, int) LNC_LAMBDA {
      const int64_t j = start + i;
      put(to + j,
          !from                      ? set<V>(static_cast<A>(absent))
          : p.param_dtype == p.dtype ? load<V>(static_cast<const T*>(from) + j, where)
                                     : clear_nan(load<V>(static_cast<const A*>(from) + j, where)),
          where);
    });
  });
  return static_cast<const A*>(to);
}

}  // namespace lnc::cpu::LNC_ISA
