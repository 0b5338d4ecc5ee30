"""The reference: its answers are the recorded ones, its choices are clear, and mistakes show in it.

A parity test only catches mistakes that show. Each line of `KNOBS` changes one thing of a small checkpoint and must
change some log-probability by far more than the 1e-4 that parity allows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from testing import oracle
from testing.tiny import CONFIGS, TOY, TinySpec, prompt_tokens, random_tensors, write_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], torch.Tensor]:
    """Log-probabilities of a named configuration on its prompt, computed once."""
    cache: dict[str, torch.Tensor] = {}

    def get(name: str) -> torch.Tensor:
        if name not in cache:
            directory = write_checkpoint(tmp_path_factory.mktemp(name), CONFIGS[name])
            cache[name] = oracle.logprobs(oracle.load_oracle(directory), prompt_tokens(CONFIGS[name]))
        return cache[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_choices_are_clear(name: str, tmp_path: Path) -> None:
    spec = CONFIGS[name]
    model = oracle.load_oracle(write_checkpoint(tmp_path, spec))
    margins = oracle.selection_margins(model, prompt_tokens(spec))
    # Weights changed by 1e-7 move log-probabilities by 1e-5, and scores by less: ten times that is safe.
    assert min(margins.values()) > 1e-4
    assert (margins["indexer"] < float("inf")) == (name == "topk")


@pytest.mark.parametrize("name", CONFIGS)
def test_rounding_stays_small(name: str, tmp_path: Path, reference: Callable[[str], torch.Tensor]) -> None:
    spec = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    nudged = {
        key: tensor
        if tensor.dtype == torch.int64
        else tensor * (1 + 1e-7 * torch.randn(tensor.shape, generator=generator))
        for key, tensor in random_tensors(spec).items()
    }
    model = oracle.load_oracle(write_checkpoint(tmp_path, spec, tensors=nudged))
    result = oracle.logprobs(model, prompt_tokens(spec))
    # 1e-7 is one fp32 rounding.
    assert (result - reference(name)).abs().max() < 1e-4
    logits_spread = reference(name).std(dim=-1).mean()
    assert 1 < logits_spread < 3


def _config(**overrides: Any) -> Callable[[TinySpec, Tensors], TinySpec]:
    return lambda spec, tensors: dataclasses.replace(spec, overrides={**spec.overrides, **overrides})


def _tensors(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[TinySpec, Tensors], TinySpec]:
    def apply(spec: TinySpec, tensors: Tensors) -> TinySpec:
        names = [name for name in tensors if part in name]
        assert names, part
        for name in names:
            tensors[name] = change(tensors[name])
        return spec

    return apply


def _transpose_comb(base: torch.Tensor) -> torch.Tensor:
    n = {24: 4, 15: 3, 8: 2}[len(base)]
    return torch.cat([base[: 2 * n], base[2 * n :].view(n, n).T.reshape(-1)])


def _swap_halves(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat(weight.chunk(2)[::-1])


def _swap_gate_and_up(spec: TinySpec, tensors: Tensors) -> TinySpec:
    for name in [name for name in tensors if ".w1." in name]:
        other = name.replace(".w1.", ".w3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return spec


YARN128 = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 128}

KNOBS: list[tuple[str, str, Callable[[TinySpec, Tensors], TinySpec]]] = [
    ("clamp", "no clamp", _config(swiglu_limit=1e6)),
    ("mixed", "no clamp", _config(swiglu_limit=1e6)),
    ("clamp", "no sink", _tensors("attn_sink", lambda t: torch.full_like(t, -1e9))),
    ("clamp", "sink of zero", _tensors("attn_sink", torch.zeros_like)),
    ("clamp", "no ape", _tensors("compressor.ape", torch.zeros_like)),
    ("clamp", "ape one token off", _tensors("compressor.ape", lambda t: t.roll(1, 0))),
    ("topk", "no ape in the indexer", _tensors("indexer.compressor.ape", torch.zeros_like)),
    ("clamp", "comb base transposed", _tensors("hc_ffn_base", _transpose_comb)),
    ("streams3", "comb base transposed", _tensors("hc_ffn_base", _transpose_comb)),
    ("streams3", "one Sinkhorn step fewer", _config(hc_sinkhorn_iters=2)),
    ("streams3", "hc_eps", _config(hc_eps=1e-6)),
    ("streams3", "rms_norm_eps", _config(rms_norm_eps=1e-6)),
    ("yarn", "no YaRN", _config(rope_scaling=None)),
    ("mixed", "no YaRN", _config(rope_scaling=None)),
    ("yarn", "another original length", _config(rope_scaling=YARN128)),
    ("yarn", "theta of ModelArgs", _config(compress_rope_theta=40000)),
    ("yarn", "one theta for all", _config(compress_rope_theta=10000)),
    ("odd", "theta of the window layers", _config(rope_theta=10000)),
    ("mixed", "window one short", _config(sliding_window=31)),
    ("mixed", "window one long", _config(sliding_window=33)),
    ("mixed", "no router bias", _tensors("gate.bias", torch.zeros_like)),
    ("mixed", "another hash", _tensors("tid2eid", lambda t: t.roll(1, 0))),
    ("mixed", "no routed scale", _config(routed_scaling_factor=1.0)),
    ("topk", "the indexer selects nothing away", _config(index_topk=512)),
    ("topk", "one entry fewer", _config(index_topk=7)),
    ("topk", "indexer weights ignored", _tensors("weights_proj", torch.abs)),
    ("odd", "overlap halves swapped", _tensors("layers.1.attn.compressor.wkv", _swap_halves)),
    ("odd", "gate halves swapped", _tensors("layers.1.attn.compressor.wgate", _swap_halves)),
    ("odd", "w1 and w3 swapped", _swap_gate_and_up),
    ("odd", "norms of one", _tensors("norm.weight", torch.ones_like)),
    ("odd", "compressor norm of one", _tensors("compressor.norm.weight", torch.ones_like)),
    ("unhashed", "no router bias", _tensors("gate.bias", torch.zeros_like)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, _, change in KNOBS],
    ids=[f"{name}: {what}" for name, what, _ in KNOBS],
)
def test_every_knob_binds(
    name: str,
    change: Callable[[TinySpec, Tensors], TinySpec],
    tmp_path: Path,
    reference: Callable[[str], torch.Tensor],
) -> None:
    tensors = random_tensors(CONFIGS[name])
    changed = change(CONFIGS[name], tensors)
    model = oracle.load_oracle(write_checkpoint(tmp_path, changed, tensors=tensors))
    result = oracle.logprobs(model, prompt_tokens(CONFIGS[name]))
    assert (result - reference(name)).abs().max() > 1e-2


def test_toy_answers_as_recorded() -> None:
    model, tokenizer = oracle.load_oracle(TOY), AutoTokenizer.from_pretrained(TOY)
    rows = [json.loads(line) for line in (TOY / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 200
    for row in rows[::40]:
        prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
        wanted = row["greedy_token_ids"]
        assert oracle.greedy(model, prompt, len(wanted) + 3, stop={1}) == wanted


def test_oracle_refuses_a_checkpoint_with_a_hole(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["topk"])
    del tensors["layers.1.attn.compressor.wkv.weight"]
    directory = write_checkpoint(tmp_path, CONFIGS["topk"], tensors=tensors)
    with pytest.raises(ValueError, match="missing_keys"):
        oracle.load_oracle(directory)


def test_shards_and_types(tmp_path: Path) -> None:
    spec = CONFIGS["topk"]
    directory = write_checkpoint(tmp_path, spec, dtype=torch.bfloat16, shards=3, tokenizer=TOY)
    assert len(list(directory.glob("*.safetensors"))) == 3
    assert len(AutoTokenizer.from_pretrained(directory)) == spec.config.vocab_size
    read = oracle.load_oracle(directory).state_dict()
    tensors = random_tensors(spec)
    assert torch.equal(read["lm_head.weight"], tensors["head.weight"].bfloat16().float())
    assert torch.equal(read["model.layers.1.self_attn.sinks"], tensors["layers.1.attn.attn_sink"])
