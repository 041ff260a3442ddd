#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include "common.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LNC_ISA avx2
#define LNC_NAME "avx2"
#define LNC_VECTOR_BYTES 32
#include "kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
