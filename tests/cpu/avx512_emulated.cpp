// The AVX-512 kernels on a machine without: the compiler splits their vectors into AVX2's, and the few instructions
// that csrc/cpu/vec.h names are replaced here.
#include <immintrin.h>

#include "cpu/common.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // of functions that are all inlined
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC target("avx2,fma,f16c")

namespace emulated {

#define LNC_EMULATED static inline __attribute__((always_inline))

template <class V>
struct Halves {
  V low, high;
};

template <class To, class From>
LNC_EMULATED To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as() reinterprets");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <int n, class A, class V>
LNC_EMULATED A sum(const V& v) {
  A lanes[n];
  memcpy(lanes, &v, sizeof lanes);
  for (int width = n / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

LNC_EMULATED __m512 fmadd_ps(__m512 a_, __m512 b_, __m512 c_) {
  const auto a = as<Halves<__m256>>(a_), b = as<Halves<__m256>>(b_), c = as<Halves<__m256>>(c_);
  return as<__m512>(Halves<__m256>{_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)});
}
LNC_EMULATED __m512d fmadd_pd(__m512d a_, __m512d b_, __m512d c_) {
  const auto a = as<Halves<__m256d>>(a_), b = as<Halves<__m256d>>(b_), c = as<Halves<__m256d>>(c_);
  return as<__m512d>(Halves<__m256d>{_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)});
}
LNC_EMULATED float reduce_add_ps(__m512 v) { return sum<16, float>(v); }
LNC_EMULATED double reduce_add_pd(__m512d v) { return sum<8, double>(v); }
LNC_EMULATED __m512i cvtepu16_epi32(__m256i v) {
  const auto h = as<Halves<__m128i>>(v);
  return as<__m512i>(Halves<__m256i>{_mm256_cvtepu16_epi32(h.low), _mm256_cvtepu16_epi32(h.high)});
}
LNC_EMULATED __m256i cvtepi32_epi16(__m512i v) {
  int32_t wide[16];
  int16_t narrow[16];
  memcpy(wide, &v, sizeof wide);
  for (int i = 0; i < 16; i++) narrow[i] = static_cast<int16_t>(wide[i]);
  return as<__m256i>(narrow);
}
LNC_EMULATED __m512 cvtph_ps(__m256i v) {
  const auto h = as<Halves<__m128i>>(v);
  return as<__m512>(Halves<__m256>{_mm256_cvtph_ps(h.low), _mm256_cvtph_ps(h.high)});
}
LNC_EMULATED __m256i cvtps_ph(__m512 v) {
  const auto h = as<Halves<__m256>>(v);
  return as<__m256i>(Halves<__m128i>{_mm256_cvtps_ph(h.low, _MM_FROUND_TO_NEAREST_INT),
                                     _mm256_cvtps_ph(h.high, _MM_FROUND_TO_NEAREST_INT)});
}
LNC_EMULATED void stream_si512(__m512i* p, __m512i v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  memcpy(p, &v, sizeof v);
}

}  // namespace emulated

#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fmadd_pd emulated::fmadd_pd
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_add_pd emulated::reduce_add_pd
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph(v)
#define _mm512_stream_si512 emulated::stream_si512

#define LNC_ISA avx512
#define LNC_NAME "avx512"
#define LNC_VECTOR_BYTES 64
#include "cpu/kernels.h"
