"""Values that no weight may have: NaN, infinity, and what becomes infinite in the dtype that the model computes in.

One such value is enough for answers that look like answers and are wrong. The check takes one pass for the smallest and
the largest value, a fifth of the time of a copy (2 GB/s and more on one core); of packed weights it reads the scales,
and the codes of fp8, which alone have a NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..ops.packed_weight import SYMMETRIC_ZERO, Scheme, dequantise
from .errors import CheckpointError

_E4M3_LARGEST, _E2M1_LARGEST = 448.0, 6.0
_WIDER = {
    torch.float16: "Start with --dtype bfloat16 or float32",
    torch.bfloat16: "Start with --dtype float32",
}


def check_values(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse values that are not finite, in the tensor or once it is converted to `dtype`. Integers always pass.

    Raises:
        CheckpointError: with the first such value and its place.
    """
    if tensor.is_meta or not tensor.numel():
        return
    if tensor.dtype is torch.float8_e4m3fn:
        # 0x7F and 0xFF are NaN: the largest signed and the largest unsigned byte.
        bytes_ = tensor.view(torch.uint8)
        if int(bytes_.max()) == 0xFF or int(bytes_.view(torch.int8).max()) == 0x7F:
            _refuse(name, tensor.float(), torch.float32)
        return
    # A NaN is both the smallest and the largest; rounding to another dtype keeps the order.
    if tensor.is_floating_point() and not torch.stack(torch.aminmax(tensor)).to(dtype).isfinite().all():
        _refuse(name, tensor, dtype)


def check_packed_values(name: str, canonical: Mapping[str, torch.Tensor], scheme: Scheme, dtype: torch.dtype) -> None:
    """The same for the weight that the canonical tensors of `scheme` stand for.

    Raises:
        CheckpointError: with the first such value and its place.
    """
    qweight, scales = canonical["qweight"], canonical["scales"]
    if scales.is_meta:
        return
    check_values(name, qweight, dtype)
    if scheme.kind == "fp4":
        largest = _E2M1_LARGEST * 2.0 ** (int(scales.max()) - 127)
    elif scheme.kind == "fp8":
        largest = _E4M3_LARGEST * float(scales.abs().max())
    else:
        largest = (15 if scheme.zero_points else SYMMETRIC_ZERO) * float(scales.abs().max())
    # Only where the largest code could overflow is the weight itself worth looking at.
    if not largest <= torch.finfo(dtype).max:
        check_values(name, dequantise(canonical, scheme), dtype)


def _refuse(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    at = (~tensor.to(dtype).isfinite()).nonzero()[0].tolist()
    value = float(tensor[tuple(at)])
    what = f"{name}{at if at else ''}={value:g}"
    if not tensor[tuple(at)].isfinite():
        raise CheckpointError(
            f"{what}: every weight must be a finite number. Download the checkpoint again; if it still has this value, "
            f"it was written so."
        )
    kept = str(dtype).removeprefix("torch.")
    fix = _WIDER.get(dtype, "Use a checkpoint whose weights float32 can hold")
    raise CheckpointError(f"{what}: is infinite in {kept}, in which the model computes with it. {fix}.")
