// CUDA, or in tests/host the header that stands in for it on a CPU.
#pragma once

#ifdef LNC_HOST_EXECUTION
#include "cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace lnc {

// Blocks that a multiprocessor of the architecture compiled for can hold, of however few threads.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 750 || __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870)
constexpr int kMostBlocks = 16;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1100)
constexpr int kMostBlocks = 24;
#else
constexpr int kMostBlocks = 32;
#endif

}  // namespace lnc
