// Rows in 16-byte packs. A pack is the unit of every load and store and of the division of a row among threads:
// pack i holds the row's elements [i * kPack, (i + 1) * kPack) wherever the row lies in memory, so that alignment
// changes how bytes travel and never which thread adds what to what.
#pragma once
#include "params.h"
#include "plan.h"
#include "platform.cuh"

namespace lnc {

template <class T>
constexpr int kPack = 16 / sizeof(T);

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
// Whether parameters and output can be wider than the data.
template <class T>
constexpr bool kNarrow = sizeof(T) < sizeof(Accumulate<T>);

// Sixteen bytes as they travel.
template <class T>
struct RawOf {
  using type = uint4;
};
template <>
struct RawOf<float> {
  using type = float4;
};
template <>
struct RawOf<double> {
  using type = double2;
};
template <class T>
using Raw = typename RawOf<T>::type;

// ---- elements ---------------------------------------------------------------------------------------------------

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, class A>
__device__ inline T narrow(A x) {
  return static_cast<T>(x);
}
template <>
__device__ inline __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

template <class To, class From>
__device__ inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// Both halves of a word at once: CUDA's own conversions take it apart for each.
template <class T>
__device__ inline void widen_pair(uint32_t word, float& low, float& high) {
#ifdef LNC_HOST_EXECUTION
  low = widen(bits<T>(uint16_t(word)));
  high = widen(bits<T>(uint16_t(word >> 16)));
#else
  if constexpr (std::is_same<T, __half>::value)
    asm("{.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;}"
        : "=f"(low), "=f"(high)
        : "r"(word));
  else
    asm("shl.b32 %0, %2, 16;\n\tand.b32 %1, %2, 0xffff0000;" : "=f"(low), "=f"(high) : "r"(word));
#endif
}

template <class T>
__device__ inline uint32_t narrow_pair(float low, float high) {
  if constexpr (std::is_same<T, __half>::value)
    return bits<uint32_t>(__floats2half2_rn(low, high));
  else
    return bits<uint32_t>(__floats2bfloat162_rn(low, high));
}

template <class T>
__device__ inline void unpack(const Raw<T>& raw, Accumulate<T> (&out)[kPack<T>]) {
  if constexpr (sizeof(T) == 8) {
    out[0] = raw.x, out[1] = raw.y;
  } else if constexpr (sizeof(T) == 4) {
    out[0] = raw.x, out[1] = raw.y, out[2] = raw.z, out[3] = raw.w;
  } else {
    widen_pair<T>(raw.x, out[0], out[1]);
    widen_pair<T>(raw.y, out[2], out[3]);
    widen_pair<T>(raw.z, out[4], out[5]);
    widen_pair<T>(raw.w, out[6], out[7]);
  }
}

template <class T>
__device__ inline Raw<T> pack(const Accumulate<T> (&in)[kPack<T>]) {
  if constexpr (sizeof(T) == 8)
    return make_double2(in[0], in[1]);
  else if constexpr (sizeof(T) == 4)
    return make_float4(in[0], in[1], in[2], in[3]);
  else
    return make_uint4(narrow_pair<T>(in[0], in[1]), narrow_pair<T>(in[2], in[3]), narrow_pair<T>(in[4], in[5]),
                      narrow_pair<T>(in[6], in[7]));
}

// Bits of element e of a pack, e known at compile time.
template <class T>
__device__ inline T element(const uint4& raw, int e) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
  if constexpr (sizeof(T) == 8)
    return bits<T>((uint64_t(word[2 * e + 1]) << 32) | word[2 * e]);
  else if constexpr (sizeof(T) == 4)
    return bits<T>(word[e]);
  else
    return bits<T>(static_cast<uint16_t>(word[e / 2] >> (e % 2 * 16)));
}

template <class T>
__device__ inline void set_element(uint4& raw, int e, T value) {
  uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
  if constexpr (sizeof(T) == 8) {
    const uint64_t b = bits<uint64_t>(value);
    word[2 * e] = uint32_t(b), word[2 * e + 1] = uint32_t(b >> 32);
  } else if constexpr (sizeof(T) == 4) {
    word[e] = bits<uint32_t>(value);
  } else {
    const uint32_t shift = e % 2 * 16;
    word[e / 2] = (word[e / 2] & ~(0xffffu << shift)) | (uint32_t(bits<uint16_t>(value)) << shift);
  }
  raw = make_uint4(word[0], word[1], word[2], word[3]);
}

