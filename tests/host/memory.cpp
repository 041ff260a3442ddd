// Shared memory's place, and what every access to memory must satisfy.
//
// The kernels are compiled with -fsanitize=thread for the calls it inserts before each access; this file,
// not libtsan, answers them.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <unordered_map>

#include "internal.h"

#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

namespace lnc::host {

bool watching = false;

namespace {

template <class T>
T* reserve(size_t count) {
  void* p =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<T*>(p);
}

// ---------------------------------------------------------------------------------------------------------------
// Shared memory. Each block of a cluster has a region of its own: the module's thread-local variables, spread with
// gaps between, then the dynamic part.

constexpr size_t unit = 128;  // variables begin at multiples of it, with at least one unit free between
constexpr size_t dynamic_room = 256 << 10;

struct Variable {
  uint64_t offset, size;  // in the module's thread-local segment
  uint64_t place;         // in the region
  uint32_t used;          // time of the last launch that asked for its address
  std::string name;
};

// Who touched a byte last. Readers are lanes of one warp, or whole warps of the owning block, or anyone.
struct SharedCell {
  uint32_t written, read;   // times
  uint16_t writer, reader;  // thread in the cluster; warp in the cluster
  uint32_t readers;         // lanes, or warps
  uint32_t arrivals;        // at cluster barriers, that a reader had made when it read: the most
};
constexpr uint16_t several_warps = 0xffff, several_blocks = 0xfffe;
constexpr uint16_t several = 0xffff;  // threads of a block

std::vector<Variable> variables;
std::vector<uint32_t> variable_at;  // by offset / 4 in the thread-local segment
std::vector<uint32_t> variable_in;  // by place / unit
size_t static_room, region_bytes, regions, dynamic_bytes;
char* shared = nullptr;
SharedCell* shared_cells = nullptr;
uintptr_t module_begin, module_end;
std::unordered_map<uintptr_t, std::string> functions;  // mangled names
constexpr uint32_t nothing = ~0u;

void add_variable(uint64_t offset, uint64_t size, std::string name) {
  const uint32_t n = static_cast<uint32_t>(variables.size());
  variables.push_back({offset, size, static_room, 0, std::move(name)});
  const size_t end = static_room + (size + unit - 1) / unit * unit;
  variable_in.resize(end / unit + 1, nothing);
  std::fill(variable_in.begin() + static_room / unit, variable_in.begin() + end / unit, n);
  static_room = end + unit;
  variable_at.resize(std::max(variable_at.size(), (offset + size) / 4 + 1), nothing);
  std::fill(variable_at.begin() + offset / 4, variable_at.begin() + (offset + size + 3) / 4, n);
}

std::string demangled(const std::string& name) {
  int status;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

// The module's thread-local variables and functions, from the symbol table of its own file.
void read_symbols() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&read_symbols), &info);
  std::ifstream file(info.dli_fname, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const auto* elf = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  const auto* segments = reinterpret_cast<const Elf64_Phdr*>(bytes.data() + elf->e_phoff);
  module_begin = reinterpret_cast<uintptr_t>(info.dli_fbase);
  for (int i = 0; i < elf->e_phnum; ++i)
    if (segments[i].p_type == PT_LOAD) module_end = module_begin + segments[i].p_vaddr + segments[i].p_memsz;
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + elf->e_shoff);
  static_room = unit;
  variable_in.assign(1, nothing);
  for (int i = 0; i < elf->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[i].sh_offset);
    const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t s = 0; s < sections[i].sh_size / sizeof(Elf64_Sym); ++s) {
      const Elf64_Sym& symbol = symbols[s];
      if (symbol.st_shndx == SHN_UNDEF || symbol.st_size == 0) continue;
      const char* name = names + symbol.st_name;
      if (ELF64_ST_TYPE(symbol.st_info) == STT_TLS) add_variable(symbol.st_value, symbol.st_size, demangled(name));
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC) functions[module_begin + symbol.st_value] = name;
    }
  }
  region_bytes = (static_room + dynamic_room + 2 * unit + 4095) / 4096 * 4096;
}

