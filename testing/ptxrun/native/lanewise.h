// Instructions that every lane executes by itself: one loop over all lanes, which the compiler vectorises.
#pragma once

#include <type_traits>
#include <utility>

#include "machine.h"

// F::of of the sources, operands 1 and on, to operand 0.
template <class F, class D, class... S, size_t... I>
inline void apply(Warp& w, const Instruction& in, Mask active, std::index_sequence<I...>) {
  D result[kLanes];
  auto run = [&](const S*... from) {
    for (int i = 0; i < kLanes; ++i) result[i] = F::of(from[i]...);
  };
  run(operand<S>(w, in, I + 1)...);
  commit(operand<D>(w, in, 0), result, active);
}
template <class F, class D, class... S>
void each(Warp& w, const Instruction& in, Mask active) {
  apply<F, D, S...>(w, in, active, std::index_sequence_for<S...>{});
}

template <class T>
using Unsigned = std::make_unsigned_t<T>;

#define LANE_OP(name, T, ...) \
  struct name {               \
    template <class T>        \
    static T of __VA_ARGS__   \
  };
