"""An op is one contract with several implementations; this module chooses between them.

`ops/<op>.py` defines an op by its argument checks and its PyTorch reference. `ops/<backend>/<op>.py` may hold a
function with the same name and parameters. Calling an op checks the arguments, then runs the first backend of the
device that has such a function. The backends are, in this order: kernels of our own (`cuda`, `triton`, `cpu`); `torch`,
for what PyTorch computes in production; and `reference`, the oracle of all others, which runs on any device.

`VLLM_DEEPSEEK_V4FLASH_OPS` chooses for a process, `use` within one. `describe` says in one line what runs, for the log
of every worker; `prepare` imports it, which compiles the CPU's kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch

from ..log import logger_name, warning_once
from .cuda.library import built, failure

logger = logging.getLogger(logger_name(__name__))

OPS_ENV = "VLLM_DEEPSEEK_V4FLASH_OPS"
CHOICES = ("auto", "reference", "cpu", "triton", "cuda", "torch")

KERNELS: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton") if built() else ("triton",)}
"""Backends with kernels of our own, by device type, fastest first."""
if importlib.util.find_spec("numba") is not None:
    KERNELS["cpu"] = ("cpu",)

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
Wrapper = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""Takes an op's name and its implementation, and returns what is called instead."""


class Op(Protocol[P, R]):
    """Checks its arguments, then runs the implementation for the device of the first one, which is a tensor."""

    __name__: str

    @property
    def reference(self) -> Callable[P, R]:
        """The PyTorch function that defines the result. It checks nothing, and calls other references only."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def op(check: Callable[..., None] | None = None) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make an op of its reference.

    Args:
        check: raises ValueError for arguments that the op does not take. Its parameters are those of the op's that it
            looks at, under the same names.
    """

    def decorate(reference: Callable[P, R]) -> Op[P, R]:
        implementations = _Implementations(reference)
        made = cast(Op[P, R], _caller(reference, check, implementations))
        _registry[made.__name__] = made, implementations
        return made

    return decorate


def ops() -> list[Op[..., Any]]:
    """Every op of the package, by name."""
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        if not module.ispkg:
            importlib.import_module(f"{_PACKAGE}.{module.name}")
    return [_registry[name][0] for name in sorted(_registry)]


def implementation(op: Op[P, R], device: torch.device) -> Callable[P, R]:
    """The function that computes `op` on tensors of `device`."""
    return _registry[op.__name__][1][device]


def backend_of(op: Op[..., Any], device: torch.device) -> str:
    """The backend that computes `op` on tensors of `device`."""
    return _backend_of(op.__name__, device.type)


def backends(device_type: str) -> tuple[str, ...]:
    """The backends that are searched for a device's ops, in order.

    Raises:
        ValueError: the choice needs something that is missing.
    """
    choice, kernels = chosen(), _kernels(device_type)
    if choice == "auto":
        return (*kernels, "torch", "reference")
    if choice in ("reference", "torch"):
        return ("reference",) if choice == "reference" else ("torch", "reference")
    if choice == "triton":
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"{OPS_ENV}=triton: Triton compiles for GPUs only. Unset it, or set TRITON_INTERPRET=1 before Python "
                f"starts to run Triton's interpreter on a CPU."
            )
        return ("triton", "torch", "reference")
    if choice not in kernels:
        needs, lacks = _NEEDS[choice]
        if choice in KERNELS.get(device_type, ()):
            lacks = f"they cannot run here ({failure()})"
        found = lacks if device_type == choice else f"this device is {device_type}"
        raise ValueError(f"{OPS_ENV}={choice}: the kernels need {needs}; {found}. Unset it to run what there is.")
    return (*kernels, "torch", "reference")


def _kernels(device_type: str) -> tuple[str, ...]:
    """KERNELS of a device without those that this machine cannot run."""
    kernels = KERNELS.get(device_type, ())
    if device_type != "cuda" or "cuda" not in kernels or (reason := failure()) is None:
        return kernels
    warning_once(logger, "csrc/'s kernels cannot run here, and Triton's run instead: %s", reason)
    return tuple(name for name in kernels if name != "cuda")