// Makes the compiler work out anew after this point what it made of a value before, instead of keeping it: the elements
// of a pack, or the places of a thread's packs from its rank. A few instructions cost less than a spilled register.
template <class R>
__device__ inline void forget(R& value) {
#ifndef LNC_HOST_EXECUTION
  if constexpr (std::is_same<R, int>::value)
    asm volatile("" : "+r"(value));
  else if constexpr (std::is_same<R, uint4>::value)
    asm volatile("" : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w));
  else if constexpr (std::is_same<R, float4>::value)
    asm volatile("" : "+f"(value.x), "+f"(value.y), "+f"(value.z), "+f"(value.w));
  else
    asm volatile("" : "+d"(value.x), "+d"(value.y));
#endif
}

__device__ inline uint4 zeros() { return make_uint4(0, 0, 0, 0); }

// Elements [first, last) of a 16-byte window, one by one: at the ends of rows.
template <class T>
__device__ inline uint4 load_elements(const T* window, int first, int last) {
  uint4 raw = zeros();
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e)
    if (e >= first && e < last) set_element<T>(raw, e, window[e]);
  return raw;
}

// Bytes [n, n + 16) of the 32 that low and high make; n is a multiple of 2 up to 16.
__device__ inline uint4 shift_down(const uint4& low, const uint4& high, int n) {
  uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (n & 16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = w[i + 4];
  }
  if (n & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (n & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const int b = (n & 3) * 8;
  return make_uint4(__funnelshift_r(w[0], w[1], b), __funnelshift_r(w[1], w[2], b), __funnelshift_r(w[2], w[3], b),
                    __funnelshift_r(w[3], w[4], b));
}

// A loop, not N copies of its body: few lanes come here, and nothing waits for a store.
template <class T>
__device__ inline void store_elements(T* window, uint4 raw, int first, int last) {
#pragma unroll 1
  for (int e = 0; e < kPack<T> && e < last; ++e) {
    if (e >= first) window[e] = element<T>(raw, 0);
    raw = shift_down(raw, zeros(), sizeof(T));
  }
}

// ---- rows -------------------------------------------------------------------------------------------------------

__device__ inline int64_t row_offset(const RowMap& map, int64_t row) {
  if (row < map.inner) return row * map.inner_stride;
  const uint32_t r = static_cast<uint32_t>(row), inner = static_cast<uint32_t>(map.inner);
  return r / inner * map.outer_stride + r % inner * map.inner_stride;
}

template <class G>
__device__ inline uint4 shuffle_up(const uint4& v, const G& group) {
  return make_uint4(__shfl_up_sync(group.mask, v.x, 1, G::kWidth), __shfl_up_sync(group.mask, v.y, 1, G::kWidth),
                    __shfl_up_sync(group.mask, v.z, 1, G::kWidth), __shfl_up_sync(group.mask, v.w, 1, G::kWidth));
}

template <class G>
__device__ inline uint4 shuffle_down(const uint4& v, const G& group) {
  return make_uint4(__shfl_down_sync(group.mask, v.x, 1, G::kWidth), __shfl_down_sync(group.mask, v.y, 1, G::kWidth),
                    __shfl_down_sync(group.mask, v.z, 1, G::kWidth), __shfl_down_sync(group.mask, v.w, 1, G::kWidth));
}

// Columns of the slice that begins at column begin.
template <class Args>
__device__ inline int slice_cols(const Args& args, int64_t begin) {
  const int64_t left = args.p.cols - begin;
  return static_cast<int>(left < args.slice_cols ? left : args.slice_cols);
}

// Known at compile time where the kernel serves one norm only.
template <Norm norm, class P>
__device__ inline bool is_layer(const P& p) {
  return norm == Norm::any ? p.norm == Norm::layer : norm == Norm::layer;
}

// Which of a row's packs a thread has: v * group.size + group.rank, v < VECS. WHOLE rows lie at multiples of 16 bytes
// and come in whole packs, of which the first SURE of a thread are always there: the plan sees to that. Others end
// anywhere and begin anywhere.
template <class T, bool WHOLE, int SURE>
struct Extent {
  static constexpr int N = kPack<T>;
  static constexpr bool kWhole = WHOLE;
  int cols;

  // For what asks pack by pack whether the row goes on: packs that has() has found are whole.
  __device__ int end() const { return WHOLE ? INT32_MAX : cols; }
  // Elements from pack v on.
  template <class G>
  __device__ int left(int v, const G& group) const {
    return cols - (v * group.size + group.rank) * N;
  }
  template <class G>
  __device__ bool has(int v, const G& group) const {
    return v < SURE || left(v, group) > 0;
  }
  // Calls f(e) for the elements of pack v that exist; only a pack across the row's end looks at every one.
  template <class G, class F>
  __device__ void each(int v, const G& group, F f) const {
    if (WHOLE ? has(v, group) : left(v, group) >= N) {
#pragma unroll
      for (int e = 0; e < N; ++e) f(e);
    } else if (!WHOLE) {
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (e < left(v, group)) f(e);
    }
  }
  // Of the elements of VECS packs, how many exist.
  template <int VECS, class G>
  __device__ int count(const G& group) const {
    int n = 0;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      const int more = left(v, group);
      n += more >= N ? N : more > 0 ? more : 0;
    }
    return n;
  }
};

template <int VECS, bool WHOLE>
constexpr int kSurePacks = WHOLE ? sure_packs(VECS) : 0;

template <class T, class G>
__device__ inline const Raw<T>* thread_packs(const T* row, const G& group) {
  return reinterpret_cast<const Raw<T>*>(row) + group.rank;
}
template <class T, class G>
__device__ inline Raw<T>* thread_packs(T* row, const G& group) {
  return reinterpret_cast<Raw<T>*>(row) + group.rank;
}

// A row that begins anywhere is read in aligned windows, each once but for one a warp: a pack's other half is the next
// lane's window.
template <class T, int VECS, class G>
__device__ inline void load_windows(uint4 (&raw)[VECS], const T* row, int cols, const G& group) {
  constexpr int N = kPack<T>;
  const int skip = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16) / int(sizeof(T));
  const T* base = row - skip;
  const int end = skip + cols;  // in elements from base
  const int last = end / N;     // the window that the row leaves unfilled
  const bool is_last_lane = group.lane() == G::kWidth - 1;
  uint4 head = zeros(), tail = zeros();
  if (group.rank == 0) head = load_elements(base, skip, end);
  bool has_tail = false;
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    const int w = v * group.size + group.rank;
    has_tail |= w == last || (is_last_lane && w + 1 == last);
  }
  if (has_tail && last > 0) tail = load_elements(base + last * N, 0, end - last * N);
  auto window = [&](int w) {
    uint4 value = w == 0 ? head : w == last ? tail : zeros();
    if (w > 0 && w < last) value = reinterpret_cast<const uint4*>(base)[w];
    return value;
  };
