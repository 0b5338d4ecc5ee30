"""vLLM's Marlin MoE kernel, from a wheel of vLLM, executed and counted as our kernels are.

The wheel holds its PTX for sm_80. What a launch counts does not depend on the weights, which are zeros here. The grid
and the kernel are those that `csrc/libtorch_stable/moe/marlin_moe_wna16/ops.cu` of vLLM 0.33 chooses.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from testing.flash import FLASH_CONFIG
from testing.ptxrun import machine_code
from testing.ptxrun.executable import Executable, Memory, Schedule
from testing.ptxrun.parse import parse
from testing.ptxrun.profile import Profile, profile
from testing.ptxrun.triton_kernels import MULTIPROCESSORS, Compiled, launch, span

from .layer import Point
from .store import Store, key_of
from .trace import Call, drawn_experts

ARCH = 80
OP = "vLLM's Marlin"
GROUP, TILE, STAGES = 128, 8, 4
"""Columns of a scale; pairs that a block multiplies at a time, for up to some 200 tokens; of its pipeline."""
LIBRARY = "vllm/_moe_C_stable_libtorch.abi3.so"
# Of its parameter for bf16 times 4-bit integers with an offset of 8: vLLM's ScalarType ids.
BF16, UINT4B8 = 1125899906909960, 1125899907892224
MOST_SHARED = 163 * 1024  # of a block on sm_80
MOST_REGISTERS = 255 * 1024  # bytes that vLLM lets a multiprocessor's blocks take
MOST_RESIDENT = 4


@dataclass(frozen=True)
class Shape:
    """Of a block's tile."""

    columns: int
    rows: int
    threads: int

    @property
    def name(self) -> str:
        """The end of the kernel's mangled name, from its threads on."""
        return f"ELi{self.threads}ELi1ELi{self.rows // 16}ELi{self.columns // 16}ELb1ELi{STAGES}ELi{GROUP // 16}ELb0E"

    @property
    def shared(self) -> int:
        """Bytes of a block."""
        codes, sums = STAGES * self.columns * self.rows // 2, 16 * (self.rows + 8) * 2
        return max(codes, sums) + STAGES * 16 * self.columns * 2 + STAGES * self.rows * 2 + 16 * 16


SHAPES = (Shape(128, 128, 256), Shape(64, 128, 128), Shape(128, 64, 128))


@functools.cache
def kernels(wheel: Path) -> dict[str, str]:
    """The PTX of each of SHAPES' kernels, by their names' end.

    Raises:
        ValueError: the wheel does not hold them.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        if LIBRARY not in archive.namelist():
            raise ValueError(f"--marlin={wheel}: holds no {LIBRARY}. Pass a CUDA wheel of vLLM 0.33.0.")
        archive.extract(LIBRARY, folder)
        tool = str(machine_code.TOOLS / "cuobjdump")
        subprocess.run([tool, "-xptx", "all", str(Path(folder) / LIBRARY)], cwd=folder, check=True, capture_output=True)
        texts = [path.read_text() for path in Path(folder).glob(f"*.sm_{ARCH}.ptx")]
    types = f"ILl{BF16}ELl{UINT4B8}ELl{BF16}ELl{BF16}"
    found = {}
    for text in (text for text in texts if types in text):
        head, *entries = text.split(".visible .entry ")
        for shape in SHAPES:
            for entry in (entry for entry in entries if f"{types}{shape.name}" in entry.partition("(")[0]):
                found[shape.name] = f"{head}.visible .entry {entry}"
    if len(found) < len(SHAPES):
        raise ValueError(f"--marlin={wheel}: lacks Marlin's kernels for int4 in bf16. Pass a wheel of vLLM 0.33.0.")
    return found


def with_lines(ptx: str) -> str:
    """Every instruction is a source line of its own, by which machine instructions are counted (`machine_code.py`)."""
    lines = [line for line in ptx.splitlines() if not re.match(r"\s*\.(loc|file)\s", line)]
    begin = next(number for number, line in enumerate(lines) if line.startswith("{"))
    for number in range(begin, len(lines)):
        if re.match(r"\s*(@!?%\w+\s+)?[a-z][\w.:]*(\s.*)?;", lines[number]):
            lines[number] = f".loc 1 {number} 0\n{lines[number]}"
    return "\n".join([*lines, '.file 1 "marlin.ptx"', ""])


@dataclass(frozen=True)
class _Product:
    """One of the two launches: [tokens, columns] times the chosen experts' [rows, columns]."""

    tokens: int
    rows: int
    columns: int
    topk: int
    weigh: bool


