// Vectors of one instruction set, LNC_ISA (see kernels.h). Arithmetic is the compiler's, through vector
// types; here is what it has no operator for. Without LNC_VECTOR_BYTES a vector is a scalar.
#pragma once
#include "common.h"

#if defined(__GNUC__)
#define LNC_INLINE inline __attribute__((always_inline))
#define LNC_LAMBDA __attribute__((always_inline))
#define LNC_NOINLINE __attribute__((noinline))
#define LNC_UNLIKELY(condition) __builtin_expect(static_cast<bool>(condition), false)
#else
#define LNC_INLINE inline
#define LNC_LAMBDA
#define LNC_NOINLINE
#define LNC_UNLIKELY(condition) (condition)
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
  typedef E type __attribute__((vector_size(LNC_VECTOR_BYTES)));
#else
  typedef E type;
#endif
};
using F = VectorOf<float>::type;
using D = VectorOf<double>::type;
using I = VectorOf<int32_t>::type;
using U = VectorOf<uint32_t>::type;
#ifdef LNC_VECTOR_BYTES
typedef uint16_t Half __attribute__((vector_size(LNC_VECTOR_BYTES / 2)));
typedef uint16_t Words __attribute__((vector_size(LNC_VECTOR_BYTES)));
#else
using Half = uint16_t;
#endif

// A register of bfloat16 as float32: its even and its odd elements, which a shift and a mask can tell apart.
struct Pair {
  F even, odd;
};

// What elements of T are computed in.
template <class T>
struct Computed {
  using Scalar = float;
  using Vector = F;
};
template <>
struct Computed<double> {
  using Scalar = double;
  using Vector = D;
};
template <>
struct Computed<bf16> {
  using Scalar = float;
  using Vector = Pair;
};

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(float);
template <>
constexpr int kLanes<D> = sizeof(D) / sizeof(double);
// Independent vectors in flight in a loop: as many as the registers hold.
template <class V>
constexpr int kUnroll = 4;
template <>
constexpr int kUnroll<Pair> = 2;

// Which lanes of a vector exist in memory: all, or the first n of a row's last few elements.
struct Full {};
struct Part {
  int n;
};

