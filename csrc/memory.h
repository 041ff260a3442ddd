// Memory of the results.
#pragma once
#include <c10/core/Allocator.h>

namespace lnc {

// PyTorch's memory for the CPU, but a large tensor's is kept for the next one when the tensor is gone. The system would
// take it back and hand it out again page by page, cleared, which costs more than the norm that is written there:
// malloc returns whatever exceeds its thresholds, and everything from 32 MiB on.
c10::Allocator* cpu_memory(size_t bytes);

}  // namespace lnc
