"""The floor plan of docs/architecture.md: imports run downwards only, and files and functions stay small."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm_deepseek_v4flash"
KERNELS = ("torch", "cpu", "triton", "cuda")

# From top to bottom: a module may import from a lower level, and from its own room. "" is the package's __init__.py.
FOLDERS = [{"tests"}, {"checks"}, {"benchmarks"}, {"testing"}, {"examples", "scripts"}, {PACKAGE}]
ROOMS = [
    {""}, {"integration"}, {"model"}, {"inspect", "serving"}, {"layers"}, {"checkpoint"}, {"kv_cache"}, {"ops"},
    {"config", "compat", "log"},
]  # fmt: skip
USERS_OF_COMPAT = {"kv_cache", "layers", "model"}
# The kernels for few tokens leave larger batches to Triton's.
BETWEEN_KERNELS = {("cuda", "triton")}

MOST_LINES, MOST_FUNCTION_LINES = 400, 80
MEASURED = (PACKAGE, "csrc", "testing", "checks")


@dataclass(frozen=True)
class Import:
    """One name that a file imports; `target` is its dotted path, from the top."""

    path: Path
    line: int
    target: tuple[str, ...]

    @property
    def source(self) -> tuple[str, ...]:
        """The importing module's dotted path."""
        module = self.path.relative_to(ROOT).with_suffix("").parts
        return module[:-1] if module[-1] == "__init__" else module

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {'.'.join(self.target)}"


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[Import]:
    """Everything that a file imports, at any depth of it; `from a import b` as a.b, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, tuple(alias.name.split(".")))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield Import(path, node.lineno, (*base, alias.name))


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def all_imports() -> tuple[Import, ...]:
    folders = [folder for level in FOLDERS for folder in level]
    return tuple(found for path in python_files(*folders) for found in imports_of(path))


def level(levels: list[set[str]], name: str) -> int:
    found = [number for number, names in enumerate(levels) if name in names]
    assert found, f"{name} is not on the floor plan"
    return found[0]


def room(module: tuple[str, ...]) -> str:
    """The room of a module of the package: a folder, or a file directly in the package."""
    name = module[1] if len(module) > 1 else ""
    path = ROOT / PACKAGE / name
    return name if name and (path.is_dir() or path.with_suffix(".py").is_file()) else ""


def kernels(module: tuple[str, ...]) -> str | None:
    """Of a module below `ops`: the folder of kernels that it is in, if any."""
    name = module[2] if len(module) > 2 else ""
    return name if (ROOT / PACKAGE / "ops" / name).is_dir() and name else None


def within_package() -> list[Import]:
    return [found for found in all_imports() if found.source[0] == found.target[0] == PACKAGE]


# ---- imports


def test_folders_import_downwards() -> None:
    names = set().union(*FOLDERS)
    crossing = [x for x in all_imports() if x.target[0] in names and x.source[0] != x.target[0]]
    assert len(crossing) > 100
    assert [
        str(found) for found in crossing if level(FOLDERS, found.source[0]) >= level(FOLDERS, found.target[0])
    ] == []


def test_nothing_imports_from_tests() -> None:
    assert [str(found) for found in all_imports() if found.target[0] == "tests"] == []


def test_rooms_import_downwards() -> None:
    crossing = [x for x in within_package() if room(x.source) != room(x.target)]
    assert len(crossing) > 100
    # The version is a constant of the package, which its __init__.py has to hold.
    crossing = [x for x in crossing if x.target != (PACKAGE, "__version__")]
    assert [
        str(found) for found in crossing if level(ROOMS, room(found.source)) >= level(ROOMS, room(found.target))
    ] == []


def test_every_room_is_on_the_plan() -> None:
    package = ROOT / PACKAGE
    found = {path.name for path in package.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    found |= {path.stem for path in package.glob("*.py")} - {"__init__"} | {""}
    assert found == set().union(*ROOMS)


def test_ops_and_kernels() -> None:
    """Kernels know the ops' types and none of the other kernels; a contract knows kernels by name only."""
    below = [x for x in within_package() if room(x.source) == room(x.target) == "ops"]
    kernel_imports = [x for x in below if kernels(x.target) not in (None, kernels(x.source))]
    assert {path.parent.name for path in (ROOT / PACKAGE / "ops").glob("*/*.py")} == set(KERNELS)
    assert [
        str(found) for found in kernel_imports
        if (kernels(found.source), kernels(found.target)) not in BETWEEN_KERNELS
        # Which kernels of csrc/ this installation has decides what the dispatcher may choose.
        and (found.source[-1], found.target[2:4]) != ("dispatch", ("cuda", "library"))
    ] == []  # fmt: skip