// Addresses of the largest cluster, so that what lies outside of a smaller one is still known to be shared memory;
// cells of as many regions as are in use.
bool reserve_regions(size_t count) {
  if (!shared) {
    shared = reserve<char>(largest_cluster * region_bytes);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(shared, largest_cluster * region_bytes);
#endif
  }
  if (count <= regions) return shared;
  if (shared_cells) munmap(shared_cells, regions * region_bytes * sizeof(SharedCell));
  regions = count;
  shared_cells = watching ? reserve<SharedCell>(count * region_bytes) : nullptr;
  return shared && (!watching || shared_cells);
}

size_t shared_limit(int arch) {
  switch (arch) {
    case 75:
      return 64 << 10;
    case 70:
      return 96 << 10;
    case 80:
    case 87:
      return 163 << 10;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 << 10;
    default:
      return 227 << 10;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Global memory.

struct GlobalCell {  // of two bytes
  uint32_t written, read;
  uint32_t writer_block, reader_block;  // 1 + the block's number
  uint16_t writer, reader;              // thread of the block
};

struct Traffic {
  uint64_t requests = 0, bytes = 0, sectors = 0, fewest_sectors = 0;
};

struct Array {
  std::string name;
  uintptr_t base;
  uint64_t bytes;
  char access;
  Traffic traffic[2];                // reads, writes
  std::vector<uint64_t> touched[2];  // by this launch, a bit for each byte
  std::vector<uint64_t> defined;     // by any launch
  GlobalCell* cells = nullptr;
};

struct Finished {
  std::string kernel;
  dim3 grid, block;
  int cluster;
  size_t shared;
  std::vector<std::string> arrays;
};

std::vector<Array> arrays;
std::vector<Finished> finished;
bool check_races = true, count_distinct = true;

void set_bits(std::vector<uint64_t>& bits, uint64_t begin, uint64_t count) {
  for (uint64_t i = begin, end = begin + count; i < end;) {
    const uint64_t bit = i % 64, n = std::min<uint64_t>(64 - bit, end - i);
    bits[i / 64] |= (n == 64 ? ~uint64_t{0} : ((uint64_t{1} << n) - 1) << bit);
    i += n;
  }
}

bool has_bits(const std::vector<uint64_t>& bits, uint64_t begin, uint64_t count) {
  for (uint64_t i = begin, end = begin + count; i < end;) {
    const uint64_t bit = i % 64, n = std::min<uint64_t>(64 - bit, end - i);
    const uint64_t mask = n == 64 ? ~uint64_t{0} : ((uint64_t{1} << n) - 1) << bit;
    if ((bits[i / 64] & mask) != mask) return false;
    i += n;
  }
  return true;
}

uint64_t count_bits(const std::vector<uint64_t>& bits) {
  uint64_t n = 0;
  for (uint64_t word : bits) n += static_cast<uint64_t>(__builtin_popcountll(word));
  return n;
}

// Is what `other` did at `time` sure to be over, and visible to `t`? __syncwarp orders memory between lanes;
// shuffles and votes do not.
bool ordered(const Thread& t, const Thread& other, uint32_t time) {
  if (&t == &other) return true;
  if (t.rank == other.rank) {
    const Warp& warp = machine.warp_of(t);
    if (time < machine.block_of(t).synced || time < warp.knows[other.number / 32]) return true;
    if (t.number / 32 == other.number / 32 && (time < warp.synced || time < t.knows[other.lane])) return true;
  }
  return t.waits > 0 && time < other.arrival_time[(t.waits - 1) & 1];
}

// The same for all who have read a byte of block `rank`'s shared memory.
bool ordered(const Thread& t, const SharedCell& c, uint32_t rank) {
  if (t.waits > c.arrivals) return true;  // the readers have arrived since, and t has waited for them
  if (c.reader == several_blocks) return false;
  if (c.reader == several_warps) {
    if (rank != t.rank) return false;
    const Warp& warp = machine.warp_of(t);
    bool all = true;
    if (c.read >= machine.blocks[rank].synced)
      for (uint32_t rest = c.readers; rest && all; rest &= rest - 1) all = c.read < warp.knows[__builtin_ctz(rest)];
    return all;
  }
  bool all = true;
  for (uint32_t rest = c.readers; rest && all; rest &= rest - 1)
    all = ordered(t, machine.warps[c.reader].threads[__builtin_ctz(rest)], c.read);
  return all;
}

void race(const char* what, const Thread& t, const std::string& place, const Thread* other, uintptr_t pc) {
  record("race",
         std::string(what) + " of " + place + ", not ordered with " + (other ? describe(*other) : "other threads"), &t,
         pc);
}

std::string place_of(const Array& a, uintptr_t address) { return a.name + " byte " + std::to_string(address - a.base); }

// ---------------------------------------------------------------------------------------------------------------
// The checks of one access.

void shared_access(Thread& t, uintptr_t address, uint32_t size, bool write, uintptr_t pc) {
  const uint64_t offset = address - reinterpret_cast<uintptr_t>(shared);
  const uint32_t rank = static_cast<uint32_t>(offset / region_bytes);
  const uint64_t place = offset % region_bytes;
  std::string name = "dynamic shared memory";
  uint64_t begin = static_room, end = static_room + dynamic_bytes;
  if (place < static_room) {
    const uint32_t n = variable_in[place / unit];
    const bool known = n != nothing && variables[n].used == machine.launch_time;
    begin = known ? variables[n].place : 0;
    end = known ? begin + variables[n].size : 0;
  }
  if (place < begin || place + size > end || rank >= machine.blocks.size())
    return fail(
        "shared out of bounds",
        std::string(write ? "write" : "read") + " of " + std::to_string(size) + " bytes outside every shared variable",
        &t, pc);
  const auto where = [&] {
    return (place < static_room ? variables[variable_in[place / unit]].name : std::string("dynamic shared memory")) +
           " byte " + std::to_string(place - begin);
  };
  if (rank != t.rank && machine.blocks[rank].live == 0)
    return fail("shared out of bounds",
                "access to " + where() + " of block " + std::to_string(rank) + " of the cluster, which has exited", &t,
                pc);
  if (!check_races) return;
  const uint16_t me = static_cast<uint16_t>(t.rank * machine.threads_per_block + t.number);
  const uint16_t warp = static_cast<uint16_t>(t.rank * machine.warps_per_block + t.number / 32);
  const uint32_t lane = 1u << t.lane;
  for (uint64_t i = offset; i < offset + size; ++i) {
    SharedCell& c = shared_cells[i];
    const bool is_written = c.written >= machine.cluster_time;
    if (is_written && !ordered(t, machine.threads[c.writer], c.written))
      return race(write ? "write after write" : "read after write", t, where(), &machine.threads[c.writer], pc);
    if (!write) {
      if (!is_written) record("uninitialised", "read of " + where() + ", which no thread has written", &t, pc);
      if (c.read < machine.cluster_time || c.read < c.written || ordered(t, c, rank)) {
        c.reader = warp;
        c.readers = lane;
        c.arrivals = 0;
      } else if (c.reader == warp) {
        c.readers |= lane;
      } else if (rank != t.rank || c.reader == several_blocks) {
        c.reader = several_blocks;
      } else if (c.reader == several_warps) {
        c.readers |= 1u << t.number / 32;
      } else if (c.reader / machine.warps_per_block == rank) {
        c.readers = 1u << c.reader % machine.warps_per_block | 1u << t.number / 32;
        c.reader = several_warps;
      } else {
        c.reader = several_blocks;
      }
      c.read = machine.time;
      c.arrivals = std::max(c.arrivals, t.arrivals);
      continue;
    }
    if (c.read >= machine.cluster_time && c.read >= c.written && !ordered(t, c, rank)) {
      const Thread* reader =
          c.reader < several_blocks ? &machine.warps[c.reader].threads[__builtin_ctz(c.readers)] : nullptr;
      return race("write after read", t, where(), reader, pc);
    }
    c.writer = me;
    c.written = machine.time;
    c.read = 0;
  }
}

void global_races(Thread& t, Array& a, uintptr_t address, uint32_t size, bool write, uintptr_t pc) {
  const uint32_t block = machine.first_block + t.rank, first = machine.first_block;
  // A thread of this cluster, or null.
  const auto thread_of = [&](uint32_t block_number, uint16_t number) -> const Thread* {
    const uint32_t rank = block_number - 1 - first;
    return rank < machine.blocks.size() ? &machine.threads[rank * machine.threads_per_block + number] : nullptr;
  };
  for (uint64_t i = (address - a.base) / 2; i <= (address - a.base + size - 1) / 2; ++i) {
    GlobalCell& c = a.cells[i];
    if (c.written >= machine.launch_time) {
      const Thread* writer = thread_of(c.writer_block, c.writer);
      if (!writer || !ordered(t, *writer, c.written))
        return race(write ? "write after write" : "read after write", t, place_of(a, a.base + 2 * i), writer, pc);
    }
    if (!write) {
      if (c.read < machine.launch_time) {
        c.reader_block = block + 1;
        c.reader = t.number;
      } else if (c.reader_block != block + 1) {
        c.reader_block = ~0u;
      } else if (c.reader != t.number) {
        c.reader = several;
      }
      c.read = machine.time;
      continue;
    }
    if (c.read >= machine.launch_time) {
      const Thread* reader =
          c.reader != several && c.reader_block != ~0u ? thread_of(c.reader_block, c.reader) : nullptr;
      const bool over =
          reader ? ordered(t, *reader, c.read) : c.reader_block == block + 1 && c.read < machine.block_of(t).synced;
      if (!over) return race("write after read", t, place_of(a, a.base + 2 * i), reader, pc);
    }
    c.written = machine.time;
    c.writer_block = block + 1;
    c.writer = t.number;
    c.read = 0;
  }
}

void global_access(Thread& t, uintptr_t address, uint32_t size, bool write, uintptr_t pc) {
  if (arrays.empty()) return;
  static size_t recent = 0;
  size_t n = recent;
  if (n >= arrays.size() || address - arrays[n].base >= arrays[n].bytes) {
    for (n = 0; n < arrays.size() && address - arrays[n].base >= arrays[n].bytes;) ++n;
    if (n == arrays.size()) {
      const uintptr_t params = reinterpret_cast<uintptr_t>(machine.launch.params);
      if (address - module_begin < module_end - module_begin || address - params < machine.launch.params_bytes) return;
      const Array* near = nullptr;
      for (const Array& a : arrays)
        if (address >= a.base && (!near || a.base > near->base)) near = &a;
      return fail(
          "global out of bounds",
          std::string(write ? "write" : "read") + " of " + std::to_string(size) + " bytes" +
              (near ? ", " + std::to_string(address - near->base - near->bytes) + " bytes past the end of " + near->name
                    : std::string(" before every array")),
          &t, pc);
    }
    recent = n;
  }
  Array& a = arrays[n];
  const uint64_t begin = address - a.base;
  if (begin + size > a.bytes)
    return fail(
        "global out of bounds",
        std::string(write ? "write" : "read") + " of " + std::to_string(size) + " bytes across the end of " + a.name,
        &t, pc);
  if (write && a.access == 'r') return fail("write to an input", place_of(a, address), &t, pc);
  if (count_distinct) {
    set_bits(a.touched[write], begin, size);
    if (a.access == 'w') {
      if (write) {
        set_bits(a.defined, begin, size);
      } else if (!has_bits(a.defined, begin, size)) {
        record("uninitialised", "read of " + place_of(a, address) + ", which nothing has written", &t, pc);
      }
    }
  }
  if (check_races && a.access != 'r') global_races(t, a, address, size, write, pc);
  t.log.push_back({pc, address, static_cast<uint16_t>(size), static_cast<uint16_t>(n), write});
}

inline void on_access(const void* p, uint32_t size, bool write, void* pc) {
  Thread* t = self;
  if (!t) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (address - t->stack < stack_bytes) return;
  if (address - reinterpret_cast<uintptr_t>(shared) < largest_cluster * region_bytes)
    return shared_access(*t, address, size, write, reinterpret_cast<uintptr_t>(pc));
  global_access(*t, address, size, write, reinterpret_cast<uintptr_t>(pc));
}

// An access whose C++ type promises its alignment, as the hardware demands it.
inline void on_aligned(const void* p, uint32_t size, bool write, void* pc) {
  if (self && (reinterpret_cast<uintptr_t>(p) & (size - 1)))
    return fail("misaligned",
                std::string(write ? "write" : "read") + " of " + std::to_string(size) +
                    " bytes at an address that is not a multiple of it",
                self, reinterpret_cast<uintptr_t>(pc));
  on_access(p, size, write, pc);
}

// The hardware moves at most 16 bytes a lane at once.
inline void on_range(const void* p, size_t size, bool write, void* pc) {
  const auto* bytes = static_cast<const char*>(p);
  for (size_t i = 0; i < size; i += 16)
    on_access(bytes + i, static_cast<uint32_t>(std::min<size_t>(16, size - i)), write, pc);
}

// ---------------------------------------------------------------------------------------------------------------
// Accounting: what the lanes of a warp do at the same instruction is one request.

struct Span {
  uintptr_t begin, end;
};

void account(Array& a, bool write, Span* spans, int count) {
  if (!std::is_sorted(spans, spans + count, [](Span x, Span y) { return x.begin < y.begin; }))
    std::sort(spans, spans + count, [](Span x, Span y) { return x.begin < y.begin; });
  uint64_t bytes = 0, sectors = 0;
  uintptr_t end = 0, next_sector = 0;
  for (int i = 0; i < count; ++i) {
    if (spans[i].end <= end) continue;
    bytes += spans[i].end - std::max(spans[i].begin, end);
    const uintptr_t first = std::max(spans[i].begin / 32, next_sector), last = (spans[i].end - 1) / 32;
    if (last >= first) sectors += last - first + 1;
    next_sector = last + 1;
    end = spans[i].end;
  }
  Traffic& traffic = a.traffic[write];
  ++traffic.requests;
  traffic.bytes += bytes;
  traffic.sectors += sectors;
  traffic.fewest_sectors += (bytes + 31) / 32;
}

struct Ordered {
  uint32_t epoch, turn, lane;  // turn: how often this lane was at this instruction in the epoch
  const Access* access;
};

}  // namespace

void flush(Warp& warp) {
  Thread* lanes[32];
  int count = 0;
  bool alike = true;
  for (uint32_t rest = warp.exists; rest; rest &= rest - 1) {
    Thread& t = warp.threads[__builtin_ctz(rest)];
    if (t.log.empty()) continue;
    lanes[count++] = &t;
    const auto& first = lanes[0]->log;
    alike = alike && t.log.size() == first.size() &&
            std::equal(first.begin(), first.end(), t.log.begin(),
                       [](const Access& x, const Access& y) { return x.pc == y.pc && x.array == y.array; });
  }
  if (count == 0) return;
  Span spans[32];
  if (alike) {
    for (size_t i = 0; i < lanes[0]->log.size(); ++i) {
      const Access& access = lanes[0]->log[i];
      if (access.pc == 0) continue;
      for (int l = 0; l < count; ++l)
        spans[l] = {lanes[l]->log[i].address, lanes[l]->log[i].address + lanes[l]->log[i].size};
      account(arrays[access.array], access.write, spans, count);
    }
  } else {
    static std::vector<Ordered> all;
    static std::unordered_map<uint64_t, uint32_t> turns;
    all.clear();
    for (int l = 0; l < count; ++l) {
      uint32_t epoch = 0;
      turns.clear();
      for (const Access& access : lanes[l]->log) {
        if (access.pc == 0) {
          ++epoch;
          turns.clear();
        } else {
          all.push_back({epoch, turns[access.pc * 64 + access.array]++, static_cast<uint32_t>(l), &access});
        }
      }
    }
    const auto key = [](const Ordered& o) { return std::make_tuple(o.epoch, o.access->pc, o.access->array, o.turn); };
    std::sort(all.begin(), all.end(), [&](const Ordered& x, const Ordered& y) { return key(x) < key(y); });
    for (size_t i = 0; i < all.size();) {
      int n = 0;
      const size_t first = i;
      for (; i < all.size() && key(all[i]) == key(all[first]); ++i)
        spans[n++] = {all[i].access->address, all[i].access->address + all[i].access->size};
      account(arrays[all[first].access->array], all[first].access->write, spans, n);
    }
  }
  for (int l = 0; l < count; ++l) lanes[l]->log.clear();
}

void mark(Thread& t) {
  if (!t.log.empty() && t.log.back().pc != 0) t.log.push_back({0, 0, 0, 0, false});
}

void order_lanes(Warp& warp, uint32_t mask) {
  if (mask == warp.exists) {
    warp.synced = machine.time;
    return;
  }
  uint32_t known[32] = {};
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    for (int i = 0; i < 32; ++i) known[i] = std::max(known[i], warp.threads[__builtin_ctz(rest)].knows[i]);
  for (uint32_t rest = mask; rest; rest &= rest - 1) known[__builtin_ctz(rest)] = machine.time;
  for (uint32_t rest = mask; rest; rest &= rest - 1)
    std::copy(known, known + 32, warp.threads[__builtin_ctz(rest)].knows);
}

std::string name_of(void (*kernel)()) {
  if (region_bytes == 0) read_symbols();
  const auto known = functions.find(reinterpret_cast<uintptr_t>(kernel));
  return known == functions.end() ? "?" : demangled(known->second);
}

void order_warps(Block& block, uint32_t warps) {
  Warp* const all = &machine.warps[(&block - machine.blocks.data()) * machine.warps_per_block];
  uint32_t known[32] = {};
  for (uint32_t rest = warps; rest; rest &= rest - 1)
    for (int i = 0; i < 32; ++i) known[i] = std::max(known[i], all[__builtin_ctz(rest)].knows[i]);
  for (uint32_t rest = warps; rest; rest &= rest - 1) known[__builtin_ctz(rest)] = machine.time;
  for (uint32_t rest = warps; rest; rest &= rest - 1) std::copy(known, known + 32, all[__builtin_ctz(rest)].knows);
}

bool prepare_memory(const Launch& l) {
  dynamic_bytes = l.dynamic_shared;
  if (dynamic_bytes > shared_limit(device().arch) || !reserve_regions(static_cast<size_t>(l.cluster))) return false;
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(shared, regions * region_bytes);
  for (size_t r = 0; r < regions; ++r) {
    for (const Variable& v : variables) __asan_unpoison_memory_region(shared + r * region_bytes + v.place, v.size);
    __asan_unpoison_memory_region(shared + r * region_bytes + static_room, dynamic_bytes);
  }
#endif
  if (watching && count_distinct) {
    for (Array& a : arrays)
      for (auto& bits : a.touched) bits.assign((a.bytes + 63) / 64, 0);
  }
  return true;
}

// New shared memory holds what nobody wrote: NaN, whatever the type.
void start_cluster() {
  for (size_t r = 0; r < machine.blocks.size(); ++r) {
    for (const Variable& v : variables)
      if (v.used) std::memset(shared + r * region_bytes + v.place, 0xff, v.size);
    std::memset(shared + r * region_bytes + static_room, 0xff, dynamic_bytes);
  }
}

void* dynamic_shared() { return shared + self->rank * region_bytes + static_room; }

void* map_shared_address(const void* p, int rank) {
  if (rank < 0 || rank >= machine.launch.cluster) {
    fail("shared out of bounds", "the cluster has no block " + std::to_string(rank), self);
    return nullptr;
  }
  return static_cast<char*>(const_cast<void*>(p)) +
         (static_cast<ptrdiff_t>(rank) - self->rank) * static_cast<ptrdiff_t>(region_bytes);
}

void finish_launch() {
  for (Variable& v : variables) v.used = 0;
  const Launch& l = machine.launch;
  Finished f{machine.kernel, l.grid, l.block, l.cluster, l.dynamic_shared, {}};
  for (Array& a : arrays) {
    std::string text = "\"" + a.name + "\":{";
    for (int write = 0; write < 2; ++write) {
      const Traffic& t = a.traffic[write];
      text +=
          std::string(write ? ",\"write\":{" : "\"read\":{") + "\"requests\":" + std::to_string(t.requests) +
          ",\"bytes\":" + std::to_string(t.bytes) + ",\"distinct\":" + std::to_string(count_bits(a.touched[write])) +
          ",\"sectors\":" + std::to_string(t.sectors) + ",\"fewest_sectors\":" + std::to_string(t.fewest_sectors) + "}";
      a.traffic[write] = {};
    }
    f.arrays.push_back(text + "}");
  }
  if (finished.size() < 1000 && watching) finished.push_back(std::move(f));
}

}  // namespace lnc::host

