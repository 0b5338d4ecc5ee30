"""The dataclass that the rest of the package reads, and what must hold between its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .layer_kinds import LayerKind, read_hash_layers, read_schedule
from .rotary import RopeScaling, read_rope, read_rope_head_dim
from .source import Source, as_integer, config_error
from .text import parse_json

MODEL_TYPE = "deepseek_v4"
ARCHITECTURE = "DeepseekV4ForCausalLM"

BLOCK_TOKENS = 256
"""Tokens of one KV-cache block, vLLM's block size for the architecture. No compressed entry may straddle two blocks."""


@dataclass(frozen=True)
class DeepseekV4Config:
    """Sizes and constants of one checkpoint; every field has been checked by `from_hf`.

    `layer_kinds` and `compress_ratios` have one entry for each backbone layer (MTP entries are dropped); a
    window layer has ratio 0. Window layers rotate with `rope_theta` and no scaling, compressed layers with
    `compress_rope_theta` and `rope_scaling`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    sliding_window: int
    layer_kinds: tuple[LayerKind, ...]
    compress_ratios: tuple[int, ...]
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    expert_dtype: str | None
    bos_token_id: int
    eos_token_id: int | tuple[int, ...]

    @classmethod
    def from_hf(cls, hf_config: Any) -> DeepseekV4Config:
        """Read a config of any of the four kinds: a mapping, or an object with the keys as attributes.

        An absent key takes transformers' default, which is Flash's value. The sizes without a default (`vocab_size`,
        `hidden_size`, `num_hidden_layers`) and the layer schedule must be present.

        Raises:
            ValueError: naming the field, its value and what is supported.
        """
        source = Source(hf_config)
        _check_architecture(source)
        head_dim = source.integer("head_dim", 512)
        n_layers = source.integer("num_hidden_layers")
        kinds, ratios = read_schedule(source, n_layers)
        rope_theta, compress_rope_theta, rope_scaling = read_rope(source)
        config = cls(
            vocab_size=source.integer("vocab_size"),
            hidden_size=source.integer("hidden_size"),
            num_hidden_layers=n_layers,
            num_attention_heads=source.integer("num_attention_heads", 64),
            head_dim=head_dim,
            qk_rope_head_dim=read_rope_head_dim(source, head_dim),
            q_lora_rank=source.integer("q_lora_rank", 1024),
            o_lora_rank=source.integer("o_lora_rank", 1024),
            o_groups=source.integer("o_groups", 8),
            sliding_window=source.integer("sliding_window", 128),
            layer_kinds=kinds,
            compress_ratios=ratios,
            rope_theta=rope_theta,
            compress_rope_theta=compress_rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=source.integer("max_position_embeddings", 1048576),
            index_n_heads=source.integer("index_n_heads", 64),
            index_head_dim=source.integer("index_head_dim", 128),
            index_topk=source.integer("index_topk", 512),
            n_routed_experts=source.integer("n_routed_experts", 256),
            n_shared_experts=source.integer("n_shared_experts", 1),
            num_experts_per_tok=source.integer("num_experts_per_tok", 6),
            moe_intermediate_size=source.integer("moe_intermediate_size", 2048),
            num_hash_layers=read_hash_layers(source, n_layers),
            routed_scaling_factor=source.positive("routed_scaling_factor", 1.5),
            norm_topk_prob=source.boolean("norm_topk_prob", True),
            swiglu_limit=source.positive("swiglu_limit", 10.0),
            hc_mult=source.integer("hc_mult", 4),
            hc_sinkhorn_iters=source.integer("hc_sinkhorn_iters", 20),
            hc_eps=source.positive("hc_eps", 1e-6),
            rms_norm_eps=source.positive("rms_norm_eps", 1e-6),
            tie_word_embeddings=source.boolean("tie_word_embeddings", False),
            num_nextn_predict_layers=source.integer("num_nextn_predict_layers", 1, minimum=0),
            expert_dtype=source.string("expert_dtype", None),
            bos_token_id=source.integer("bos_token_id", 0, minimum=0),
            eos_token_id=_read_eos_token(source),
        )
        _check_relations(config)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeepseekV4Config:
        """`from_hf` for a parsed config.json."""
        return cls.from_hf(values)

    @classmethod
    def from_json_file(cls, path: str | Path) -> DeepseekV4Config:
        """`from_hf` for a config.json on disk, or for the directory that holds one."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            values = parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: is not JSON: {error}. Download it again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: must be a JSON object, found {type(values).__name__}. Pass a config.json.")
        return cls.from_hf(values)

    def replace(self, **changes: Any) -> DeepseekV4Config:
        """A copy with some fields changed; the relations between the fields are checked again."""
        config = dataclasses.replace(self, **changes)
        _check_relations(config)
        return config


