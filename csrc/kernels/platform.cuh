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
