// What every machine of the architecture can run: 16-byte vectors, or scalars where the compiler has no vector types.
#include "common.h"

#if defined(__aarch64__) && defined(__GNUC__)
#include <arm_neon.h>
#define LNC_NAME "neon"
#else
#define LNC_NAME "baseline"
#endif
#define LNC_ISA baseline
#ifdef __GNUC__
#define LNC_VECTOR_BYTES 16
#endif
#include "kernels.h"
