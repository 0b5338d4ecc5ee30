"""The headers that a checkpoint should have, where only its config.json, or that and its index, are there.

Names in an index are the checkpoint's own. Shapes are the model's, and dtypes are what the tools of
`quantization_config` write: an estimate, which the index's `total_size` confirms where it has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint import names
from ..checkpoint.headers import TensorHeader
from ..checkpoint.names import TensorSpec
from ..config import DeepseekV4Config, LayerKind

_FP32 = re.compile(r"hc_|.*\.(hc_\w+|attn_sink|ape|bias)$")
# What DeepSeek quantises, and the tools after it: an estimate from config.json alone assumes no more and no less.
_PACKED = re.compile(
    r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.(shared_experts|experts\.\d+)\.w[123])"
)
_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SCALES = ("scale", "weight_scale_inv", "weight_scale")
_INTEGERS_OF_32_BITS = 32

Leaves = dict[str, tuple[str, tuple[int, ...]]]
"""dtype code and shape by leaf."""


def guess_headers(
    config: DeepseekV4Config, values: Mapping[str, Any], quantization: Any, stored: Iterable[str] | None
) -> list[TensorHeader]:
    """A header for each tensor of `stored`, an index's names; without them, for each that config.json asks for.

    A name that the model does not have gets an empty shape, and is the survey's to report.
    """
    guess = _Guess(config, values, quantization if isinstance(quantization, Mapping) else {})
    return guess.of_names(list(stored)) if stored is not None else guess.of_config()


class _Guess:
    def __init__(self, config: DeepseekV4Config, values: Mapping[str, Any], quantization: Mapping[str, Any]) -> None:
        self.config = config
        self.expected = names.expected_tensors(config)
        draft = config.replace(
            num_hidden_layers=1, layer_kinds=(LayerKind.WINDOW,), compress_ratios=(0,), num_hash_layers=0
        )
        self.draft = {
            name.removeprefix("layers.0."): spec
            for name, spec in names.expected_tensors(draft).items()
            if name.startswith("layers.0.")
        } | _of_draft(config)
        name = str(values.get("torch_dtype") or values.get("dtype") or "bfloat16").removeprefix("torch.")
        self.plain = _CODES.get(name, "BF16")
        self.method = str(quantization.get("quant_method") or "").lower().replace("_", "-")
        self.bits, self.group = _bits_and_group(quantization)
        awq = "awq" in str(quantization.get("packing_format") or "") or quantization.get("checkpoint_format") == "gemm"
        self.along_rows = self.method == "awq" or awq
        self.ue8m0 = quantization.get("scale_fmt", "ue8m0") == "ue8m0"

    def of_config(self) -> list[TensorHeader]:
        headers = []
        for name, spec in self.expected.items():
            module = name.removesuffix(".weight")
            if not self.method or not _PACKED.fullmatch(module):
                headers.append(TensorHeader(self._plain(name, spec), spec.shape, name))
                continue
            if self.method in ("fp8", "deepseek-v4-fp8"):
                leaves = self._floats(module, spec.shape, "scale")
            elif self.method == "compressed-tensors":
                leaves = self._compressed(spec.shape)
                leaves = {leaf: leaves[leaf] for leaf in ("weight_packed", "weight_scale", "weight_shape")}
            else:
                leaves = self._words(spec.shape)
                del leaves["g_idx"]
            headers += [TensorHeader(dtype, shape, f"{module}.{leaf}") for leaf, (dtype, shape) in leaves.items()]
        return headers

    def of_names(self, stored: list[str]) -> list[TensorHeader]:
        known = set(stored)
        return [self._of_name(name, known) for name in stored]

    def _of_name(self, stored: str, known: set[str]) -> TensorHeader:
        native = names.native_name(stored) or stored
        fused = names.fused_shape(self.config, native)
        if fused is not None:
            return TensorHeader(self.plain, fused, stored)
        expected = self.expected
        if names.is_mtp(native):
            native, expected = native.removeprefix("mtp.").partition(".")[2], self.draft
        spec = expected.get(native)
        if spec is not None and not native.endswith(".weight"):
            return TensorHeader(self._plain(native, spec), spec.shape, stored)
        module, _, leaf = native.rpartition(".")
        spec = expected.get(f"{module}.weight")
        if spec is None:
            return TensorHeader("U8", (0,), stored)
        owner = stored.rpartition(".")[0]
        scale = next((name for name in _SCALES if f"{owner}.{name}" in known), None)
        if leaf == "weight" and (scale is None or len(spec.shape) != 2):
            return TensorHeader(self._plain(native, spec), spec.shape, stored)
        leaves: Leaves = {}
        if len(spec.shape) == 2:
            packed = f"{owner}.weight_packed" in known
            leaves = self._compressed(spec.shape) if packed else self._words(spec.shape)
            if scale is not None and not packed:
                leaves |= self._floats(module, spec.shape, scale)
        dtype, shape = leaves.get(leaf, ("U8", (0,)))
        return TensorHeader(dtype, shape, stored)

    def _plain(self, native: str, spec: TensorSpec) -> str:
        return "I64" if spec.integer else "F32" if _FP32.match(native) else self.plain

    def _floats(self, module: str, shape: tuple[int, ...], scale: str) -> Leaves:
        """DeepSeek's FP8, or FP4 for its experts."""
        n, k = shape
        fp4 = ".experts." in f".{module}" and "shared" not in module and self.config.expert_dtype == "fp4"
        code = "F8_E8M0" if self.ue8m0 and scale != "weight_scale" else "F32"
        if fp4 and scale == "scale":
            return {"weight": ("I8", (n, k // 2)), scale: ("F8_E8M0", (n, k // 32))}
        return {"weight": ("F8_E4M3", (n, k)), scale: (code, (-(-n // 128), -(-k // 128)))}

    def _words(self, shape: tuple[int, ...]) -> Leaves:
        """GPTQ's, AWQ's and AutoRound's."""
        n, k = shape
        values, groups = _INTEGERS_OF_32_BITS // self.bits, -(-k // (self.group or k))
        qweight = (k, n // values) if self.along_rows else (k // values, n)
        return {
            "qweight": ("I32", qweight),
            "qzeros": ("I32", (groups, n // values)),
            "scales": ("F16", (groups, n)),
            "g_idx": ("I32", (k,)),
        }

    def _compressed(self, shape: tuple[int, ...]) -> Leaves:
        """compressed-tensors' `pack-quantized`."""
        n, k = shape
        values, groups = _INTEGERS_OF_32_BITS // self.bits, -(-k // (self.group or k))
        return {
            "weight_packed": ("I32", (n, k // values)),
            "weight_scale": ("BF16", (n, groups)),
            "weight_shape": ("I64", (2,)),
            "weight_zero_point": ("I32", (n // values, groups)),
            "weight_g_idx": ("I32", (k,)),
        }


def _of_draft(config: DeepseekV4Config) -> dict[str, TensorSpec]:
    """What a multi-token-prediction block has that no layer has."""
    hidden, streams = config.hidden_size, config.hc_mult
    return {
        **{f"{name}.weight": TensorSpec((hidden, hidden)) for name in ("e_proj", "h_proj")},
        **{f"{name}.weight": TensorSpec((hidden,)) for name in ("enorm", "hnorm", "norm")},
        "hc_head_fn": TensorSpec((streams, streams * hidden)),
        "hc_head_base": TensorSpec((streams,)),
        "hc_head_scale": TensorSpec((1,)),
    }


def _bits_and_group(quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Bits of a packed integer, 4 where the config has nothing that fits; columns of a group, 0 for all."""
    weights: Any = quantization
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping):
        found = [group["weights"] for group in groups.values()
                 if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)]  # fmt: skip
        weights = next((each for each in found if each.get("num_bits") == 4), {})
    bits = weights.get("bits") or weights.get("num_bits")
    group = weights.get("group_size")
    return (
        bits if type(bits) is int and bits in (2, 4, 8) else 4,
        group if type(group) is int and group > 0 else 0,
    )
