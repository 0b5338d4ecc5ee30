"""The small checkpoints of the `engine` part, and their prompts.

The trained toy is used for arithmetic in 16 bits: its choices are clear, while a random model's depend on the last bit.
The random model of the scheduler's tests runs in fp32 only; its seeds were searched for clear choices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .environment import ROOT

EXAMPLES = ROOT / "examples"
PROMPTS = 64
STOP = 1
"""The toy's end token."""
MOST_TOKENS = 40
SCHEDULER_TOKENS = 40


@dataclass(frozen=True)
class Setting:
    """What determines the tokens: a checkpoint, and the dtypes in which it runs.

    Attributes:
        cache: `--kv-cache-dtype`; auto is fp8 for a 16-bit model and fp32 for one in fp32.
        index: `index_cache_dtype`.
    """

    checkpoint: str
    dtype: str
    cache: str = "auto"
    index: str = "auto"

    @property
    def name(self) -> str:
        rows = {"auto": "fp32 rows" if self.exact else "fp8 rows"}.get(self.cache, f"{self.cache} rows")
        index = "" if self.index == "auto" else f", {self.index} index"
        return f"{self.checkpoint}, {self.dtype}, {rows}{index}"

    @property
    def exact(self) -> bool:
        """Whether the tokens must be equal: nothing has fewer bits than fp32."""
        return self.dtype == "float32"

    @property
    def options(self) -> dict[str, object]:
        """For `vllm.LLM`."""
        more = {} if self.index == "auto" else {"additional_config": {"index_cache_dtype": self.index}}
        return {"dtype": self.dtype, "kv_cache_dtype": self.cache, **more}


SETTINGS = (
    Setting("scheduler", "float32"),
    Setting("toy", "float32"),
    Setting("toy", "bfloat16"),
    Setting("toy", "bfloat16", "bfloat16"),
    Setting("toy", "bfloat16", index="fp4"),
    Setting("toy-int4", "float32"),
    Setting("toy-int4", "bfloat16"),
    Setting("toy-fp4", "float32"),
    Setting("toy-fp4", "bfloat16"),
)


def checkpoint(name: str, scratch: Path) -> Path:
    """The directory of a checkpoint, created below `scratch` if the repository does not have it."""
    if name not in _MADE:
        return EXAMPLES / name
    directory = scratch / name
    return directory if directory.exists() else _MADE[name](directory)


def write_scheduler(directory: Path) -> Path:
    from testing.scheduler.prompts import SPEC
    from testing.tiny import write_checkpoint

    return write_checkpoint(directory, SPEC)


def write_toy_fp4(directory: Path) -> Path:
    """The toy as DeepSeek stores its weights: FP4 experts, FP8 linears."""
    from safetensors.torch import save_file

    from testing.format_cases import FP8_CONFIG
    from testing.native_checkpoints import quantise
    from vllm_deepseek_v4flash.checkpoint.names import native_name

    native = {native_name(name) or name: tensor for name, tensor in _load(EXAMPLES / "toy").items()}
    directory.mkdir(parents=True)
    tensors = quantise(native, "fp4", torch.float8_e8m0fnu)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    config = json.loads((EXAMPLES / "toy" / "config.json").read_text())
    quantization = {**FP8_CONFIG, "activation_scheme": "dynamic"}
    (directory / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization, "expert_dtype": "fp4"})
    )
    return directory


_MADE: dict[str, Callable[[Path], Path]] = {"scheduler": write_scheduler, "toy-fp4": write_toy_fp4}


def prompts(name: str) -> list[list[int]]:
    """The prompts of a checkpoint: token ids."""
    if name == "scheduler":
        from testing.scheduler.prompts import TEXTS

        return [list(text) for text in TEXTS]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EXAMPLES / "toy" / "tokenizer.json"))
    return [tokenizer.encode(line["prompt"], add_special_tokens=False).ids for line in questions()]


def questions() -> list[dict[str, object]]:
    """Questions of every kind, evenly from the toy's own list."""
    lines = (EXAMPLES / "toy" / "eval.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:: len(lines) // PROMPTS]][:PROMPTS]


def fingerprint(directory: Path) -> str:
    """A hash of a checkpoint's contents, except for the last bits of random numbers, in which CPUs differ."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_load(directory).items()):
        values = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        size = float(values.double().abs().mean())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {size:.3e}\n".encode())
    return digest.hexdigest()[:16]


def _load(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, under its stored name."""
    from safetensors.torch import load_file

    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
