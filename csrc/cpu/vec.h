// Vectors of one instruction set, LNC_ISA (see kernels.h). Arithmetic is the compiler's, through vector
// types; here is what it has no operator for. Without LNC_VECTOR_BYTES a vector is a scalar.
#pragma once
#include "common.h"

#if defined(__GNUC__)
#define LNC_INLINE inline __attribute__((always_inline))
#define LNC_LAMBDA __attribute__((always_inline))
#define LNC_NOINLINE __attribute__((noinline))
#else
#define LNC_INLINE inline
#define LNC_LAMBDA
#define LNC_NOINLINE
#endif

namespace lnc::cpu::LNC_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class E>
struct VectorOf {
#ifdef LNC_VECTOR_BYTES
  static constexpr int lanes = LNC_VECTOR_BYTES / sizeof(E);
  typedef E type __attribute__((vector_size(LNC_VECTOR_BYTES)));
#else
  static constexpr int lanes = 1;
  typedef E type;
#endif
};

template <class E>
using Vector = typename VectorOf<E>::type;
using F = Vector<float>;
using D = Vector<double>;
using I = Vector<int32_t>;
template <class A>
constexpr int kLanes = VectorOf<A>::lanes;

#ifdef LNC_VECTOR_BYTES
typedef uint16_t Half __attribute__((vector_size(LNC_VECTOR_BYTES / 2)));
#define LNC_CONVERT(v, To) __builtin_convertvector(v, To)
#else
using Half = uint16_t;
#define LNC_CONVERT(v, To) static_cast<To>(v)
#endif

// Which lanes of a vector exist in memory: all, or the first n of a row's last few elements.
struct Full {};
struct Part {
  int n;
};

template <class To, class From>
LNC_INLINE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as() reinterprets");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
LNC_INLINE V read(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

LNC_INLINE F set(float a) { return a - F{}; }
LNC_INLINE D set(double a) { return a - D{}; }

// Integer arithmetic on 32-bit lanes, for instruction sets without conversions.
template <class Int>
LNC_INLINE Int half_to_float(Int h) {
  constexpr int32_t inf = 0x7c00 << 13;
  const Int magnitude = (h & 0x7fff) << 13;
  const Int rebased = as<Int>(as<F>(magnitude) * 0x1p112f);  // exact, subnormals too
  return (magnitude >= inf ? rebased | 0x7f800000 : rebased) | (h & 0x8000) << 16;
}

template <class Int>
LNC_INLINE Int float_to_half(Int u) {
  const Int a = u & 0x7fffffff;
  const Int normal = (a - ((127 - 15) << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  const Int subnormal = as<Int>(as<F>(a) + 0.5f) - 0x3f000000;
  const Int finite = a < (113 << 23) ? subnormal : normal;
  const Int special = a > 0x7f800000 ? Int{} + 0x7e00 : Int{} + 0x7c00;
  return (a >= (143 << 23) ? special : finite) | ((u >> 16) & 0x8000);
}

template <class Int>
LNC_INLINE Int float_to_bfloat(Int u) {
  const Int rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return (u & 0x7fffffff) > 0x7f800000 ? Int{} + 0x7fc0 : rounded & 0xffff;
}

LNC_INLINE F load(const float* p, Full) { return read<F>(p); }
LNC_INLINE D load(const double* p, Full) { return read<D>(p); }
LNC_INLINE F widen(bf16, Half h) { return as<F>(LNC_CONVERT(h, I) << 16); }
LNC_INLINE void store(float* p, F v, Full) { memcpy(p, &v, sizeof v); }
LNC_INLINE void store(double* p, D v, Full) { memcpy(p, &v, sizeof v); }

#if LNC_VECTOR_BYTES == 64
LNC_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
LNC_INLINE D fma(D a, D b, D c) { return (D)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
LNC_INLINE float sum(F v) { return _mm512_reduce_add_ps((__m512)v); }
LNC_INLINE double sum(D v) { return _mm512_reduce_add_pd((__m512d)v); }
LNC_INLINE F widen(f16, Half h) { return (F)_mm512_cvtph_ps((__m256i)h); }
LNC_INLINE void store(f16* p, F v, Full) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LNC_INLINE void store(bf16* p, F v, Full) {
#ifdef LNC_AVX512_BF16
  // The instruction flushes subnormal numbers to zero; we do not.
  if (!_mm512_fpclass_ps_mask((__m512)v, 0x20)) {
    const auto rounded = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &rounded, sizeof rounded);
    return;
  }
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)float_to_bfloat(as<I>(v))));
}

