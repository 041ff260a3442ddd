// Rows in 16-byte packs. A pack is the unit of every load and store and of the division of a row among threads:
// pack i holds the row's elements [i * kPack, (i + 1) * kPack) wherever the row lies in memory, so that alignment
// changes how bytes travel and never which thread adds what to what.
#pragma once
#include "params.h"
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

template <class T>
__device__ inline void unpack(const uint4& raw, Accumulate<T> (&out)[kPack<T>]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < 2; ++i) out[i] = bits<double>((uint64_t(word[2 * i + 1]) << 32) | word[2 * i]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = bits<float>(word[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same<T, __half>::value) {
        const float2 pair = __half22float2(bits<__half2>(word[i]));
        out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
      } else {
        out[2 * i] = bits<float>(word[i] << 16), out[2 * i + 1] = bits<float>(word[i] & 0xffff0000u);
      }
    }
  }
}

template <class T>
__device__ inline uint4 pack(const Accumulate<T> (&in)[kPack<T>]) {
  uint32_t word[4];
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < 2; ++i) {
      const uint64_t b = bits<uint64_t>(in[i]);
      word[2 * i] = uint32_t(b), word[2 * i + 1] = uint32_t(b >> 32);
    }
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = bits<uint32_t>(in[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = make_float2(in[2 * i], in[2 * i + 1]);
      if constexpr (std::is_same<T, __half>::value)
        word[i] = bits<uint32_t>(__float22half2_rn(pair));
      else
        word[i] = bits<uint32_t>(__float22bfloat162_rn(pair));
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
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

// Makes the compiler unpack a pack anew after this point instead of keeping what it unpacked before: a few
// conversions cost less than a spilled register.
__device__ inline void forget(uint4& raw) {
#ifndef LNC_HOST_EXECUTION
  asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
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

// Whether every row of an array begins at a multiple of 16 bytes. Rows of one launch all take the same path.
inline bool is_aligned(const void* p, const RowMap& map, int64_t rows, int64_t size) {
  auto multiple = [](int64_t bytes) { return bytes % 16 == 0; };
  return multiple(reinterpret_cast<intptr_t>(p)) &&
         (rows == 1 || map.inner == 1 || multiple(map.inner_stride * size)) &&
         (rows <= map.inner || multiple(map.outer_stride * size));
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

// The thread's packs v * group.size + group.rank of a row of cols elements; zeros beyond its end.
// A misaligned row is read in aligned windows, each once but for one a warp: the pack's other half is the next
// lane's window. ALIGNED promises at compile time what aligned says at run time.
template <bool ALIGNED = false, class T, int VECS, class G>
__device__ inline void load_row(uint4 (&raw)[VECS], const T* row, int cols, bool aligned, const G& group) {
  constexpr int N = kPack<T>;
  if (ALIGNED || aligned) {
    const uint4* packs = reinterpret_cast<const uint4*>(row);
    const int full = cols / N;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      const int i = v * group.size + group.rank;
      raw[v] = zeros();
      if (i < full) raw[v] = packs[i];
    }
    if (cols % N != 0 && full % group.size == group.rank) {
      const uint4 tail = load_elements(row + full * N, 0, cols % N);
#pragma unroll
      for (int v = 0; v < VECS; ++v)
        if (v * group.size + group.rank == full) raw[v] = tail;
    }
    return;
  }
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
    if (is_last_lane) beyond[v] = window(v * group.size + group.rank + 1);
  }
#pragma unroll
  for (int v = 0; v < VECS; ++v) {
    uint4 next = shuffle_down(raw[v], group);
    if (is_last_lane) next = beyond[v];
    raw[v] = shift_down(raw[v], next, skip * int(sizeof(T)));
  }
}

// Where load_row reads, store_row writes. Windows that two warps share are written by each in part.
template <class T, int VECS, class G>
__device__ inline void store_row(T* row, const uint4 (&raw)[VECS], int cols, bool aligned, const G& group) {
  constexpr int N = kPack<T>;
  if (aligned) {
    uint4* packs = reinterpret_cast<uint4*>(row);
    const int full = cols / N;
#pragma unroll
    for (int v = 0; v < VECS; ++v) {
      const int i = v * group.size + group.rank;
      if (i < full) packs[i] = raw[v];
    }
    if (cols % N != 0 && full % group.size == group.rank) {
      uint4 tail = raw[0];
#pragma unroll
      for (int v = 1; v < VECS; ++v)
        if (v * group.size + group.rank == full) tail = raw[v];
      store_elements(row + full * N, tail, 0, cols % N);
    }
    return;
  }
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

// kPack<T> values of another, wider array (parameters in the accumulation type beside 16-bit data).
template <class T, class A = Accumulate<T>>
__device__ inline void load_wide(A (&out)[kPack<T>], const A* row, int i, int cols, bool aligned) {
  constexpr int N = kPack<T>, M = kPack<A>;
  if (aligned && (i + 1) * N <= cols) {
#pragma unroll
    for (int j = 0; j < N; j += M) {
      A part[M];
      unpack<A>(reinterpret_cast<const uint4*>(row + i * N)[j / M], part);
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
      reinterpret_cast<uint4*>(row + i * N)[j / M] = pack<A>(part);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (i * N + e < cols) row[i * N + e] = in[e];
}

// Weight or bias: the thread's packs of it. KEEP: they wait in registers, if they are as narrow as the data.
template <class T, int VECS, bool KEEP>
struct Params {
  using A = Accumulate<T>;
  static constexpr int N = kPack<T>;
  const void* first;  // null where there is none
  int cols;
  bool wide;
  int begin = 0;  // the pack that pack 0 below stands for
  uint4 raw[KEEP ? VECS : 1];

  __device__ Params(const void* p, int64_t column, int cols, bool wide)
      : first(!p     ? nullptr
              : wide ? static_cast<const void*>(static_cast<const A*>(p) + column)
                     : static_cast<const void*>(static_cast<const T*>(p) + column)),
        cols(cols),
        wide(wide) {}

  // From the row's pack v of the thread on.
  template <class G>
  __device__ void load(const G& group, int v = 0) {
    begin = v * group.size;
    if constexpr (KEEP)
      if (first && !wide) load_row<true>(raw, static_cast<const T*>(first) + begin * N, cols - begin * N, true, group);
  }

  template <class G>
  __device__ void values(int v, A (&out)[N], A absent, const G& group) const {
    if (!first) {
#pragma unroll
      for (int e = 0; e < N; ++e) out[e] = absent;
    } else if (wide) {
      load_wide<T>(out, static_cast<const A*>(first), begin + v * group.size + group.rank, cols, true);
    } else if constexpr (KEEP) {
      unpack<T>(raw[v], out);
    } else {
      const int i = begin + v * group.size + group.rank;
      const T* row = static_cast<const T*>(first);
      uint4 value = zeros();
      if ((i + 1) * N <= cols)
        value = reinterpret_cast<const uint4*>(row)[i];
      else if (i * N < cols)
        value = load_elements(row + i * N, 0, cols - i * N);
      unpack<T>(value, out);
    }
  }
};

}  // namespace lnc