def _check_architecture(source: Source) -> None:
    """Refuse what shares key names with V4 but computes something else."""
    model_type = source.get("model_type")
    if model_type == "deepseek_v41":
        raise config_error(
            "model_type", model_type, f"must be {MODEL_TYPE!r}; DeepSeek-V4.1 is another architecture",
            "Use vLLM's own class, which stays registered",
        )  # fmt: skip
    if model_type != MODEL_TYPE:
        raise config_error("model_type", model_type, f"must be {MODEL_TYPE!r}")
    vision_layers = source.get("vision_n_layers", 0)
    if vision_layers:
        raise config_error(
            "vision_n_layers", vision_layers, "must be 0; the vision variant is another architecture",
            "Use vLLM's own class, which stays registered",
        )  # fmt: skip
    fixed: dict[str, Any] = {
        "num_key_value_heads": 1,  # the one latent row is key and value of all heads
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "norm_topk_prob": True,  # the reference always normalizes
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,  # the head is a tensor of its own in every V4 checkpoint
    }
    for name, supported in fixed.items():
        value = source.get(name, supported)
        if type(value) is not type(supported) or value != supported:
            raise config_error(name, value, f"must be {supported!r}")


def _read_eos_token(source: Source) -> int | tuple[int, ...]:
    value = source.get("eos_token_id", 1)
    if isinstance(value, (list, tuple)):
        return tuple(as_integer("eos_token_id", token, minimum=0) for token in value)
    return as_integer("eos_token_id", value, minimum=0)


def _check_relations(config: DeepseekV4Config) -> None:
    """What no field can tell alone."""
    c = config
    rope = c.qk_rope_head_dim
    if rope % 2:
        raise config_error("qk_rope_head_dim", rope, "must be even, because channels are rotated in pairs")
    if rope >= c.head_dim:
        raise config_error("qk_rope_head_dim", rope, f"must be less than head_dim={c.head_dim}")
    if LayerKind.CSA in c.layer_kinds and rope > c.index_head_dim:
        raise config_error("index_head_dim", c.index_head_dim, f"must be at least qk_rope_head_dim={rope}")
    if c.num_attention_heads % c.o_groups:
        raise config_error("o_groups", c.o_groups, f"must divide num_attention_heads={c.num_attention_heads}")
    for field in ("bos_token_id", "eos_token_id"):
        tokens = getattr(c, field)
        if max(tokens if isinstance(tokens, tuple) else (tokens,), default=0) >= c.vocab_size:
            raise config_error(field, tokens, f"must be less than vocab_size={c.vocab_size}")
    if c.num_experts_per_tok > c.n_routed_experts:
        raise config_error(
            "num_experts_per_tok", c.num_experts_per_tok, f"must be at most n_routed_experts={c.n_routed_experts}"
        )
    if c.num_hash_layers > c.num_hidden_layers:
        raise config_error(
            "num_hash_layers", c.num_hash_layers, f"must be at most num_hidden_layers={c.num_hidden_layers}"
        )
    if not len(c.layer_kinds) == len(c.compress_ratios) == c.num_hidden_layers:
        raise config_error(
            "compress_ratios", c.compress_ratios, f"must have num_hidden_layers={c.num_hidden_layers} entries"
        )
    for i, (kind, ratio) in enumerate(zip(c.layer_kinds, c.compress_ratios, strict=True)):
        if kind is LayerKind.WINDOW:
            if ratio != 0:
                raise config_error(f"compress_ratios[{i}]", ratio, "must be 0 for a window layer")
        elif ratio < 2 or BLOCK_TOKENS % ratio:
            raise config_error(
                f"compress rate of layer {i} ({kind.value})", ratio,
                f"must be above 1 and divide {BLOCK_TOKENS}, the tokens of one cache block",
            )  # fmt: skip
