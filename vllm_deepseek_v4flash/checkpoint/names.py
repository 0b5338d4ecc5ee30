"""Every name and shape a DeepSeek-V4 tensor has, in one table.

This package uses DeepSeek's names (`layers.0.attn.wq_a.weight`). Checkpoints come in four other spellings: the same
with a `model.` prefix; what transformers' `save_pretrained` writes (DeepSeek's, with a few exceptions); transformers'
module names (`model.layers.0.self_attn.q_a_proj.weight`), with separate or fused experts; and mixtures of these that
quantisation tools produce. A name is therefore translated piece by piece: containers first, then the module. The leaf
(`weight`, or a quantised format's `qweight`, `scales`, `weight_packed`, ...) is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..config import DeepseekV4Config, LayerKind

Where = Literal["global", "layer", "compressed", "csa", "hash", "biased", "expert"]
Style = Literal["native", "prefixed", "saved", "transformers"]


@dataclass(frozen=True)
class TensorSpec:
    """Full (unsharded) shape of a tensor, `[out, in]` for a linear layer, and whether it holds integers."""

    shape: tuple[int, ...]
    integer: bool = False


@dataclass(frozen=True)
class Row:
    """One tensor, or one per layer or per expert (`*` stands for the expert's number).

    `native` and `transformers` are relative to `layers.N.` unless `where` is "global". A `module` holds a `weight` (or
    the leaves of a quantised format in its place); any other row is a parameter of its own. `dims` are keys of
    `_dimensions`. `saved` is what `save_pretrained` writes if that is not `model.` + native. `mistaken` is what a tool
    writes that renames too much.
    """

    native: str
    transformers: str
    dims: tuple[str, ...]
    where: Where = "layer"
    module: bool = True
    integer: bool = False
    saved: str | None = None
    mistaken: str | None = None


TABLE: tuple[Row, ...] = (
    Row("embed", "model.embed_tokens", ("vocab", "hidden"), "global", saved="model.embed_tokens"),
    Row("head", "lm_head", ("vocab", "hidden"), "global", saved="head"),
    Row("norm", "model.norm", ("hidden",), "global"),
    Row("hc_head_fn", "model.hc_head.hc_fn", ("hc", "flat"), "global", False, saved="model.hc_head.hc_fn"),
    Row("hc_head_base", "model.hc_head.hc_base", ("hc",), "global", False, saved="model.hc_head.hc_base"),
    Row("hc_head_scale", "model.hc_head.hc_scale", ("one",), "global", False, saved="model.hc_head.hc_scale"),
    Row("attn_norm", "input_layernorm", ("hidden",)),
    Row("ffn_norm", "post_attention_layernorm", ("hidden",)),
    Row("hc_attn_fn", "attn_hc.fn", ("mix", "flat"), module=False),
    Row("hc_attn_base", "attn_hc.base", ("mix",), module=False),
    Row("hc_attn_scale", "attn_hc.scale", ("three",), module=False),
    Row("hc_ffn_fn", "ffn_hc.fn", ("mix", "flat"), module=False),
    Row("hc_ffn_base", "ffn_hc.base", ("mix",), module=False),
    Row("hc_ffn_scale", "ffn_hc.scale", ("three",), module=False),
    Row("attn.attn_sink", "self_attn.sinks", ("heads",), module=False),
    Row("attn.wq_a", "self_attn.q_a_proj", ("q_rank", "hidden")),
    Row("attn.q_norm", "self_attn.q_a_norm", ("q_rank",)),
    Row("attn.wq_b", "self_attn.q_b_proj", ("q", "q_rank")),
    Row("attn.wkv", "self_attn.kv_proj", ("head", "hidden")),
    Row("attn.kv_norm", "self_attn.kv_norm", ("head",), saved="attn.norm"),
    Row("attn.wo_a", "self_attn.o_a_proj", ("o_rank", "o_group")),
    Row("attn.wo_b", "self_attn.o_b_proj", ("hidden", "o_rank")),
    Row("attn.compressor.ape", "self_attn.compressor.position_bias", ("ratio", "kv"), "compressed", False),
    Row("attn.compressor.wkv", "self_attn.compressor.kv_proj", ("kv", "hidden"), "compressed"),
    Row("attn.compressor.wgate", "self_attn.compressor.gate_proj", ("kv", "hidden"), "compressed"),
    Row("attn.compressor.norm", "self_attn.compressor.kv_norm", ("head",), "compressed"),
    Row("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj", ("index_q", "q_rank"), "csa"),
    Row(
        "attn.indexer.weights_proj",
        "self_attn.compressor.indexer.scorer.weights_proj",
        ("index_heads", "hidden"),
        "csa",
    ),
    Row(
        "attn.indexer.compressor.ape",
        "self_attn.compressor.indexer.position_bias",
        ("ratio", "index_kv"),
        "csa",
        False,
    ),
    Row("attn.indexer.compressor.wkv", "self_attn.compressor.indexer.kv_proj", ("index_kv", "hidden"), "csa"),
    Row(
        "attn.indexer.compressor.wgate",
        "self_attn.compressor.indexer.gate_proj",
        ("index_kv", "hidden"),
        "csa",
    ),
    Row("attn.indexer.compressor.norm", "self_attn.compressor.indexer.kv_norm", ("index_head",), "csa"),
    Row("ffn.gate", "mlp.gate", ("experts", "hidden")),
    Row("ffn.gate.bias", "mlp.gate.e_score_correction_bias", ("experts",), "biased", False),
    Row("ffn.gate.tid2eid", "mlp.gate.tid2eid", ("vocab", "top"), "hash", False, integer=True),
    # transformers renames the compressor's `wgate` and `gate_proj`; AutoRound 0.16 renames the routed experts' too.
    Row("ffn.experts.*.w1", "mlp.experts.*.gate_proj", ("inter", "hidden"), "expert", mistaken="ffn.experts.*.wgate"),
    Row("ffn.experts.*.w2", "mlp.experts.*.down_proj", ("hidden", "inter"), "expert"),
    Row("ffn.experts.*.w3", "mlp.experts.*.up_proj", ("inter", "hidden"), "expert"),
    Row("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj", ("inter", "hidden")),
    Row("ffn.shared_experts.w2", "mlp.shared_experts.down_proj", ("hidden", "inter")),
    Row("ffn.shared_experts.w3", "mlp.shared_experts.up_proj", ("inter", "hidden")),
)

# transformers stacks a layer's experts: [E, 2*inter, hidden] with the gate first, and [E, hidden, inter].
FUSED_GATE_UP = "ffn.experts.gate_up_proj"
FUSED_DOWN = "ffn.experts.down_proj"

# Containers with two names. DeepSeek's indexer is next to the compressor and contains another one, transformers'
# indexer is inside the compressor: both fold into `attn.indexer.`.
_CONTAINERS = (
    ("self_attn.", "attn."),
    ("mlp.", "ffn."),
    ("attn.indexer.compressor.", "attn.indexer."),
    ("attn.compressor.indexer.", "attn.indexer."),
)
_LAYER = re.compile(r"layers\.(0|[1-9]\d*)\.(.+)")
_EXPERT = re.compile(r"(?<=^ffn\.experts\.)(0|[1-9]\d*)(?=\.)")


def _fold(path: str) -> str:
    for spelling, folded in _CONTAINERS:
        if path.startswith(spelling):
            path = folded + path.removeprefix(spelling)
    return path


def _spellings(row: Row) -> set[str]:
    names = {row.native, row.transformers.removeprefix("model.")}
    names |= {name.removeprefix("model.") for name in (row.saved, row.mistaken) if name is not None}
    return {_fold(name) for name in names}


_GLOBAL_ROWS = {name: row for row in TABLE if row.where == "global" for name in _spellings(row)}
_LAYER_ROWS = {name: row for row in TABLE if row.where != "global" for name in _spellings(row)}
_ROW_OF_NATIVE = {row.native: row for row in TABLE}


def _find(path: str, rows: dict[str, Row]) -> tuple[Row, str] | None:
    """The row of a folded path, and the leaf with its dot (empty for a bare parameter)."""
    row = rows.get(path)
    if row is not None:
        return row, ""
    owner, dot, leaf = path.rpartition(".")
    row = rows.get(owner)
    return (row, dot + leaf) if row is not None and row.module else None


def native_name(source: str) -> str | None:
    """DeepSeek's name of a stored tensor or module, whatever its spelling; None if the model has no such tensor.

    The leaf is kept: `model.layers.0.self_attn.q_a_proj.qweight` is `layers.0.attn.wq_a.qweight`. A module name
    without a leaf (as in the ignore lists of quantisation configs) gives a module name. Fused experts give
    `layers.N.ffn.experts.gate_up_proj` or `.down_proj`, and `mtp.*` keeps its name (see `is_mtp`).
    """
    name = source.removeprefix("model.")
    if is_mtp(name):
        return name
    match = _LAYER.fullmatch(name)
    if match is None:
        found = _find(name, _GLOBAL_ROWS)
        return found[0].native + found[1] if found else None
    path = _native_path(match[2])
    return None if path is None else f"layers.{match[1]}.{path}"


@lru_cache(maxsize=1 << 14)
def _native_path(path: str) -> str | None:
    """DeepSeek's spelling of what follows `layers.N.`. Every layer has the same, so most are looked up once."""
    path = _fold(path)
    if path in (FUSED_GATE_UP, FUSED_DOWN):
        return path
    expert = _EXPERT.search(path)
    found = _find(_EXPERT.sub("*", path), _LAYER_ROWS)
    if found is None:
        return None
    native = found[0].native
    if "*" in native:
        if expert is None:
            return None
        native = native.replace("*", expert[0])
    return native + found[1]


def is_mtp(source: str) -> bool:
    """Whether a stored name belongs to a multi-token-prediction (or DSpark) block, which is not loaded."""
    return source.removeprefix("model.").startswith("mtp.")


def layer_index(native: str) -> int | None:
    """N of `layers.N.…`; None for the tensors outside the layers."""
    match = _LAYER.fullmatch(native)
    return int(match[1]) if match else None


def expert_index(native: str) -> int | None:
    """E of `layers.N.ffn.experts.E.…`; None for every other tensor."""
    match = _LAYER.fullmatch(native)
    expert = _EXPERT.search(match[2]) if match else None
    return int(expert[0]) if expert else None


def stored_name(native: str, style: Style) -> str:
    """The inverse of `native_name`: the tensor's name in a checkpoint of one style.

    "saved" is what transformers' `save_pretrained` writes. Experts are separate in every style.

    Raises:
        KeyError: `native` is not one of the model's tensors.
    """
    if style == "native":
        return native
    match = _LAYER.fullmatch(native)
    path = match[2] if match else native
    expert = expert_index(native)
    found = _find(_EXPERT.sub("*", path), _ROW_OF_NATIVE)
    if found is None:
        raise KeyError(native)
    row, leaf = found
    if style == "transformers":
        new = row.transformers
    elif style == "saved" and row.saved is not None:
        new = row.saved
    else:
        new = row.native if match else f"model.{row.native}"
    new = new.replace("*", str(expert)) + leaf
    return f"model.layers.{match[1]}.{new}" if match else new


def _dimensions(config: DeepseekV4Config, layer: int | None) -> dict[str, int]:
    ratio = config.compress_ratios[layer] if layer is not None else 0
    # Ratio-4 entries pool the previous window's first half with the current window's second half.
    halves = 2 if layer is not None and config.layer_kinds[layer] is LayerKind.CSA else 1
    return {
        "one": 1,
        "three": 3,
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "hc": config.hc_mult,
        "mix": (2 + config.hc_mult) * config.hc_mult,
        "flat": config.hc_mult * config.hidden_size,
        "heads": config.num_attention_heads,
        "head": config.head_dim,
        "q": config.num_attention_heads * config.head_dim,
        "q_rank": config.q_lora_rank,
        "o_group": config.num_attention_heads * config.head_dim // config.o_groups,
        "o_rank": config.o_groups * config.o_lora_rank,
        "ratio": ratio,
        "kv": halves * config.head_dim,
        "index_heads": config.index_n_heads,
        "index_head": config.index_head_dim,
        "index_q": config.index_n_heads * config.index_head_dim,
        "index_kv": halves * config.index_head_dim,
        "experts": config.n_routed_experts,
        "top": config.num_experts_per_tok,
        "inter": config.moe_intermediate_size,
    }


def expected_tensors(config: DeepseekV4Config) -> dict[str, TensorSpec]:
    """All tensors an unquantised checkpoint of this config holds, by native name, without `mtp.*`."""
    expected: dict[str, TensorSpec] = {}

    def add(row: Row, prefix: str, dims: dict[str, int], expert: int | None = None) -> None:
        name = row.native if expert is None else row.native.replace("*", str(expert))
        shape = tuple(dims[dim] for dim in row.dims)
        expected[prefix + name + (".weight" if row.module else "")] = TensorSpec(shape, row.integer)

    dims = _dimensions(config, None)
    for row in TABLE:
        if row.where == "global":
            add(row, "", dims)
    for layer in range(config.num_hidden_layers):
        dims = _dimensions(config, layer)
        kind, hashed = config.layer_kinds[layer], layer < config.num_hash_layers
        present: dict[Where, bool] = {
            "layer": True,
            "compressed": kind is not LayerKind.WINDOW,
            "csa": kind is LayerKind.CSA,
            "hash": hashed,
            "biased": not hashed,
        }
        for row in TABLE:
            if row.where == "expert":
                for expert in range(config.n_routed_experts):
                    add(row, f"layers.{layer}.", dims, expert)
            elif present.get(row.where, False):
                add(row, f"layers.{layer}.", dims)
    return expected


def fused_shape(config: DeepseekV4Config, native: str) -> tuple[int, int, int] | None:
    """Full shape of a fused expert tensor of a backbone layer; None if `native` is not one."""
    layer = layer_index(native)
    if layer is None or layer >= config.num_hidden_layers:
        return None
    experts, inter, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    if native.endswith("." + FUSED_GATE_UP):
        return experts, 2 * inter, hidden
    if native.endswith("." + FUSED_DOWN):
        return experts, hidden, inter
    return None


def fused_parts(config: DeepseekV4Config, native: str) -> list[tuple[str, tuple[int, slice]]]:
    """The parts of a fused expert tensor: native names per expert, and the location of each.

    A part is `tensor[index]` with `index = (expert, rows)`; gate (w1) comes before up (w3).
    """
    prefix = native.rpartition(".")[0]
    inter, experts = config.moe_intermediate_size, range(config.n_routed_experts)
    if native.endswith("." + FUSED_DOWN):
        return [(f"{prefix}.{e}.w2.weight", (e, slice(None))) for e in experts]
    halves = (("w1", slice(0, inter)), ("w3", slice(inter, 2 * inter)))
    return [(f"{prefix}.{e}.{name}.weight", (e, rows)) for e in experts for name, rows in halves]
