// All kernels, for one instruction set. A translation unit of its own includes common.h and its intrinsics,
// then turns its instruction set on for everything that follows, names it (LNC_ISA, LNC_VECTOR_BYTES, and
// LNC_VECTOR_REGISTERS where there are more than 16) and includes this. What follows lives in lnc::cpu::LNC_ISA and
// calls no inline function from outside that the linker could share between instruction sets.
#pragma once
#include "backward.h"
#include "forward.h"

namespace lnc::cpu::LNC_ISA {

template <template <class T, class O, Norm N> class Pass, class T, class O, class Params>
void run(const Params& p, ParallelFor parallel) {
  if (p.norm == Norm::layer)
    Pass<T, O, Norm::layer>(p, parallel).run();
  else
    Pass<T, O, Norm::rms>(p, parallel).run();
}

template <template <class T, class O, Norm N> class Pass, class Params>
void run(const Params& p, ParallelFor parallel) {
  const bool wide = p.output_dtype == DType::f32;
  switch (p.dtype) {
    case DType::f64:
      return run<Pass, double, double>(p, parallel);
    case DType::f32:
      return run<Pass, float, float>(p, parallel);
    case DType::f16:
      return wide ? run<Pass, f16, float>(p, parallel) : run<Pass, f16, f16>(p, parallel);
    case DType::bf16:
      return wide ? run<Pass, bf16, float>(p, parallel) : run<Pass, bf16, bf16>(p, parallel);
  }
}

extern const Kernels kernels;
const Kernels kernels = {LNC_NAME, &run<Forward, ForwardParams>, &run<Backward, BackwardParams>};

}  // namespace lnc::cpu::LNC_ISA
