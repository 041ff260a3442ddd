// Runs the CUDA kernels without PyTorch: fills inputs, checks every output against float64, times.
#include <functional>
#include <memory>

#include "arrays.h"
#include "kernels/launch.h"
#include "options.h"
#include "reference.h"
#include "roof.cuh"

namespace lnc::standalone {
namespace {

constexpr double kEps = 1e-5;

// Milliseconds, the median of repeats runs; one more warms up where there are several.
double time(int64_t repeats, const std::function<cudaError_t()>& run, const char* what) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  if (repeats > 1) check(run(), what);
  std::vector<float> times(repeats);
  for (float& t : times) {
    check(cudaEventRecord(begin, nullptr), "cudaEventRecord");
    check(run(), what);
    check(cudaEventRecord(end, nullptr), "cudaEventRecord");
    check(cudaEventSynchronize(end), what);
    check(cudaEventElapsedTime(&t, begin, end), "cudaEventElapsedTime");
  }
  check(cudaDeviceSynchronize(), what);
  cudaEventDestroy(begin), cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[repeats / 2];
}

void print_time(const char* name, double milliseconds, int64_t bytes) {
  std::printf("%-12s %10.2f us %8.1f GB/s\n", name, 1e3 * milliseconds, bytes / milliseconds * 1e-6);
}

// Both move as many bytes as the norm needs, from and to arrays of their own.
void time_roof(const Options& o, int64_t bytes) {
  const int64_t halves = ceil_div(bytes, 2 * 16), thirds = ceil_div(bytes, 3 * 16);
  const Array a(DType::f32, 4 * halves, 0), b(DType::f32, 4 * thirds, 0), out(DType::f32, 4 * halves, 0);
  auto launch = [](const void* kernel, int64_t packs, void** args) {
    const dim3 grid(static_cast<unsigned>(ceil_div(packs, kRoofThreads)));
    return cudaLaunchKernel(kernel, grid, dim3(kRoofThreads), args, 0, nullptr);
  };
  void *first = a.data(), *second = b.data(), *result = out.data();
  int64_t packs = halves;
  void* copy_args[] = {&first, &result, &packs};
  const auto copy = [&] { return launch(reinterpret_cast<const void*>(copy_roof), packs, copy_args); };
  print_time("copy", time(o.repeats, copy, "copy"), 2 * 16 * packs);
  packs = thirds;
  void* add_args[] = {&first, &second, &result, &packs};
  const auto add = [&] { return launch(reinterpret_cast<const void*>(add_roof), packs, add_args); };
  print_time("two in, one", time(o.repeats, add, "add"), 3 * 16 * packs);
}

// The plan that the launchers will follow; refuses where the tier asked for cannot hold the row.
Plan announce(const Options& o, const DeviceTraits& device) {
  const bool aligned = o.misalign * size_of(o.dtype) % 16 == 0;
  const Plan plan = o.backward ? plan_backward(o.rows, o.cols, o.dtype, device, aligned)
                               : plan_forward(o.rows, o.cols, o.dtype, device, aligned);
  if (!o.tier.empty() && o.tier != plan.tier->name)
    refuse("no tier " + o.tier + " holds a row of " + std::to_string(o.cols) + "; --list-tiers lists them");
  std::printf("%s %lld x %lld %s, sm_%d with %d multiprocessors: tier %s (%s), %lld x %lld blocks of %d threads\n",
              o.backward ? "backward" : "forward", static_cast<long long>(o.rows), static_cast<long long>(o.cols),
              name_of(o.dtype), device.arch, device.sm_count, plan.tier->name, plan.tier->reason,
              static_cast<long long>(plan.blocks_x), static_cast<long long>(plan.blocks_y), plan.threads);
  return plan;
}

struct Workspace {
  void* data = nullptr;
  explicit Workspace(int64_t bytes) {
    if (bytes) check(cudaMalloc(&data, bytes), "cudaMalloc");
  }
  ~Workspace() { cudaFree(data); }
};

using Pointer = std::unique_ptr<Array>;
void* data(const Pointer& p) { return p ? p->data() : nullptr; }

bool finish(bool right, std::initializer_list<const Pointer*> outputs) {
  for (const Pointer* p : outputs)
    if (*p && (*p)->written_before_its_beginning()) {
      std::printf("an output was written before its beginning: WRONG\n");
      right = false;
    }
  return right;
}

bool forward(const Options& o, const DeviceTraits& device) {
  const int64_t count = o.rows * o.cols;
  Inputs in;
  in.input = normal(o.seed, count, o.offset, 1, o.dtype);
  if (o.residual) in.residual = normal(o.seed + 1, count, 0, 1, o.dtype);
  if (o.weight) in.weight = normal(o.seed + 2, o.cols, 1, 0.5, o.param_dtype);
  if (o.bias) in.bias = normal(o.seed + 3, o.cols, 0, 1, o.param_dtype);

  auto array = [&](DType type, const Values& v, int64_t lead) {
    return v.empty() ? nullptr : std::make_unique<Array>(type, v, lead);
  };
  const int64_t stats_count = o.norm == Norm::layer ? 2 * o.rows : o.rows;
  const Pointer input = array(o.dtype, in.input, o.misalign), residual = array(o.dtype, in.residual, o.misalign),
                weight = array(o.param_dtype, in.weight, 0), bias = array(o.param_dtype, in.bias, 0),
                output = std::make_unique<Array>(o.output_dtype, count, o.misalign),
                sum = o.residual ? std::make_unique<Array>(o.dtype, count, o.misalign) : nullptr,
                stats = std::make_unique<Array>(accumulate_type(o.dtype), stats_count, o.misalign);
  ForwardParams p{};
  p.input = data(input), p.residual = data(residual), p.weight = data(weight), p.bias = data(bias);
  p.output = data(output), p.sum = data(sum), p.stats = data(stats);
  p.input_rows = p.residual_rows = RowMap::contiguous(o.rows, o.cols);
  p.rows = o.rows, p.cols = o.cols, p.eps = kEps;
  p.dtype = o.dtype, p.param_dtype = o.param_dtype, p.output_dtype = o.output_dtype, p.norm = o.norm;
  const Workspace workspace(cuda::forward_workspace(p, device));
  p.workspace = workspace.data;

  announce(o, device);
  const double milliseconds = time(o.repeats, [&] { return cuda::forward(p, device, nullptr); }, "forward");
  const int64_t bytes = count * ((o.residual ? 3 : 1) * size_of(o.dtype) + size_of(o.output_dtype));
  print_time("forward", milliseconds, bytes);
  if (o.roof) time_roof(o, bytes);

  bool right = true;
  if (o.residual) {
    Expected expected(count);  // exact: one addition, rounded as the data are
    for (int64_t i = 0; i < count; ++i) {
      const double exact = in.input[i] + in.residual[i];
      const double a = o.dtype == DType::f64 ? exact : static_cast<float>(exact);
      in.input[i] = expected.value[i] = rounded(a, o.dtype);
    }
    right &= is_right("sum", expected, sum->values());
  }
  const Expected exact = reference_stats(o, in.input, kEps);
  right &= is_right("stats", exact, stats->values());
  right &= is_right("output", reference_output(o, in, in.input, exact.value), output->values());
  return finish(right, {&output, &sum, &stats});
}

bool backward(const Options& o, const DeviceTraits& device) {
  const int64_t count = o.rows * o.cols;
  Inputs in;
  in.input = normal(o.seed, count, o.offset, 1, o.dtype);
  in.grad_output = normal(o.seed + 4, count, 0, 1, o.output_dtype);
  if (o.residual) in.grad_sum = normal(o.seed + 5, count, 0, 1, o.dtype);
  if (o.weight) in.weight = normal(o.seed + 2, o.cols, 1, 0.5, o.param_dtype);
  Values stats = reference_stats(o, in.input, kEps).value;
  for (double& s : stats) s = rounded(s, accumulate_type(o.dtype));

  auto array = [&](DType type, const Values& v, int64_t lead) {
    return v.empty() ? nullptr : std::make_unique<Array>(type, v, lead);
  };
  auto out = [&](bool wanted, DType type, int64_t n) {
    return wanted ? std::make_unique<Array>(type, n, o.misalign) : nullptr;
  };
  const Pointer input = array(o.dtype, in.input, o.misalign),
                grad_output = array(o.output_dtype, in.grad_output, o.misalign),
                grad_sum = array(o.dtype, in.grad_sum, o.misalign), weight = array(o.param_dtype, in.weight, 0),
                saved = array(accumulate_type(o.dtype), stats, o.misalign), grad_input = out(true, o.dtype, count),
                grad_weight = out(o.weight, o.param_dtype, o.cols), grad_bias = out(o.bias, o.param_dtype, o.cols);
  BackwardParams p{};
  p.grad_output = data(grad_output), p.grad_sum = data(grad_sum), p.input = data(input), p.weight = data(weight);
  p.stats = data(saved), p.grad_input = data(grad_input), p.grad_weight = data(grad_weight);
  p.grad_bias = data(grad_bias);
  p.grad_output_rows = p.grad_sum_rows = p.input_rows = RowMap::contiguous(o.rows, o.cols);
  p.rows = o.rows, p.cols = o.cols;
  p.dtype = o.dtype, p.param_dtype = o.param_dtype, p.output_dtype = o.output_dtype, p.norm = o.norm;
  const Workspace workspace(cuda::backward_workspace(p, device));
  p.workspace = workspace.data;

  announce(o, device);
  const double milliseconds = time(o.repeats, [&] { return cuda::backward(p, device, nullptr); }, "backward");
  const int64_t bytes = count * ((o.residual ? 3 : 2) * size_of(o.dtype) + size_of(o.output_dtype));
  print_time("backward", milliseconds, bytes);
  if (o.roof) time_roof(o, bytes);

  const Gradients expected = reference_gradients(o, in, stats);
  bool right = is_right("grad_input", expected.input, grad_input->values());
  if (grad_weight) right &= is_right("grad_weight", expected.weight, grad_weight->values());
  if (grad_bias) right &= is_right("grad_bias", expected.bias, grad_bias->values());
  return finish(right, {&grad_input, &grad_weight, &grad_bias});
}

template <int K>
void list_tiers(const char* direction, const Tier (&tiers)[K], int64_t element) {
  for (const Tier& t : tiers) {
    if (element < t.min_element || element > t.max_element) continue;
    const std::string longest =
        t.max_packs == INT64_MAX ? "any" : "to " + std::to_string(t.max_packs * (16 / element)) + " columns";
    std::printf("%-9s %-7s %-18s %s\n", direction, t.name, longest.c_str(), t.reason);
  }
}

}  // namespace
}  // namespace lnc::standalone

int main(int argc, char** argv) {
  using namespace lnc::standalone;
  const Options o = parse(argc, argv);
  if (o.list_tiers) {
    list_tiers("forward", lnc::kForwardTiers, lnc::size_of(o.dtype));
    list_tiers("backward", lnc::kBackwardTiers, lnc::size_of(o.dtype));
    return 0;
  }
  lnc::DeviceTraits device = lnc::cuda::current_device_traits();
  if (!o.tier.empty()) device.tier = o.tier.c_str();
  return (o.backward ? backward(o, device) : forward(o, device)) ? 0 : 1;
}
