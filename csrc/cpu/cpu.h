// The CPU kernels as the glue sees them.
#pragma once
#include <cstdint>

#include "../kernels/params.h"

namespace lnc::cpu {

// Calls task(context, begin, end) over disjoint ranges covering [0, count), possibly from several threads at
// once, none of which is woken for less than grain. Results must not depend on how it divides.
using Task = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, Task task, void* context);

int64_t forward_workspace(const ForwardParams&);    // bytes
int64_t backward_workspace(const BackwardParams&);  // bytes
void forward(const ForwardParams&, ParallelFor);
void backward(const BackwardParams&, ParallelFor);

// The instruction set in use: "baseline", "avx2", "avx512", "neon".
// LAYERNORM_CUDA_CPU=<name> chooses a lower one than the machine has.
const char* instruction_set();

}  // namespace lnc::cpu
