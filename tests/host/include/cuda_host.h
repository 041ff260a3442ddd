// What csrc/kernels/platform.cuh includes instead of CUDA's headers, and the helpers of the kernels that are
// written in PTX otherwise.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace lnc {

struct DeviceTraits;
namespace host {
const DeviceTraits& device_traits();
}

// bar.sync id, threads
inline void group_barrier(int id, int threads, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::named_barrier(id, threads, {file, line});
  asm volatile("" ::: "memory");
}

// The launch's dynamic shared memory, 16-byte aligned.
template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(host::dynamic_shared());
}

}  // namespace lnc
