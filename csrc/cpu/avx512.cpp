#if defined(__x86_64__) && defined(__GNUC__)
#ifndef __clang__  // its own header's _mm512_undefined_*() (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "common.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define LNC_ISA avx512
#define LNC_NAME "avx512"
#define LNC_VECTOR_BYTES 64
#define LNC_VECTOR_REGISTERS 32
#include "kernels.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
