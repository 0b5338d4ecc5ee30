"""The DeepSeek-V4 hyper-parameters as one frozen dataclass, whatever wrote the config.json.

Four sources are read: DeepSeek's own file (`compress_ratios`, flat `rope_scaling`, `num_hash_layers`), a file
saved again by transformers (`layer_types`, `compress_rates`, `mlp_layer_types`, nested `rope_parameters`) and
the config objects of vLLM and of transformers. Standard library only: reading a config never waits for torch.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One KV-cache block holds this many tokens (vLLM's block size for the architecture), and no compressed entry
# may straddle two blocks.
BLOCK_TOKENS = 256


class LayerKind(enum.Enum):
    """What a layer attends to besides its sliding window (tech report, sections 2.3.1 and 2.3.2)."""

    WINDOW = "window"
    CSA = "csa"
    HCA = "hca"


_KIND_OF_RATIO = {0: LayerKind.WINDOW, 1: LayerKind.WINDOW, 4: LayerKind.CSA, 128: LayerKind.HCA}
_KIND_OF_LAYER_TYPE = {
    "sliding_attention": LayerKind.WINDOW,
    "compressed_sparse_attention": LayerKind.CSA,
    "heavily_compressed_attention": LayerKind.HCA,
}
_LAYER_TYPE_OF_KIND = {kind: name for name, kind in _KIND_OF_LAYER_TYPE.items()}


@dataclass(frozen=True)
class RopeScaling:
    """YaRN of the compressed layers. There is no mscale: cos, sin and the softmax scale stay as they are."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


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

        A key that is absent takes transformers' default, which is Flash's value; the sizes that nobody can
        guess (`vocab_size`, `hidden_size`, `num_hidden_layers`) and the layer schedule must be there.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        source = _Source(hf_config)
        _check_architecture(source)
        head_dim = source.integer("head_dim", 512)
        n_layers = source.integer("num_hidden_layers")
        kinds, ratios = _layer_schedule(source, n_layers)
        rope_theta, compress_rope_theta, rope_scaling = _rope(source)
        config = cls(
            vocab_size=source.integer("vocab_size"),
            hidden_size=source.integer("hidden_size"),
            num_hidden_layers=n_layers,
            num_attention_heads=source.integer("num_attention_heads", 64),
            head_dim=head_dim,
            qk_rope_head_dim=_rope_head_dim(source, head_dim),
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
            num_hash_layers=_hash_layers(source, n_layers),
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
            eos_token_id=_eos_token(source),
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
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
        return cls.from_hf(values)

    def replace(self, **changes: Any) -> DeepseekV4Config:
        """A copy with some fields changed; the relations between the fields are checked again."""
        config = dataclasses.replace(self, **changes)
        _check_relations(config)
        return config


_MISSING = object()


class _Source:
    """Checked look-ups in a mapping or in an object; JSON null and an absent key are the same thing."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def get(self, name: str, default: Any = None) -> Any:
        if isinstance(self._raw, Mapping):
            value = self._raw.get(name)
        else:
            value = getattr(self._raw, name, None)
        return default if value is None else value

    def integer(self, name: str, default: Any = _MISSING, *, minimum: int = 1) -> int:
        value = self.get(name, default)
        if value is _MISSING:
            raise _error(name, None, f"an integer >= {minimum}; the key is missing from the config")
        return _as_integer(name, value, minimum)

    def positive(self, name: str, default: float) -> float:
        return _as_positive(name, self.get(name, default))

    def boolean(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise _error(name, value, "true or false")
        return value

    def string(self, name: str, default: str | None) -> str | None:
        value = self.get(name, default)
        if value is not None and not isinstance(value, str):
            raise _error(name, value, "a string or null")
        return value


def _error(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"DeepSeek-V4 config: {name} is {value!r}; allowed: {allowed}")


def _as_integer(name: str, value: Any, minimum: int = 1) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < minimum:
        raise _error(name, value, f"an integer >= {minimum}")
    return int(value)


def _as_positive(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise _error(name, value, "a finite number > 0")
    return float(value)


def _check_architecture(source: _Source) -> None:
    """Refuse what shares key names with V4 but computes something else."""
    model_type = source.get("model_type")
    if model_type != "deepseek_v4":
        hint = "; DeepSeek-V4.1 is another architecture and stays with vLLM's own class"
        raise _error("model_type", model_type, "'deepseek_v4'" + (hint if model_type == "deepseek_v41" else ""))
    vision_layers = source.get("vision_n_layers", 0)
    if vision_layers:
        raise _error("vision_n_layers", vision_layers, "0; the vision variant stays with vLLM's own class")
    fixed: dict[str, Any] = {
        "num_key_value_heads": 1,  # the one latent row is key and value of all heads
        "n_shared_experts": 1,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "norm_topk_prob": True,  # the reference always normalises
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,  # the head is a tensor of its own in every V4 checkpoint
    }
    for name, allowed in fixed.items():
        value = source.get(name, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise _error(name, value, repr(allowed))


def _layer_schedule(source: _Source, n_layers: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    native = source.get("compress_ratios")
    saved = source.get("layer_types")
    if native is None and saved is None:
        raise _error("compress_ratios", None, "one of 0, 1, 4, 128 for each layer (or layer_types with compress_rates)")
    if native is None:
        return _schedule_from_layer_types(source, saved, n_layers)
    schedule = _schedule_from_ratios(native, n_layers)
    if saved is not None and _schedule_from_layer_types(source, saved, n_layers) != schedule:
        raise _error("layer_types", _as_list("layer_types", saved), "the same schedule as compress_ratios")
    return schedule


def _schedule_from_ratios(native: Any, n_layers: int) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    entries = _as_list("compress_ratios", native)
    if len(entries) < n_layers:
        raise _error("compress_ratios", entries, f"at least num_hidden_layers = {n_layers} entries")
    for i, ratio in enumerate(entries):
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio not in _KIND_OF_RATIO:
            raise _error(f"compress_ratios[{i}]", ratio, "0 or 1 (window), 4 (CSA), 128 (HCA)")
    # What follows the backbone belongs to the MTP blocks: one entry in Flash, three with DSpark.
    entries = entries[:n_layers]
    return tuple(_KIND_OF_RATIO[r] for r in entries), tuple(r if r > 1 else 0 for r in entries)


def _schedule_from_layer_types(
    source: _Source, saved: Any, n_layers: int
) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    entries = _as_list("layer_types", saved)
    if len(entries) != n_layers:
        raise _error("layer_types", entries, f"exactly num_hidden_layers = {n_layers} entries")
    for i, name in enumerate(entries):
        if name not in _KIND_OF_LAYER_TYPE:
            raise _error(f"layer_types[{i}]", name, "one of " + ", ".join(_KIND_OF_LAYER_TYPE))
    rates = source.get("compress_rates", {})
    if not isinstance(rates, Mapping):
        raise _error("compress_rates", rates, "a mapping from layer type to the number of tokens in an entry")
    ratio_of_kind = {LayerKind.WINDOW: 0}
    # Scalars are how the first transformers configs of V4 spelled the rates.
    for kind, default, scalar in (
        (LayerKind.CSA, 4, "compress_rate_csa"),
        (LayerKind.HCA, 128, "compress_rate_hca"),
    ):
        layer_type = _LAYER_TYPE_OF_KIND[kind]
        rate = source.get(scalar, rates.get(layer_type, default))
        ratio_of_kind[kind] = _as_integer(f"compress_rates[{layer_type!r}]", rate, minimum=2)
    kinds = tuple(_KIND_OF_LAYER_TYPE[name] for name in entries)
    return kinds, tuple(ratio_of_kind[kind] for kind in kinds)


def _as_list(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise _error(name, value, "a list with one entry for each layer")
    return list(value)


def _hash_layers(source: _Source, n_layers: int) -> int:
    native = source.get("num_hash_layers")
    saved = source.get("mlp_layer_types")
    if saved is None:
        count = _as_integer("num_hash_layers", min(3, n_layers) if native is None else native, minimum=0)
        if count > n_layers:
            raise _error("num_hash_layers", count, f"at most num_hidden_layers = {n_layers}")
        return count
    entries = _as_list("mlp_layer_types", saved)
    if len(entries) != n_layers:
        raise _error("mlp_layer_types", entries, f"exactly num_hidden_layers = {n_layers} entries")
    count = entries.count("hash_moe")
    if entries != ["hash_moe"] * count + ["moe"] * (n_layers - count):
        raise _error("mlp_layer_types", entries, "'hash_moe' for the first layers, then 'moe' for all others")
    if native is not None and native != count:
        raise _error("num_hash_layers", native, f"{count}, as mlp_layer_types has it")
    return count


def _rope_head_dim(source: _Source, head_dim: int) -> int:
    explicit = source.get("qk_rope_head_dim")
    factor = source.get("partial_rotary_factor")
    if explicit is not None:
        rope_dim = _as_integer("qk_rope_head_dim", explicit)
        # transformers stores both, and cuts the product down to an integer, which may lose one to rounding.
        if factor is not None and abs(_as_positive("partial_rotary_factor", factor) * head_dim - rope_dim) > 1:
            allowed = f"qk_rope_head_dim / head_dim = {rope_dim} / {head_dim}"
            raise _error("partial_rotary_factor", factor, allowed)
        return rope_dim
    return round(head_dim * _as_positive("partial_rotary_factor", 64 / 512 if factor is None else factor))


def _rope(source: _Source) -> tuple[float, float, RopeScaling | None]:
    """rope_theta, compress_rope_theta and the compressed layers' scaling, from either form."""
    # In transformers' class `rope_scaling` is an alias of `rope_parameters`; vLLM's copies one to the other.
    parameters = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise _error("rope_parameters", parameters, "a mapping or null")
    main_theta = source.get("rope_theta", parameters.get("rope_theta") or 10000.0)
    compress_theta = source.get("compress_rope_theta", 160000.0)
    scaling, field = parameters, "rope_scaling"
    main, compress = parameters.get("main"), parameters.get("compress")
    if isinstance(main, Mapping) or isinstance(compress, Mapping):
        if not (isinstance(main, Mapping) and isinstance(compress, Mapping)):
            raise _error("rope_parameters", dict(parameters), "both 'main' and 'compress', each a mapping")
        if _rope_type(main) != "default":
            allowed = "'default'; window layers never scale"
            raise _error("rope_parameters['main'].rope_type", _rope_type(main), allowed)
        main_theta = main.get("rope_theta") or main_theta
        compress_theta = compress.get("rope_theta") or compress_theta
        scaling, field = compress, "rope_parameters['compress']"
    return (
        _as_positive("rope_theta", main_theta),
        _as_positive("compress_rope_theta", compress_theta),
        _rope_scaling(scaling, field),
    )


def _rope_type(parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _rope_scaling(parameters: Mapping[str, Any], field: str) -> RopeScaling | None:
    rope_type = _rope_type(parameters)
    if rope_type == "default":
        if parameters.get("factor") not in (None, 1, 1.0):
            raise _error(f"{field}.type", None, "'yarn' where there is a factor")
        return None
    if rope_type != "yarn":
        raise _error(f"{field}.type", rope_type, "'yarn', 'default' or no scaling at all (null)")
    if parameters.get("attention_factor") not in (None, 1, 1.0):
        raise _error(f"{field}.attention_factor", parameters["attention_factor"], "1.0; V4 has no YaRN mscale")
    if parameters.get("truncate") not in (None, True):
        raise _error(f"{field}.truncate", parameters["truncate"], "true; V4 rounds the ramp outwards")
    beta_fast = _as_positive(f"{field}.beta_fast", parameters.get("beta_fast") or 32)
    beta_slow = _as_positive(f"{field}.beta_slow", parameters.get("beta_slow") or 1)
    if beta_fast <= beta_slow:
        raise _error(f"{field}.beta_fast", beta_fast, f"more than beta_slow = {beta_slow}")
    factor = _as_positive(f"{field}.factor", parameters.get("factor"))
    if factor < 1:
        raise _error(f"{field}.factor", factor, "a number >= 1")
    return RopeScaling(
        factor=factor,
        original_max_position_embeddings=_as_integer(
            f"{field}.original_max_position_embeddings", parameters.get("original_max_position_embeddings")
        ),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
    )


def _eos_token(source: _Source) -> int | tuple[int, ...]:
    value = source.get("eos_token_id", 1)
    if isinstance(value, (list, tuple)):
        return tuple(_as_integer("eos_token_id", token, minimum=0) for token in value)
    return _as_integer("eos_token_id", value, minimum=0)


def _check_relations(config: DeepseekV4Config) -> None:
    """What no field can tell alone."""
    c = config
    rope = c.qk_rope_head_dim
    if rope % 2:
        raise _error("qk_rope_head_dim", rope, "an even number; channels are rotated in pairs")
    if rope >= c.head_dim:
        raise _error("qk_rope_head_dim", rope, f"less than head_dim = {c.head_dim}")
    if LayerKind.CSA in c.layer_kinds and rope > c.index_head_dim:
        raise _error("index_head_dim", c.index_head_dim, f"at least qk_rope_head_dim = {rope}")
    if c.num_attention_heads % c.o_groups:
        raise _error("o_groups", c.o_groups, f"a divisor of num_attention_heads = {c.num_attention_heads}")
    if c.num_experts_per_tok > c.n_routed_experts:
        raise _error("num_experts_per_tok", c.num_experts_per_tok, f"at most n_routed_experts = {c.n_routed_experts}")
    if c.num_hash_layers > c.num_hidden_layers:
        raise _error("num_hash_layers", c.num_hash_layers, f"at most num_hidden_layers = {c.num_hidden_layers}")
    if not len(c.layer_kinds) == len(c.compress_ratios) == c.num_hidden_layers:
        raise _error("compress_ratios", c.compress_ratios, f"num_hidden_layers = {c.num_hidden_layers} entries")
    for i, (kind, ratio) in enumerate(zip(c.layer_kinds, c.compress_ratios, strict=True)):
        if kind is LayerKind.WINDOW:
            if ratio != 0:
                raise _error(f"compress_ratios[{i}]", ratio, "0 for a window layer")
        elif ratio < 2 or BLOCK_TOKENS % ratio:
            allowed = f"a divisor of {BLOCK_TOKENS}, the tokens of one cache block, above 1"
            raise _error(f"compress rate of layer {i} ({kind.value})", ratio, allowed)
