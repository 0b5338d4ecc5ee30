"""Control flow of a kernel: basic blocks, where diverged lanes reconverge, and which registers share a slot."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from .parse import Address, Instruction, Kernel, Operand, Pair, Register, Symbol, Vector

# Opcodes whose first operand is not a destination.
_NO_DESTINATION = {
    "st", "bra", "bar", "barrier", "ret", "exit", "cp", "red", "membar", "fence", "trap", "prefetch", "mbarrier",
    "wgmma", "griddepcontrol", "nanosleep", "discard", "stmatrix", "setmaxnreg",
}  # fmt: skip
_ACCUMULATES = "wgmma.mma_async"  # reads its destination, too


@dataclass
class Block:
    """Instructions `first` to `end` - 1, of which only the last may branch."""

    first: int
    end: int
    successors: list[int] = field(default_factory=list)
    """Numbers of blocks; none where the block ends the thread."""


def _ends(instruction: Instruction) -> bool:
    return instruction.opcode in ("ret", "exit", "trap")


def _branches(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] == "bra"


def target(kernel: Kernel, branch: Instruction) -> int:
    """The instruction that a branch goes to."""
    (label,) = branch.operands
    assert isinstance(label, Symbol)
    return kernel.labels[label.name]


def blocks(kernel: Kernel) -> list[Block]:
    """The kernel's basic blocks in the order of its text."""
    instructions = kernel.instructions
    starts = {0}
    for index, instruction in enumerate(instructions):
        if _branches(instruction):
            starts |= {target(kernel, instruction), index + 1}
        elif _ends(instruction):
            starts.add(index + 1)
    bounds = sorted(start for start in starts if start < len(instructions))
    found = [Block(first, end) for first, end in zip(bounds, [*bounds[1:], len(instructions)], strict=True)]
    at = {block.first: number for number, block in enumerate(found)}
    for block in found:
        last = instructions[block.end - 1]
        if _branches(last):
            block.successors.append(at[target(kernel, last)])
        falls_through = last.guard is not None or not (_branches(last) or _ends(last))
        if block.end < len(instructions) and falls_through and at[block.end] not in block.successors:
            block.successors.append(at[block.end])
    return found


def reconvergence(found: list[Block]) -> list[int | None]:
    """The immediate post-dominator of each block; None where that is the end of the kernel.

    By the algorithm of Cooper, Harvey and Kennedy ("A Simple, Fast Dominance Algorithm") on the reversed graph. A
    guarded `ret` counts as falling through: its lanes just leave, and need no place to meet the others.
    """
    exit_ = len(found)
    order = _reverse_postorder(found)
    number_of = {node: i for i, node in enumerate(order)}
    nearest: dict[int, int] = {exit_: exit_}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            candidates = [s for s in (found[node].successors or [exit_]) if s in nearest]
            if not candidates:
                continue
            new = candidates[0]
            for other in candidates[1:]:
                while new != other:
                    while number_of[new] < number_of[other]:
                        new = nearest[new]
                    while number_of[other] < number_of[new]:
                        other = nearest[other]
            if nearest.get(node) != new:
                nearest[node] = new
                changed = True
    return [None if nearest.get(i, exit_) == exit_ else nearest[i] for i in range(exit_)]


def _reverse_postorder(found: list[Block]) -> list[int]:
    """Blocks from which the exit can be reached, and the exit last: a post-order walk along the reversed edges."""
    exit_ = len(found)
    predecessors: list[list[int]] = [[] for _ in range(exit_ + 1)]
    for number, block in enumerate(found):
        for successor in block.successors or [exit_]:
            predecessors[successor].append(number)
    order: list[int] = []
    seen, stack = {exit_}, [(exit_, iter(predecessors[exit_]))]
    while stack:
        node, rest = stack[-1]
        before = next((p for p in rest if p not in seen), None)
        if before is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(before)
            stack.append((before, iter(predecessors[before])))
    return order