// A loop that is unrolled at every level of optimisation.
template <class Body, int... u>
LNC_INLINE void unrolled(const Body& body, std::integer_sequence<int, u...>) {
  (body(u), ...);
}
template <int unroll, class Body>
LNC_INLINE void unrolled(const Body& body) {
  unrolled(body, std::make_integer_sequence<int, unroll>{});
}

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
template <class V>
LNC_INLINE void write(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

// Its words from 16 - n on are n ones and then zeros.
constexpr int32_t kMask[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

// The first n elements of a vector, fewer than it has, from and to memory; of the others, zero is read.
#if LNC_VECTOR_BYTES == 64
template <class V, class S>
LNC_INLINE V read_part(const S* p, int n) {
  const uint64_t bytes = (uint64_t{1} << n * sizeof(S)) - 1;
  if constexpr (sizeof(V) == 64)
    return as<V>(_mm512_maskz_loadu_epi8(bytes, p));
  else
    return as<V>(_mm256_maskz_loadu_epi8(static_cast<uint32_t>(bytes), p));
}
template <class S, class V>
LNC_INLINE void write_part(S* p, V v, int n) {
  const uint64_t bytes = (uint64_t{1} << n * sizeof(S)) - 1;
  if constexpr (sizeof(V) == 64)
    _mm512_mask_storeu_epi8(p, bytes, as<__m512i>(v));
  else
    _mm256_mask_storeu_epi8(p, static_cast<uint32_t>(bytes), as<__m256i>(v));
}

#else
struct Quads {
  uint64_t first, second;
};

// By powers of two, where there are no masks; and on Zen a masked store costs more than all of these.
template <class S, class V>
LNC_INLINE void write_part(S* elements, V v, int n) {
  char* p = reinterpret_cast<char*>(elements);
  const int bytes = n * int{sizeof(S)};
  uint64_t last = 0;  // what is left to write, fewer than eight bytes
#if LNC_VECTOR_BYTES == 32
  if constexpr (sizeof(V) == 32) {
    __m128i half = _mm256_castsi256_si128(as<__m256i>(v));
    if (bytes & 16) write(p, half), p += 16, half = _mm256_extracti128_si256(as<__m256i>(v), 1);
    return write_part(p, half, bytes & 15);
  }
#endif
  if constexpr (sizeof(V) == 16) {
    const auto quads = as<Quads>(v);
    if (bytes & 8) write(p, quads.first), p += 8;
    last = bytes & 8 ? quads.second : quads.first;
  } else if constexpr (sizeof(V) == 8) {
    last = as<uint64_t>(v);
  }
  if (bytes & 4) write(p, static_cast<uint32_t>(last)), p += 4, last >>= 32;
  if (bytes & 2) write(p, static_cast<uint16_t>(last));
}

#if LNC_VECTOR_BYTES == 32
// By words of 32 bits; then an odd last element of 16.
constexpr uint16_t kLastWord[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xffff};
template <class V, class S>
LNC_INLINE V read_part(const S* p, int n) {
  using Shorts = std::conditional_t<sizeof(V) == 32, Words, Half>;
  const auto* const from = reinterpret_cast<const int*>(p);
  const int32_t* const mask = kMask + 16 - n * int{sizeof(S)} / 4;
  V v;
  if constexpr (sizeof(V) == 32)
    v = as<V>(_mm256_maskload_epi32(from, read<__m256i>(mask)));
  else
    v = as<V>(_mm_maskload_epi32(from, read<__m128i>(mask)));
  if constexpr (sizeof(S) == 2)
    v = as<V>(as<Shorts>(v) | ((Shorts{} + read<uint16_t>(p + n - 1)) & read<Shorts>(kLastWord + 16 - n)));
  return v;
}
#else
template <class V, class S>
LNC_INLINE V read_part(const S* elements, int n) {
  const char* const p = reinterpret_cast<const char*>(elements);
  const int bytes = n * int{sizeof(S)};
  const char* end = p + bytes;
  uint64_t last = 0;
  if (bytes & 2) end -= 2, last = read<uint16_t>(end);
  if (bytes & 4) end -= 4, last = last << 32 | read<uint32_t>(end);
  if constexpr (sizeof(V) == 16)
    return as<V>(bytes & 8 ? Quads{read<uint64_t>(p), last} : Quads{last, 0});
  else if constexpr (sizeof(V) == 8)
    return as<V>(last);
  else
    return V{};
}
#endif
#endif

// Elements of T in a cache line.
template <class T>
constexpr int kLine = 64 / sizeof(T);

#if LNC_VECTOR_BYTES >= 32
constexpr bool kWritesPast = true;
#else
constexpr bool kWritesPast = false;
#endif

// To memory past the caches; p is aligned. The task that does so ends with a fence.
template <class V>
LNC_INLINE void write_past(void* p, V v) {
#if LNC_VECTOR_BYTES == 64
  if constexpr (sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), as<__m512i>(v));
#endif
#if LNC_VECTOR_BYTES >= 32
  if constexpr (sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), as<__m256i>(v));
  if constexpr (sizeof v == 16) return _mm_stream_si128(static_cast<__m128i*>(p), as<__m128i>(v));
#endif
  write(p, v);
}
LNC_INLINE void fence() {
#if LNC_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

template <class V>
LNC_INLINE V set(std::conditional_t<std::is_same_v<V, D>, double, float> a) {
  if constexpr (std::is_same_v<V, Pair>)
    return {a - F{}, a - F{}};
  else
    return a - V{};
}

#if LNC_VECTOR_BYTES >= 32
// Not by the same instruction that converts to float16: Zen takes twice as long for it as for a conversion and a store.
LNC_INLINE Half in_register(Half v) {
  asm("" : "+x"(v));
  return v;
}
#endif

// What the instruction set has instructions for: fma, the sum over lanes (in double), 16-bit lanes to and from 32-bit
// ones (to: values below 2^16), the upper halves of two vectors' lanes side by side, and float16.
#if LNC_VECTOR_BYTES == 64
LNC_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
LNC_INLINE D fma(D a, D b, D c) { return (D)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
LNC_INLINE double sum(D v) { return _mm512_reduce_add_pd((__m512d)v); }
LNC_INLINE double sum(F v) {
  const __m256 low = _mm512_castps512_ps256((__m512)v), high = (__m256)_mm512_extractf64x4_pd((__m512d)v, 1);
  return sum((D)_mm512_cvtps_pd(low) + (D)_mm512_cvtps_pd(high));
}
LNC_INLINE Words upper_halves(U even, U odd) { return as<Words>((even >> 16) | (odd & 0xffff0000)); }
LNC_INLINE Words lower_halves(U even, U odd) { return as<Words>((even & 0xffff) | (odd << 16)); }
LNC_INLINE Words minus_saturated(Words a, Words b) { return (Words)_mm512_subs_epu16((__m512i)a, (__m512i)b); }
LNC_INLINE I spread(Half h) { return (I)_mm512_cvtepu16_epi32((__m256i)h); }
LNC_INLINE Half pack(I v) { return (Half)_mm512_cvtepi32_epi16((__m512i)v); }
LNC_INLINE F widen(f16, Half h) { return (F)_mm512_cvtph_ps((__m256i)h); }
LNC_INLINE Half narrow(f16, F v) { return in_register((Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }

#elif LNC_VECTOR_BYTES == 32
LNC_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
LNC_INLINE D fma(D a, D b, D c) { return (D)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
LNC_INLINE double sum(D v) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
LNC_INLINE double sum(F v) {
  const __m128 low = _mm256_castps256_ps128((__m256)v), high = _mm256_extractf128_ps((__m256)v, 1);
  return sum((D)_mm256_cvtps_pd(low) + (D)_mm256_cvtps_pd(high));
}
LNC_INLINE Words upper_halves(U even, U odd) {
  return (Words)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
}
LNC_INLINE Words lower_halves(U even, U odd) {
  return (Words)_mm256_blend_epi16((__m256i)even, (__m256i)(odd << 16), 0xaa);
}
LNC_INLINE Words minus_saturated(Words a, Words b) { return (Words)_mm256_subs_epu16((__m256i)a, (__m256i)b); }
LNC_INLINE I spread(Half h) { return (I)_mm256_cvtepu16_epi32((__m128i)h); }
LNC_INLINE Half pack(I v) {
  return (Half)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
LNC_INLINE F widen(f16, Half h) { return (F)_mm256_cvtph_ps((__m128i)h); }
LNC_INLINE Half narrow(f16, F v) { return in_register((Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }

#else
#if defined(__aarch64__) && defined(LNC_VECTOR_BYTES)
LNC_INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
LNC_INLINE D fma(D a, D b, D c) { return (D)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
#else
LNC_INLINE F fma(F a, F b, F c) { return a * b + c; }
LNC_INLINE D fma(D a, D b, D c) { return a * b + c; }
#endif
template <class A, class V>
LNC_INLINE double sum_lanes(const V& v) {
  A lanes[kLanes<V>];
  memcpy(lanes, &v, sizeof v);
  double total = 0;
  unrolled<kLanes<V>>([&](int i) LNC_LAMBDA { total += lanes[i]; });
  return total;
}
LNC_INLINE double sum(F v) { return sum_lanes<float>(v); }
LNC_INLINE double sum(D v) { return sum_lanes<double>(v); }
#ifdef LNC_VECTOR_BYTES
LNC_INLINE I spread(Half h) { return __builtin_convertvector(h, I); }
LNC_INLINE Half pack(I v) { return __builtin_convertvector(v, Half); }
#else
LNC_INLINE I spread(Half h) { return h; }
LNC_INLINE Half pack(I v) { return static_cast<Half>(v); }
#endif
LNC_INLINE U upper_halves(U even, U odd) { return (even >> 16) | (odd & 0xffff0000); }
LNC_INLINE F widen(f16, Half half) {
  const I h = spread(half), magnitude = (h & 0x7fff) << 13;
  const I rebased = as<I>(as<F>(magnitude) * 0x1p112f);  // exact, subnormals too
  return as<F>((magnitude >= (0x7c00 << 13) ? rebased | 0x7f800000 : rebased) | (h & 0x8000) << 16);
}
LNC_INLINE Half narrow(f16, F v) {
  const I u = as<I>(v), a = u & 0x7fffffff;
  const I normal = (a - ((127 - 15) << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  const I subnormal = as<I>(as<F>(a) + 0.5f) - 0x3f000000;
  const I finite = a < (113 << 23) ? subnormal : normal;
  const I special = a > 0x7f800000 ? I{} + 0x7e00 : I{} + 0x7c00;
  return pack((a >= (143 << 23) ? special : finite) | ((u >> 16) & 0x8000));
}
#endif

LNC_INLINE double root(double v) {
#ifdef __GNUC__
  return __builtin_sqrt(v);
#else
  return sqrt(v);
#endif
}
LNC_INLINE bool all(bool condition) { return condition; }
LNC_INLINE double lane(double v, int) { return v; }

// Numbers of some rows: a core takes as long for one square root or division as for several.
#if LNC_VECTOR_BYTES >= 32
constexpr int kTogether = 4;
typedef double Together __attribute__((vector_size(kTogether * sizeof(double))));
typedef int64_t Conditions __attribute__((vector_size(kTogether * sizeof(int64_t))));
LNC_INLINE Together root(Together v) { return (Together)_mm256_sqrt_pd((__m256d)v); }
LNC_INLINE bool all(Conditions c) { return _mm256_movemask_pd((__m256d)c) == 15; }
LNC_INLINE double lane(Together v, int i) { return v[i]; }
#else
constexpr int kTogether = 1;
using Together = double;
#endif

LNC_INLINE Pair operator+(Pair a, Pair b) { return {a.even + b.even, a.odd + b.odd}; }
LNC_INLINE Pair operator-(Pair a, Pair b) { return {a.even - b.even, a.odd - b.odd}; }
LNC_INLINE Pair operator*(Pair a, Pair b) { return {a.even * b.even, a.odd * b.odd}; }
LNC_INLINE Pair fma(Pair a, Pair b, Pair c) { return {fma(a.even, b.even, c.even), fma(a.odd, b.odd, c.odd)}; }
LNC_INLINE double sum(Pair v) { return sum(v.even + v.odd); }

// To nearest even. NaN stays NaN if its lower half is clear, as it is where NaN comes from bfloat16 or from arithmetic.
LNC_INLINE U to_bf16(Pair v) {
  const U even = as<U>(v.even), odd = as<U>(v.odd);
#if LNC_VECTOR_BYTES >= 32
  // The lower half, less one where the upper is even, has its first bit set where the upper is to grow.
  const Words upper = upper_halves(even, odd);
  return as<U>(upper + (minus_saturated(lower_halves(even, odd), ~upper & 1) >> 15));
#else
  const auto rounded = [](U u) { return u + 0x7fff + ((u >> 16) & 1); };
  return upper_halves(rounded(even), rounded(odd));
#endif
}

// From float32 values, as to_bf16 wants NaN to be.
LNC_INLINE F clear_nan(F v) { return as<F>(v != v ? I{} + 0x7fc00000 : as<I>(v)); }
LNC_INLINE Pair clear_nan(Pair v) { return {clear_nan(v.even), clear_nan(v.odd)}; }
LNC_INLINE D clear_nan(D v) { return v; }

// The same for a sum of two bfloat16 values, as a value (Veltkamp): exact where it is subnormal, for then it has no
// bits to lose; not finite from 2^111 on, where the product is not.
LNC_INLINE F rounded_sum(F v) {
  const F product = v * 65537.0f;
  return product - (product - v);
}
LNC_INLINE Pair rounded_sum(Pair v) { return {rounded_sum(v.even), rounded_sum(v.odd)}; }

// The elements of a Pair as they lie in memory as float32.
struct InOrder {
  F low, high;
};
#ifdef LNC_VECTOR_BYTES
#if defined(__clang__) || __GNUC__ >= 12
#define LNC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LNC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif
template <int... i>
LNC_INLINE Pair split(F low, F high, std::integer_sequence<int, i...>) {
#if LNC_VECTOR_BYTES == 32
  // By quarters first: no instruction takes single elements from anywhere in two registers.
  const F a = LNC_SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11), b = LNC_SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
  return {LNC_SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14), LNC_SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15)};
#else
  return {LNC_SHUFFLE(low, high, (2 * i)...), LNC_SHUFFLE(low, high, (2 * i + 1)...)};
#endif
}
template <int... i>
LNC_INLINE InOrder join(Pair v, std::integer_sequence<int, i...>) {
  constexpr int L = sizeof...(i);
  return {LNC_SHUFFLE(v.even, v.odd, (i / 2 + i % 2 * L)...),
          LNC_SHUFFLE(v.even, v.odd, (L / 2 + i / 2 + i % 2 * L)...)};
}
#else
LNC_INLINE Pair split(F low, F high, std::integer_sequence<int, 0>) { return {low, high}; }
LNC_INLINE InOrder join(Pair v, std::integer_sequence<int, 0>) { return {v.even, v.odd}; }
#endif
using LaneIndices = std::make_integer_sequence<int, kLanes<F>>;
LNC_INLINE Pair in_lanes(F low, F high) { return split(low, high, LaneIndices{}); }
LNC_INLINE InOrder in_order(Pair v) { return join(v, LaneIndices{}); }

// A vector as it lies in memory, and what it is there.
LNC_INLINE F stored(const float*, F v) { return v; }
LNC_INLINE D stored(const double*, D v) { return v; }
LNC_INLINE Half stored(const f16*, F v) { return narrow(f16{}, v); }
LNC_INLINE U stored(const bf16*, Pair v) { return to_bf16(v); }
LNC_INLINE F value(const float*, F v) { return v; }
LNC_INLINE D value(const double*, D v) { return v; }
LNC_INLINE F value(const f16*, Half h) { return widen(f16{}, h); }
LNC_INLINE Pair value(const bf16*, U u) { return {as<F>(u << 16), as<F>(u & 0xffff0000)}; }

template <class T, class V>
LNC_INLINE void load(const T* p, V& v) {
  v = value(p, read<decltype(stored(p, v))>(p));
}
LNC_INLINE void load(const float* p, Pair& v) { v = in_lanes(read<F>(p), read<F>(p + kLanes<F>)); }

template <class V, class S>
LNC_INLINE void store(S* p, V v, Full) {
  write(p, stored(p, v));
}
LNC_INLINE void store(float* p, Pair v, Full) {
  const InOrder elements = in_order(v);
  write(p, elements.low), write(p + kLanes<F>, elements.high);
}
template <class V, class S>
LNC_INLINE void store_past(S* p, V v) {
  write_past(p, stored(p, v));
}
LNC_INLINE void store_past(float* p, Pair v) {
  const InOrder elements = in_order(v);
  write_past(p, elements.low), write_past(p + kLanes<F>, elements.high);
}

template <class V, class S>
LNC_INLINE V load(const S* p, Full) {
  V v;
  load(p, v);
  return v;
}
// Lanes that are not there are zero.
template <class V, class S>
LNC_INLINE V load(const S* p, Part part) {
  if constexpr (std::is_same_v<V, Pair> && std::is_same_v<S, float>) {
    constexpr int L = kLanes<F>;
    return part.n < L ? in_lanes(read_part<F>(p, part.n), F{}) : in_lanes(read<F>(p), read_part<F>(p + L, part.n - L));
  } else {
    return value(p, read_part<decltype(stored(p, V{}))>(p, part.n));
  }
}
template <class V, class S>
LNC_INLINE void store(S* p, V v, Part part) {
  if constexpr (std::is_same_v<V, Pair> && std::is_same_v<S, float>) {
    constexpr int L = kLanes<F>;
    const InOrder elements = in_order(v);
    if (part.n < L) return write_part(p, elements.low, part.n);
    write(p, elements.low), write_part(p + L, elements.high, part.n - L);
  } else {
    write_part(p, stored(p, v), part.n);
  }
}

template <class V, class S, class Where>
LNC_INLINE void store(S* p, V v, Where where, bool past) {
  if constexpr (std::is_same_v<Where, Full>)
    if (LNC_UNLIKELY(past)) return store_past(p, v);
  store(p, v, where);
}
// A vector as it lies in memory, and the value that it has there.
template <class V, class B>
struct Rounded {
  B bits;
  V value;
};
// A sum of two values of T. Quick: of bfloat16 not finite where it is 2^111 or more.
template <bool Quick, class T, class V>
LNC_INLINE auto rounded(V sum) {
  const T* const element = nullptr;
  if constexpr (Quick && std::is_same_v<T, bf16>) {
    const V v = rounded_sum(sum);
    return Rounded<V, U>{as<U>(upper_halves(as<U>(v.even), as<U>(v.odd))), v};
  } else {
    const auto bits = stored(element, sum);
    return Rounded<V, std::decay_t<decltype(bits)>>{bits, value(element, bits)};
  }
}
template <class T, class B>
LNC_INLINE void write(T* p, B bits, Full) {
  write(p, bits);
}
template <class T, class B>
LNC_INLINE void write(T* p, B bits, Part part) {
  write_part(p, bits, part.n);
}
template <class T, class B>
LNC_INLINE void write_past(T* p, B bits, Full) {
  write_past(p, bits);
}
template <class T, class B>
LNC_INLINE void write_past(T* p, B bits, Part part) {
  write(p, bits, part);
}

// Buffers of our own hold values in the order of the lanes, and are padded to whole vectors where that is
// not the order of the elements.
template <class V, class A, class Where>
LNC_INLINE V get(const A* p, Where where) {
  if constexpr (std::is_same_v<V, Pair>)
    return {read<F>(p), read<F>(p + kLanes<F>)};
  else
    return load<V>(p, where);
}
template <class V, class A, class Where>
LNC_INLINE void put(A* p, V v, Where where) {
  if constexpr (std::is_same_v<V, Pair>)
    write(p, v.even), write(p + kLanes<F>, v.odd);
  else
    store(p, v, where);
}

// Keeps a vector in a register: the compiler would as soon read it again with each operation that needs it, and a core
// reads fewer vectors of this size in a cycle than it computes with. AVX2 has too few registers for that; on NEON,
// which has enough, it was not measured.
#if LNC_VECTOR_REGISTERS == 32
constexpr bool kHolds = true;
template <class V>
LNC_INLINE V hold(V v) {
  if constexpr (!std::is_same_v<V, Pair>) asm("" : "+v"(v));
  return v;
}
#else
constexpr bool kHolds = false;
template <class V>
LNC_INLINE V hold(V v) {
  return v;
}
#endif

// Zero in the lanes that are not there.
template <class V>
LNC_INLINE V keep(V v, int n) {
  if constexpr (kLanes<V> == 1)
    return n ? v : V(0);
  else
    return as<V>(as<I>(v) & read<I>(kMask + 16 - n * (kLanes<F> / kLanes<V>)));
}
LNC_INLINE Pair keep(Pair v, int n) { return {keep(v.even, (n + 1) / 2), keep(v.odd, n / 2)}; }
template <class V>
LNC_INLINE V keep(V v, Part part) {
  return keep(v, part.n);
}
template <class V>
LNC_INLINE V keep(V v, Full) {
  return v;
}

LNC_INLINE float first_of(const float* p) { return *p; }
LNC_INLINE double first_of(const double* p) { return *p; }
LNC_INLINE float first_of(const bf16* p) { return as<float>(static_cast<uint32_t>(p->bits) << 16); }
LNC_INLINE float first_of(const f16* p) {
  const F v = widen(f16{}, Half{} + p->bits);
  return read<float>(&v);
}

// Whether not all of eight elements have one sign.
template <class T>
LNC_INLINE bool has_both_signs(const T* p) {
#if LNC_VECTOR_BYTES >= 32
  constexpr int all = sizeof(T) == 2 ? 0xaaaa : 0xff;
  int signs;
  if constexpr (sizeof(T) == 2)
    signs = _mm_movemask_epi8(read<__m128i>(p)) & all;
  else if constexpr (sizeof(T) == 4)
    signs = _mm256_movemask_ps(read<__m256>(p));
  else
    signs = _mm256_movemask_pd(read<__m256d>(p)) | _mm256_movemask_pd(read<__m256d>(p + 4)) << 4;
  return signs != 0 && signs != all;
#else
  constexpr int size = sizeof(T), words = size;
  constexpr uint64_t signs = size == 2 ? 0x8000800080008000 : size == 4 ? 0x8000000080000000 : 0x8000000000000000;
  uint64_t word[words], any = 0, all = signs;
  memcpy(word, p, sizeof word);
  unrolled<words>([&](int i) LNC_LAMBDA { any |= word[i], all &= word[i]; });
  return (any & signs) != 0 && all != signs;
#endif
}

// Into the second-level cache: the first holds what is being worked on. p[i] need not exist.
template <class T>
LNC_INLINE void prefetch(const T* p, int64_t i) {
#ifdef __GNUC__
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + i * sizeof(T)), 0, 2);
#else
  (void)p, (void)i;
#endif
}
// Whether the u-th of several adjacent vectors of T is the first to touch its cache line.
template <class T>
constexpr bool starts_line(int u) {
  return u * kLanes<typename Computed<T>::Vector> % kLine<T> == 0;
}

struct Nothing {
  LNC_INLINE void operator()() const {}
};

// Calls body(i, where, u) for the vectors of n columns, in one fixed order; u < unroll numbers those that may
// be in flight together. And meanwhile(), before each round of that many.
template <int L, class Body, class Meanwhile, int... u>
LNC_INLINE void sweep(int64_t n, const Body& body, const Meanwhile& meanwhile, std::integer_sequence<int, u...>) {
  constexpr int unroll = sizeof...(u);
  int64_t i = 0;
  for (; i + unroll * L <= n; i += unroll * L) meanwhile(), (body(i + u * L, Full{}, u), ...);
  for (; i + L <= n; i += L) body(i, Full{}, 0);
  if (i < n) body(i, Part{static_cast<int>(n - i)}, unroll - 1);
}
template <class V, int unroll = kUnroll<V>, class Body, class Meanwhile = Nothing>
LNC_INLINE void sweep(int64_t n, const Body& body, const Meanwhile& meanwhile = {}) {
  sweep<kLanes<V>>(n, body, meanwhile, std::make_integer_sequence<int, unroll>{});
}

}  // namespace lnc::cpu::LNC_ISA
