// The kernels of one instruction set (LNC_CHECKED, a namespace of lnc::cpu) against long double: every dtype and
// parameter dtype, both norms, tails, strides, residuals, and values of extreme size. Prints what is wrong; exit status
// 0 only if nothing is. Without torch, so that it runs where torch does not: under an emulator.
//   check [share]    the share of all cases that are run, 1 / share; default 1
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/common.h"

namespace lnc::cpu {
namespace LNC_CHECKED {
extern const Kernels kernels;
}
void will_write(void*, int64_t) {}
int64_t cache_bytes = 16 << 20;
}  // namespace lnc::cpu

using namespace lnc;
using Wide = long double;
using cpu::LNC_CHECKED::kernels;

namespace {

// Half a unit in the last place, as a share of the value; of float16 also what is below its normal range.
Wide rounding(DType t) {
  switch (t) {
    case DType::f64:
      return 0x1p-53L;
    case DType::f32:
      return 0x1p-24L;
    case DType::f16:
      return 0x1p-11L;
    case DType::bf16:
      return 0x1p-8L;
  }
  abort();
}
Wide smallest(DType t) { return t == DType::f16 ? 0x1p-25L : 0; }

const char* name_of(DType t) {
  const char* const names[] = {"float32", "float16", "bfloat16", "float64"};
  return names[static_cast<int>(t)];
}

double float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double value = exponent ? std::ldexp(fraction + 1024, exponent - 25) : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -value : value;
}

// To nearest even; of finite values far from overflow.
uint16_t float16_bits(double value) {
  const double size = std::fabs(value);
  const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // carries into the exponent
  return static_cast<uint16_t>((std::signbit(value) ? 0x8000 : 0) | (units + ((exponent + 14) << 10)));
}

// Elements of a dtype that begin at any of them, the first at a cache line.
class Array {
  struct alignas(64) Line {
    char bytes[64];
    bool operator==(const Line& other) const { return !memcmp(bytes, other.bytes, sizeof bytes); }
  };
  DType dtype;
  int64_t begin;
  std::vector<Line> lines;

 public:
  Array(DType t, int64_t count, int64_t first = 0)
      : dtype(t), begin(first), lines(static_cast<size_t>((first + count + 32) * size_of(t) / 64 + 1)) {
    memset(lines.data(), 0x7f, lines.size() * sizeof(Line));
  }

  char* at(int64_t i) { return lines.data()->bytes + (begin + i) * size_of(dtype); }
  bool operator==(const Array& other) const { return lines == other.lines; }

