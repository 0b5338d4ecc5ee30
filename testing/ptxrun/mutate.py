"""Mistakes put into kernels, to prove that running them would show the real ones.

In Triton's sources a mistake is a change of the syntax tree, which does not depend on how a kernel is written. What the
compiler inserts (barriers, waits) is left out of the PTX.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


class WithoutMasks(ast.NodeTransformer):
    """Every `tl.load` or `tl.store` of the kernels loses its mask."""

    def __init__(self, function: str) -> None:
        self.function, self.count = function, 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == self.function:
            kept = [keyword for keyword in node.keywords if keyword.arg not in ("mask", "other")]
            self.count += len(kept) < len(node.keywords)
            node.keywords = kept
        return node


class OneTooMany(ast.NodeTransformer):
    """Every `a < b` of the kernels becomes `a <= b`."""

    def __init__(self) -> None:
        self.count = 0

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        self.count += sum(isinstance(op, ast.Lt) for op in node.ops)
        node.ops = [ast.LtE() if isinstance(op, ast.Lt) else op for op in node.ops]
        return node


class ShortIndices(ast.NodeTransformer):
    """Every `.to(tl.int64)` of the kernels is left out."""

    def __init__(self) -> None:
        self.count = 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and ast.unparse(node).endswith(".to(tl.int64)"):
            self.count += 1
            return node.func.value
        return node


Mistake = WithoutMasks | OneTooMany | ShortIndices


def module_with(name: str, mistake: Mistake) -> ModuleType:
    """A copy of a module of Triton kernels with the mistake in all of its kernels.

    Raises:
        ValueError: no kernel has a place for the mistake.
    """
    module = importlib.import_module(name)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            mistake.visit(node)
    if not mistake.count:
        raise ValueError(f"{name}: no kernel has a place for {type(mistake).__name__}. Choose another mistake.")
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    # Of the same package, for its relative imports; Triton reads a kernel's source from the file.
    spec = importlib.util.spec_from_file_location(f"{name}_{type(mistake).__name__}_{folder.name}", path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    spec.loader.exec_module(copy)
    return copy


def instructions(ptx: str, opcode: str) -> list[re.Match[str]]:
    """The instructions whose opcode starts with `opcode`."""
    return list(re.finditer(rf"^[ \t]*(?:@!?%\w+[ \t]+)?{re.escape(opcode)}[^;]*;", ptx, re.M))


def without(ptx: str, opcode: str, number: int) -> str:
    """PTX that lacks the `number`-th of `instructions`."""
    left_out = instructions(ptx, opcode)[number]
    return ptx[: left_out.start()] + ptx[left_out.end() :]


ALTERATIONS: dict[str, tuple[str, str | Callable[[re.Match[str]], str]]] = {
    "barriers left out": (r"bar\.sync[^;]*;", ""),
    "waits left out": (r"cp\.async\.wait_group[^;]*;", ""),
    "loads without their masks": (r"@!?%p\d+ (ld\.global)", r"\1"),
    "stores without their masks": (r"@!?%p\d+ (st\.global)", r"\1"),
    "a wrong swizzle": (r"(xor\.b32\s+%r\d+, %r\d+, )16;", r"\g<1>48;"),
    "sums in bf16": (
        r"(mma\.sync[^{;]*\.f32\s*\{\s*(%\w+),\s*(%\w+),\s*(%\w+),\s*(%\w+)\s*\}[^;]*;)",
        r"\1 and.b32 \2, \2, -65536; and.b32 \3, \3, -65536; and.b32 \4, \4, -65536; and.b32 \5, \5, -65536;",
    ),
    "swapped fragments": (
        r"(mma\.sync[^{;]*\{[^}]*\},\s*\{\s*%\w+,\s*)(%\w+),\s*(%\w+)", r"\1\3, \2",
    ),
    "matrices from the next row of 16 bytes": (r"(ldmatrix[^;]*\[\s*%\w+)((?:\s*\+\s*\d+)?)\s*\]", r"\1+16]"),
    "shuffles with the wrong lane": (r"(shfl\.sync\.bfly\.b32\s+[^,]+,\s*[^,]+,\s*)(?:1|2|4|8),", r"\g<1>16,"),
    "one too many": (r"setp\.lt\.(s|u)", r"setp.le.\1"),
    "one too few": (r"setp\.le\.(s|u)|setp\.gt\.(s|u)", lambda m: f"setp.lt.{m[1]}" if m[1] else f"setp.ge.{m[2]}"),
    "minima for maxima": (r"\bmax\.(\w*f32)", r"min.\1"),
    "sums for differences": (r"\bsub\.(\w*f32)", r"add.\1"),
    "products without sums": (
        r"\bfma\.rn\.(\w*f32)(\s+%\w+,\s*[^,;]+,\s*[^,;]+),\s*[^,;]+;", r"mul.\1\2;",
    ),
    "the other of two values": (r"(selp\.\w+\s+%\w+,\s*)([^,;]+),\s*([^,;]+),", r"\1\3, \2,"),
    "stores one element further": (r"(st\.global[^;]*\[\s*%\w+)\s*\+\s*0\s*\]", r"\1+4]"),
    "shared stores one word further": (r"(st\.shared[^;]*\[\s*%\w+)((?:\s*\+\s*0)?)\s*\]", r"\1+16]"),
}  # fmt: skip
"""Mistakes in PTX, at every place that a kernel has for them: a pattern, and what stands there instead."""


def altered(ptx: str, alteration: str) -> str:
    """PTX with one of `ALTERATIONS`.

    Raises:
        ValueError: it has no place for it.
    """
    pattern, instead = ALTERATIONS[alteration]
    changed, count = re.subn(pattern, instead, ptx)
    if not count:
        raise ValueError(f"alteration={alteration!r}: the kernel has no place for it. Choose another one.")
    return changed
