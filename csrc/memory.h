// Memory of the results.
#pragma once
#include <c10/core/Allocator.h>

namespace lnc {

// PyTorch's memory for the CPU; but where results of so many bytes in all are wanted, and they are large, their memory
// is kept for the next ones when the tensors are gone. The system would take it back and hand it out again page by
// page, cleared, which costs more than the norm that is written there: malloc returns whatever exceeds its thresholds,
// and everything from 32 MiB on.
c10::Allocator* cpu_memory(size_t bytes);

}  // namespace lnc