def chosen() -> str:
    """What `use` or the environment asks for, one of CHOICES.

    Raises:
        ValueError: the environment asks for something else.
    """
    choice = _selection.choice or os.environ.get(OPS_ENV, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{OPS_ENV}={choice!r}: unknown. Use one of {', '.join(CHOICES)}.")
    return choice


@contextlib.contextmanager
def use(choice: str, *, reference: Iterable[Op[..., Any]] = ()) -> Iterator[None]:
    """Run what `choice` selects, in this process and while the block runs; the innermost block decides.

    Args:
        choice: one of CHOICES.
        reference: ops that run their references all the same.
    """
    names = frozenset(op.__name__ for op in reference)
    with _select(replace(_selection, choice=choice, reference=names)):
        chosen()
        yield


@contextlib.contextmanager
def wrap(wrapper: Wrapper) -> Iterator[None]:
    """Call `wrapper(name, implementation)` instead of every op's implementation while the block runs.

    To time, count or replace them. Inner blocks wrap what outer ones return.
    """
    with _select(replace(_selection, wrappers=(*_selection.wrappers, wrapper))):
        yield


def prepare(device: torch.device) -> None:
    """Import every op's implementation for a device: on a CPU this compiles the kernels, or reads them from the disk.

    The first compilation takes seconds, which a server spends at its start rather than in its first request.
    """
    for each in ops():
        implementation(each, device)


def describe(device: torch.device) -> str:
    """Which ops run where, for the log: `ops on cuda: triton (compress, ...); torch (linear_fp32, ...)`."""
    by_backend: dict[str, list[str]] = {backend: [] for backend in backends(device.type)}
    for each in ops():
        by_backend[backend_of(each, device)].append(each.__name__)
    listed = [f"{backend} ({', '.join(names)})" for backend, names in by_backend.items() if names]
    if device.type in _NEEDS and device.type not in KERNELS.get(device.type, ()):
        listed.append(f"no {device.type} kernels: {_NEEDS[device.type][1]}")
    return f"ops on {device.type}: {'; '.join(listed)}"


@dataclass(frozen=True)
class _Selection:
    """What `use` and `wrap` ask for."""

    choice: str | None = None
    """One of CHOICES; None leaves it to the environment."""
    reference: frozenset[str] = frozenset()
    wrappers: tuple[Wrapper, ...] = ()


class _Implementations(dict[torch.device, Callable[..., Any]]):
    """What runs for one op, by device; found when a device is first seen, and kept until the selection changes."""

    def __init__(self, reference: Callable[..., Any]) -> None:
        super().__init__()
        self.reference = reference

    def __missing__(self, device: torch.device) -> Callable[..., Any]:
        name = self.reference.__name__
        backend, function = _backend_of(name, device.type), self.reference
        if backend != "reference":
            function = getattr(importlib.import_module(f"{_PACKAGE}.{backend}.{name}"), name)
        for wrapper in _selection.wrappers:
            function = wrapper(name, function)
        self[device] = function
        return function


_PACKAGE = __name__.rpartition(".")[0]
_NEEDS = {
    "cpu": ("a CPU and Numba", "Numba is not installed"),
    "cuda": ("a GPU and csrc/, compiled", "csrc/ was not compiled, because the installation found no nvcc"),
}
"""What the kernels of a backend need, and what is amiss where its device has none."""
_registry: dict[str, tuple[Op[..., Any], _Implementations]] = {}
_selection = _Selection()


def _caller(
    reference: Callable[..., Any], check: Callable[..., None] | None, implementations: _Implementations
) -> Callable[..., Any]:
    """A function with the reference's parameters that checks them and calls the implementation.

    It is generated, because a step on a CPU makes hundreds of calls, and one that takes and passes on *args and
    **kwargs costs a microsecond more.
    """
    name, parameters = reference.__name__, inspect.signature(reference).parameters
    keywords = [n for n, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    positional = [n for n in parameters if n not in keywords]
    checked = [] if check is None else list(inspect.signature(check).parameters)
    if not parameters.keys() >= set(checked):
        raise TypeError(f"the check of {name} has parameters that the op does not have: {', '.join(checked)}")
    declared = ", ".join(positional + (["*", *keywords] if keywords else []))
    passed = ", ".join(positional + [f"{n}={n}" for n in keywords])
    source = f"def {name}({declared}):\n"
    if checked:
        source += f"    _check({', '.join(checked)})\n"
    source += f"    return _implementations[{positional[0]}.device]({passed})\n"
    namespace: dict[str, Any] = {"_check": check, "_implementations": implementations}
    exec(compile(source, f"<op {name}>", "exec"), namespace)
    caller = functools.update_wrapper(namespace[name], reference)
    caller.__defaults__, caller.__kwdefaults__ = reference.__defaults__, reference.__kwdefaults__  # type: ignore[attr-defined]
    caller.reference = reference  # type: ignore[attr-defined]
    return caller


@contextlib.contextmanager
def _select(selection: _Selection) -> Iterator[None]:
    global _selection
    before, _selection = _selection, selection
    try:
        _forget()
        yield
    finally:
        _selection = before
        _forget()


def _forget() -> None:
    for _, implementations in _registry.values():
        implementations.clear()


def _backend_of(name: str, device_type: str) -> str:
    if name in _selection.reference:
        return "reference"
    *others, last = backends(device_type)
    found = (backend for backend in others if importlib.util.find_spec(f"{_PACKAGE}.{backend}.{name}") is not None)
    return next(found, last)