# ---- vLLM


def may_import_vllm(module: tuple[str, ...]) -> bool:
    return room(module) == "integration" or module[1:] in (("compat",), ("serving", "compat"))


def test_vllm_is_imported_by_the_integration_and_compat_only() -> None:
    found = [x for x in all_imports() if x.source[0] == PACKAGE and x.target[0] == "vllm"]
    assert len(found) > 50
    assert [str(x) for x in found if not may_import_vllm(x.source)] == []


def test_compat_is_for_the_model_side() -> None:
    """Ops, checkpoints and `inspect` work without vLLM; the chat side has its own."""
    found = [x for x in within_package() if x.target[1:2] == ("compat",)]
    assert found
    assert [str(x) for x in found if room(x.source) not in USERS_OF_COMPAT] == []
    chat = [x for x in within_package() if x.target[1:3] == ("serving", "compat")]
    assert chat
    assert [str(x) for x in chat if room(x.source) != "serving"] == []


def test_only_the_integration_registers_or_patches() -> None:
    """Outside it no registry of vLLM's is imported, and nothing that comes from vLLM is assigned to."""
    registries = re.compile("registry|register|plugins|manager", re.IGNORECASE)
    for path in python_files(PACKAGE):
        module = Import(path, 0, ()).source
        if room(module) == "integration":
            continue
        imported = [x for x in imports_of(path) if x.target[0] == "vllm" or "compat" in x.target[1:-1]]
        assert [str(x) for x in imported if registries.search(".".join(x.target))] == []
        names = {x.target[-1] for x in imported}
        assert [f"{path}: {ast.unparse(node)}" for node in ast.walk(parse(path)) if assigns_to(node, names)] == []


def assigns_to(node: ast.AST, names: set[str]) -> bool:
    """Whether a statement sets an attribute or an item of one of `names`."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
        return isinstance(node.args[0], ast.Name) and node.args[0].id in names
    for target in targets:
        root = target
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if root is not target and isinstance(root, ast.Name) and root.id in names:
            return True
    return False


def test_patches_are_seen() -> None:
    statements = ast.parse("A.b = 1; A[0] = 1; A.b.c += 1; setattr(A, 'b', 1); a.b = 1; A = 1; setattr(a, 'A', A)").body
    nodes = [node.value if isinstance(node, ast.Expr) else node for node in statements]
    assert [assigns_to(node, {"A"}) for node in nodes] == [True] * 4 + [False] * 3


# ---- sizes


def measured_files() -> list[Path]:
    suffixes = {".py", ".cu", ".cuh", ".h", ".cpp"}
    return sorted(path for folder in MEASURED for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


@pytest.mark.parametrize("path", measured_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sizes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    functions = python_functions(parse(path)) if path.suffix == ".py" else c_functions(lines)
    assert len(lines) <= MOST_LINES
    assert {name: length for name, length in functions if length > MOST_FUNCTION_LINES} == {}


def python_functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def c_functions(lines: list[str]) -> Iterator[tuple[str, int]]:
    """Blocks with a parameter list, from the line at the closing brace's indent that begins them; not `if`, `for`, …"""
    for end, line in enumerate(lines):
        if line.strip() != "}":
            continue
        indent = line.index("}")
        start = next(
            (number for number in range(end - 1, -1, -1) if re.match(rf" {{{indent}}}[^\s#)}}/]", lines[number])), 0
        )
        head = lines[start].strip()
        if "(" in head and not re.match(r"(if|else|for|while|do|switch)\b", head):
            yield head, end - start + 1


def test_functions_of_csrc_are_seen() -> None:
    source = [
        "template <int N>",
        "__global__ void f(",
        "    int a) {",
        "  if (a) {",
        "    g();",
        "  }",
        "}",
        "struct S {",
    ]
    source += ["  int h() const {", "    return 1;", "  }", "};", "namespace n {", "}"]
    assert list(c_functions(source)) == [("__global__ void f(", 6), ("int h() const {", 3)]
    assert sum(1 for path in measured_files() if path.suffix == ".cu") > 0
