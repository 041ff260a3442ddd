// Rows, partial results and their merges, for one instruction set (see kernels.h).
#pragma once
#include "vec.h"

namespace lnc::cpu::LNC_ISA {

template <class A>
constexpr DType kAccumulateType = sizeof(A) == 8 ? DType::f64 : DType::f32;

template <class T>
LNC_INLINE const T* row_of(const void* base, const RowMap& map, int64_t row) {
  const int64_t offset = row < map.inner ? row * map.inner_stride
                                         : row / map.inner * map.outer_stride + row % map.inner * map.inner_stride;
  return static_cast<const T*>(base) + offset;
}

// A weight or bias that is not there.
struct Ones {};
struct Zeros {};
template <class A, class T, class Where>
LNC_INLINE Vector<A> at(const T* p, int64_t i, Where where) {
  return load(p + i, where);
}
template <class A, class Where>
LNC_INLINE Vector<A> at(Ones, int64_t, Where) {
  return set(A(1));
}
template <class A, class Where>
LNC_INLINE Vector<A> at(Zeros, int64_t, Where) {
  return set(A(0));
}

constexpr int kAccumulators = 4;
template <class A>
struct Accumulators {
  Vector<A> v[kAccumulators] = {};
  LNC_INLINE A total() const { return sum((v[0] + v[1]) + (v[2] + v[3])); }
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

}  // namespace lnc::cpu::LNC_ISA
