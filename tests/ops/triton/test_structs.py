"""Kernels take structs, in a way that every supported version of Triton compiles."""

import ast
from pathlib import Path

import pytest

import vllm_deepseek_v4flash.ops.triton as kernels

MOST_PARAMETERS = 14
FILES = sorted(path for path in Path(kernels.__file__).parent.glob("*.py") if "@triton.jit" in path.read_text())
# Functions of Triton's library that are themselves compiled; the others are part of the language.
COMPILED = ("zeros", "zeros_like", "cdiv", "sum", "max", "min", "argmax", "argmin", "cumsum", "sigmoid", "flip", "sort")


def functions(source):
    """The functions that Triton compiles."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def passed_on_unnamed(function):
    """Members of constexpr structs that are arguments of a compiled function, on their own or in a tuple."""
    constants = {a.arg for a in function.args.args if a.annotation and "constexpr" in ast.unparse(a.annotation)}
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if isinstance(call.func, ast.Name) or name.removeprefix("tl.") in COMPILED:
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            for value in [item for each in given for item in (each.elts if isinstance(each, ast.Tuple) else [each])]:
                if isinstance(value, ast.Attribute) and ast.unparse(value.value) in constants:
                    yield f"{function.name}: {ast.unparse(value)} to {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_members_of_constexpr_structs_are_named_before_they_are_passed_on(path):
    """Triton 3.6 and 3.7 refuse plain strings, and plain integers in tuples (ops/triton/__init__.py)."""
    assert [found for function in functions(path.read_text()) for found in passed_on_unnamed(function)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_have_few_parameters(path):
    counts = {function.name: len(function.args.args) for function in functions(path.read_text())}
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_and_stores_of_blocks_have_a_shape_comment(path):
    """A masked load or store is of a block; its line, or the statement's last one, says of which shape."""
    source = path.read_text()
    lines = source.splitlines()
    for function in functions(source):
        statements = (n for n in ast.walk(function) if isinstance(n, (ast.Assign, ast.AugAssign, ast.Expr, ast.Return)))
        for statement in statements:
            calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
            blocks = [c for c in calls if ast.unparse(c.func) in ("tl.load", "tl.store") and c.keywords]
            if blocks:
                assert "#" in lines[(statement.end_lineno or statement.lineno) - 1], f"{path.name}:{statement.lineno}"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("tl.zeros((PLAN.n, 1), tl.float32)", ["kernel: PLAN.n to tl.zeros"]),
        ("helper(x, PLAN.codec)", ["kernel: PLAN.codec to helper"]),
        ("tl.arange(0, PLAN.n) + rows.stride", []),
        ("helper(x, rows.stride, PLAN)", []),
    ],
)
def test_a_member_that_is_passed_on_is_found(body, found):
    source = f"@triton.jit\ndef kernel(x, rows, PLAN: tl.constexpr):\n    y = {body}\n"
    assert [name for function in functions(source) for name in passed_on_unnamed(function)] == found
