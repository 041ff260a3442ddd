#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace lnc {
namespace {

// What is left of a thread's part of a range, in pieces. Its owner takes them off the front, helpers off the back: on a
// quiet machine a thread gets the same ones every time, which may still lie in its cache.
class alignas(64) Share {
  std::atomic<uint64_t> left_;  // begin, and end in the upper half: more pieces than that fit in no memory

 public:
  void set(uint64_t begin, uint64_t end) { left_.store(begin | end << 32, std::memory_order_relaxed); }

  template <class Body>
  void work(bool owner, const Body& body) {
    for (;;) {
      uint64_t left = left_.load(std::memory_order_relaxed), begin, end, taken;
      do {
        begin = left & UINT32_MAX, end = left >> 32;
        if (begin == end) return;
        taken = (end - begin + 3) / 4;
      } while (!left_.compare_exchange_weak(left, owner ? (begin + taken) | end << 32 : begin | (end - taken) << 32,
                                            std::memory_order_relaxed));
      owner ? body(begin, begin + taken) : body(end - taken, end);
    }
  }
};

}  // namespace

void parallel_for(int64_t count, int64_t grain, cpu::Task task, void* context) {
  constexpr int64_t kShares = 32;  // where there are more threads, some have one together
  const int64_t piece = std::max<int64_t>(grain / 4, 1), pieces = at::divup(count, piece);
  const int64_t wanted = std::min<int64_t>(at::get_num_threads(), at::divup(count, grain));
  const int64_t threads = at::in_parallel_region() ? 1 : wanted, n = std::min(threads, kShares);
  if (threads == 1) return task(context, 0, count);

  Share shares[kShares];
  for (int64_t i = 0; i < n; i++) shares[i].set(pieces * i / n, pieces * (i + 1) / n);
  const auto run = [&](int64_t begin, int64_t end) { task(context, begin * piece, std::min(end * piece, count)); };
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      shares[i % n].work(true, run);
      for (int64_t step = 1; step < n; step *= 2) shares[(i + step) % n].work(false, run);
    }
  });
}

}  // namespace lnc