using namespace lnc::host;

void lnc_host_reset() {
  for (Array& a : arrays)
    if (a.cells) munmap(a.cells, (a.bytes / 2 + 2) * sizeof(GlobalCell));
  arrays.clear();
  finished.clear();
  machine.reports.clear();
}

void lnc_host_array(const char* name, const void* base, int64_t bytes, char access) {
  if (!watching || bytes <= 0) return;
  Array a;
  a.name = name;
  a.base = reinterpret_cast<uintptr_t>(base);
  a.bytes = static_cast<uint64_t>(bytes);
  a.access = access;
  if (count_distinct && access == 'w') a.defined.assign((a.bytes + 63) / 64, 0);
  if (check_races && access != 'r') a.cells = reserve<GlobalCell>(a.bytes / 2 + 2);
  arrays.push_back(std::move(a));
}

void lnc_host_check(int races, int distinct) {
  check_races = races;
  count_distinct = distinct;
}

const char* lnc_host_report() {
  static std::string text;
  const auto quote = [](const std::string& s) {
    std::string quoted = "\"";
    for (char c : s) {
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += c;
    }
    return quoted + "\"";
  };
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "[" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + "]";
  };
  text = std::string("{\"instrumented\":") + (watching ? "true" : "false") + ",\"reports\":[";
  for (const Report& r : machine.reports) {
    if (&r != &machine.reports[0]) text += ",";
    text += "{\"kind\":" + quote(r.kind) + ",\"message\":" + quote(r.message) +
            ",\"block\":" + triple(r.block.x, r.block.y, r.block.z) +
            ",\"thread\":" + triple(r.thread.x, r.thread.y, r.thread.z) +
            ",\"address\":" + std::to_string(r.pc ? r.pc - module_begin : 0) + "}";
  }
  text += "],\"launches\":[";
  for (const Finished& f : finished) {
    if (&f != &finished[0]) text += ",";
    text += "{\"kernel\":" + quote(f.kernel) + ",\"grid\":" + triple(f.grid.x, f.grid.y, f.grid.z) +
            ",\"block\":" + triple(f.block.x, f.block.y, f.block.z) + ",\"cluster\":" + std::to_string(f.cluster) +
            ",\"dynamic_shared\":" + std::to_string(f.shared) + ",\"arrays\":{";
    for (const std::string& a : f.arrays) text += (&a != &f.arrays[0] ? "," : "") + a;
    text += "}}";
  }
  text += "]}";
  return text.c_str();
}

