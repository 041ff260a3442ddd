// __nv_bfloat16 for g++, bit-exact: the upper half of a float, round to nearest even.
#pragma once
#include <cstdint>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
  LNC_ASSIGNED_WHOLE(__nv_bfloat16)
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  LNC_ASSIGNED_WHOLE(__nv_bfloat162)
};

inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(uint32_t{b.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {__bfloat162float(b.x), __bfloat162float(b.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
