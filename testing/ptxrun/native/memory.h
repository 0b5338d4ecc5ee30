// Access to memory: every access is located, checked and counted.
#pragma once

#include "machine.h"

// Where generic addresses have shared and local memory; layout.py's.
constexpr uint64_t kSharedWindow = 0x7000000000000000ull;
constexpr uint64_t kLocalWindow = 0x7100000000000000ull;

inline Stat& stat(Warp& w, const Instruction& in) { return w.launch->stats[&in - w.launch->program]; }

// The lanes' addresses: operand number `base` plus the instruction's immediate.
void gather_addresses(Warp& w, const Instruction& in, int base, uint64_t* addresses);

// Where a lane's bytes are on this CPU, or null where the access is faulty. `value`: what a store will write there.
uint8_t* locate(Warp& w, const Instruction& in, int lane, uint64_t address, uint32_t bytes, bool writes,
                const uint8_t* value = nullptr);

// Parts of `locate`: whether a global access may happen, and whether a shared one is aligned and within the block's.
bool global_access(Warp& w, const Instruction& in, int lane, uint64_t address, uint32_t bytes, bool writes);
bool shared_fits(Warp& w, const Instruction& in, int lane, uint64_t address, uint32_t bytes);

// Notes that a lane writes to shared memory; `pending`: by a copy that has not been waited for.
void shadow_write(Warp& w, const Instruction& in, int lane, uint32_t address, uint32_t bytes, bool pending,
                  const uint8_t* value = nullptr);

// Count sectors and lines of global memory, and wavefronts of shared memory.
void count_global(Stat& s, const uint64_t* addresses, uint32_t bytes, Mask active);
void count_shared(Stat& s, const uint64_t* addresses, uint32_t bytes, Mask active);
void count_access(Warp& w, const Instruction& in, const uint64_t* addresses, uint32_t bytes, Mask active);

// Reports the copies of a warp that ends without having waited for them.
void finish_warp(Warp& w);
