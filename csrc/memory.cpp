#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace lnc {
namespace {

// What is smaller comes from memory that malloc has kept, and often from what was freed just before, still in a cache.
constexpr size_t kLarge = 8 << 20;

class KeptMemory final : public c10::Allocator {
  // Lies before the memory itself, which begins where malloc's own large blocks do within their page: results beside
  // inputs of another place hold each other up now and then (see BackwardPlan).
  struct alignas(64) Block {
    static constexpr size_t kPage = 4096, kPlace = 64;
    void* allocated;
    size_t bytes;
    void* memory() { return this + 1; }
    static Block* of(void* memory) { return static_cast<Block*>(memory) - 1; }
    static Block* in(void* allocated, size_t bytes) {
      const auto first = reinterpret_cast<uintptr_t>(allocated) + sizeof(Block);
      const auto memory = first + (kPlace - first) % kPage;
      return new (reinterpret_cast<void*>(memory - sizeof(Block))) Block{allocated, bytes};
    }
  };

  std::mutex mutex;
  std::vector<Block*> idle;  // the longest idle first
  size_t idle_bytes = 0;
  const size_t most = most_bytes();

  static size_t most_bytes() {
    const char* mib = std::getenv("LAYERNORM_CUDA_KEEP_MIB");
    return size_t{mib ? std::strtoul(mib, nullptr, 10) : 256} << 20;
  }

  // Never waited for: after a fork, nobody may be left to release it.
  std::unique_lock<std::mutex> lock() { return {mutex, std::try_to_lock}; }

  // The last one used that fits, which is the likeliest to be in a cache.
  Block* take(size_t bytes) {
    const auto locked = lock();
    if (!locked) return nullptr;
    for (size_t i = idle.size(); i-- > 0;) {
      Block* const block = idle[i];
      if (block->bytes < bytes || block->bytes / 3 > bytes / 2) continue;
      idle.erase(idle.begin() + static_cast<std::ptrdiff_t>(i));
      idle_bytes -= block->bytes;
      return block;
    }
    return nullptr;
  }

  void keep(Block* block) {
    const auto locked = lock();
    if (!locked || block->bytes > most) return c10::free_cpu(block->allocated);
    idle.push_back(block);
    idle_bytes += block->bytes;
    shrink_to(most);
  }

  void shrink_to(size_t bytes) {
    size_t gone = 0;
    for (; idle_bytes > bytes; gone++) {
      idle_bytes -= idle[gone]->bytes;
      c10::free_cpu(idle[gone]->allocated);
    }
    idle.erase(idle.begin(), idle.begin() + static_cast<std::ptrdiff_t>(gone));
  }

  Block* create(size_t bytes) {
    const size_t all = sizeof(Block) + Block::kPage + bytes;
    try {
      return Block::in(c10::alloc_cpu(all), bytes);
    } catch (const c10::Error&) {  // what is kept may be what is missing
      if (const auto locked = lock()) shrink_to(0);
      return Block::in(c10::alloc_cpu(all), bytes);
    }
  }

  static void release(void* memory) {
    c10::profiledCPUMemoryReporter().Delete(memory);
    instance().keep(Block::of(memory));
  }

 public:
  static KeptMemory& instance() {
    static KeptMemory& kept = *new KeptMemory;  // tensors may outlive whatever ends with the process
    return kept;
  }

  c10::DataPtr allocate(size_t bytes) override {
    Block* block = take(bytes);
    if (!block) block = create(bytes);
    void* const memory = block->memory();
    c10::profiledCPUMemoryReporter().New(memory, bytes);
    return {memory, memory, &release, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

c10::Allocator* cpu_memory(size_t bytes) {
  c10::Allocator* const current = c10::GetCPUAllocator();
  return bytes < kLarge || current != c10::GetDefaultCPUAllocator() ? current : &KeptMemory::instance();
}

}  // namespace lnc
