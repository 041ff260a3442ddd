// __half for g++, bit-exact: IEEE binary16, round to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  LNC_ASSIGNED_WHOLE(__half)
};
struct alignas(4) __half2 {
  __half x, y;
  LNC_ASSIGNED_WHOLE(__half2)
};
using half = __half;
using half2 = __half2;

inline float __half2float(__half h) {
  const uint32_t sign = uint32_t{h.bits & 0x8000u} << 16, magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00) {  // infinity and NaN
    return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  }
  // Scaling by 2^112 moves the exponent's bias from 15 to 127, and makes subnormals normal.
  const float value = __uint_as_float(magnitude << 13) * 0x1p112f;
  return __uint_as_float(__float_as_uint(value) | sign);
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fff;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and beyond round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum's last bit is worth 2^-24, as a subnormal's
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

inline __half __float2half(float value) { return __float2half_rn(value); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
