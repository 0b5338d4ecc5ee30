"""Puts a mistake into a function of the package while a model runs, and takes it out again.

A mistake is written as the few characters of source that change. They are looked for in the function as
`ast.unparse` prints it (one statement a line, single quotes, no comments) without its docstring and decorators, so a
mistake survives reformatting and stops the test when the code that it alters is gone. The function keeps its identity
and only its code is exchanged: every caller runs the mistake. Of an op, it is the reference that changes.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

PACKAGE = "vllm_deepseek_v4flash"


@contextlib.contextmanager
def mutated(target: str, *changes: tuple[str, str]) -> Iterator[None]:
    """Replace text in one function for the length of the `with` block.

    Args:
        target: `module:function` or `module:Class.method`, the module relative to the package.
        changes: (old, new) source; `old` must occur exactly once in the function.

    Raises:
        LookupError: there is no such function, or `old` is not in it exactly once.
    """
    name, _, path = target.partition(":")
    module = importlib.import_module(f"{PACKAGE}.{name}")
    function = _function(module, path)
    code = _changed_code(module, path, changes)
    original = function.__code__
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = original


def _function(module: types.ModuleType, path: str) -> Any:
    owner: Any = module
    for part in path.split("."):
        owner = getattr(owner, part, None)
        if owner is None:
            raise LookupError(f"{module.__name__} has no {path}")
    return inspect.unwrap(owner)


def _changed_code(module: types.ModuleType, path: str, changes: tuple[tuple[str, str], ...]) -> types.CodeType:
    tree = ast.parse(inspect.getsource(module))
    body = _Body(path, changes)
    body.visit(tree)
    if not body.found:
        raise LookupError(f"the source of {module.__name__} has no {path}")
    code = compile(ast.fix_missing_locations(tree), module.__file__ or path, "exec", dont_inherit=True)
    for part in path.split("."):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == part)
    return code


class _Body(ast.NodeTransformer):
    """Rewrites the one function definition whose qualified name is `path`."""

    def __init__(self, path: str, changes: tuple[tuple[str, str], ...]) -> None:
        self.path, self.changes = path, changes
        self.scope: list[str] = []
        self.found = False

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if ".".join([*self.scope, node.name]) != self.path:
            return node
        self.found = True
        node.decorator_list = []
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        text = ast.unparse(node)
        for old, new in self.changes:
            if text.count(old) != 1:
                raise LookupError(f"{old!r} is {text.count(old)} times in {self.path}, not once:\n{text}")
            text = text.replace(old, new)
        return ast.parse(text).body[0]
