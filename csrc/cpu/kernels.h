// All kernels, for one instruction set. A translation unit of its own includes common.h and its intrinsics,
// then turns its instruction set on for everything that follows, names it (LNC_ISA, LNC_VECTOR_BYTES) and
// includes this. What follows lives in lnc::cpu::LNC_ISA and calls no inline function from outside that the
// linker could share between instruction sets.
#pragma once
#include "backward.h"
#include "forward.h"

namespace lnc::cpu::LNC_ISA {

template <template <class T, class P, class O, Norm N> class Pass, class T, class P, class O, class Params>
void run_norm(const Params& p, ParallelFor parallel) {
  if (p.norm == Norm::layer)
    Pass<T, P, O, Norm::layer>(p, parallel).run();
  else
    Pass<T, P, O, Norm::rms>(p, parallel).run();
}

template <template <class T, class P, class O, Norm N> class Pass, class T, class Params>
void run_16bit(const Params& p, ParallelFor parallel) {
  if (p.param_dtype == p.dtype)
    run_norm<Pass, T, T, T>(p, parallel);
  else if (p.output_dtype == p.dtype)
    run_norm<Pass, T, float, T>(p, parallel);
  else
    run_norm<Pass, T, float, float>(p, parallel);
}

template <template <class T, class P, class O, Norm N> class Pass, class Params>
void run(const Params& p, ParallelFor parallel) {
  switch (p.dtype) {
    case DType::f64:
      return run_norm<Pass, double, double, double>(p, parallel);
    case DType::f32:
      return run_norm<Pass, float, float, float>(p, parallel);
    case DType::f16:
      return run_16bit<Pass, f16>(p, parallel);
    case DType::bf16:
      return run_16bit<Pass, bf16>(p, parallel);
  }
}

extern const Kernels kernels;
const Kernels kernels = {LNC_NAME, &run<Forward, ForwardParams>, &run<Backward, BackwardParams>};

}  // namespace lnc::cpu::LNC_ISA
