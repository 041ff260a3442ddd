// What every instruction set shares: entry points, and how work is cut. Cuts depend on the shape alone,
// so that results depend neither on the number of threads nor on who runs which piece.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu.h"

namespace lnc::cpu {

struct Kernels {
  const char* name;
  void (*forward)(const ForwardParams&, ParallelFor);
  void (*backward)(const BackwardParams&, ParallelFor);
};

// Says that fresh memory is about to be written from end to end: where it is much, the operating system's
// huge pages save most of what its first touch costs.
void will_write(void* p, int64_t bytes);

// Fewer elements than this are not worth waking a thread for.
constexpr int64_t kGrain = 32768;

// A row is taken in chunks that stay in the first-level cache between mean and squared deviations.
constexpr int64_t chunk_columns(DType accumulate) { return accumulate == DType::f64 ? 2048 : 4096; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t clamp(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }
constexpr int64_t grain_of(int64_t elements) { return ceil_div(kGrain, elements > 0 ? elements : 1); }

// More than the last-level cache holds for one core, on many a machine: inputs and outputs drive each other out.
extern int64_t cache_bytes;

// Whether rows come from so far away that it pays to ask for them ahead of time; up to here the processor's own
// prefetching does better alone.
constexpr bool is_far(int64_t bytes) { return bytes > 2 << 20; }

// How a pass reaches memory: as it comes, asking for rows ahead of time, or also writing past the caches.
enum class Reach { cached, fetched, past };

// Columns of a buffer of ours: whole vectors of any instruction set.
constexpr int64_t padded(int64_t cols) { return ceil_div(cols, 32) * 32; }

// Whether parameters in memory are what the kernels compute with (vec.h has bfloat16 in an order of its own).
template <class Params>
bool reads_parameters(const Params& p) {
  return p.param_dtype == accumulate_type(p.dtype) && p.dtype != DType::bf16;
}

// Of a chunk of a row, or of several: scalars are double, whatever the lanes were.
struct Moments {
  double count, mean, squares;
};
struct Sums {
  double g, g_xhat;
};

struct ForwardPlan {
  static constexpr int64_t kMaxSplitRows = 8, kMaxGroup = 8;

  int64_t chunks;            // of a row
  bool split_columns;        // few long rows: threads share a row
  int64_t group;             // rows whose statistics are taken before the first is normalised
  Reach reach;               // past: no output would still be in a cache when it is read
  bool past_sum;             // and so does the sum, from a little more on: it is read once again
  bool overlaps;             // two rows are normalised while two more are looked at
  bool given;                // weight and bias are of the input's dtype, or not there: read as they are
  int64_t parameters_bytes;  // otherwise, workspace for them as the kernels want them,
  int64_t workspace;         // and behind them each chunk's Moments

  static ForwardPlan of(const ForwardParams& p) {
    ForwardPlan plan;
    plan.chunks = ceil_div(p.cols, chunk_columns(accumulate_type(p.dtype)));
    plan.split_columns = p.rows <= kMaxSplitRows && plan.chunks > 1;
    const int64_t elements = p.rows * p.cols, arrays = p.residual ? 2 : 1;
    const int64_t bytes = elements * (size_of(p.output_dtype) + (2 * arrays - 1) * size_of(p.dtype));
    const auto misaligned = reinterpret_cast<uintptr_t>(p.output) | reinterpret_cast<uintptr_t>(p.sum) |
                            static_cast<uintptr_t>(p.cols * size_of(p.dtype));
    const bool past = bytes >= cache_bytes && misaligned % 64 == 0;
    // Of rows this short, asking costs more than it spares.
    const bool fetches = is_far(elements * size_of(p.dtype)) && p.cols * size_of(p.dtype) > 256;
    plan.reach = past ? Reach::past : fetches ? Reach::fetched : Reach::cached;
    plan.past_sum = past && p.residual && plan.chunks == 1 && bytes >= cache_bytes / 4 * 5;
    // Rows that come from memory need their place in the cache for both inputs.
    const int64_t row_bytes = padded(p.cols) * size_of(p.dtype) * (past ? arrays : 1);
    // Two rows share what is read of the parameters; of shorter rows, more are better.
    const bool by_twos = plan.chunks == 1 && !p.residual && !past, converts = p.dtype != accumulate_type(p.dtype);
    plan.group = clamp((8 << 10) / row_bytes, by_twos && converts ? 2 : 1, kMaxGroup);
    plan.overlaps = by_twos && !converts && row_bytes > 2048;
    // bfloat16 parameters are widened once for all rows where these are many and what becomes of them stays in the
    // cache.
    const bool widens = p.dtype == DType::bf16 && p.bias && elements >= 1 << 18 && p.cols <= 2048;
    plan.given = p.weight ? p.param_dtype == p.dtype && !widens : !p.bias;
    const bool as_is = plan.given || (p.weight && p.bias && reads_parameters(p));
    plan.parameters_bytes = as_is ? 0 : 2 * padded(p.cols) * size_of(accumulate_type(p.dtype));
    plan.workspace = plan.parameters_bytes + (plan.split_columns ? p.rows * plan.chunks * int64_t{sizeof(Moments)} : 0);
    return plan;
  }
};

// Backward takes rows in chunks, each with its own sums for the weight and bias gradients, and chunks in
// blocks, whose x and dy stay in cache between the row sums and their use: the first-level cache of one
// thread, or the last-level cache of those that share rows and meet twice for every block.
struct BackwardPlan {
  static constexpr int64_t kMaxBlock = 32;

  int64_t chunks;  // of a row, in columns
  int64_t block;   // rows
  int64_t rows_a_chunk;
  int64_t row_chunks;
  bool split_columns;        // too few chunks of long rows: threads share rows
  Reach reach;               // past: dx would drive x and dy out, and be driven out itself
  bool fetches_dx;           // lines of dx are asked for as well, when x and dy are first read
  bool direct;               // sums are results already
  int64_t parameters_bytes;  // workspace for the weight as the kernels want it,
  int64_t sums_bytes;        // behind it each chunk's Sums, of rows that are shared,
  int64_t workspace;         // behind them the weight and bias gradients of each chunk of rows

  // Whole lines; and where rows are whole pages, so that those of several rows lie at the same place in theirs, not
  // just behind lines that are read meanwhile, at the same pace: it took up to five times as long.
  static bool goes_past_well(const BackwardParams& p) {
    constexpr uint64_t line = 64, page = 4096;
    const auto dx = reinterpret_cast<uintptr_t>(p.grad_input);
    const uint64_t row_bytes = static_cast<uint64_t>(p.cols * size_of(p.dtype));
    if ((dx | row_bytes) % line != 0) return false;
    const auto held_up_by = [=](const void* read) {
      return read && (dx - reinterpret_cast<uintptr_t>(read)) % page / line - 1 < 4;
    };
    const bool same_pace = size_of(p.dtype) == size_of(accumulate_type(p.dtype));
    return row_bytes % page != 0 || !(held_up_by(p.input) || held_up_by(p.grad_output) || held_up_by(p.grad_sum) ||
                                      (same_pace && (held_up_by(p.weight) || held_up_by(p.workspace))));
  }

  static BackwardPlan of(const BackwardParams& p) {
    BackwardPlan plan;
    const int64_t scalar = size_of(accumulate_type(p.dtype)), row_bytes = size_of(p.dtype) + size_of(p.output_dtype);
    plan.chunks = ceil_div(p.cols, chunk_columns(accumulate_type(p.dtype)));
    // 32 rows keep the partial sums' traffic to a few percent, 512 keep rounding errors from growing. Where few rows
    // are worth several threads, 8 of them are better than half of each row, whose other half another core has just
    // read.
    const int64_t a_grain = kGrain / p.cols, an_eighth = p.rows / 8;
    const int64_t least = plan.chunks > 1 ? 32 : clamp(a_grain > an_eighth ? a_grain : an_eighth, 8, 32);
    plan.rows_a_chunk = clamp(p.rows / 64, least, 512);
    plan.row_chunks = ceil_div(p.rows, plan.rows_a_chunk);
    plan.split_columns = plan.chunks > 1 && plan.row_chunks < 8;
    const int64_t cache = plan.split_columns ? 2 << 20 : 16 << 10;
    plan.block = clamp(cache / (p.cols * row_bytes), 2, kMaxBlock) / 2 * 2;
    // The last-level cache has room for blocks of rows that threads share: it pays from more on, there.
    const int64_t bytes = p.rows * p.cols * (row_bytes + size_of(p.dtype));
    const bool past = bytes >= (plan.split_columns ? 4 * cache_bytes : cache_bytes / 2 * 3) && goes_past_well(p);
    // A block of rows that threads share would drive out what is asked for behind it.
    const int64_t x_bytes = p.rows * p.cols * size_of(p.dtype);
    plan.reach = past ? Reach::past : !plan.split_columns && is_far(x_bytes) ? Reach::fetched : Reach::cached;
    // With rows of a page and more the processor keeps up by itself: there it pays from twice the size on.
    const bool is_short = p.cols * size_of(p.dtype) < 4096;
    plan.fetches_dx = plan.reach == Reach::fetched && (is_short || is_far(x_bytes / 2));
    plan.direct = plan.row_chunks == 1 && reads_parameters(p);
    plan.parameters_bytes = reads_parameters(p) && p.weight ? 0 : padded(p.cols) * scalar;
    plan.sums_bytes = plan.split_columns ? plan.block * plan.chunks * int64_t{sizeof(Sums)} : 0;
    // Where the bias's gradient is summed, so is the weight's, and needs a place.
    const bool partials = plan.direct ? p.grad_bias && !p.grad_weight : p.grad_weight || p.grad_bias;
    plan.workspace =
        plan.parameters_bytes + plan.sums_bytes + (partials ? plan.row_chunks * 2 * padded(p.cols) * scalar : 0);
    return plan;
  }
};

}  // namespace lnc::cpu
