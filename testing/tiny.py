"""Small random checkpoints in which every trap of the architecture shows.

`CONFIGS` has the configurations, `write_checkpoint` writes one to a directory in any naming style, and
`prompt_tokens` makes its prompt. With these prompts and seeds fp32 rounding decides no choice of experts or of indexer
entries, and every value that an implementation has got wrong changes the output; `test_oracle.py` checks both.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_deepseek_v4flash.checkpoint import names
from vllm_deepseek_v4flash.config import DeepseekV4Config

TOY = Path(__file__).resolve().parent.parent / "examples" / "toy"

BASE: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "compress_ratios": [0, 4, 128, 4, 0],
    "compress_rope_theta": 160000,
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "index_head_dim": 64,
    "index_n_heads": 4,
    "index_topk": 512,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 2,
    "o_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 32,
    "swiglu_limit": 2.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "vocab_size": 264,
}


@dataclass(frozen=True)
class TinySpec:
    """One small model: its differences from `BASE`, the length of its prompt, and the spread of its biases."""

    why: str
    overrides: Mapping[str, Any]
    prompt_length: int
    seed: int = 0
    sink: float = 1.5
    ape: float = 1.0
    hc_base: float = 0.7

    @property
    def hf_config(self) -> dict[str, Any]:
        """config.json in DeepSeek's own form."""
        # A deep copy: the config classes of transformers and vLLM write into rope_scaling.
        return copy.deepcopy({**BASE, **self.overrides})

    @property
    def config(self) -> DeepseekV4Config:
        return DeepseekV4Config.from_dict(self.hf_config)


def _yarn(original: int) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": original,
    }


CONFIGS: dict[str, TinySpec] = {
    "mixed": TinySpec(
        "Flash's pattern, two hash layers and then biased ones, five ratio-128 windows, more than 512 tokens",
        {
            "num_hidden_layers": 5,
            "compress_ratios": [0, 0, 4, 128, 4, 0],
            "num_hash_layers": 2,
            "rope_scaling": _yarn(65536),
        },
        prompt_length=650,
    ),
    "yarn": TinySpec(
        "YaRN far beyond its original length, in compressed layers only",
        {"compress_ratios": [4, 128, 0, 4, 0], "rope_scaling": _yarn(64), "num_hash_layers": 1},
        prompt_length=400,
    ),
    "topk": TinySpec(
        "the indexer chooses 8 of up to 50 entries by the scores of 32 heads, which do not tie",
        {
            "num_hidden_layers": 3,
            "compress_ratios": [0, 4, 4, 0],
            "index_topk": 8,
            "index_n_heads": 32,
            "hc_mult": 2,
        },
        prompt_length=200,
        seed=15,
    ),
    "odd": TinySpec(
        "no size is a power of two, three heads a group, a vocabulary of no tokenizer",
        {
            "num_attention_heads": 6,
            "o_groups": 2,
            "head_dim": 96,
            "index_head_dim": 48,
            "index_n_heads": 5,
            "hidden_size": 200,
            "q_lora_rank": 72,
            "o_lora_rank": 40,
            "vocab_size": 301,
            "n_routed_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 56,
            "routed_scaling_factor": 2.5,
            "sliding_window": 23,
            "rope_theta": 500,
        },
        prompt_length=300,
        seed=10,
    ),
    "clamp": TinySpec(
        "the clamp limits most activations on one side or both; sinks, ape and mHC bases far from zero",
        {"swiglu_limit": 0.3, "compress_ratios": [0, 128, 4, 4, 0, 0, 0], "compress_rope_theta": 50000},
        prompt_length=300,
        sink=4.0,
        ape=3.0,
        hc_base=2.0,
    ),
    "streams3": TinySpec(
        "three streams, few Sinkhorn steps, eps that count, V4-Pro's ratio-128 start, five experts a token",
        {
            "hc_mult": 3,
            "hc_sinkhorn_iters": 3,
            "compress_ratios": [128, 128, 4, 128, 0],
            "sliding_window": 17,
            "num_attention_heads": 6,
            "o_groups": 3,
            "n_routed_experts": 12,
            "num_experts_per_tok": 5,
            "num_hash_layers": 3,
            "hc_eps": 0.02,
            "rms_norm_eps": 0.005,
        },
        prompt_length=420,
        seed=5,
        hc_base=1.5,
    ),
    "unhashed": TinySpec(
        "every layer routes by score, no window-only layer, the rope as wide as the indexer's head",
        {
            "num_hidden_layers": 3,
            "compress_ratios": [4, 128, 4],
            "num_hash_layers": 0,
            "num_nextn_predict_layers": 0,
            "index_head_dim": 32,
            "sliding_window": 40,
            "rope_scaling": _yarn(128),
        },
        prompt_length=300,
        seed=15,
    ),
}

# fp32 in DeepSeek's files, whatever the dtype of the rest.
_ALWAYS_FP32 = ("hc_", "attn_sink", ".ape", "gate.bias")