// ---------------------------------------------------------------------------------------------------------------
// What the compiler calls.

#define HIDDEN __attribute__((visibility("hidden")))

extern "C" {

// Where a thread-local variable is: inside a kernel, in the block's shared memory.
struct ThreadLocal {
  uint64_t module, offset;
};
HIDDEN void* __tls_get_addr(ThreadLocal* v) {
  static auto* const real = reinterpret_cast<void* (*)(ThreadLocal*)>(dlsym(RTLD_DEFAULT, "__tls_get_addr"));
  const Thread* t = self;
  if (!t || reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) - t->stack >= stack_bytes) return real(v);
  Variable& variable = variables[variable_at[v->offset / 4]];
  if (variable.used != machine.launch_time) {
    std::memset(shared + t->rank * region_bytes + variable.place, 0xff, variable.size);
    variable.used = machine.launch_time;
  }
  return shared + t->rank * region_bytes + variable.place + (v->offset - variable.offset);
}

#define PC __builtin_return_address(0)
#define LNC_ACCESS(size)                                                              \
  HIDDEN void __tsan_read##size(void* p) { on_aligned(p, size, false, PC); }          \
  HIDDEN void __tsan_write##size(void* p) { on_aligned(p, size, true, PC); }          \
  HIDDEN void __tsan_volatile_read##size(void* p) { on_aligned(p, size, false, PC); } \
  HIDDEN void __tsan_volatile_write##size(void* p) { on_aligned(p, size, true, PC); } \
  HIDDEN void __tsan_unaligned_read##size(void* p) { on_access(p, size, false, PC); } \
  HIDDEN void __tsan_unaligned_write##size(void* p) { on_access(p, size, true, PC); }
LNC_ACCESS(1)
LNC_ACCESS(2)
LNC_ACCESS(4)
LNC_ACCESS(8)
LNC_ACCESS(16)
HIDDEN void __tsan_read_range(void* p, size_t size) { on_range(p, size, false, PC); }
HIDDEN void __tsan_write_range(void* p, size_t size) { on_range(p, size, true, PC); }
HIDDEN void __tsan_vptr_update(void**, void*) {}
HIDDEN void __tsan_vptr_read(void**) {}
HIDDEN void __tsan_func_entry(void*) {}
HIDDEN void __tsan_func_exit(void) {}
HIDDEN void __tsan_init() { watching = true; }
}
