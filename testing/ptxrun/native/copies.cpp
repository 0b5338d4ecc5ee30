// Asynchronous copies from global to shared memory.
#include <algorithm>
#include <utility>

#include "memory.h"

namespace {

// cp.async [shared], [global], size {, bytes to read}: the data arrives when the warp waits for it.
void copy_async(Warp& w, const Instruction& in, Mask active) {
  uint64_t to[kLanes], from[kLanes];
  const uint32_t* shared = operand<uint32_t>(w, in, 0);
  const uint64_t* global = operand<uint64_t>(w, in, 1);
  const uint32_t* wanted = in.operands > 2 ? operand<uint32_t>(w, in, 2) : nullptr;
  Mask reading = 0;
  for (Mask left = active; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    to[i] = uint32_t(shared[i] + int32_t(in.immediate));
    from[i] = global[i] + (in.immediate >> 32);
    const uint32_t read = wanted ? std::min<uint32_t>(wanted[i], in.size) : in.size;
    if (!shared_fits(w, in, i, to[i], in.size)) continue;
    Copy copy{from[i], uint32_t(to[i]), uint8_t(read), in.size, uint8_t(i), int32_t(&in - w.launch->program)};
    if (read) {
      if (from[i] % in.size) report(w, in, kMisaligned, i, from[i]);
      uint32_t unit = read;  // the check takes powers of two
      while (unit & (unit - 1)) unit &= unit - 1;
      if (!global_access(w, in, i, from[i], unit, false)) copy.bytes = 0;
      reading |= 1u << i;
    }
    if (w.block->checked) shadow_write(w, in, i, copy.to, in.size, true);
    w.open_group.push_back(copy);
  }
  Stat& s = stat(w, in);
  const uint64_t bytes = s.bytes;
  if (reading) count_global(s, from, in.size, reading);
  count_shared(s, to, in.size, active);
  s.bytes = bytes + uint64_t(in.size) * __builtin_popcount(reading);
}

void land(Warp& w, const std::vector<Copy>& group) {
  Block& b = *w.block;
  for (const Copy& copy : group) {
    std::memset(b.shared.data() + copy.to, 0, copy.filled);
    std::memcpy(b.shared.data() + copy.to, reinterpret_cast<const void*>(copy.from), copy.bytes);
    if (!b.checked) continue;
    for (uint32_t at = copy.to; at < copy.to + copy.filled; ++at) {
      ShadowByte& s = b.shadow[at];
      s.pending = false, s.initialised = true;
      s.write_epoch = b.epoch, s.write_warp_epoch = w.epoch, s.write_warp = w.number, s.write_lane = copy.lane;
    }
  }
}

void commit_group(Warp& w, const Instruction& in, Mask active) {
  if (active != w.live) report(w, in, kDivergentWarpOperation, 0, active);
  w.groups.push_back(std::move(w.open_group));
  w.open_group.clear();
}

void wait_group(Warp& w, const Instruction& in, Mask active) {
  if (active != w.live) report(w, in, kDivergentWarpOperation, 0, active);
  while (int64_t(w.groups.size()) > in.immediate) {
    land(w, w.groups.front());
    w.groups.pop_front();
  }
}

void wait_all(Warp& w, const Instruction& in, Mask active) {
  commit_group(w, in, active);
  while (!w.groups.empty()) {
    land(w, w.groups.front());
    w.groups.pop_front();
  }
}

const Entry kEntries[] = {
    {"cp.async", copy_async}, {"cp.async.commit_group", commit_group}, {"cp.async.wait_group", wait_group},
    {"cp.async.wait_all", wait_all},
};

}  // namespace

void finish_warp(Warp& w) {
  for (const auto& group : w.groups)
    for (const Copy& copy : group) report(w, w.launch->program[copy.instruction], kUnwaitedCopy, copy.lane, copy.to);
  for (const Copy& copy : w.open_group)
    report(w, w.launch->program[copy.instruction], kUnwaitedCopy, copy.lane, copy.to);
}

Handler find_copy(const std::string& name) { return find_in(kEntries, name); }
