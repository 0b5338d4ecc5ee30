"""Mistakes that implementations of DeepSeek-V4 have made, each as a change that repeats it in our code.

The numbers are those of the checklist in docs/model.md, "Traps". The parity test must see each of `TRAPS` in the
configuration given with it; `HARMLESS` changes look like traps and are correct. Mistakes that these models cannot show
are tested elsewhere: scales and nibble order of packed weights in `tests/checkpoint/formats`, scheduling in
`tests/scheduler`. Padding of heads does not exist here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from testing.mutate import mutated
from vllm_deepseek_v4flash.layers.rotary import inverse_frequencies

Break = Callable[[Any], AbstractContextManager[Any]]
"""Takes the running model and makes the mistake for the length of a `with` block."""

CHUNK = 130
"""Tokens a step where a trap needs a prompt in several steps: no multiple of either ratio."""


@dataclass(frozen=True)
class Trap:
    what: str
    config: str
    breaks: tuple[Break, ...]
    chunked: bool = False


def _in(function: str, *changes: tuple[str, str]) -> Break:
    """`function` with some of its source replaced, as `mutate.mutated` does."""
    return lambda _: mutated(function, *changes)


def _op(name: str, old: str, new: str, *, function: str | None = None) -> Break:
    return _in(f"ops.{name}:{function or name}", (old, new))


def _rope(
    module: str, theta: Callable[[Any], float], scaling: Callable[[Any], Any], *changes: tuple[str, str]
) -> Break:
    """Frequencies of `module` from another theta and another scaling, or by other arithmetic."""

    @contextlib.contextmanager
    def apply(model: Any) -> Iterator[None]:
        rotary, config = getattr(model.model, module), model.config
        with mutated("layers.rotary:inverse_frequencies", *changes):
            wrong = inverse_frequencies(config.qk_rope_head_dim, theta(config), scaling(config))
        right, rotary.inv_freq = rotary.inv_freq, wrong
        try:
            yield
        finally:
            rotary.inv_freq = right

    return apply


def _parameters(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Break:
    """Every parameter whose name ends with `suffix`, as if it had been loaded wrong."""

    @contextlib.contextmanager
    def apply(model: Any) -> Iterator[None]:
        found = {name: param for name, param in model.named_parameters() if name.endswith(suffix)}
        if not found:
            raise LookupError(f"no parameter ends with {suffix}")
        originals = {name: param.data.clone() for name, param in found.items()}
        try:
            for param in found.values():
                param.data.copy_(change(param.data))
            yield
        finally:
            for name, param in found.items():
                param.data.copy_(originals[name])

    return apply


def _setting(cls: str, attribute: str, value: Any) -> Break:
    """An attribute of every module of one class."""

    @contextlib.contextmanager
    def apply(model: Any) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            modules = [module for module in model.modules() if type(module).__name__ == cls]
            if not modules:
                raise LookupError(f"the model has no {cls}")
            for module in modules:
                patch.setattr(module, attribute, value)
            yield

    return apply


def _main(config: Any) -> float:
    return config.rope_theta


def _compress(config: Any) -> float:
    return config.compress_rope_theta


def _yarn(config: Any) -> Any:
    return config.rope_scaling


def _none(config: Any) -> None:
    return None


def _int64_as_int32(table: torch.Tensor) -> torch.Tensor:
    return table.long().view(torch.int32).flatten()[: table.numel()].view_as(table)


YARN = "freq / scaling.factor * ramp + freq * (1 - ramp)"
_ATTENTION = "layers.attention:DeepseekV4Attention"
_ROTATION = "torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)"
_VISIBLE = "(positions + 1) // ratio"
_INDEX_VISIBLE = "(positions[part] + 1) // ratio"
_POOLED = "(gate.softmax(dim=1) * kv).sum(dim=1)"
_ROW = "comb = comb / (comb.sum(-1, keepdim=True) + eps)"
_COLUMN = "comb = comb / (comb.sum(-2, keepdim=True) + eps)"
_SWAPPED = "kv[:, :ratio, dim:], kv[:, ratio:, :dim]"
_FLAT = "flat = streams.flatten(1).float()"
_PER_STREAM = (
    "flat = streams.float()\n"
    "    flat = (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)).flatten(1)"
)
_FLAT_NORM = " * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)"
_QUERY = "apply_rope(rms_norm.reference(q, None, eps), cos_sin)"
_BF16 = "F.linear(x.bfloat16(), weight.bfloat16()).float()"


def _trap(what: str, config: str, *breaks: Break, chunked: bool = False) -> Trap:
    return Trap(what, config, breaks, chunked)


# 1 to 6: rotary embedding.
ROPE = (
    _trap("YaRN's mscale in the softmax scale", "yarn",
          _in(f"{_ATTENTION}.attend", ("scale=self.scale", "scale=self.scale * (1.277 if self.ratio else 1)"))),
    _trap("YaRN's mscale in cos and sin", "yarn",
          _in("layers.rotary:RotaryEmbedding.forward", ("self.inv_freq)", "self.inv_freq) * 1.277"))),
    _trap("YaRN on window layers", "yarn", _rope("rope_window", _main, _yarn)),
    _trap("compress_rope_theta on window layers", "yarn", _rope("rope_window", _compress, _none)),
    _trap("the compressed layers' frequencies on window layers", "yarn", _rope("rope_window", _compress, _yarn)),
    _trap("rope_theta on compressed layers", "yarn", _rope("rope_compressed", _main, _yarn)),
    _trap("the window layers' frequencies on compressed layers", "yarn", _rope("rope_compressed", _main, _none)),
    _trap("no YaRN", "yarn", _rope("rope_compressed", _compress, _none)),
    _trap("YaRN divides every frequency", "yarn",
          _rope("rope_compressed", _compress, _yarn, (YARN, "freq / scaling.factor"))),
    _trap("YaRN's ramp reversed", "yarn",
          _rope("rope_compressed", _compress, _yarn,
                (YARN, "freq / scaling.factor * (1 - ramp) + freq * ramp"))),
    _trap("YaRN's ramp not rounded outwards", "yarn",
          _rope("rope_compressed", _compress, _yarn, ("math.floor", "float"), ("math.ceil", "float"))),
    _trap("compress_rope_theta 40000, ModelArgs' default", "yarn",
          _rope("rope_compressed", lambda _: 40000.0, _yarn)),
    _trap("compress_rope_theta 160000 in spite of the config", "clamp",
          _rope("rope_compressed", lambda _: 160000.0, _yarn)),
    _trap("half-split pairs", "topk",
          _in("ops.apply_rope:apply_rope",
              ("unflatten(-1, (-1, 2)).unbind(-1)", "chunk(2, dim=-1)"),
              (_ROTATION, "torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)"))),
    _trap("the first dimensions rotated", "topk",
          _in("ops.apply_rope:apply_rope",
              ("x[..., -rope_dim:]", "x[..., :rope_dim]"),
              ("(x[..., :-rope_dim], rotated.to(x.dtype))", "(rotated.to(x.dtype), x[..., rope_dim:])"))),
    _trap("rotated the other way", "topk",
          _in("ops.apply_rope:apply_rope",
              ("even * cos - odd * sin, even * sin + odd * cos", "even * cos + odd * sin, odd * cos - even * sin"))),
    _trap("angles in bf16", "mixed",
          _op("rope_table", "positions[:, None].float() * inv_freq",
              "(positions[:, None].bfloat16() * inv_freq.bfloat16()).float()")),
    _trap("no inverse rotation of the output", "topk",
          _in(f"{_ATTENTION}.attend", ("cos_sin=cos_sin", "cos_sin=None"))),
    _trap("the output rotated forward", "topk", _op("sparse_attention", "inverse=True", "inverse=False")),
    _trap("entries rotated at w", "streams3", _op("compress", "last - (ratio - 1)", "last // ratio")),
    _trap("entries rotated at their last token", "streams3", _op("compress", "last - (ratio - 1)", "last")),
    _trap("entries rotated at the previous window's first token", "topk",
          _op("compress", "last - (ratio - 1)", "(last - (2 * ratio - 1)).clamp(min=0)")),
    _trap("entries not rotated", "streams3",
          _op("compress", "apply_rope(rms_norm.reference(pooled, norm_weight, eps), cos_sin)",
              "rms_norm.reference(pooled, norm_weight, eps)")),
)  # fmt: skip

# 7, 8, 10, 12: what attention sees, and how.
ATTENTION = (
    _trap("no sliding window: all tokens visible", "streams3",
          _op("sparse_attention", "token = positions", "size = int(positions.max()) + 1\n    token = positions",
              function="_window_rows")),
    _trap("window one too narrow", "streams3",
          _op("sparse_attention", "size - 1, -1, -1", "size - 2, -1, -1", function="_window_rows")),
    _trap("window one too wide", "streams3",
          _op("sparse_attention", "size - 1, -1, -1", "size, -1, -1", function="_window_rows")),
    _trap("the window in ratio-0 layers only", "yarn",
          _op("sparse_attention", "window_size)\n", "window_size)\n        valid = valid & (entries is None)\n")),
    _trap("no compressed entries", "streams3", _op("sparse_attention", "if entries is not None and", "if False and")),
    _trap("no entries for tokens of the window", "streams3",
          _op("sparse_attention", "ratio)\n",
              "ratio)\n            seen &= (listed + 1) * ratio <= positions[part, None] - window_size + 1\n")),
    _trap("entries visible one token late", "streams3",
          _op("sparse_attention", _VISIBLE, "positions // ratio", function="_entry_rows")),
    _trap("entries visible one token early", "streams3",
          _op("sparse_attention", _VISIBLE, "((positions + 2) // ratio).clamp(max=(int(positions.max()) + 1) // ratio)",
              function="_entry_rows")),
    _trap("entries of later tokens visible", "streams3",
          _op("sparse_attention", _VISIBLE, "(positions.max() + 1 + 0 * positions) // ratio", function="_entry_rows")),
    _trap("no sink", "clamp",
          _op("sparse_attention", " + (sinks - top).exp()", "", function="_attend")),
    _trap("sink scaled like the scores", "clamp",
          _op("sparse_attention", "(sinks - top).exp()", "(sinks * scale - top).exp()", function="_attend")),
    _trap("sink with a value", "clamp",
          _op("sparse_attention", "torch.einsum('thk,tkd->thd', weights, keys)",
              "torch.einsum('thk,tkd->thd', weights, keys) + (sinks - top).exp()[..., None] * keys[:, -1:]",
              function="_attend")),
    _trap("another head's sink", "clamp",
          _op("sparse_attention", "(sinks - top).exp()", "(sinks.roll(1) - top).exp()", function="_attend")),
    _trap("attention weights in bf16", "mixed",
          _op("sparse_attention", "(scores - top[..., None]).exp()",
              "(scores - top[..., None]).bfloat16().exp().float()", function="_attend")),
    _trap("no norm of the query heads", "topk", _op("qnorm_rope_kv_insert", _QUERY, "apply_rope(q, cos_sin)")),
    _trap("query heads normed over their unrotated part", "topk",
          _op("qnorm_rope_kv_insert", "rms_norm.reference(q, None, eps)",
              "q * torch.rsqrt(q[..., :-cos_sin.shape[1]].square().mean(-1, keepdim=True) + eps)")),
    _trap("query heads normed with a weight", "topk",
          _in(f"{_ATTENTION}.attend", ("qnorm_rope_kv_insert(q, ", "qnorm_rope_kv_insert(self.kv_norm(q), "))),
    _trap("no norm of the kv row", "topk",
          _in(f"{_ATTENTION}.attend", ("self.kv_norm(kv)", "kv"))),
    _trap("output groups of strided heads", "odd",
          _in(f"{_ATTENTION}.project_out",
              ("o.view(o.shape[0], self.groups, self.heads // self.groups * self.dim)",
               "o.unflatten(1, (-1, self.groups)).transpose(1, 2).flatten(2)"))),
    _trap("norms without their eps", "streams3",
          _op("rms_norm", "keepdim=True) + eps", "keepdim=True)")),
)  # fmt: skip

# 9: the compressor.
COMPRESSOR = (
    _trap("overlap halves swapped", "topk",
          _in("ops.compress:_pool",
              ("kv[:, :ratio, :dim], kv[:, ratio:, dim:]", _SWAPPED),
              ("gate[:, :ratio, :dim], gate[:, ratio:, dim:]", _SWAPPED.replace("kv", "gate")))),
    _trap("no previous window", "topk",
          _op("compress", "exists = token >= 0", "exists = token > last[:, None] - ratio", function="_pool")),
    _trap("the missing window before the first weighs exp(0)", "topk",
          _op("compress", "gate.where(exists[..., None], -torch.inf)", "gate.where(exists[..., None], 0.0)",
              function="_pool")),
    _trap("no ape", "streams3", _op("compress", "gate + ape[positions % ratio]", "gate")),
    _trap("ape after the softmax", "streams3",
          _op("compress", "gate + ape[positions % ratio]", "gate"),
          _op("compress", "owner, ratio, overlap", "owner, (ratio, ape), overlap"),
          _in("ops.compress:_pool",
              ("span = 2", "ratio, ape = ratio\n    span = 2"),
              (_POOLED, "((gate.softmax(dim=1) + (torch.cat((ape[:, :dim], ape[:, dim:])) if overlap else ape)) * kv)"
                        ".sum(dim=1)"))),
    _trap("ape shifted by one token", "streams3",
          _op("compress", "ape[positions % ratio]", "ape[(positions + 1) % ratio]")),
    _trap("ape indexed from the chunk's start", "mixed",
          _op("compress", "ape[positions % ratio]", "ape[(positions - positions[0]) % ratio]"), chunked=True),
    _trap("compressor state lost between steps", "mixed",
          _op("compress", "rows = states.rows_per_page", "rows = states.rows_per_page\n    states.pages.zero_()"),
          chunked=True),
    _trap("window rows lost between steps", "mixed",
          _op("qnorm_rope_kv_insert", "rows = window.rows_per_page",
              "rows = window.rows_per_page\n    window.pages.zero_()"),
          chunked=True),
    _trap("softmax over channels", "streams3", _op("compress", "softmax(dim=1)", "softmax(dim=-1)", function="_pool")),
    _trap("entries not normed", "streams3",
          _op("compress", "apply_rope(rms_norm.reference(pooled, norm_weight, eps), cos_sin)",
              "apply_rope(pooled, cos_sin)")),
    _trap("compressor projections and router in bf16", "mixed",
          _op("linear_fp32", "F.linear(x.float(), weight.float())", _BF16)),
)  # fmt: skip

# 17: the indexer.
INDEXER = (
    _trap("every entry attended to", "topk",
          _in("layers.indexer:Indexer.forward", ("step.max_entries <= self.topk", "True"))),
    _trap("one entry too few", "topk", _op("indexer_topk", "min(topk, max_entries)", "min(topk - 1, max_entries)")),
    _trap("no relu", "topk", _op("indexer_topk", ".relu()", "")),
    _trap("heads summed unweighted", "topk",
          _op("indexer_topk", "dots, weights[part]", "dots, torch.ones_like(weights[part])")),
    _trap("head weights cut off at zero", "topk",
          _op("indexer_topk", "dots, weights[part]", "dots, weights[part].relu()")),
    _trap("index queries not rotated", "topk", _op("indexer_topk", "apply_rope(q, cos_sin)", "q")),
    _trap("entries chosen one token late", "topk", _op("indexer_topk", _INDEX_VISIBLE, "positions[part] // ratio")),
    _trap("invisible entries compete", "topk",
          _op("indexer_topk", _INDEX_VISIBLE, "(positions[part] + 1 + 8 * ratio) // ratio")),
    _trap("Hadamard on the queries only", "topk",
          _in("ops.indexer_topk:indexer_topk",
              ("width = min(", "from .hadamard import hadamard\n    width = min("),
              ("apply_rope(q, cos_sin)", "hadamard(apply_rope(q, cos_sin))"))),
)  # fmt: skip

# 11: hyper-connections.
STREAMS = (
    _trap("comb transposed", "streams3", _op("mhc_post", "tjk,tjh->tkh", "tkj,tjh->tkh")),
    _trap("post is sigmoid + eps", "topk",
          _op("mhc_pre", "post = 2 * torch.sigmoid", "post = hc_eps + torch.sigmoid")),
    _trap("rows and columns exchanged in Sinkhorn", "streams3",
          _in("ops.mhc_pre:sinkhorn",
              ("softmax(-1)", "softmax(-2)"),
              ("eps\n    " + _COLUMN, "eps\n    " + _ROW),
              (f":\n        {_ROW}\n        {_COLUMN}", f":\n        {_COLUMN}\n        {_ROW}"))),
    _trap("a row step right after the softmax", "streams3",
          _in("ops.mhc_pre:sinkhorn", ("eps\n    " + _COLUMN, f"eps\n    {_ROW}\n    {_COLUMN}"))),
    _trap("Sinkhorn ends on a row step", "streams3",
          _in("ops.mhc_pre:sinkhorn", ("    return", f"    {_ROW}\n    return"))),
    _trap("no column step with the softmax", "streams3",
          _in("ops.mhc_pre:sinkhorn", ("eps\n    " + _COLUMN, "eps"))),
    _trap("one Sinkhorn step too few", "streams3", _op("mhc_pre", "iters - 1", "iters - 2", function="sinkhorn")),
    _trap("one Sinkhorn step too many", "streams3", _op("mhc_pre", "iters - 1", "iters", function="sinkhorn")),
    _trap("no eps after the softmax", "streams3",
          _op("mhc_pre", "logits.softmax(-1) + eps", "logits.softmax(-1)", function="sinkhorn")),
    _trap("no eps in a row's sum", "streams3",
          _op("mhc_pre", _ROW, "comb = comb / comb.sum(-1, keepdim=True)", function="sinkhorn")),
    _trap("no eps in the columns' sums", "streams3",
          _in("ops.mhc_pre:sinkhorn",
              ("eps\n    " + _COLUMN, "eps\n    comb = comb / comb.sum(-2, keepdim=True)"),
              ("        " + _COLUMN, "        comb = comb / comb.sum(-2, keepdim=True)"))),
    _trap("no eps on pre", "streams3", _op("mhc_pre", "base[:n]) + hc_eps", "base[:n])")),
    _trap("eps on post as well", "streams3", _op("mhc_pre", "base[n:2 * n])", "base[n:2 * n]) + hc_eps")),
    _trap("no eps in the head's weights", "streams3", _op("mhc_head", " + hc_eps", "")),
    _trap("hc_eps in the streams' norm", "streams3",
          _op("mhc_pre", "mhc_mixes(streams, fn, norm_eps)", "mhc_mixes(streams, fn, hc_eps)")),
    _trap("each stream normed by itself", "topk",
          _in("ops.mhc_pre:mhc_mixes", (_FLAT_NORM, ""), (_FLAT, _PER_STREAM))),
    _trap("streams not normed", "topk", _op("mhc_pre", _FLAT_NORM, "", function="mhc_mixes")),
    _trap("streams flattened channel by channel", "topk",
          _op("mhc_pre", "streams.flatten(1)", "streams.transpose(1, 2).flatten(1)", function="mhc_mixes")),
    _trap("mixes in bf16", "mixed",
          _op("mhc_pre", "F.linear(flat, fn)", "F.linear(flat.bfloat16(), fn.bfloat16()).float()",
              function="mhc_mixes")),
    _trap("pre's scale for post", "topk", _op("mhc_pre", "scale[1]", "scale[0]")),
    _trap("streams averaged for the head", "topk",
          _op("mhc_head", "(pre[..., None] * streams.float()).sum(1)", "streams.float().mean(1)")),
)  # fmt: skip

# 13 to 15: experts.
EXPERTS = (
    _trap("bias in the routing weights", "topk",
          _op("route", "weights = scores.gather", "weights = (scores if bias is None else scores + bias).gather")),
    _trap("no routed scale", "topk", _op("route", "weights * scaling", "weights")),
    _trap("routed scale twice", "topk", _op("route", "weights * scaling", "weights * scaling * scaling")),
    _trap("hash layers route by score", "mixed", _op("route", "expert_ids is None", "True")),
    _trap("hash layers weigh their experts equally", "mixed",
          _op("route", "if renormalize:",
              "if bias is None:\n        weights = torch.full_like(weights, 1 / topk)\n    elif renormalize:")),
    _trap("tid2eid's int64 read as int32", "mixed", _parameters("tid2eid", _int64_as_int32)),
    _trap("routing weights not normalised", "topk", _op("route", "if renormalize", "if False")),
    _trap("no square root in the scores", "topk", _op("route", "F.softplus(logits).sqrt()", "F.softplus(logits)")),
    _trap("sigmoid scores", "topk", _op("route", "F.softplus(logits).sqrt()", "logits.sigmoid()")),
    _trap("bias left at zero, its name not recognised", "topk", _parameters("gate.bias", torch.zeros_like)),
    _trap("gate weights in fp8", "topk", _parameters("gate.weight", lambda w: w.to(torch.float8_e4m3fn).to(w.dtype))),
    _trap("gate clamped from both sides", "clamp", _op("swiglu", "clamp(max=limit)", "clamp(-limit, limit)")),
    _trap("gate clamped after silu", "clamp",
          _in("ops.swiglu:swiglu",
              ("gate = gate.clamp(max=limit)", "pass"), ("F.silu(gate)", "F.silu(gate).clamp(max=limit)"))),
    _trap("up clamped from above only", "clamp", _op("swiglu", "up.clamp(-limit, limit)", "up.clamp(max=limit)")),
    _trap("routed experts not clamped", "clamp", _setting("RoutedExperts", "limit", None)),
    _trap("shared expert not clamped", "clamp", _setting("SharedExpert", "limit", None)),
    _trap("shared expert scaled like the routed ones", "topk",
          _in("layers.moe:MoE.forward", ("self.shared_experts(x).float()", "1.5 * self.shared_experts(x).float()"))),
    _trap("w1 and w3 swapped in the stack", "topk", _op("fused_experts", "gate, up = ", "up, gate = ")),
)  # fmt: skip

TRAPS = (*ROPE, *ATTENTION, *COMPRESSOR, *INDEXER, *STREAMS, *EXPERTS)

HARMLESS = (
    # Positive factors keep the order of the scores, and only the order is used.
    _trap("indexer weights unscaled", "topk",
          _in("layers.indexer:Indexer.forward", ("(self.dim * self.heads) ** (-0.5)", "1.0"))),
    # The transform is orthonormal: without rounding to 4 bits the scores are the same.
    _trap("Hadamard on queries and keys", "topk",
          _in("ops.indexer_topk:indexer_topk",
              ("width = min(", "from .hadamard import hadamard\n    width = min("),
              ("apply_rope(q, cos_sin)", "hadamard(apply_rope(q, cos_sin))"),
              ("keys = read_rows(entries", "keys = hadamard(read_rows(entries"),
              ("0)), visible)", "0)), visible))"))),
    # A rotation keeps the norm of the whole head.
    _trap("query heads normed after the rotation", "topk",
          _op("qnorm_rope_kv_insert", _QUERY, "rms_norm.reference(apply_rope(q, cos_sin), None, eps)")),
    # w2 is linear; only rounding to 16 bits would tell.
    _trap("routing weight after w2", "topk",
          _in("ops.fused_experts:fused_experts",
              ("swiglu_limit) * weights", "swiglu_limit)"),
              ("w2[index].to(x.dtype))", "w2[index].to(x.dtype)).float() * weights"))),
)  # fmt: skip
