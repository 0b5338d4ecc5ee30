"""`torch`, or its dtypes alone where it is not installed.

`inspect` and `plan` run on a laptop before anything is installed. Of torch they need the dtypes that headers and cache
formats mention. What computes with tensors raises a ModuleNotFoundError that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

_ITEM_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Dtype:
    """A dtype by name; it prints as torch's own does."""

    name: str
    itemsize: int

    def __repr__(self) -> str:
        return f"torch.{self.name}"


class Dtypes:
    """The attributes of `torch` that are dtypes."""

    def __init__(self) -> None:
        self.__dict__.update({name: Dtype(name, size) for name, size in _ITEM_SIZES.items()})

    def __getattr__(self, name: str) -> Any:
        raise ModuleNotFoundError(
            f"torch.{name}: torch is not installed, and without it only headers are read. Install torch, or vLLM, "
            f"which brings it.",
            name="torch",
        )


if TYPE_CHECKING:
    import torch as torch
else:
    try:
        import torch
    except ModuleNotFoundError as error:
        # A torch that is installed and broken must not be mistaken for none.
        if error.name != "torch":
            raise
        torch = Dtypes()