def _registers_of(operand: Operand) -> list[str]:
    match operand:
        case Register(name):
            return [name]
        case Vector(items):
            return [name for item in items for name in _registers_of(item)]
        case Address(base, _):
            return _registers_of(base) if base is not None else []
        case Pair(first, second):
            return _registers_of(first) + _registers_of(second)
    return []


def reads_and_writes(instruction: Instruction) -> tuple[list[str], list[str]]:
    """The registers whose values an instruction needs, and those that it sets."""
    base = instruction.opcode.split(".")[0]
    reads, writes = [], []
    for index, operand in enumerate(instruction.operands):
        names = _registers_of(operand)
        destination = index == 0 and base not in _NO_DESTINATION and not isinstance(operand, Address)
        if destination or (index == 0 and instruction.opcode.startswith(_ACCUMULATES)):
            writes += names
        if not destination:
            reads += names
    if instruction.guard is not None:
        reads.append(instruction.guard.name)
        reads += writes  # lanes that the guard leaves out keep their values
    return reads, writes


Accesses = list[tuple[list[str], list[str]]]


def slots(kernel: Kernel, found: list[Block], size_of: dict[str, int]) -> tuple[dict[str, int], int]:
    """An offset in bytes per register, shared by registers that are not live at once, and the bytes in all.

    Args:
        found: the kernel's `blocks`.
        size_of: the bytes of each register's slot.
    """
    known = kernel.registers
    accesses = [
        ([name for name in reads if name in known], [name for name in writes if name in known])
        for reads, writes in map(reads_and_writes, kernel.instructions)
    ]
    first, last = _intervals(list(known), found, accesses)
    free: dict[int, list[int]] = {}
    active: list[tuple[int, int, int]] = []  # last instruction, size, offset
    offsets: dict[str, int] = {}
    total = 0
    for name in sorted(first, key=lambda n: first[n]):
        while active and active[0][0] < first[name]:
            _, size, offset = heapq.heappop(active)
            free.setdefault(size, []).append(offset)
        size = size_of[name]
        if free.get(size):
            offset = free[size].pop()
        else:
            offset, total = total, total + size
        offsets[name] = offset
        heapq.heappush(active, (last[name], size, offset))
    return offsets, total


def _live(names: list[str], found: list[Block], accesses: Accesses) -> tuple[list[int], list[int]]:
    """The registers that are live at each block's start and end, as bit sets over `names`."""
    bit = {name: 1 << i for i, name in enumerate(names)}
    uses, defines = [], []
    for block in found:
        use = define = 0
        for reads, writes in accesses[block.first : block.end]:
            for name in reads:
                use |= bit[name] & ~define
            for name in writes:
                define |= bit[name]
        uses.append(use)
        defines.append(define)
    live_in, live_out = [0] * len(found), [0] * len(found)
    changed = True
    while changed:
        changed = False
        for number in range(len(found) - 1, -1, -1):
            out = 0
            for successor in found[number].successors:
                out |= live_in[successor]
            new = uses[number] | (out & ~defines[number])
            if (new, out) != (live_in[number], live_out[number]):
                live_in[number], live_out[number], changed = new, out, True
    return live_in, live_out


def _intervals(names: list[str], found: list[Block], accesses: Accesses) -> tuple[dict[str, int], dict[str, int]]:
    """Each register's first and last instruction: one interval that covers every block in which it is live."""
    live_in, live_out = _live(names, found, accesses)
    first: dict[str, int] = {}
    last: dict[str, int] = {}

    def extend(name: str, at: int) -> None:
        first[name] = min(first.get(name, at), at)
        last[name] = max(last.get(name, at), at)

    for number, block in enumerate(found):
        for live, at in ((live_in[number], block.first), (live_out[number], block.end - 1)):
            while live:
                low = live & -live
                extend(names[low.bit_length() - 1], at)
                live ^= low
        for index in range(block.first, block.end):
            for name in accesses[index][0] + accesses[index][1]:
                extend(name, index)
    return first, last