def count(wheel: Path, ranks: int, point: Point, store: Store) -> Call:
    """Both products of a layer's routed experts, which are those of `Tracer`; units are 4-bit weights.

    Raises:
        RuntimeError: a block waits for another one that runs after it.
    """
    config = FLASH_CONFIG
    hidden, inner, topk = config.hidden_size, config.moe_intermediate_size // ranks, config.num_experts_per_tok
    ids = drawn_experts(point.tokens)
    call = Call(OP, 3.0 * hidden * inner * len(ids.unique()))
    for product in (
        _Product(point.tokens, 2 * inner, hidden, topk, weigh=False),
        _Product(point.tokens * topk, hidden, inner, 1, weigh=True),
    ):
        call.launches.append(_count(wheel, product, ids, store))
    return call


def _count(wheel: Path, product: _Product, ids: torch.Tensor, store: Store) -> Profile:
    (shape, ptx, resident), multiprocessors = _chosen(wheel, product), MULTIPROCESSORS[ARCH]
    (kernel,) = parse(ptx).values()
    executable = Executable(kernel, (shape.threads, 1, 1))
    grid, dynamic = (multiprocessors * resident, 1, 1), MOST_SHARED // resident - (1024 if resident > 1 else 0)
    sorted_ids, experts = sorted_pairs(ids)
    codes = torch.zeros(FLASH_CONFIG.n_routed_experts, product.rows, product.columns // 2, dtype=torch.uint8)
    scales = torch.zeros(len(codes), product.columns // GROUP, product.rows, dtype=torch.bfloat16)
    locks = torch.zeros(multiprocessors * MOST_RESIDENT, dtype=torch.int32)
    tensors = [
        torch.zeros(product.tokens, product.columns, dtype=torch.bfloat16), codes,
        torch.zeros(product.tokens * product.topk, product.rows, dtype=torch.bfloat16),
        torch.zeros(multiprocessors * MOST_RESIDENT * TILE * 256), None, None, scales, None, None,
        sorted_ids, experts, torch.tensor([len(sorted_ids)], dtype=torch.int32), torch.ones(ids.numel()),
    ]  # fmt: skip
    values = [
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        product.topk, product.weigh, product.tokens, product.rows, product.columns, locks.data_ptr(), 0, 0, 1,
    ]  # fmt: skip
    parameters = bytearray()
    offsets = kernel.parameter_offsets().values()
    for value, parameter, offset in zip(values, kernel.parameters, offsets, strict=True):
        parameters += b"\0" * (offset - len(parameters)) + value.to_bytes(parameter.size, "little")
    memory = [span(tensor, str(number)) for number, tensor in enumerate(tensors) if tensor is not None]
    memory.append(Memory(locks.data_ptr(), ctypes.sizeof(ctypes.c_int32) * len(locks), "locks"))
    # A block waits for those that have the end of its columns, which are later ones.
    schedule = Schedule(blocks_backward=True, check_every=0)
    compiled, given = Compiled(executable, ptx, dynamic), bytes(parameters)
    chosen = b"".join(tensor.numpy().tobytes() for tensor in (sorted_ids, experts))
    key = key_of(compiled, given, memory, chosen, grid, schedule)
    known = store.get(key)
    if known is None:
        run = launch("Marlin", compiled, given, memory, grid, schedule)
        if run.result.findings:
            raise RuntimeError(f"Marlin: {run.result.findings[0]}")
        known = profile(run)
        store.put(key, known)
    return known


def _chosen(wheel: Path, product: _Product) -> tuple[Shape, str, int]:
    """Which kernel vLLM starts, and how many of its blocks for each multiprocessor: the first with most."""
    best: tuple[Shape, str, int] | None = None
    for shape in SHAPES:
        if product.columns % shape.columns or product.rows % shape.rows:
            continue
        ptx = _prepared(wheel, shape.name)
        (name,) = parse(ptx)
        registers = machine_code.assemble(ptx, name).registers
        resident = min(MOST_REGISTERS // (4 * registers * shape.threads), MOST_SHARED // (shape.shared + 1536))
        resident = max(1, min(resident, MOST_RESIDENT))
        tiles = 4 * product.rows // shape.rows * product.tokens * product.topk
        if tiles < MULTIPROCESSORS[ARCH] * resident:
            resident = max(1, tiles // MULTIPROCESSORS[ARCH])
        if best is None or resident > best[2]:
            best = shape, ptx, resident
    assert best is not None, "no shape divides the experts"
    return best


@functools.cache
def _prepared(wheel: Path, name: str) -> str:
    return with_lines(kernels(wheel)[name])


def sorted_pairs(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs by expert, each filled up to whole tiles with a number that is no pair's; the tiles' experts."""
    flat, pairs, experts = ids.flatten(), list[int](), list[int]()
    for expert in flat.unique().tolist():
        mine = (flat == expert).nonzero().flatten().tolist()
        mine += [flat.numel()] * (-len(mine) % TILE)
        pairs += mine
        experts += [expert] * (len(mine) // TILE)
    return torch.tensor(pairs, dtype=torch.int32), torch.tensor(experts, dtype=torch.int32)