  Wide get(int64_t i) {
    if (dtype == DType::f64) return read<double>(i);
    if (dtype == DType::f32) return read<float>(i);
    if (dtype == DType::f16) return float16_value(read<uint16_t>(i));
    const uint32_t bits = static_cast<uint32_t>(read<uint16_t>(i)) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  void set(int64_t i, double value) {
    if (dtype == DType::f64) return write(i, value);
    const float narrow = static_cast<float>(value);
    if (dtype == DType::f32) return write(i, narrow);
    if (dtype == DType::f16) return write(i, float16_bits(narrow));
    uint32_t bits;
    memcpy(&bits, &narrow, sizeof bits);
    write(i, static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
  }

 private:
  template <class E>
  E read(int64_t i) {
    E e;
    memcpy(&e, at(i), sizeof e);
    return e;
  }
  template <class E>
  void write(int64_t i, E e) {
    memcpy(at(i), &e, sizeof e);
  }
};

struct Case {
  int64_t rows, cols;
  DType dtype, param_dtype, output_dtype;
  Norm norm;
  bool weight, bias, residual, grad_sum, strided;
  double offset, scale, eps;
  int wanted;  // bits: dx, dweight, dbias
};

int64_t pieces;  // in which for_ranges hands out its work, as if to so many threads
void in_pieces(int64_t count, int64_t grain, cpu::Task task, void* context) {
  const int64_t size = std::max(grain, cpu::ceil_div(count, pieces));
  for (int64_t begin = 0; begin < count; begin += size) task(context, begin, std::min(count, begin + size));
}

int failures;
void expect(bool right, const char* what, const Case& c) {
  if (right || failures++ > 40) return;
  printf("%s: %lld x %lld %s, parameters %s, output %s, %s%s%s%s%s%s, offset %g, scale %g, eps %g, wanted %d\n", what,
         static_cast<long long>(c.rows), static_cast<long long>(c.cols), name_of(c.dtype), name_of(c.param_dtype),
         name_of(c.output_dtype), c.norm == Norm::rms ? "rms" : "layer", c.weight ? ", weight" : "",
         c.bias ? ", bias" : "", c.residual ? ", residual" : "", c.grad_sum ? ", grad_sum" : "",
         c.strided ? ", strided" : "", c.offset, c.scale, c.eps, c.wanted);
}

class Check {
  const Case c;
  const DType wide = accumulate_type(c.dtype);
  const Wide unit = rounding(wide);
  const int64_t rows = c.rows, cols = c.cols;
  const RowMap map = c.strided ? RowMap{rows % 3 ? 1 : 3, cols + 5, (rows % 3 ? 1 : 3) * (cols + 5) + 7}
                               : RowMap::contiguous(rows, cols);
  const int64_t span = place(rows - 1, cols);
  Array x{c.dtype, span, c.strided}, residual{c.dtype, span}, weight{c.param_dtype, cols}, bias{c.param_dtype, cols};
  Array dy{c.output_dtype, span, c.strided * 3}, grad_sum{c.dtype, span};
  Array y{c.output_dtype, rows * cols}, sum{c.dtype, rows * cols}, stats{wide, 2 * rows};
  Array dx{c.dtype, rows * cols}, dweight{c.param_dtype, cols}, dbias{c.param_dtype, cols};
  std::vector<Wide> xhat = std::vector<Wide>(static_cast<size_t>(rows * cols)), rstd;

  int64_t place(int64_t row, int64_t col) const {
    return row / map.inner * map.outer_stride + row % map.inner * map.inner_stride + col;
  }
  Wide scale(int64_t col) { return c.weight ? weight.get(col) : 1; }
  Wide source(int64_t row, int64_t col) { return c.residual ? sum.get(row * cols + col) : x.get(place(row, col)); }
  static bool near(Wide got, Wide want, Wide tolerance) { return std::fabs(got - want) <= tolerance; }

  void forward(int64_t first, int64_t count, Array& to, Array& to_sum, Array& to_stats) {
    ForwardParams p{};
    p.input = x.at(place(first, 0));
    p.residual = c.residual ? residual.at(place(first, 0)) : nullptr;
    p.weight = c.weight ? weight.at(0) : nullptr;
    p.bias = c.bias ? bias.at(0) : nullptr;
    p.output = to.at(0), p.sum = c.residual ? to_sum.at(0) : nullptr, p.stats = to_stats.at(0);
    p.input_rows = p.residual_rows = map;
    p.rows = count, p.cols = cols, p.eps = c.eps, p.norm = c.norm;
    p.dtype = c.dtype, p.param_dtype = c.param_dtype, p.output_dtype = c.output_dtype;
    const auto plan = cpu::ForwardPlan::of(p);
    expect(c.weight || c.bias || plan.split_columns || plan.workspace == 0, "workspace for nothing", c);
    std::vector<char> workspace(static_cast<size_t>(plan.workspace + 64), 0x7f);
    p.workspace = workspace.data();
    kernels.forward(p, in_pieces);
  }

  void backward(int64_t first, int64_t count, Array& to_stats, Array& to, Array& to_weight, Array& to_bias) {
    BackwardParams p{};
    p.grad_output = dy.at(place(first, 0));
    p.grad_sum = c.grad_sum ? grad_sum.at(place(first, 0)) : nullptr;
    p.input = c.residual ? sum.at(first * cols) : x.at(place(first, 0));
    p.weight = c.weight ? weight.at(0) : nullptr;
    p.stats = to_stats.at(0);
    p.grad_input = c.wanted & 1 ? to.at(0) : nullptr;
    p.grad_weight = c.wanted & 2 ? to_weight.at(0) : nullptr;
    p.grad_bias = c.wanted & 4 ? to_bias.at(0) : nullptr;
    p.grad_output_rows = p.grad_sum_rows = map;
    p.input_rows = c.residual ? RowMap::contiguous(count, cols) : map;
    p.rows = count, p.cols = cols, p.norm = c.norm;
    p.dtype = c.dtype, p.param_dtype = c.param_dtype, p.output_dtype = c.output_dtype;
    std::vector<char> workspace(static_cast<size_t>(cpu::BackwardPlan::of(p).workspace + 64), 0x7f);
    p.workspace = workspace.data();
    kernels.backward(p, in_pieces);
  }

  void check_row(int64_t row) {
    Wide mean = 0, variance = 0, g_mean = 0, g_xhat_mean = 0;
    for (int64_t j = 0; c.norm == Norm::layer && j < cols; j++) mean += source(row, j) / cols;
    for (int64_t j = 0; j < cols; j++) variance += (source(row, j) - mean) * (source(row, j) - mean) / cols;
    rstd.push_back(variance + c.eps > 0 ? 1 / std::sqrt(variance + static_cast<Wide>(c.eps)) : 0);
    bool right = true, right_dx = true, right_sum = true;
    for (int64_t j = 0; j < cols; j++) {
      const Wide normal = xhat[row * cols + j] = (source(row, j) - mean) * rstd[row];
      const Wide want = normal * scale(j) + (c.bias ? bias.get(j) : 0), g = dy.get(place(row, j)) * scale(j);
      right &= near(y.get(row * cols + j), want,
                    1.01L * rounding(c.output_dtype) * std::fabs(want) + 30 * unit * (1 + std::fabs(scale(j))) +
                        smallest(c.output_dtype));
      g_mean += c.norm == Norm::layer ? g / cols : 0, g_xhat_mean += g * normal / cols;
      if (c.residual) {
        Array exact(c.dtype, 1);
        const double a = x.get(place(row, j)), b = residual.get(place(row, j));
        exact.set(0, wide == DType::f64 ? a + b : static_cast<float>(a) + static_cast<float>(b));
        right_sum &= sum.get(row * cols + j) == exact.get(0);
      }
    }
    if (cols == 1 && c.norm == Norm::layer && c.wanted & 1)
      right_dx &= dx.get(row) == (c.grad_sum ? grad_sum.get(place(row, 0)) : 0);
    for (int64_t j = 0; j < cols && c.wanted & 1; j++) {
      const Wide g = dy.get(place(row, j)) * scale(j), back = xhat[row * cols + j] * g_xhat_mean;
      const Wide added = c.grad_sum ? grad_sum.get(place(row, j)) : 0;
      const Wide want = rstd[row] * (g - g_mean - back) + added;
      right_dx &= near(dx.get(row * cols + j), want,
                       1.01L * rounding(c.dtype) * std::fabs(want) + smallest(c.dtype) + 4 * unit * std::fabs(added) +
                           100 * unit * rstd[row] * (1 + std::fabs(g) + std::fabs(back)));
    }
    expect(right, "output", c), expect(right_sum, "sum", c), expect(right_dx, "dx", c);
  }

  void check_gradients() {
    bool right_weight = true, right_bias = true;
    for (int64_t j = 0; j < cols; j++) {
      Wide dw = 0, db = 0, size = 0;
      for (int64_t row = 0; row < rows; row++) {
        const Wide g = dy.get(place(row, j)), product = g * xhat[row * cols + j];
        dw += product, db += g, size += std::fabs(product) + std::fabs(g);
      }
      const Wide share = 1.01L * rounding(c.param_dtype), noise = 30 * unit * size + smallest(c.param_dtype);
      right_weight &= !(c.wanted & 2) || near(dweight.get(j), dw, share * std::fabs(dw) + noise);
      right_bias &= !(c.wanted & 4) || near(dbias.get(j), db, share * std::fabs(db) + noise);
    }
    expect(right_weight, "dweight", c), expect(right_bias, "dbias", c);
  }

  void check_bits() {
    const auto before = std::vector<Array>{y, sum, stats, dx, dweight, dbias};
    pieces = 3;
    forward(0, rows, y, sum, stats), backward(0, rows, stats, dx, dweight, dbias);
    expect(before == std::vector<Array>{y, sum, stats, dx, dweight, dbias}, "bits with more threads", c);
    for (int64_t row : {int64_t{0}, rows / 2, rows - 1}) {
      Array y1(c.output_dtype, cols), sum1(c.dtype, cols), stats1(wide, 2), dx1(c.dtype, cols);
      Array dweight1(c.param_dtype, cols), dbias1(c.param_dtype, cols);
      forward(row, 1, y1, sum1, stats1), backward(row, 1, stats1, dx1, dweight1, dbias1);
      const bool same_y = !memcmp(y1.at(0), y.at(row * cols), static_cast<size_t>(cols * size_of(c.output_dtype)));
      const bool same_dx =
          !(c.wanted & 1) || !memcmp(dx1.at(0), dx.at(row * cols), static_cast<size_t>(cols * size_of(c.dtype)));
      expect(same_y, "output of the row alone", c), expect(same_dx, "dx of the row alone", c);
    }
  }

 public:
  Check(const Case& c_, unsigned seed) : c(c_) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t row = 0; row < rows; row++)
      for (int64_t j = 0; j < cols; j++) {
        x.set(place(row, j), c.offset + c.scale * normal(random)),
            residual.set(place(row, j), c.scale * normal(random));
        dy.set(place(row, j), normal(random)), grad_sum.set(place(row, j), normal(random));
      }
    for (int64_t j = 0; j < cols; j++) weight.set(j, 1 + normal(random) / 2), bias.set(j, normal(random));
  }

