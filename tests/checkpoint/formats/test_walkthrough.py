"""Adding a packed format: one file and one line that registers it, and vLLM, the loader and `inspect` read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from testing import made_up_format, oracle, tiny
from testing.engine import full_logprobs, running
from vllm_deepseek_v4flash.checkpoint import formats
from vllm_deepseek_v4flash.inspect.contents import inspect_checkpoint

# fp32 on both sides, as in testing/served.py.
TOLERANCE = 1e-4
SPEC = tiny.CONFIGS["yarn"]
GROUP = 32
QUANTIZATION = {"quant_method": "toy4", "group": GROUP}
# The compressors, the router, embedding and head stay plain.
PACKED = (".attn.wq_a.", ".attn.wq_b.", ".attn.wkv.", ".attn.wo_a.", ".attn.wo_b.", ".experts.", ".shared_experts.")


@pytest.fixture
def registered() -> Iterator[None]:
    formats.register(made_up_format.FORMAT)
    yield
    del formats.FORMATS["toy4"]


def quantise(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The leaves of one weight, and the values that they stand for."""
    grouped = weight.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    steps = ((high - low) / 15).clamp(min=1e-6)
    zeros = (-low / steps).round()
    codes = (grouped / steps + zeros).round().clamp(0, 15)
    flat = codes.flatten(1).to(torch.uint8)
    leaves = {
        "codes": flat[:, 0::2] * 16 + flat[:, 1::2],
        "steps": steps[..., 0].t().contiguous(),
        "zeros": zeros[..., 0].t().contiguous().to(torch.uint8),
    }
    return leaves, ((codes - zeros) * steps).flatten(1)


def write(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**SPEC.hf_config, "torch_dtype": "float32", **config}))
    return directory


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint in the new format, and the same values as plain weights."""
    packed, plain = {}, {}
    for name, tensor in tiny.random_tensors(SPEC).items():
        packed[name] = plain[name] = tensor
        if name.endswith(".weight") and any(part in name for part in PACKED):
            leaves, plain[name] = quantise(packed.pop(name))
            packed |= {f"{name.removesuffix('weight')}{leaf}": stored for leaf, stored in leaves.items()}
    return write(tmp_path / "packed", packed, quantization_config=QUANTIZATION), write(tmp_path / "plain", plain)


@pytest.mark.usefixtures("registered")
def test_a_registered_format_is_served(checkpoints: tuple[Path, Path]) -> None:
    packed, plain = checkpoints
    report = inspect_checkpoint(packed)
    assert report.problems == ()
    modules = SPEC.config.num_hidden_layers * (5 + 3 + 3 * SPEC.config.n_routed_experts)
    assert sum(row.count for row in report.rows if row.scheme.kind == "int4") == modules

    tokens = tiny.prompt_tokens(SPEC)
    expected = oracle.logprobs(oracle.load_oracle(plain), tokens)
    with running(packed) as llm:
        logprobs = full_logprobs(llm, [tokens])[0]
    assert (logprobs - expected).abs().max() <= TOLERANCE


def test_a_format_that_is_not_registered_is_refused(checkpoints: tuple[Path, Path]) -> None:
    (problem,) = inspect_checkpoint(checkpoints[0]).problems
    assert problem.text.startswith("quant_method='toy4' in quantization_config: not supported. Use a checkpoint whose")
