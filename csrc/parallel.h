// Torch's threads, for kernels that know nothing of torch.
#pragma once
#include "cpu/cpu.h"

namespace lnc {

// A cpu::ParallelFor in which threads that are done help the others: cores differ in speed, and other programs or a
// neighbour on the same core make them differ.
void parallel_for(int64_t count, int64_t grain, cpu::Task task, void* context);

}  // namespace lnc
