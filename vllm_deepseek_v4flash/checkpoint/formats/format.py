"""What a module of this folder has to say about its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...ops.packed_weight import Scheme
from ...ops.torch_or_dtypes import torch
from ..headers import TensorHeader


@dataclass(frozen=True)
class Format:
    """One way in which checkpoints store their weights.

    Attributes:
        name: For messages and tests.
        quant_methods: The values of `quantization_config.quant_method` that select this format.
        describe: `(quantization_config, module, leaves)` to the scheme of one module, from the config and the
            tensors' headers. `module` is DeepSeek's name of it, `leaves` is keyed by leaf name (`qweight`, ...). A
            module that the format did not pack goes to `floats.describe`.
        repack: `(leaves, scheme)` to the canonical tensors of `ops/packed_weight.py`.
        dequantise: `(leaves, scheme)` to fp32 [N, K], straight from the stored tensors: the reference.

        transposes_embedding: Whether a tool packs `embed` as a layer from tokens to channels. Its scheme then has the
            shape [channels, tokens].

    The callables raise QuantizationError, naming the module, the tensor, what it has and what it should have.
    """

    name: str
    quant_methods: tuple[str, ...]
    describe: Callable[[Mapping[str, Any], str, Mapping[str, TensorHeader]], Scheme]
    repack: Callable[[Mapping[str, torch.Tensor], Scheme], dict[str, torch.Tensor]]
    dequantise: Callable[[Mapping[str, torch.Tensor], Scheme], torch.Tensor]
    transposes_embedding: bool = False