def random_tensors(spec: TinySpec) -> dict[str, torch.Tensor]:
    """All tensors of the model by native name, fp32 (tid2eid int64); the same on every machine."""
    generator = torch.Generator().manual_seed(spec.seed)
    return {
        name: _random_tensor(name, tensor.shape, spec, generator)
        for name, tensor in names.expected_tensors(spec.config).items()
    }


def _random_tensor(name: str, shape: tuple[int, ...], spec: TinySpec, generator: torch.Generator) -> torch.Tensor:
    def normal(scale: float, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale + shift

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    if name.endswith("tid2eid"):
        experts = spec.config.n_routed_experts
        rows = [torch.randperm(experts, generator=generator)[: shape[1]] for _ in range(shape[0])]
        return torch.stack(rows)
    if "hc_" in name:
        if name.endswith("_base"):
            return normal(spec.hc_base)
        return uniform(0.5, 1.5) if name.endswith("_scale") else normal(1 / math.sqrt(shape[1]))
    if name.endswith("attn_sink"):
        return normal(spec.sink, 0.5)
    if name.endswith(".ape"):
        return normal(spec.ape)
    if name.endswith("gate.bias"):
        return normal(0.3)
    if "norm" in name:
        return uniform(0.5, 1.5)
    if name == "embed.weight":
        return normal(1.0)
    return normal((2.0 if name == "head.weight" else 1.0) / math.sqrt(shape[1]))


def prompt_tokens(spec: TinySpec, length: int | None = None, seed: int = 0) -> list[int]:
    """BOS and random ids without special ones. Another seed gives another prompt."""
    generator = torch.Generator().manual_seed(1000 + seed)
    count = spec.prompt_length if length is None else length
    ids = torch.randint(3, spec.config.vocab_size, (count,), generator=generator).tolist()
    return [0, *ids[1:]] if count else []


def write_checkpoint(
    directory: Path,
    spec: TinySpec,
    *,
    dtype: torch.dtype = torch.float32,
    style: names.Style = "native",
    fused: bool = False,
    resaved_config: bool = False,
    tokenizer: Path | None = None,
    shards: int = 1,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write `spec` as a checkpoint directory; returns the directory.

    Args:
        dtype: of the weights. What DeepSeek keeps in fp32 stays in fp32.
        style: how tensors are named (see `names.stored_name`).
        fused: stack the experts of a layer as transformers does.
        resaved_config: write config.json as transformers saves it.
        tokenizer: a directory to copy the tokenizer's files from, such as `TOY`.
        shards: the number of safetensors files; more than one get an index.
        tensors: by native name, written instead of `random_tensors(spec)`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    native = dict(random_tensors(spec) if tensors is None else tensors)
    native = {name: _cast(name, tensor, dtype) for name, tensor in native.items()}
    if fused:
        native = fuse_experts(spec.config, native)
    stored = {_stored(name, style): tensor.contiguous() for name, tensor in native.items()}
    config = resaved(spec.hf_config) if resaved_config else spec.hf_config
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    _save(directory, stored, shards)
    if tokenizer is not None:
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(tokenizer / file, directory / file)
    return directory


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point() or any(part in name for part in _ALWAYS_FP32):
        return tensor
    return tensor.to(dtype)


def _stored(name: str, style: names.Style) -> str:
    if name.endswith((names.FUSED_GATE_UP, names.FUSED_DOWN)):
        if style == "native":
            return name
        return "model." + (name.replace(".ffn.", ".mlp.") if style == "transformers" else name)
    return names.stored_name(name, style)


def fuse_experts(config: DeepseekV4Config, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fused = {name: tensor for name, tensor in tensors.items() if names.expert_index(name) is None}
    experts = range(config.n_routed_experts)
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}.ffn.experts."
        gate_up = [torch.cat([tensors[f"{prefix}{e}.w1.weight"], tensors[f"{prefix}{e}.w3.weight"]]) for e in experts]
        fused[f"layers.{layer}.{names.FUSED_GATE_UP}"] = torch.stack(gate_up)
        down = [tensors[f"{prefix}{e}.w2.weight"] for e in experts]
        fused[f"layers.{layer}.{names.FUSED_DOWN}"] = torch.stack(down)
    return fused


def resaved(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A native config.json as transformers 5 saves it: other keys for the schedule, rope and hash layers."""
    config = dict(hf_config)
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    ratios = config.pop("compress_ratios")[:layers]
    hashed = config.pop("num_hash_layers")
    scaling = config.pop("rope_scaling")
    types = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    partial = config.pop("qk_rope_head_dim") / head_dim
    shared = {"partial_rotary_factor": partial}
    main = {"rope_type": "default", "rope_theta": config["rope_theta"], **shared}
    compress = {"rope_type": "default", "rope_theta": config["compress_rope_theta"], **shared}
    if scaling:
        compress |= {**scaling, "rope_type": "yarn", "attention_factor": 1.0}
    return config | {
        "layer_types": [types[ratio] for ratio in ratios],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "partial_rotary_factor": partial,
        "rope_parameters": {"main": main, "compress": compress},
    }


def _save(directory: Path, stored: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return
    ordered = sorted(stored)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored[name] for name in ordered[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
