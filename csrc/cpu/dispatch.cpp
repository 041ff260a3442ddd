// Chooses an instruction set, once, when first called.
#include <cstdlib>

#include "common.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lnc::cpu {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

// The best that this machine (its operating system included) can run, or a lower one named by
// LAYERNORM_CUDA_CPU.
const Kernels& choose() {
  const Kernels* chosen = &baseline::kernels;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const struct {
    bool there;
    const Kernels* kernels;
  } higher[] = {
      {has_avx2, &avx2::kernels},
      {has_avx512, &avx512::kernels},
  };
  const char* wanted = std::getenv("LAYERNORM_CUDA_CPU");
  for (const auto& set : higher) {
    if (!set.there || (wanted && !std::strcmp(wanted, chosen->name))) break;
    chosen = set.kernels;
  }
#endif
  return *chosen;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace

int64_t cache_bytes = 16 << 20;

void will_write(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // What is smaller holds hardly a huge page, and mostly comes from memory that malloc has kept.
  constexpr int64_t huge = 2 << 20, much = 4 << 20;
  if (bytes < much) return;
  // Whole huge pages around it: at either end one of them spares up to 511 faults.
  const auto begin = reinterpret_cast<uintptr_t>(p) / huge * huge;
  const auto end = (reinterpret_cast<uintptr_t>(p) + bytes + huge - 1) / huge * huge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failing, it changes nothing
#else
  (void)p, (void)bytes;
#endif
}

const char* instruction_set() { return kernels().name; }

int64_t forward_workspace(const ForwardParams& p) { return p.cols > 0 ? ForwardPlan::of(p).workspace : 0; }
int64_t backward_workspace(const BackwardParams& p) { return p.cols > 0 ? BackwardPlan::of(p).workspace : 0; }

void forward(const ForwardParams& p, ParallelFor parallel) {
  if (p.rows > 0 && p.cols > 0) kernels().forward(p, parallel);
}

void backward(const BackwardParams& p, ParallelFor parallel) {
  if (p.cols == 0) return;
  if (p.rows > 0) return kernels().backward(p, parallel);
  const size_t bytes = static_cast<size_t>(p.cols * size_of(p.param_dtype));
  if (p.grad_weight) std::memset(p.grad_weight, 0, bytes);
  if (p.grad_bias) std::memset(p.grad_bias, 0, bytes);
}

}  // namespace lnc::cpu
