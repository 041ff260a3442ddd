// What a kernel is told: plain structs, shared by the CUDA and the CPU kernels. No torch, no CUDA.
#pragma once
#include <cstdint>

namespace lnc {

enum class DType : int { f32, f16, bf16, f64 };
enum class Norm : int { layer, rms, any };  // any: of a kernel that serves both

constexpr int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
constexpr DType accumulate_type(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// Where the rows of a possibly strided array begin: row r at
// (r / inner) * outer_stride + (r % inner) * inner_stride elements. Elements of a row are adjacent. Where there are
// two levels (inner < rows), rows is below 2^32.
struct RowMap {
  int64_t inner, inner_stride, outer_stride;
  static RowMap contiguous(int64_t rows, int64_t cols) { return {rows > 0 ? rows : 1, cols, 0}; }
};

// T: dtype (input). P: param_dtype. O: output_dtype. A: accumulate_type(dtype).
// Combinations that exist: P is T or A; O is T or A, and O = A only where P = A.
// On CUDA weight and bias begin at a multiple of 16 bytes; the other arrays may begin at any element.
struct ForwardParams {
  const void* input;     // T [rows, cols] by input_rows
  const void* residual;  // T [rows, cols] by residual_rows, or null
  const void* weight;    // P [cols], or null for ones
  const void* bias;      // P [cols], or null for zeros
  void* output;          // O [rows, cols] contiguous
  void* sum;             // T [rows, cols] contiguous: input + residual rounded to T; null without residual
  void* stats;           // A [2, rows] (Norm::layer: shift, rstd) or [1, rows] (Norm::rms: rstd); null when not wanted
  void* workspace;       // as many bytes as the backend asked for
  RowMap input_rows, residual_rows;
  int64_t rows, cols;
  double eps;
  DType dtype, param_dtype, output_dtype;
  Norm norm;
};

// x is the forward's input, or its sum where there was a residual.
// shift is mean - x[row, 0]: kept relative to the row's own first element (its pivot) it loses nothing
// to a large mean. xhat = (x - x[row, 0] - shift) * rstd; for rms xhat = x * rstd.
struct BackwardParams {
  const void* grad_output;  // O [rows, cols] by grad_output_rows
  const void* grad_sum;     // T [rows, cols] by grad_sum_rows, added to grad_input; or null
  const void* input;        // T [rows, cols] by input_rows
  const void* weight;       // P [cols], or null for ones
  const void* stats;        // A [2, rows] or [1, rows], as the forward left them
  void* grad_input;         // T [rows, cols] contiguous, or null when not wanted
  void* grad_weight;        // P [cols], or null when not wanted
  void* grad_bias;          // P [cols], or null when not wanted
  void* workspace;          // as many bytes as the backend asked for
  RowMap grad_output_rows, grad_sum_rows, input_rows;
  int64_t rows, cols;
  DType dtype, param_dtype, output_dtype;
  Norm norm;
};

}  // namespace lnc
