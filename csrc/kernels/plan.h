// Which kernel runs for a shape, and how it is laid out: a pure function over a table, the same on every host.
// How a row is divided depends on the row alone (its length and dtype) and the architecture, never on how many rows
// there are: a row's bits are then the same in any batch.
#pragma once
#include <cstdint>

#include "params.h"

namespace lnc {

struct DeviceTraits {
  int arch;                    // 10 * major + minor of the compute capability
  int sm_count;                // multiprocessors
  const char* tier = nullptr;  // the only tiers to choose from, by name, to measure them; null for all
  int code_arch = INT32_MAX;   // what the kernels were compiled for: may be older, where PTX brings them here
  bool teams = true;           // whether blocks may wait for each other
  bool has_clusters() const { return arch >= 90 && code_arch >= 90; }
  bool has_teams() const { return teams && !has_clusters(); }
  // Simulators of sm_70 know no other launches, but start the blocks in their order, and all find room.
  bool has_cooperative_launches() const { return arch >= 75; }
};

constexpr int kWholeWarps = 0;
constexpr int64_t kAnyLength = INT64_MAX;

struct Tier {
  const char* name;
  int group;            // threads that share a row: a power of two, or kWholeWarps for as many warps as it takes
  int vecs;             // 16-byte packs of a row to a thread
  int threads;          // threads a block (the most, for kWholeWarps)
  int64_t max_packs;    // the longest row, in packs
  int64_t max_element;  // the widest element in bytes
  int64_t min_element;
  const char* reason;
};

// clang-format off
constexpr Tier kForwardTiers[] = {
    // Short rows: a thread gets so much of a row that what a row costs besides (its address, the reduction) is shared
    // by many elements, while the lanes of a group still read 64 bytes of it at a time.
    {"warp", 1, 1, 128, 1, 8, 2, "the row is one 16-byte pack: one thread a row"},
    {"warp", 4, 1, 128, 4, 8, 2, "short row: 4 threads share it, 8 rows a warp"},
    {"warp", 8, 1, 128, 8, 8, 2, "short row: 8 threads share it, 4 rows a warp"},
    {"warp", 8, 2, 128, 16, 8, 2, "short row: 8 threads share it, 4 rows a warp, 2 packs a thread"},
    {"warp", 16, 2, 128, 32, 8, 2, "short row: 16 threads share it, 2 rows a warp, 2 packs a thread"},
    {"warp", 16, 4, 128, 64, 8, 2, "short row: 16 threads share it, 2 rows a warp, 4 packs a thread"},
    // A warp a row needs no barrier. 128 threads a block: enough rows to hide latency, small enough to fill the tail.
    // Of 16-bit data 4 packs are 32 elements, and the last rows take long: two warps are done with them sooner, and
    // leave registers for weight and bias, which then come with the row.
    {"warp", 32, 4, 128, 128, 8, 4, "a warp a row, 4 packs a thread in registers"},
    {"block", 64, 2, 64, 128, 2, 2, "two warps a row, 2 packs a thread in registers"},
    // The same of more float32 elements; 3 packs serve 768 columns without an idle lane.
    {"block", 64, 3, 64, 192, 4, 4, "two warps a row, 3 packs a thread in registers"},
    {"block", 64, 4, 64, 256, 4, 4, "two warps a row, 4 packs a thread in registers"},
    // 16 elements a thread while a row leaves too few packs for 32, which share a row's fixed cost among more.
    {"block", kWholeWarps, 4, 512, 768, 8, 4, "a block a row, 4 packs a thread in registers"},
    // Of a long row weight and bias are twice as much, and come from the L2 cache every time: several blocks take the
    // same columns of many rows and keep theirs.
    {"team", kWholeWarps, 8, 512, 4096, 4, 4, "long row: blocks that run together share it, the next one in flight"},
    {"block", kWholeWarps, 8, 512, 4096, 8, 4, "a block a row, 8 packs a thread in registers"},
    {"block", kWholeWarps, 2, 512, 1024, 2, 2, "a block a row, 2 packs a thread in registers"},
    {"team", kWholeWarps, 4, 512, 2048, 2, 2, "long row: blocks that run together share it, the next one in flight"},
    {"block", kWholeWarps, 4, 512, 2048, 2, 2, "a block a row, 4 packs a thread in registers"},
    // Longer rows are cut into slices of one size whoever takes them: the same bits, however many rows there are.
    {"staged", kWholeWarps, 4, 512, kAnyLength, 8, 2, "many long rows: a block a row, kept in its shared memory"},
    {"cluster", kWholeWarps, 4, 512, kAnyLength, 8, 2, "long rows: a cluster of blocks a row, kept in shared memory"},
    {"slices", kWholeWarps, 4, 512, kAnyLength, 8, 2, "few long rows, or too long to keep: slices, in two launches"},
};

constexpr Tier kBackwardTiers[] = {
    // 16 elements of 16-bit data a thread: 128 registers hold this row, the next one and the gradients of weight and
    // bias. Blocks of 512: one partial a multiprocessor is all that the second kernel has to read.
    {"warp", 1, 1, 512, 1, 8, 2, "the row is one 16-byte pack: one thread a row"},
    {"warp", 4, 1, 512, 4, 8, 2, "short row: 4 threads share it, 8 rows a warp"},
    {"warp", 8, 1, 512, 8, 8, 2, "short row: 8 threads share it, 4 rows a warp"},
    {"warp", 8, 2, 512, 16, 8, 2, "short row: 8 threads share it, 4 rows a warp, 2 packs of each array a thread"},
    {"warp", 16, 2, 512, 32, 8, 2, "short row: 16 threads share it, 2 rows a warp, 2 packs of each array a thread"},
    {"warp", 32, 2, 512, 64, 8, 2, "a warp a row, 2 packs of each array a thread, next row in flight"},
    {"block", 64, 2, 512, 128, 2, 2, "two warps share a row, 2 packs of each array a thread, next row in flight"},
    {"block", kWholeWarps, 2, 512, 1024, 8, 2, "warps share a row, 2 packs of each array a thread, next row in flight"},
    // Longer rows: as much of one to a block as above.
    {"cluster", kWholeWarps, 2, 512, 8 * 1024, 8, 2, "long row: a cluster of blocks shares it, next row in flight"},
    {"team", kWholeWarps, 2, 512, 8 * 1024, 8, 2, "long row: blocks that run together share it, next row in flight"},
    {"slices", kWholeWarps, 2, 512, kAnyLength, 8, 2, "too long to keep: slices, in two launches"},
};
// clang-format on

constexpr int kMaxCluster = 8;                // blocks: what every device allows that has clusters
constexpr int kMaxStagedSlices = 64;          // of one row
constexpr int64_t kReservedShared = 4 << 10;  // of a block's shared memory, for all but the slices that it keeps
// Of forward's teams, which take rows of more than kLargeRow threads, whose weight and bias do not stay in L1: threads
// a block; blocks a multiprocessor, 3 warps each of its quarters, which leaves registers for a row, the next and both.
constexpr int kLargeRow = 256, kTeamThreads = 64, kTeamBlocks = 6;
constexpr int64_t kMaxGridY = 65535;
// Of a team's board, in bytes: two halves of three floats for each of 32 warps; of two numbers for each block.
constexpr int64_t kForwardBoard = 2 * 32 * 3 * 8, kBackwardBoard = 2 * kMaxCluster * 2 * 2 * 8;

// The shared memory that one block can have, in bytes.
constexpr int64_t shared_memory(int arch) {
  const int64_t kib = arch < 75                      ? 96
                      : arch == 75                   ? 64
                      : arch == 80 || arch == 87     ? 163
                      : arch < 90 || arch / 10 == 12 ? 99
                                                     : 227;
  return kib << 10;
}

struct Plan {
  const Tier* tier;
  int threads;          // a block
  int threads_per_row;  // of one block
  int rows_per_block;   // at a time
  int64_t blocks_x, blocks_y;
  int64_t slice_cols, slices;  // of a row
  int cluster;                 // blocks that share a row: a cluster or a team
  bool cooperative;            // all blocks of the grid run at the same time
  bool whole;                  // rows begin and end with packs: for the kernels that take these only
  int64_t shared;              // bytes of shared memory for slices of rows
  int64_t board;               // bytes of the workspace through which the blocks of teams exchange sums
  int64_t partials;            // backward: how many sets of weight and bias gradients the second kernel folds
  bool is(const char* name) const;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr bool same_name(const char* a, const char* b) { return *a == *b && (!*a || same_name(a + 1, b + 1)); }
inline bool Plan::is(const char* name) const { return same_name(tier->name, name); }

// Of a thread's packs, those that every row has which goes to the kernels for whole ones.
constexpr int sure_packs(int vecs) { return vecs < 4 ? vecs - 1 : vecs - 2; }

inline bool is_whole(const Plan& plan, int64_t cols, int64_t element) {
  const int64_t pack = 16 / element, sure = plan.slices > 1 ? 0 : sure_packs(plan.tier->vecs);
  return cols % pack == 0 && cols / pack >= sure * plan.cluster * plan.threads_per_row;
}

// A row's division; a row of several slices takes whole blocks.
inline Plan lay_out(const Tier* tier, int64_t cols, int64_t element) {
  const int64_t pack = 16 / element, packs = ceil_div(cols, pack);
  Plan plan{tier};
  plan.slices = plan.cluster = 1, plan.slice_cols = cols;
  int64_t warps = at_most(ceil_div(packs, 32 * tier->vecs), tier->threads / 32);
  if (tier->vecs * pack == 32 && 32 * warps > kLargeRow) warps += warps % 2;  // a team has two to a block
  if (tier->max_packs == kAnyLength) {
    warps = tier->threads / 32;
    plan.slice_cols = warps * 32 * tier->vecs * pack;
    plan.slices = ceil_div(cols, plan.slice_cols);
  }
  plan.threads_per_row = tier->group == kWholeWarps ? static_cast<int>(warps) * 32 : tier->group;
  return plan;
}

// The first tier of a table that holds the row and that complete(plan) accepts; the last one takes every row.
template <int K, class F>
Plan choose(const Tier (&tiers)[K], int64_t cols, DType dtype, const char* name, F complete) {
  const int64_t element = size_of(dtype), packs = ceil_div(cols, 16 / element);
  Plan plan{};
  for (const Tier& t : tiers) {
    const bool last = &t == &tiers[K - 1];
    if (!last && (packs > t.max_packs || element < t.min_element || element > t.max_element ||
                  (name && !same_name(name, t.name))))
      continue;
    plan = lay_out(&t, cols, element);
    if (complete(plan) || last) break;
  }
  return plan;
}

// Threads of one multiprocessor that walk the rows forward, by what each holds in registers: its packs of a row as they
// are computed with, of the next as they come, and which lanes it shares the row with where they are not all. Some rows
// are then written while others are read.
constexpr int forward_threads(int group, int vecs, int pack) {
  const int registers = vecs * (pack + 4) + (group < 32);
  return registers > 48 ? 512 : registers > 36 ? 640 : registers > 20 ? 768 : 1024;
}

// aligned: every row of every array begins at a multiple of 16 bytes.
inline Plan plan_forward(int64_t rows, int64_t cols, DType dtype, const DeviceTraits& device, bool aligned = true) {
  return choose(kForwardTiers, cols, dtype, device.tier, [&](Plan& plan) {
    plan.threads = plan.tier->group == kWholeWarps ? plan.threads_per_row : plan.tier->threads;
    plan.rows_per_block = plan.threads / plan.threads_per_row;
    plan.blocks_x = ceil_div(rows, plan.rows_per_block), plan.blocks_y = 1;
    plan.whole = aligned && is_whole(plan, cols, size_of(dtype));
    if (plan.is("team")) {
      // Rows that are not whole would not have the next one in flight.
      const bool pays = plan.whole && plan.threads > kLargeRow;
      if (!device.has_teams() || !(pays || device.tier)) return false;
      plan.cluster = static_cast<int>(ceil_div(plan.threads, kTeamThreads));
      plan.threads = plan.threads_per_row = kTeamThreads;
      plan.whole = aligned && is_whole(plan, cols, size_of(dtype));
      // A row for each of them: fewer are as soon done in a block each. And no more than it takes for as many rounds.
      const int64_t most = kTeamBlocks * device.sm_count / plan.cluster;
      if (most == 0 || (rows < most && !device.tier)) return false;
      const int64_t teams = ceil_div(rows, ceil_div(rows, most));
      plan.blocks_x = teams * plan.cluster;
      plan.board = teams * kForwardBoard;
      plan.cooperative = device.has_cooperative_launches();
      return true;
    }
    if (plan.is("warp") && plan.whole && dtype != DType::f64) {
      const int threads = forward_threads(plan.tier->group, plan.tier->vecs, 16 / size_of(dtype));
      plan.blocks_x = at_most(plan.blocks_x, threads / plan.threads * device.sm_count);
    }
    if (plan.is("slices")) {
      plan.blocks_x = plan.slices, plan.blocks_y = at_most(rows, kMaxGridY);
    } else if (plan.is("staged") || plan.is("cluster")) {
      const int64_t slice_bytes = plan.slice_cols * size_of(dtype),
                    kept = (shared_memory(device.arch) - kReservedShared) / slice_bytes;
      if (plan.is("cluster")) {
        if (!device.has_clusters()) return false;
        // More blocks than it takes where multiprocessors would stand idle.
        plan.cluster = 2;
        while (plan.cluster < kMaxCluster && plan.cluster < plan.slices &&
               (ceil_div(plan.slices, plan.cluster) > kept || rows * plan.cluster * 2 <= device.sm_count))
          plan.cluster *= 2;
      }
      const int64_t keeps = ceil_div(plan.slices, plan.cluster);
      plan.blocks_x = rows * plan.cluster;
      plan.shared = keeps * slice_bytes;
      // Half the multiprocessors are enough: they read the row once, the slices' two launches twice.
      return keeps <= kept && plan.slices <= kMaxStagedSlices && (device.tier || 2 * plan.blocks_x >= device.sm_count);
    }
    return true;
  });
}

inline Plan plan_backward(int64_t rows, int64_t cols, DType dtype, const DeviceTraits& device, bool aligned = true) {
  const int64_t pack = 16 / size_of(dtype);
  return choose(kBackwardTiers, cols, dtype, device.tier, [&](Plan& plan) {
    plan.threads = plan.threads_per_row;
    plan.rows_per_block = 1;
    plan.blocks_y = 1;
    if (plan.is("slices")) {
      plan.blocks_x = plan.slices;
      // Two blocks a multiprocessor share the rows of a slice: more would only write more partials.
      plan.blocks_y = at_least(1, at_most(at_most(rows, kMaxGridY), 2 * device.sm_count / plan.slices));
      plan.partials = plan.blocks_y;
    } else if (plan.is("cluster") || plan.is("team")) {
      if (!(plan.is("team") ? device.has_teams() : device.has_clusters())) return false;
      const int64_t packs = ceil_div(cols, pack);
      // Two blocks a multiprocessor, as far as the sizes of teams go: one computes while the other waits for its team.
      const int64_t most = plan.is("team") ? kMaxCluster : 1;
      for (plan.cluster = 2;
           plan.cluster * plan.tier->threads * plan.tier->vecs < (plan.cluster < most ? 2 : 1) * packs;)
        plan.cluster *= 2;
      plan.threads = static_cast<int>(32 * ceil_div(packs, plan.cluster * 32 * plan.tier->vecs));
      plan.threads_per_row = plan.threads;
      plan.slice_cols = plan.threads * plan.tier->vecs * pack;
      plan.slices = plan.cluster;
      const int64_t blocks = plan.is("team") ? plan.tier->threads / plan.threads * device.sm_count : device.sm_count;
      plan.partials = at_least(1, at_most(rows, blocks / plan.cluster));
      plan.blocks_x = plan.partials * plan.cluster;
      if (plan.is("team")) {
        if (plan.blocks_x > blocks) return false;
        plan.board = plan.partials * kBackwardBoard;
        plan.cooperative = device.has_cooperative_launches();
      }
    } else {
      // As many rows at a time as a block holds, fewer while that would leave multiprocessors without a row.
      const int64_t groups =
          at_least(1, at_most(plan.tier->threads / plan.threads_per_row, ceil_div(rows, device.sm_count)));
      plan.threads = static_cast<int>(ceil_div(groups * plan.threads_per_row, 32) * 32);
      plan.rows_per_block = plan.threads / plan.threads_per_row;
      // Fewer where that keeps partials within 2% of what is moved and takes one round of rows in sixteen at most: what
      // the others have on its way fills the memory's lanes still.
      const int64_t two_percent = 3 * rows * size_of(dtype) / (100 * size_of(accumulate_type(dtype)));
      const int64_t fewer = at_least(1, at_most(device.sm_count, two_percent));
      auto rounds = [&](int64_t blocks) { return ceil_div(rows, blocks * plan.rows_per_block); };
      const int64_t walkers = 15 * rounds(fewer) <= 16 * rounds(device.sm_count) ? fewer : device.sm_count;
      plan.blocks_x = plan.partials = at_most(walkers, ceil_div(rows, plan.rows_per_block));
    }
    plan.whole = aligned && is_whole(plan, cols, size_of(dtype));
    return true;
  });
}

}  // namespace lnc