#elif LNC_VECTOR_BYTES == 32
LNC_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
LNC_INLINE D fma(D a, D b, D c) { return (D)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
LNC_INLINE float sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
LNC_INLINE double sum(D v) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
LNC_INLINE F widen(f16, Half h) { return (F)_mm256_cvtph_ps((__m128i)h); }
LNC_INLINE void store(f16* p, F v, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
LNC_INLINE void store(bf16* p, F v, Full) {
  const __m256i r = (__m256i)float_to_bfloat(as<I>(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}

#else
#if defined(__aarch64__) && defined(LNC_VECTOR_BYTES)
LNC_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
LNC_INLINE D fma(D a, D b, D c) { return (D)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
LNC_INLINE F fma(F a, F b, F c) { return a * b + c; }
LNC_INLINE D fma(D a, D b, D c) { return a * b + c; }
#endif
template <class A>
LNC_INLINE A sum_lanes(const Vector<A>& v) {
  A lanes[kLanes<A>];
  memcpy(lanes, &v, sizeof v);
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}
LNC_INLINE float sum(F v) { return sum_lanes<float>(v); }
LNC_INLINE double sum(D v) { return sum_lanes<double>(v); }
LNC_INLINE F widen(f16, Half h) { return as<F>(half_to_float(LNC_CONVERT(h, I))); }
LNC_INLINE void store(f16* p, F v, Full) {
  const Half h = LNC_CONVERT(float_to_half(as<I>(v)), Half);
  memcpy(p, &h, sizeof h);
}
LNC_INLINE void store(bf16* p, F v, Full) {
  const Half h = LNC_CONVERT(float_to_bfloat(as<I>(v)), Half);
  memcpy(p, &h, sizeof h);
}
#endif

LNC_INLINE F load(const f16* p, Full) { return widen(f16{}, read<Half>(p)); }
LNC_INLINE F load(const bf16* p, Full) { return widen(bf16{}, read<Half>(p)); }

template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

template <class T>
LNC_INLINE auto load(const T* p, Part part) {
  T lanes[kLanes<Accumulate<T>>] = {};
  memcpy(lanes, p, part.n * sizeof(T));
  return load(lanes, Full{});
}

template <class T, class V>
LNC_INLINE void store(T* p, V v, Part part) {
  T lanes[kLanes<Accumulate<T>>];
  store(lanes, v, Full{});
  memcpy(p, lanes, part.n * sizeof(T));
}

LNC_INLINE float first_of(const float* p) { return *p; }
LNC_INLINE double first_of(const double* p) { return *p; }
template <class T>
LNC_INLINE float first_of(const T* p) {
  const F v = widen(T{}, Half{} + p->bits);
#ifdef LNC_VECTOR_BYTES
  return v[0];
#else
  return v;
#endif
}

// Zero in the lanes that do not exist.
constexpr int32_t kMask[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
template <class V>
LNC_INLINE V keep(V v, Full) {
  return v;
}
template <class V>
LNC_INLINE V keep(V v, Part part) {
#ifdef LNC_VECTOR_BYTES
  return as<V>(as<I>(v) & read<I>(kMask + 16 - part.n * (sizeof(v[0]) / 4)));
#else
  return v;
#endif
}

// Calls body(i, part, index of an independent accumulator) for the vectors of n columns, in one fixed order.
template <int U, int L, class Body, int... Us>
LNC_INLINE void sweep_unrolled(int64_t n, const Body& body, std::integer_sequence<int, Us...>) {
  int64_t i = 0;
  for (; i + U * L <= n; i += U * L) (body(i + Us * L, Full{}, Us), ...);
  for (; i + L <= n; i += L) body(i, Full{}, 0);
  if (i < n) body(i, Part{static_cast<int>(n - i)}, U - 1);
}
template <class A, int U, class Body>
LNC_INLINE void sweep(int64_t n, const Body& body) {
  sweep_unrolled<U, kLanes<A>>(n, body, std::make_integer_sequence<int, U>{});
}

template <class Body, int... Us>
LNC_INLINE void unrolled(const Body& body, std::integer_sequence<int, Us...>) {
  (body(Us), ...);
}
template <int U, class Body>
LNC_INLINE void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int, U>{});
}

}  // namespace lnc::cpu::LNC_ISA
