// The AVX-512 kernels on a machine without: the compiler splits their vectors into AVX2's, and the few instructions
// that csrc/cpu/vec.h names are replaced here.
#include <immintrin.h>

#include "cpu/common.h"

#pragma GCC target("avx2,fma,f16c")

namespace emulated {

#define LNC_EMULATED static inline __attribute__((always_inline))

typedef int32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

LNC_EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
LNC_EMULATED __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  for (int i = 0; i < 8; i++) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
}
LNC_EMULATED __m256 castps512_ps256(__m512 v) {
  __m256 low;
  for (int i = 0; i < 8; i++) low[i] = v[i];
  return low;
}
LNC_EMULATED __m256d extractf64x4_pd(__m512d v, int upper) {
  __m256d half{};
  for (int i = 0; i < 4; i++) half[i] = v[4 * upper + i];
  return half;
}
LNC_EMULATED __m512d cvtps_pd(__m256 v) {
  __m512d wide;
  for (int i = 0; i < 8; i++) wide[i] = v[i];
  return wide;
}
LNC_EMULATED double reduce_add_pd(__m512d v) {
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  return v[0];
}
LNC_EMULATED __m512i cvtepu16_epi32(__m256i v) {
  Words wide;
  for (int i = 0; i < 16; i++) wide[i] = ((Halves)v)[i];
  return (__m512i)wide;
}
LNC_EMULATED __m256i cvtepi32_epi16(__m512i v) {
  Halves narrow;
  for (int i = 0; i < 16; i++) narrow[i] = static_cast<uint16_t>(((Words)v)[i]);
  return (__m256i)narrow;
}
LNC_EMULATED __m512i subs_epu16(__m512i a, __m512i b) {
  typedef uint16_t Unsigned __attribute__((vector_size(64)));
  const Unsigned from = (Unsigned)a, less = (Unsigned)b;
  return (__m512i)(from > less ? from - less : Unsigned{});
}
LNC_EMULATED __m512 cvtph_ps(__m256i v) {
  __m512 wide;
  for (int i = 0; i < 16; i++) wide[i] = _cvtsh_ss(((Halves)v)[i]);
  return wide;
}
LNC_EMULATED __m256i cvtps_ph(__m512 v) {
  Halves narrow;
  for (int i = 0; i < 16; i++) narrow[i] = _cvtss_sh(v[i], _MM_FROUND_TO_NEAREST_INT);
  return (__m256i)narrow;
}
template <class V>
LNC_EMULATED V maskz_loadu(uint64_t bytes, const void* p) {
  char v[sizeof(V)] = {};
  for (size_t i = 0; i < sizeof v; i++)
    if (bytes >> i & 1) v[i] = static_cast<const char*>(p)[i];
  V result;
  memcpy(&result, v, sizeof v);
  return result;
}
template <class V>
LNC_EMULATED void mask_storeu(void* p, uint64_t bytes, V v) {
  for (size_t i = 0; i < sizeof v; i++)
    if (bytes >> i & 1) static_cast<char*>(p)[i] = reinterpret_cast<const char*>(&v)[i];
}
LNC_EMULATED void stream_si512(__m512i* p, __m512i v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  memcpy(p, &v, sizeof v);
}

}  // namespace emulated

#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_fmadd_pd emulated::fmadd_pd
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_extractf64x4_pd emulated::extractf64x4_pd
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_reduce_add_pd emulated::reduce_add_pd
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_subs_epu16 emulated::subs_epu16
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph(v)
#define _mm512_maskz_loadu_epi8 emulated::maskz_loadu<__m512i>
#define _mm256_maskz_loadu_epi8 emulated::maskz_loadu<__m256i>
#define _mm512_mask_storeu_epi8 emulated::mask_storeu<__m512i>
#define _mm256_mask_storeu_epi8 emulated::mask_storeu<__m256i>
#define _mm512_stream_si512 emulated::stream_si512

#define LNC_ISA avx512
#define LNC_NAME "avx512"
#define LNC_VECTOR_BYTES 64
#include "cpu/kernels.h"
