// The textbook in float64, and how far from it a kernel may be.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "arrays.h"

namespace lnc::standalone {

// Values with the distance from them that is still right.
struct Expected {
  Values value, tolerance;
  explicit Expected(int64_t count) : value(count), tolerance(count) {}
};

// What a kernel's arithmetic may lose, relative to the terms it adds: 2e-6 is the project's numerical contract for
// float32 accumulation whatever the row's mean; for float64 a thousand units in the last place.
inline double arithmetic(DType t) { return accumulate_type(t) == DType::f64 ? 1e-13 : 2e-6; }

// What rounding a result to t may lose: half a unit in the last place, or in the smallest subnormal.
inline double rounding(double x, DType t) {
  const int digits = t == DType::f64 ? 53 : t == DType::f32 ? 24 : t == DType::f16 ? 11 : 8;
  const double least = t == DType::f64 ? 0 : t == DType::f16 ? std::ldexp(1, -25) : std::ldexp(1, -134);
  return std::max(1.001 * std::abs(x) * std::ldexp(1, -digits), least);
}

struct Inputs {
  Values input, residual, weight, bias, grad_output, grad_sum;
};

inline double weight_of(const Inputs& in, int64_t c) { return in.weight.empty() ? 1 : in.weight[c]; }
inline double bias_of(const Inputs& in, int64_t c) { return in.bias.empty() ? 0 : in.bias[c]; }

// [2, rows] or [1, rows], as the kernels keep them.
inline Expected reference_stats(const Options& o, const Values& x, double eps) {
  const bool layer = o.norm == Norm::layer;
  Expected stats(layer ? 2 * o.rows : o.rows);
  for (int64_t r = 0; r < o.rows; ++r) {
    const double* row = &x[r * o.cols];
    double mean = 0, variance = 0;
    for (int64_t c = 0; layer && c < o.cols; ++c) mean += row[c] - row[0];
    mean /= o.cols;
    const double centre = layer ? row[0] + mean : 0;
    for (int64_t c = 0; c < o.cols; ++c) variance += (row[c] - centre) * (row[c] - centre);
    const double deviation = std::sqrt(variance / o.cols + eps), rstd = 1 / deviation;
    if (layer) stats.value[r] = mean, stats.tolerance[r] = arithmetic(o.dtype) * (std::abs(mean) + deviation);
    const int64_t i = layer ? o.rows + r : r;
    stats.value[i] = rstd, stats.tolerance[i] = arithmetic(o.dtype) * rstd;
  }
  return stats;
}

inline double normalised(const Options& o, const Values& x, const Values& stats, int64_t r, int64_t c) {
  const double v = x[r * o.cols + c];
  return o.norm == Norm::layer ? (v - x[r * o.cols] - stats[r]) * stats[o.rows + r] : v * stats[r];
}

inline Expected reference_output(const Options& o, const Inputs& in, const Values& x, const Values& stats) {
  Expected y(o.rows * o.cols);
  for (int64_t r = 0; r < o.rows; ++r)
    for (int64_t c = 0; c < o.cols; ++c) {
      const double xhat = normalised(o, x, stats, r, c), w = weight_of(in, c), b = bias_of(in, c);
      const int64_t i = r * o.cols + c;
      y.value[i] = xhat * w + b;
      y.tolerance[i] = arithmetic(o.dtype) * (std::max(1.0, std::abs(xhat)) * std::abs(w) + std::abs(b)) +
                       rounding(y.value[i], o.output_dtype);
    }
  return y;
}

struct Gradients {
  Expected input, weight, bias;
};

inline Gradients reference_gradients(const Options& o, const Inputs& in, const Values& stats) {
  Gradients g{Expected(o.rows * o.cols), Expected(o.cols), Expected(o.cols)};
  const double loss = arithmetic(o.dtype);
  for (int64_t r = 0; r < o.rows; ++r) {
    const double rstd = stats[o.norm == Norm::layer ? o.rows + r : r];
    double sum = 0, sum_x = 0, size = 0, size_x = 0;
    for (int64_t c = 0; c < o.cols; ++c) {
      const double xhat = normalised(o, in.input, stats, r, c), dy = in.grad_output[r * o.cols + c];
      const double gw = dy * weight_of(in, c);
      sum += gw, size += std::abs(gw);
      sum_x += gw * xhat, size_x += std::abs(gw * xhat);
      g.weight.value[c] += dy * xhat, g.weight.tolerance[c] += loss * std::abs(dy) * std::max(1.0, std::abs(xhat));
      g.bias.value[c] += dy, g.bias.tolerance[c] += loss * std::abs(dy);
    }
    if (o.norm == Norm::rms) sum = size = 0;
    for (int64_t c = 0; c < o.cols; ++c) {
      const double xhat = normalised(o, in.input, stats, r, c);
      const int64_t i = r * o.cols + c;
      const double gw = in.grad_output[i] * weight_of(in, c), more = in.grad_sum.empty() ? 0 : in.grad_sum[i];
      const double dx = rstd * (gw - sum / o.cols - xhat * sum_x / o.cols);
      const double terms = rstd * (std::abs(gw) + size / o.cols + std::max(1.0, std::abs(xhat)) * size_x / o.cols);
      g.input.value[i] = dx + more;
      g.input.tolerance[i] = loss * (terms + std::abs(more)) + rounding(dx + more, o.dtype);
    }
  }
  for (Expected* e : {&g.weight, &g.bias})
    for (int64_t c = 0; c < o.cols; ++c) e->tolerance[c] += rounding(e->value[c], o.param_dtype);
  return g;
}

// Prints the largest error and, where it is too large, the first one that is.
inline bool is_right(const char* name, const Expected& expected, const Values& got) {
  double largest = 0, share = 0;
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - expected.value[i]);
    if (!(error <= expected.tolerance[i]) && wrong++ == 0) first = i;
    largest = std::max(largest, std::isnan(error) ? std::numeric_limits<double>::infinity() : error);
    share = std::max(share, expected.tolerance[i] > 0 ? error / expected.tolerance[i] : 0);
  }
  std::printf("%-12s largest error %.2e, at most %.2f of what is allowed: %s\n", name, largest, share,
              wrong ? "WRONG" : "right");
  if (wrong)
    std::printf("  %zu of %zu elements are wrong; element %zu is %.9g, expected %.9g within %.2g\n", wrong, got.size(),
                first, got[first], expected.value[first], expected.tolerance[first]);
  return wrong == 0;
}

}  // namespace lnc::standalone
