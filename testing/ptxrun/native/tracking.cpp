// What memory accesses are checked for, and what is counted of them.
#include "memory.h"

#include <algorithm>

void report(Warp& w, const Instruction& in, Fault fault, int lane, uint64_t address, int32_t other) {
  Launch& l = *w.launch;
  const int32_t at = int32_t(&in - l.program);
  for (int i = 0; i < l.finding_count; ++i)
    if (l.findings[i].fault == fault && l.findings[i].instruction == at) {
      ++l.findings[i].count;
      return;
    }
  if (l.finding_count == l.finding_limit) return;
  l.findings[l.finding_count++] = {fault, at, w.block->number, w.number, lane, other, address, 1};
}

namespace {

Allocation* allocation_of(Launch& l, uint64_t address, uint64_t bytes) {
  static thread_local int last = 0;
  auto holds = [&](const Allocation& a) { return address >= a.base && address + bytes <= a.base + a.size; };
  if (last < l.allocation_count && holds(l.allocations[last])) return &l.allocations[last];
  for (int i = 0; i < l.allocation_count; ++i)
    if (holds(l.allocations[i])) return &l.allocations[last = i];
  return nullptr;
}

}  // namespace

bool global_access(Warp& w, const Instruction& in, int lane, uint64_t address, uint32_t bytes, bool writes) {
  if (address % bytes) {
    report(w, in, kMisaligned, lane, address);
    return false;
  }
  Allocation* a = allocation_of(*w.launch, address, bytes);
  if (a == nullptr) {
    report(w, in, kOutOfBounds, lane, address);
    return false;
  }
  uint8_t* marks = writes ? a->written : a->read;
  if (marks != nullptr) {
    const uint64_t sector = (address - (a->base & ~31ull)) / 32;
    marks[sector / 8] |= 1 << sector % 8;
  }
  return true;
}

namespace {

struct Distinct {
  uint64_t values[4 * kLanes];
  int count = 0;
  void add(uint64_t value) {
    for (int i = count - 1; i >= 0; --i)
      if (values[i] == value) return;
    values[count++] = value;
  }
};

}  // namespace

void count_global(Stat& s, const uint64_t* addresses, uint32_t bytes, Mask active) {
  Distinct sectors, lines;
  for (Mask left = active; left; left &= left - 1) {
    const uint64_t a = addresses[__builtin_ctz(left)];
    for (uint64_t at = a / 32; at <= (a + bytes - 1) / 32; ++at) sectors.add(at);
    lines.add(a / 128);
  }
  s.sectors += sectors.count;
  s.lines += lines.count;
  s.bytes += uint64_t(bytes) * __builtin_popcount(active);
}

// Shared memory has 32 banks of 4 bytes; half a warp accesses 8 bytes at a time, a quarter of one 16.
void count_shared(Stat& s, const uint64_t* addresses, uint32_t bytes, Mask active) {
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += together) {
    uint32_t words[kLanes][kLanes];
    uint8_t used[kLanes] = {};
    int worst = 0;
    for (int i = first; i < first + together; ++i) {
      if (!(active >> i & 1)) continue;
      for (uint32_t word = uint32_t(addresses[i]) / 4; word <= (addresses[i] + bytes - 1) / 4; ++word) {
        const int bank = word % 32;
        bool known = false;
        for (int k = 0; k < used[bank] && !known; ++k) known = words[bank][k] == word;
        if (!known) {
          words[bank][used[bank]] = word;
          worst = std::max(worst, int(++used[bank]));
        }
      }
    }
    s.wavefronts += worst;
    s.ideal_wavefronts += worst > 0;
  }
  s.bytes += uint64_t(bytes) * __builtin_popcount(active);
}

bool shared_fits(Warp& w, const Instruction& in, int lane, uint64_t address, uint32_t bytes) {
  if (address % bytes) {
    report(w, in, kMisaligned, lane, address);
    return false;
  }
  if (address + bytes > w.block->shared.size()) {
    report(w, in, kSharedOutOfBounds, lane, address);
    return false;
  }
  return true;
}

