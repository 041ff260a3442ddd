// Which kernel runs for a shape, and how it is laid out: a pure function over a table, the same on every host.
// Forward's choice and backward's threads per row depend on the row alone (its length and dtype), never on how many
// rows there are: a row's bits are then the same in any batch.
#pragma once
#include <cstdint>

#include "params.h"

namespace lnc {

struct DeviceTraits {
  int arch;                    // 10 * major + minor of the compute capability
  int sm_count;                // multiprocessors
  const char* tier = nullptr;  // the only tiers to choose from, by name, to measure them; null for all
};

constexpr int kWholeWarps = 0;

struct Tier {
  const char* name;
  int group;            // threads that share a row: a power of two up to 32, or kWholeWarps for as many as it takes
  int vecs;             // 16-byte packs of a row to a thread
  int threads;          // threads a block (the most, for kWholeWarps)
  int64_t max_packs;    // the longest row, in packs
  int64_t max_element;  // the widest element in bytes
  int64_t min_element;
  const char* reason;
};

// clang-format off
constexpr Tier kForwardTiers[] = {
    // A pack a thread while that fills a warp with whole rows: no lane idles, no shuffle more than the row needs.
    {"warp", 1, 1, 128, 1, 8, 2, "the row is one 16-byte pack: one thread a row"},
    {"warp", 4, 1, 128, 4, 8, 2, "short row: 4 threads share it, 8 rows a warp"},
    {"warp", 16, 1, 128, 16, 8, 2, "short row: 16 threads share it, 2 rows a warp"},
    // A warp a row needs no barrier. 128 threads a block: enough rows to hide latency, small enough to fill the tail.
    {"warp", 32, 1, 128, 32, 8, 2, "a warp a row, 1 pack a thread in registers"},
    {"warp", 32, 2, 128, 64, 8, 2, "a warp a row, 2 packs a thread in registers"},
    {"warp", 32, 3, 128, 96, 8, 2, "a warp a row, 3 packs a thread in registers"},
    {"warp", 32, 4, 128, 128, 8, 2, "a warp a row, 4 packs a thread in registers"},
    // 6 packs serve 768 float32 columns without an idle lane; 8 are 32 elements, the most a thread keeps.
    {"warp", 32, 6, 128, 192, 8, 4, "a warp a row, 6 packs a thread in registers"},
    {"warp", 32, 8, 128, 256, 8, 4, "a warp a row, 8 packs a thread in registers"},
    // 16 elements a thread: all loads of a row in flight at once, and several rows on a multiprocessor; then 32, the
    // most that leaves 128 registers without a spill.
    {"block", kWholeWarps, 2, 512, 1024, 2, 2, "a block a row, 2 packs a thread in registers"},
    {"block", kWholeWarps, 4, 512, 2048, 8, 2, "a block a row, 4 packs a thread in registers"},
    {"block", kWholeWarps, 8, 512, 4096, 8, 4, "a block a row, 8 packs a thread in registers"},
    // Longer rows are cut: one launch for the slices' moments, one for their values.
    {"slices", kWholeWarps, 4, 512, INT64_MAX, 8, 2, "longer than a block's registers: slices, in two launches"},
};

constexpr Tier kBackwardTiers[] = {
    {"warp", 1, 1, 512, 1, 8, 2, "the row is one 16-byte pack: one thread a row"},
    {"warp", 4, 1, 512, 4, 8, 2, "short row: 4 threads share it, 8 rows a warp"},
    {"warp", 16, 1, 512, 16, 8, 2, "short row: 16 threads share it, 2 rows a warp"},
    {"warp", 32, 1, 512, 32, 8, 2, "a warp a row, 1 pack of each array a thread"},
    {"warp", 32, 2, 512, 64, 8, 4, "a warp a row, 2 packs of each array a thread"},
    // 8 elements a thread in blocks of 512: 128 registers hold this row, the next one and the gradients of weight and
    // bias, and one partial a multiprocessor is all that the second kernel has to read.
    {"block", kWholeWarps, 1, 512, 512, 2, 2, "warps share a row, 1 pack of each array a thread, next row in flight"},
    {"block", kWholeWarps, 2, 512, 1024, 8, 4, "warps share a row, 2 packs of each array a thread, next row in flight"},
    // Twice the elements a thread leave no room for the next row, nor for the weight.
    {"block", kWholeWarps, 2, 512, 1024, 2, 2, "512 threads share a row, 2 packs of each array a thread"},
    {"slices", kWholeWarps, 2, 512, INT64_MAX, 8, 2, "longer than a block's registers: slices, in two launches"},
};
// clang-format on

struct Plan {
  const Tier* tier;
  int threads;  // a block
  int threads_per_row;
  int rows_per_block;  // at a time
  int64_t blocks_x, blocks_y;
  int64_t slice_cols, slices;  // of a row
  int64_t partials;            // backward: how many sets of weight and bias gradients the second kernel folds
  bool is_sliced() const { return tier->max_packs == INT64_MAX; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr bool same_name(const char* a, const char* b) { return *a == *b && (!*a || same_name(a + 1, b + 1)); }

template <int K>
constexpr const Tier* find_tier(const Tier (&tiers)[K], int64_t packs, int64_t element, const char* name) {
  for (const Tier& t : tiers)
    if (packs <= t.max_packs && element >= t.min_element && element <= t.max_element &&
        (!name || same_name(name, t.name)))
      return &t;
  return &tiers[K - 1];
}

constexpr int64_t kMaxGridY = 65535;

inline Plan lay_out(const Tier* tier, int64_t cols, int64_t element) {
  const int64_t pack = 16 / element, packs = ceil_div(cols, pack);
  Plan plan{tier};
  plan.slices = 1, plan.slice_cols = cols;
  if (plan.is_sliced()) {
    plan.slice_cols = int64_t(tier->threads) * tier->vecs * pack;
    plan.slices = ceil_div(cols, plan.slice_cols);
  }
  const int64_t warps = at_most(ceil_div(packs, 32 * tier->vecs), tier->threads / 32);
  plan.threads_per_row = tier->group == kWholeWarps ? static_cast<int>(warps) * 32 : tier->group;
  return plan;
}

inline Plan plan_forward(int64_t rows, int64_t cols, DType dtype, const DeviceTraits& device) {
  const int64_t element = size_of(dtype);
  Plan plan = lay_out(find_tier(kForwardTiers, ceil_div(cols, 16 / element), element, device.tier), cols, element);
  plan.threads = plan.tier->group == kWholeWarps ? plan.threads_per_row : plan.tier->threads;
  plan.rows_per_block = plan.threads / plan.threads_per_row;
  plan.blocks_x = plan.is_sliced() ? plan.slices : ceil_div(rows, plan.rows_per_block);
  plan.blocks_y = plan.is_sliced() ? at_most(rows, kMaxGridY) : 1;
  return plan;
}

inline Plan plan_backward(int64_t rows, int64_t cols, DType dtype, const DeviceTraits& device) {
  const int64_t element = size_of(dtype);
  Plan plan = lay_out(find_tier(kBackwardTiers, ceil_div(cols, 16 / element), element, device.tier), cols, element);
  if (plan.is_sliced()) {
    plan.threads = plan.threads_per_row;
    plan.rows_per_block = 1;
    plan.blocks_x = plan.slices;
    // Two blocks a multiprocessor share the rows of a slice: more would only write more partials.
    plan.blocks_y = at_least(1, at_most(at_most(rows, kMaxGridY), 2 * device.sm_count / plan.slices));
    plan.partials = plan.blocks_y;
  } else {
    // As many rows at a time as a block holds, fewer while that would leave multiprocessors without a row.
    const int64_t most = plan.tier->threads / plan.threads_per_row;
    int64_t groups = at_least(1, at_most(most, ceil_div(rows, device.sm_count)));
    plan.threads = static_cast<int>(ceil_div(groups * plan.threads_per_row, 32) * 32);
    plan.rows_per_block = plan.threads / plan.threads_per_row;
    plan.blocks_x = at_most(device.sm_count, ceil_div(rows, plan.rows_per_block));
    plan.blocks_y = 1;
    plan.partials = plan.blocks_x;
  }
  return plan;
}

}  // namespace lnc
