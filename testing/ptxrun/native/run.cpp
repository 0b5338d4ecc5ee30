// Runs the blocks of a launch one after another, and a block's warps in turns, each from barrier to barrier.
#include <algorithm>
#include <cstdlib>

#include "machine.h"
#include "memory.h"

Handler find_integer(const std::string&);
Handler find_floating(const std::string&);
Handler find_selection(const std::string&);
Handler find_conversion(const std::string&);
Handler find_memory(const std::string&);
Handler find_copy(const std::string&);
Handler find_collective(const std::string&);
Handler find_warpgroup(const std::string&);

namespace {

constexpr uint64_t kMostInstructions = 1 << 24;  // a warp that executes more is taken for endless

void leave(Warp& w, Mask lanes) {
  w.live &= ~lanes;
  for (StackEntry& entry : w.stack) entry.mask &= ~lanes;
}

// Lanes that diverge run one path after the other, until they meet again at the branch's `reconverge`.
void branch(Warp& w, const Instruction& in, Mask active) {
  StackEntry& top = w.stack.back();
  const Mask others = top.mask & ~active;
  if (!active) {
    ++top.pc;
  } else if (!others) {
    top.pc = in.target;
  } else {
    const int32_t next = top.pc + 1, meet = in.reconverge;
    const bool same = top.reconverge == meet;
    if (same) w.stack.pop_back();
    else top.pc = meet;
    if (next != meet) w.stack.push_back({next, meet, others});
    if (in.target != meet) w.stack.push_back({in.target, meet, active});
    // Lanes that are at the meeting point already wait in the entry below, whose next instruction it is.
  }
}

void run_until_stop(Warp& w) {
  Launch& l = *w.launch;
  while (!w.stack.empty()) {
    StackEntry& top = w.stack.back();
    if (!top.mask || (top.pc == top.reconverge && w.stack.size() > 1)) {
      w.stack.pop_back();
      continue;
    }
    if (top.pc < 0 || top.pc >= l.instruction_count) {
      leave(w, top.mask);
      continue;
    }
    const Instruction& in = l.program[top.pc];
    Mask active = top.mask;
    if (in.guard != kNone) {
      const Mask p = predicate(w, in.guard);
      active &= in.guard_negated ? ~p : p;
    }
    Stat& s = l.stats[top.pc];
    ++s.executed;
    s.lanes += __builtin_popcount(active);
    if (l.stopped || ++w.instructions > kMostInstructions) {
      if (!l.stopped) report(w, in, kEndless, 0, 0);
      l.stopped = 1;  // other warps are unlikely to end either
      leave(w, w.live);
      continue;
    }
    switch (in.flow) {
      case kNext:
        if (active) in.handler(w, in, active);
        ++top.pc;
        break;
      case kBranch: branch(w, in, active); break;
      case kExit:
        ++top.pc;
        leave(w, active);
        break;
      case kBarrier:
        if (!active) {
          ++top.pc;
          break;
        }
        if (active != w.live) report(w, in, kDivergentBarrier, 0, active);
        ++top.pc;
        w.waiting = true;
        w.barrier = in.immediate;
        return;
    }
  }
  w.done = true;
  finish_warp(w);
}

void set_special(Warp& w, const Block& b) {
  const Launch& l = *w.launch;
  auto set = [&](int which, auto value) {
    if (l.special[which] == kNone) return;
    for (int i = 0; i < kLanes; ++i) lanes<uint32_t>(w, l.special[which])[i] = uint32_t(value(i));
  };
  const uint32_t first = w.number * kLanes;
  set(0, [&](int i) { return (first + i) % l.threads[0]; });
  set(1, [&](int i) { return (first + i) / l.threads[0] % l.threads[1]; });
  set(2, [&](int i) { return (first + i) / l.threads[0] / l.threads[1]; });
  set(3, [&](int) { return b.x; });
  set(4, [&](int) { return b.y; });
  set(5, [&](int) { return b.z; });
  set(6, [&](int i) { return i; });
  set(7, [&](int) { return w.number; });
  set(8, [&](int i) { return (1u << i) - 1; });
  set(9, [&](int i) { return (2u << i) - 1; });
  set(10, [&](int i) { return 1u << i; });
  set(11, [&](int i) { return ~((1u << i) - 1); });
  for (int axis = 0; axis < 3; ++axis) set(12 + axis, [&](int) { return l.grid[axis]; });
}

void run_block(Launch& l, int32_t number, std::vector<uint8_t*>& registers) {
  Block block;
  block.launch = &l;
  block.number = number;
  block.x = number % l.grid[0], block.y = number / l.grid[0] % l.grid[1], block.z = number / l.grid[0] / l.grid[1];
  block.shared.assign(l.shared_size, 0xA5);
  block.checked = l.check_every > 0 && number % l.check_every == 0;
  if (block.checked) block.shadow.assign(l.shared_size, ShadowByte{});
  const int threads = l.threads[0] * l.threads[1] * l.threads[2], count = (threads + kLanes - 1) / kLanes;
  std::vector<Warp> warps(count);
  for (int i = 0; i < count; ++i) {
    Warp& w = warps[i];
    w.registers = registers[i];
    w.block = &block, w.launch = &l, w.number = i;
    w.live = threads - i * kLanes >= kLanes ? kAllLanes : (1u << (threads - i * kLanes)) - 1;
    std::memset(w.registers, 0xA5, l.registers_size);
    std::memcpy(w.registers + l.constants_at, l.constants, l.constants_size);
    w.local.assign(l.local_size * kLanes, 0xA5);
    set_special(w, block);
    w.stack.push_back({0, -2, w.live});
  }
  for (int round = 0;; ++round) {
    bool any = false;
    const bool backward = l.warp_order == 1 || (l.warp_order == 2 && round % 2);
    for (int i = 0; i < count; ++i) {
      Warp& w = warps[backward ? count - 1 - i : i];
      if (w.done || w.waiting) continue;
      run_until_stop(w);
      any = true;
    }
    if (!any) break;
    int waiting = 0, done = 0;
    for (Warp& w : warps) waiting += w.waiting, done += w.done;
    if (waiting + done < count) continue;
    ++block.epoch;
    for (Warp& w : warps) w.waiting = false, ++w.epoch;
  }
}

}  // namespace

extern "C" Handler ptxrun_handler(const char* name) {
  for (auto find : {find_integer, find_floating, find_selection, find_conversion, find_memory, find_copy,
                    find_collective, find_warpgroup})
    if (Handler found = find(name)) return found;
  return nullptr;
}

extern "C" void ptxrun_launch(Launch* l) {
  const int threads = l->threads[0] * l->threads[1] * l->threads[2], count = (threads + kLanes - 1) / kLanes;
  std::vector<uint8_t*> registers(count);
  const uint64_t size = (l->registers_size + 63) / 64 * 64;
  for (auto& r : registers) r = static_cast<uint8_t*>(std::aligned_alloc(64, size));
  const int32_t last = (l->block_count - 1) / l->block_step * l->block_step;
  for (int32_t number = 0; number <= last && !l->stopped; number += l->block_step)
    run_block(*l, l->blocks_backward ? last - number : number, registers);
  for (auto r : registers) std::free(r);
}
