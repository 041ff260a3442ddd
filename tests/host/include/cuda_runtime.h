// CUDA's built-ins for g++: every thread of a launch is a fiber of machine.cpp.
// Only what the kernels use. Semantics follow the CUDA C++ programming guide; where the hardware would
// misbehave silently, the machine reports.
#pragma once
#include <math.h>  // unlike <cmath>, with float overloads outside std, as on the device
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One copy for each block: memory.cpp answers the address lookup that a thread-local variable compiles to.
#define __shared__ static thread_local __attribute__((tls_model("global-dynamic")))

// Assignment is one access of the whole: without it the compiler would not report, in an instrumented build, that
// the result of a function was stored to memory.
namespace lnc::host {
template <size_t>
struct Whole;
template <>
struct Whole<2> {
  typedef uint16_t __attribute__((may_alias)) type;
};
template <>
struct Whole<4> {
  typedef uint32_t __attribute__((may_alias)) type;
};
template <>
struct Whole<8> {
  typedef uint64_t __attribute__((may_alias)) type;
};
template <>
struct Whole<16> {
  typedef unsigned __int128 __attribute__((may_alias)) type;
};
}  // namespace lnc::host
#define LNC_ASSIGNED_WHOLE(Name)                                             \
  Name() = default;                                                          \
  Name(const Name&) = default;                                               \
  __forceinline__ Name& operator=(const Name& other) {                       \
    using Bits = typename lnc::host::Whole<sizeof(Name)>::type;              \
    *reinterpret_cast<Bits*>(this) = *reinterpret_cast<const Bits*>(&other); \
    return *this;                                                            \
  }

#define LNC_VECTOR2(Name, Scalar)           \
  struct alignas(2 * sizeof(Scalar)) Name { \
    Scalar x, y;                            \
    LNC_ASSIGNED_WHOLE(Name)                \
  };                                        \
  inline Name make_##Name(Scalar x, Scalar y) { return {x, y}; }
#define LNC_VECTOR4(Name, Scalar)           \
  struct alignas(4 * sizeof(Scalar)) Name { \
    Scalar x, y, z, w;                      \
    LNC_ASSIGNED_WHOLE(Name)                \
  };                                        \
  inline Name make_##Name(Scalar x, Scalar y, Scalar z, Scalar w) { return {x, y, z, w}; }
LNC_VECTOR2(float2, float)
LNC_VECTOR4(float4, float)
LNC_VECTOR2(double2, double)
LNC_VECTOR2(int2, int)
LNC_VECTOR4(int4, int)
LNC_VECTOR2(uint2, unsigned)
LNC_VECTOR4(uint4, unsigned)
LNC_VECTOR2(ushort2, unsigned short)
LNC_VECTOR4(ushort4, unsigned short)
#undef LNC_VECTOR2
#undef LNC_VECTOR4

#define threadIdx (lnc::host::thread_index())
#define blockIdx (lnc::host::block_index())
#define blockDim (lnc::host::block_dim())
#define gridDim (lnc::host::grid_dim())
constexpr int warpSize = 32;

// `file` and `line` are the call's own: threads that meet must come from the same one.
#define LNC_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(LNC_SITE) {
  lnc::host::block_barrier({file, line});
  asm volatile("" ::: "memory");
}
inline void __syncwarp(unsigned mask = 0xffffffffu, LNC_SITE) {
  lnc::host::meet(lnc::host::Meeting::syncwarp, mask, 0, 0, 32, {file, line});
  asm volatile("" ::: "memory");
}

#define LNC_SHUFFLE(name, meeting, Argument)                                                                          \
  template <class T>                                                                                                  \
  inline T name(unsigned mask, T value, Argument argument, int width = 32, LNC_SITE) {                                \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");                                    \
    uint64_t bits = 0;                                                                                                \
    std::memcpy(&bits, &value, sizeof(T));                                                                            \
    bits = lnc::host::meet(lnc::host::Meeting::meeting, mask, bits, static_cast<int>(argument), width, {file, line}); \
    std::memcpy(&value, &bits, sizeof(T));                                                                            \
    return value;                                                                                                     \
  }
LNC_SHUFFLE(__shfl_sync, shfl, int)
LNC_SHUFFLE(__shfl_xor_sync, shfl_xor, int)
LNC_SHUFFLE(__shfl_up_sync, shfl_up, unsigned)
LNC_SHUFFLE(__shfl_down_sync, shfl_down, unsigned)
#undef LNC_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, LNC_SITE) {
  return static_cast<unsigned>(lnc::host::meet(lnc::host::Meeting::ballot, mask, predicate != 0, 0, 32, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, LNC_SITE) {
  return lnc::host::meet(lnc::host::Meeting::ballot, mask, predicate != 0, 0, 32, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, LNC_SITE) {
  return lnc::host::meet(lnc::host::Meeting::ballot, mask, predicate != 0, 0, 32, {file, line}) == mask;
}
inline unsigned __activemask() { return lnc::host::active_mask(); }

template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcs(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
__forceinline__ void __stcg(T* p, T value) {
  *p = value;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / __builtin_sqrt(a)); }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / __builtin_sqrt(a)); }
inline double rsqrt(double a) { return 1.0 / __builtin_sqrt(a); }
inline float rsqrt(float a) { return rsqrtf(a); }

inline float __int_as_float(int bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline int __float_as_int(float v) {
  int bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }

#undef LNC_SITE