namespace {

void shadow_read(Warp& w, const Instruction& in, int lane, uint32_t address, uint32_t bytes) {
  Block& b = *w.block;
  for (uint32_t at = address; at < address + bytes; ++at) {
    ShadowByte& s = b.shadow[at];
    if (s.pending) report(w, in, kPendingCopyRead, lane, at, s.writer);
    else if (!s.initialised) report(w, in, kSharedUninitialised, lane, at);
    if (s.write_epoch == b.epoch) {
      if (s.write_warp != w.number) report(w, in, kSharedRace, lane, at, s.writer);
      else if (s.write_lane != lane && s.write_warp_epoch == w.epoch) report(w, in, kSharedWarpHazard, lane, at, s.writer);
    }
    if (s.read_epoch != b.epoch) {
      s.read_warp = w.number, s.read_lane = lane;
    } else {
      if (s.read_warp != w.number) s.read_warp = 255;
      if (s.read_lane != lane || s.read_warp_epoch != w.epoch) s.read_lane = s.read_warp_epoch == w.epoch ? 255 : lane;
    }
    s.read_epoch = b.epoch, s.read_warp_epoch = w.epoch, s.reader = int32_t(&in - w.launch->program);
  }
}

}  // namespace

void shadow_write(Warp& w, const Instruction& in, int lane, uint32_t address, uint32_t bytes, bool pending,
                  const uint8_t* value) {
  Block& b = *w.block;
  for (uint32_t at = address; at < address + bytes; ++at) {
    ShadowByte& s = b.shadow[at];
    if (s.pending && !pending) report(w, in, kPendingCopyWrite, lane, at, s.writer);
    if (s.read_epoch == b.epoch) {
      if (s.read_warp != w.number) report(w, in, kSharedRace, lane, at, s.reader);
      else if (s.read_lane != lane && s.read_warp_epoch == w.epoch) report(w, in, kSharedWarpHazard, lane, at, s.reader);
    }
    if (s.write_epoch == b.epoch) {
      // Lanes of one store may write the same value; which of several values remains is undefined.
      const bool same = value && b.shared[at] == value[at - address];
      if (s.write_warp != w.number) {
        if (!same || s.writer != int32_t(&in - w.launch->program)) report(w, in, kSharedRace, lane, at, s.writer);
      } else if (s.write_lane != lane && s.write_warp_epoch == w.epoch && !same) {
        report(w, in, kSharedWarpHazard, lane, at, s.writer);
      }
    }
    s.write_epoch = b.epoch, s.write_warp_epoch = w.epoch, s.write_warp = w.number, s.write_lane = lane;
    s.writer = int32_t(&in - w.launch->program);
    s.initialised = !pending, s.pending = pending;
  }
}

void gather_addresses(Warp& w, const Instruction& in, int base, uint64_t* addresses) {
  if (in.width[base] == 8) {
    const uint64_t* from = operand<uint64_t>(w, in, base);
    for (int i = 0; i < kLanes; ++i) addresses[i] = from[i] + in.immediate;
  } else {
    const uint32_t* from = operand<uint32_t>(w, in, base);
    for (int i = 0; i < kLanes; ++i) addresses[i] = uint32_t(from[i] + in.immediate);
  }
}

uint8_t* locate(Warp& w, const Instruction& in, int lane, uint64_t address, uint32_t bytes, bool writes,
                const uint8_t* value) {
  uint8_t space = in.space;
  if (space == kGeneric) {
    if (address >= kSharedWindow && address < kSharedWindow + (1u << 24)) space = kShared, address -= kSharedWindow;
    else if (address >= kLocalWindow && address < kLocalWindow + (1u << 24)) space = kLocal, address -= kLocalWindow;
    else space = kGlobal;
  }
  if (space == kGlobal)
    return global_access(w, in, lane, address, bytes, writes) ? reinterpret_cast<uint8_t*>(address) : nullptr;
  if (space == kShared) {
    if (!shared_fits(w, in, lane, address, bytes)) return nullptr;
    if (w.block->checked) {
      if (writes) shadow_write(w, in, lane, uint32_t(address), bytes, false, value);
      else shadow_read(w, in, lane, uint32_t(address), bytes);
    }
    return w.block->shared.data() + address;
  }
  if (address % bytes || address + bytes > w.launch->local_size) {
    report(w, in, address % bytes ? kMisaligned : kOutOfBounds, lane, address);
    return nullptr;
  }
  return w.local.data() + lane * w.launch->local_size + address;
}

void count_access(Warp& w, const Instruction& in, const uint64_t* addresses, uint32_t bytes, Mask active) {
  if (in.space == kGlobal || in.space == kGeneric) count_global(stat(w, in), addresses, bytes, active);
  else if (in.space == kShared) count_shared(stat(w, in), addresses, bytes, active);
}