#pragma unroll
  for (int v = 0; v < VECS; ++v) raw[v] = window(v * group.size + group.rank);
  uint4 beyond[VECS];
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    beyond[v] = zeros();
    if (is_last_lane && skip) beyond[v] = window(v * group.size + group.rank + 1);
  }
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    uint4 next = shuffle_down(raw[v], group);
    if (is_last_lane) next = beyond[v];
    raw[v] = shift_down(raw[v], next, skip * int(sizeof(T)));
  }
}

// Where load_windows reads, store_windows writes. Windows that two warps share are written by each in part.
template <class T, int VECS, class G>
__device__ inline void store_windows(T* row, const uint4 (&raw)[VECS], int cols, const G& group) {
  constexpr int N = kPack<T>;
  const int skip = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16) / int(sizeof(T));
  T* base = row - skip;
  const int end = skip + cols;
  const bool is_last_lane = group.lane() == G::kWidth - 1;
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    const int w = v * group.size + group.rank;
    uint4 previous = shuffle_up(raw[v], group);
    const uint4 value = shift_down(previous, raw[v], 16 - skip * int(sizeof(T)));
    const int first = group.lane() == 0 ? skip : 0;
    if (first == 0 && (w + 1) * N <= end)
      reinterpret_cast<uint4*>(base)[w] = value;
    else if (w * N < end)
      store_elements(base + w * N, value, first, end - w * N);
    if (is_last_lane && (w + 1) * N < end)
      store_elements(base + (w + 1) * N, shift_down(raw[v], zeros(), 16 - skip * int(sizeof(T))), 0,
                     end - (w + 1) * N < skip ? end - (w + 1) * N : skip);
  }
}

// The thread's packs of a row; zeros beyond its end.
template <class T, int VECS, bool WHOLE, int SURE, class G>
__device__ inline void load_row(Raw<T> (&raw)[VECS], const T* row, const Extent<T, WHOLE, SURE>& extent,
                                const G& group) {
  if constexpr (WHOLE) {
    const Raw<T>* packs = thread_packs(row, group);
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      if (v >= SURE) raw[v] = Raw<T>{};
      if (extent.has(v, group)) raw[v] = packs[v * group.size];
    }
  } else {
    uint4 windows[VECS];
    load_windows(windows, row, extent.cols, group);
#pragma unroll
    for (int v = 0; v < VECS; ++v) raw[v] = bits<Raw<T>>(windows[v]);
  }
}

