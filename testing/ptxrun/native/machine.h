// Programs, launches, blocks and warps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

constexpr int kLanes = 32;
using Mask = uint32_t;
constexpr Mask kAllLanes = 0xFFFFFFFFu;
constexpr uint32_t kNone = 0xFFFFFFFFu;

struct Warp;
struct Instruction;
// Executes an instruction for the lanes of the mask, which is not empty.
using Handler = void (*)(Warp&, const Instruction&, Mask);

enum Flow : uint8_t { kNext, kBranch, kExit, kBarrier };
enum Space : uint8_t { kGlobal, kShared, kParameter, kLocal, kGeneric };

// library.py's Instruction.
struct Instruction {
  Handler handler;
  const uint32_t* operand;  // offsets into the warp's registers, in the order of the text
  const uint8_t* width;     // bytes that a lane has of each; 0 for a predicate, which is a Mask
  int64_t immediate;        // an address's offset, a group count, a barrier's number
  int32_t target, reconverge;
  uint32_t guard;  // offset of a predicate, or kNone
  uint8_t guard_negated, flow, space, size, vector, is_signed, operands, modifier;
};

// library.py's Stat.
struct Stat {
  uint64_t executed, lanes, bytes, sectors, lines, wavefronts, ideal_wavefronts;
};

// Memory that the kernel may access.
struct Allocation {
  uint64_t base, size;
  uint8_t* read;  // a bit per sector of 32 bytes, or null
  uint8_t* written;
};

// executable.py's Fault.
enum Fault : int32_t {
  kOutOfBounds,
  kMisaligned,
  kSharedOutOfBounds,
  kSharedUninitialised,
  kSharedRace,        // between warps, without a barrier in between
  kSharedWarpHazard,  // between lanes of a warp, without bar.warp.sync in between
  kPendingCopyRead,
  kPendingCopyWrite,
  kDivergentBarrier,
  kDivergentWarpOperation,
  kUnwaitedCopy,
  kEndless,
};

struct Finding {
  int32_t fault, instruction, block, warp, lane, other_instruction;
  uint64_t address, count;
};

// What happened to a byte of shared memory. Epochs count barriers of the block and of the warp.
struct ShadowByte {
  uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
  int32_t writer, reader;                                // instructions
  uint8_t write_warp, write_lane, read_warp, read_lane;  // of a read, 255 where several read in one epoch
  uint8_t initialised, pending;                          // pending: a copy that has not been waited for
};

// A cp.async that has not been waited for.
struct Copy {
  uint64_t from;
  uint32_t to;
  uint8_t bytes, filled, lane;  // of `filled` bytes the first `bytes` are copied, the others are zeros
  int32_t instruction;
};

// Lanes that run together from `pc` until `reconverge`.
struct StackEntry {
  int32_t pc, reconverge;
  Mask mask;
};

struct Launch;

struct Block {
  Launch* launch;
  int32_t number;
  uint32_t x, y, z;
  std::vector<uint8_t> shared;
  std::vector<ShadowByte> shadow;
  uint32_t epoch = 1;    // of barriers
  bool checked = false;  // whether accesses to shared memory are
};

struct Warp {
  uint8_t* registers;
  Block* block;
  Launch* launch;
  int32_t number;
  Mask live = kAllLanes;
  uint32_t epoch = 1;  // of bar.warp.sync
  std::vector<StackEntry> stack;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open_group;
  std::vector<uint8_t> local;
  bool waiting = false, done = false;
  int64_t barrier = 0;
  uint64_t instructions = 0;
};

// library.py's Launch.
struct Launch {
  const Instruction* program;
  Stat* stats;
  const uint8_t* constants;  // a warp's registers from `constants_at` on
  const uint8_t* parameters;
  Allocation* allocations;
  Finding* findings;
  uint64_t registers_size, constants_at, constants_size;
  uint64_t shared_size, local_size;
  uint32_t grid[3], threads[3];
  uint32_t special[15];  // offsets of layout.py's SPECIAL, or kNone
  int32_t allocation_count, instruction_count;
  int32_t finding_count, finding_limit;
  int32_t check_every;  // blocks whose number is a multiple are checked; none where 0
  int32_t warp_order;   // 0 forward, 1 backward, 2 alternating from barrier to barrier
  int32_t blocks_backward, block_count, block_step;  // step: the blocks in between are left out
  int32_t stopped;  // set where a warp does not end
};

template <class T>
inline T* lanes(Warp& w, uint32_t offset) {
  return reinterpret_cast<T*>(w.registers + offset);
}
template <class T>
inline T* operand(Warp& w, const Instruction& in, int i) {
  return lanes<T>(w, in.operand[i]);
}
inline Mask& predicate(Warp& w, uint32_t offset) { return *lanes<Mask>(w, offset); }

// Writes the active lanes' results.
template <class T>
inline void commit(T* to, const T* result, Mask active) {
  if (active == kAllLanes) {
    std::memcpy(to, result, sizeof(T) * kLanes);
  } else {
    for (Mask left = active; left; left &= left - 1) {
      const int i = __builtin_ctz(left);
      to[i] = result[i];
    }
  }
}

// Records a finding; of one fault of one instruction only the first, and a count.
void report(Warp& w, const Instruction& in, Fault fault, int lane, uint64_t address, int32_t other = -1);
// A handler by the name that opcodes.py gives it.
struct Entry {
  const char* name;
  Handler handler;
};

template <size_t kCount>
Handler find_in(const Entry (&entries)[kCount], const std::string& name) {
  for (const Entry& entry : entries)
    if (name == entry.name) return entry.handler;
  return nullptr;
}
