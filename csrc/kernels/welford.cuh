// Mean and squared deviations: of a thread's registers as one chunk, merged by Chan, Golub and LeVeque's formula
// ("Updating formulae and a pairwise algorithm for computing sample variances", 1979), Welford's for more than one
// value at a time.
#pragma once
#include "platform.cuh"

namespace lnc {

// A product rounded on its own, where fusing it with an addition in one place and not in another would make two
// values of what must be one.
__device__ inline float multiply(float a, float b) {
#ifdef LNC_HOST_EXECUTION
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}
__device__ inline double multiply(double a, double b) {
#ifdef LNC_HOST_EXECUTION
  return a * b;
#else
  return __dmul_rn(a, b);
#endif
}

__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <class A>
struct Moments {
  A n;     // how many values
  A mean;  // their mean
  A m2;    // sum of squared deviations from it
};

// Of parts that have all the same n, merged without a division: twice n is what the other part's n takes it to.
template <class A>
struct EqualMoments {
  A sum;
  A m2;
  A half_inverse;  // 1 / (2n)
  __device__ void merge(A other_sum, A other_m2) {
    const A delta = other_sum - sum;  // n times the difference of the means
    m2 = multiply_add(multiply(delta, delta), half_inverse, m2 + other_m2);
    sum += other_sum;
    half_inverse *= A(0.5);
  }
};

template <class A>
__device__ inline A divide(A a, A b) {
  return a / b;
}
// Two units in the last place: a share of two counts, off the critical path but for its instructions.
template <>
__device__ inline float divide(float a, float b) {
  return __fdividef(a, b);
}

template <class A>
__device__ inline Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  const A n = a.n + b.n;
  const A share = n > A(0) ? divide(b.n, n) : A(0);
  const A delta = b.mean - a.mean;
  return {n, multiply_add(delta, share, a.mean), multiply_add(delta * delta, a.n * share, a.m2 + b.m2)};
}

__device__ inline float inverse_sqrt(float v) {
  const float r = rsqrtf(v);
  return fmaf(0.5f * r, fmaf(-v * r, r, 1.0f), r);  // one Newton step: below one unit in the last place
}
__device__ inline double inverse_sqrt(double v) { return 1.0 / sqrt(v); }

// The variances that can be used as they are, and the powers of two that bring the others' squares into range.
template <class A>
struct Range;
template <>
struct Range<float> {
  static constexpr float kSmallest = 1e-30f, kLargest = 3e38f, kUp = 0x1p100f, kDown = 0x1p-100f;
};
template <>
struct Range<double> {
  static constexpr double kSmallest = 1e-290, kLargest = 1e308, kUp = 0x1p500, kDown = 0x1p-600;
};

}  // namespace lnc