template <class T, int VECS, bool WHOLE, int SURE, class G>
__device__ inline void store_row(T* row, const Raw<T> (&raw)[VECS], const Extent<T, WHOLE, SURE>& extent,
                                 const G& group) {
  if constexpr (WHOLE) {
    Raw<T>* packs = thread_packs(row, group);
#pragma unroll
    for (int v = 0; v < VECS; ++v)
      if (extent.has(v, group)) packs[v * group.size] = raw[v];
  } else {
    uint4 windows[VECS];
#pragma unroll
    for (int v = 0; v < VECS; ++v) windows[v] = bits<uint4>(raw[v]);
    store_windows(row, windows, extent.cols, group);
  }
}

// Pack i of another, wider array (parameters, output or its gradient in the accumulation type beside 16-bit data).
template <class T, class A = Accumulate<T>>
__device__ inline void load_wide(A (&out)[kPack<T>], const A* row, int i, int cols, bool aligned) {
  constexpr int N = kPack<T>, M = kPack<A>;
  if (aligned && (i + 1) * N <= cols) {
#pragma unroll
    for (int j = 0; j < N; j += M) {
      A part[M];
      unpack<A>(reinterpret_cast<const Raw<A>*>(row + i * N)[j / M], part);
#pragma unroll
      for (int k = 0; k < M; ++k) out[j + k] = part[k];
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) out[e] = i * N + e < cols ? row[i * N + e] : A(0);
}

template <class T, class A = Accumulate<T>>
__device__ inline void store_wide(A* row, const A (&in)[kPack<T>], int i, int cols, bool aligned) {
  constexpr int N = kPack<T>, M = kPack<A>;
  if (aligned && (i + 1) * N <= cols) {
#pragma unroll
    for (int j = 0; j < N; j += M) {
      A part[M];
#pragma unroll
      for (int k = 0; k < M; ++k) part[k] = in[j + k];
      reinterpret_cast<Raw<A>*>(row + i * N)[j / M] = pack<A>(part);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (i * N + e < cols) row[i * N + e] = in[e];
}

// Weight or bias. EARLY of a thread's packs are on their way ahead of the one in use: the compiler moves no load before
// a store, so that each would only leave when the one before has been used. Where EARLY are all of them they stay, or
// where KEEP says so; the others are then fetched each time.
template <class T, int VECS, int EARLY, bool KEEP = false>
struct Param {
  using A = Accumulate<T>;
  static constexpr int N = kPack<T>;
  const void* first;  // null where there is none
  bool wide;          // in the accumulation type
  Raw<T> early[EARLY ? EARLY : 1];

  __device__ Param(const void* p, int64_t column, bool wide)
      : first(!p     ? nullptr
              : wide ? static_cast<const void*>(static_cast<const A*>(p) + column)
                     : static_cast<const void*>(static_cast<const T*>(p) + column)),
        wide(kNarrow<T> && wide) {}

  // PLAIN promises at compile time that there is one, as narrow as the data.
  template <bool PLAIN, class E, class G>
  __device__ void load(const E& extent, const G& group) {
    if (!PLAIN && (!first || wide)) return;
#pragma unroll
    for (int v = 0; v < EARLY; ++v) early[v] = one(v, extent, group);
  }

  template <bool PLAIN, class E, class G>
  __device__ void values(int v, A (&out)[N], A absent, const E& extent, const G& group) {
    if (!PLAIN && !first) {
#pragma unroll
      for (int e = 0; e < N; ++e) out[e] = absent;
    } else if (!PLAIN && wide) {
      load_wide<T>(out, static_cast<const A*>(first), v * group.size + group.rank, extent.end(), true);
    } else if constexpr (EARLY == 0) {
      unpack<T>(one(v, extent, group), out);
    } else if (KEEP && v >= EARLY) {
      unpack<T>(one(v, extent, group), out);
    } else {
      unpack<T>(early[v % EARLY], out);
      if (!KEEP && v + EARLY < VECS) early[v % EARLY] = one(v + EARLY, extent, group);
    }
  }

 private:
  template <class E, class G>
  __device__ Raw<T> one(int v, const E& extent, const G& group) const {
    const T* row = static_cast<const T*>(first);
    const int i = v * group.size + group.rank, left = extent.left(v, group);
    Raw<T> value{};
    if (E::kWhole ? extent.has(v, group) : left >= N)
      value = reinterpret_cast<const Raw<T>*>(row)[i];
    else if (!E::kWhole && left > 0)
      value = bits<Raw<T>>(load_elements(row + i * N, 0, left));
    return value;
  }
};

}  // namespace lnc