  void run() {
    pieces = 1;
    forward(0, rows, y, sum, stats);
    backward(0, rows, stats, dx, dweight, dbias);
    for (int64_t row = 0; row < rows; row++) check_row(row);
    check_gradients();
    check_bits();
  }
};

}  // namespace

int main(int argc, char** argv) {
  const unsigned share = argc > 1 ? static_cast<unsigned>(atoi(argv[1])) : 1;
  unsigned seed = 0, count = 0;
  auto run = [&](const Case& c) {
    if (++seed % share == 0) Check(c, seed).run(), count++;
  };
  constexpr DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16, f64 = DType::f64;
  const DType combinations[][3] = {{f64, f64, f64}, {f32, f32, f32},    {f16, f16, f16},   {f16, f32, f16},
                                   {f16, f32, f32}, {bf16, bf16, bf16}, {bf16, f32, bf16}, {bf16, f32, f32}};
  const int64_t shapes[][2] = {{1, 1},   {3, 1},     {5, 2},    {7, 3},    {2, 7},     {4, 8},    {3, 15},
                               {6, 16},  {9, 17},    {3, 31},   {40, 33},  {5, 64},    {2, 100},  {70, 129},
                               {7, 769}, {2, 4096},  {1, 4097}, {3, 9001}, {13, 5000}, {700, 40}, {300, 520},
                               {35, 96}, {17, 2000}, {6, 1030}, {9, 4095}};
  const auto run_shapes = [&] {
    for (const auto& [dtype, param_dtype, output_dtype] : combinations)
      for (Norm norm : {Norm::layer, Norm::rms})
        for (const auto& [rows, cols] : shapes)
          for (int variant = 0; variant < 4; variant++) {
            const unsigned mix = (seed + 1) * 2654435761u;
            run({rows, cols, dtype, param_dtype, output_dtype, norm, (mix >> 20 & 1) != 0, (mix >> 21 & 1) != 0,
                 variant % 2 == 1, (mix >> 22 & 1) != 0, variant >= 2, variant ? 0.0 : 3.0, 1, 1e-5,
                 variant ? static_cast<int>(1 + (mix >> 24) % 7) : 7});
          }
  };
  run_shapes();
  for (int64_t cols : {5, 768, 4096, 131072})
    for (double offset : {1e2, 1e4, 1e6})
      run({2, cols, f32, f32, f32, Norm::layer, false, false, false, false, false, offset, 1, 1e-5, 7});
  for (DType dtype : {f32, f16, bf16, f64})
    for (int64_t cols : {7, 8, 33, 1024, 2050, 9000})
      for (double offset : {0.9, -1.1, 1.9, -2.1, 5.0})
        for (bool residual : {false, true})
          run({5, cols, dtype, dtype, dtype, Norm::layer, true, true, residual, false, false, offset, 1, 0, 7});
  for (Norm norm : {Norm::layer, Norm::rms})
    for (DType dtype : {f32, bf16, f64})
      for (int64_t cols : {5, 768, 1500, 20000})
        for (double size : {0.0, 1e-30, 1e-22, 1e-19, 1e-12, 1e12, 1e18, 1e19, 1e30})
          for (double eps : {0.0, 1e-25})
            run({5, cols, dtype, dtype, dtype, norm, true, true, size > 1, false, false, 0,
                 dtype != f64 ? size
                 : size > 1   ? size * 1e180
                              : size * 1e-180,
                 eps, 7});
  for (DType dtype : {f32, f16, bf16, f64})
    for (int64_t cols : {1, 5, 768, 5000})
      for (bool residual : {false, true})  // rows of one value
        run({9, cols, dtype, dtype, dtype, Norm::layer, true, true, residual, false, false, 3, 0, 1e-5, 7});
  cpu::cache_bytes = 256;  // results go past the caches
  run_shapes();
  printf("%s: %u cases, %d failures\n", kernels.name, count, failures);
  return failures != 0 || count == 0;
}
