"""The table of names, held against transformers itself and against files written by quantisation tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open

from testing import oracle
from testing.tiny import CONFIGS, TOY, random_tensors, write_checkpoint
from vllm_deepseek_v4flash.checkpoint import names
from vllm_deepseek_v4flash.checkpoint.names import TABLE, expected_tensors, native_name, stored_name
from vllm_deepseek_v4flash.config import DeepseekV4Config

STYLES = get_args(names.Style)


def _keys(directory: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return shapes


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("spec", CONFIGS.values(), ids=CONFIGS)
def test_every_style_maps_back(spec: Any, style: names.Style) -> None:
    expected = expected_tensors(spec.config)
    stored = {name: stored_name(name, style) for name in expected}
    assert len(set(stored.values())) == len(expected)
    assert {native_name(source) for source in stored.values()} == set(expected)
    assert all(native_name(source) == name for name, source in stored.items())


def test_no_spelling_belongs_to_two_tensors() -> None:
    spellings = [name for row in TABLE for name in names._spellings(row)]
    assert len(spellings) == len(set(spellings))


def test_save_pretrained_writes_the_saved_style(tmp_path: Path) -> None:
    spec = CONFIGS["mixed"]
    model = oracle.load_oracle(write_checkpoint(tmp_path / "native", spec))
    model.save_pretrained(tmp_path / "saved")
    written = _keys(tmp_path / "saved")
    expected = expected_tensors(spec.config)
    assert set(written) == {stored_name(name, "saved") for name in expected}
    assert {native_name(key): shape for key, shape in written.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


def test_transformers_style_is_its_modules_own(tmp_path: Path) -> None:
    spec = CONFIGS["mixed"]
    model = oracle.load_oracle(write_checkpoint(tmp_path / "native", spec))
    fused = write_checkpoint(tmp_path / "fused", spec, style="transformers", fused=True)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert _keys(fused) == own


@pytest.mark.parametrize("resaved_config", [False, True])
@pytest.mark.parametrize(("style", "fused"), [("saved", False), ("saved", True), ("transformers", True)])
def test_transformers_reads_what_the_writer_wrote(
    tmp_path: Path, style: names.Style, fused: bool, resaved_config: bool
) -> None:
    spec = CONFIGS["odd"]
    native = oracle.load_oracle(write_checkpoint(tmp_path / "native", spec)).state_dict()
    other = write_checkpoint(tmp_path / "other", spec, style=style, fused=fused, resaved_config=resaved_config)
    read = oracle.load_oracle(other).state_dict()
    assert read.keys() == native.keys()
    assert all(torch.equal(read[name], native[name]) for name in native)


def test_toy_holds_exactly_what_is_expected() -> None:
    expected = expected_tensors(DeepseekV4Config.from_json_file(TOY))
    stored = _keys(TOY)
    assert stored == {name: tensor.shape for name, tensor in expected.items()}


def test_flash_has_as_many_tensors_as_the_hub_says() -> None:
    # 67,612 backbone tensors in the official index, with the scales of quantised weights: of 5 attention, 3
    # shared and 3 * 256 expert matrices in a layer, and of indexer.wq_b in the 21 ratio-4 layers.
    config = DeepseekV4Config.from_dict(
        {
            "model_type": "deepseek_v4",
            "vocab_size": 129280,
            "hidden_size": 4096,
            "num_hidden_layers": 43,
            "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
        }
    )
    expected = expected_tensors(config)
    assert len(expected) + 43 * (5 + 3 + 3 * 256) + 21 == 67612
    assert expected["layers.0.attn.wo_a.weight"].shape == (8192, 4096)
    assert expected["layers.2.attn.compressor.ape"].shape == (4, 1024)
    assert expected["layers.3.attn.compressor.ape"].shape == (128, 512)
    assert expected["layers.2.attn.indexer.wq_b.weight"].shape == (8192, 1024)
    assert expected["layers.2.attn.indexer.compressor.wgate.weight"].shape == (256, 4096)
    assert expected["layers.0.hc_attn_fn"].shape == (24, 16384)
    assert expected["layers.2.ffn.gate.tid2eid"] == names.TensorSpec((129280, 6), integer=True)
    assert "layers.3.ffn.gate.bias" in expected
    assert "layers.2.ffn.gate.bias" not in expected


# One line for each kind of name found in checkpoints of AutoRound, GPTQModel and llm-compressor.
FOUND = {
    "model.layers.1.attn.norm.weight": "layers.1.attn.kv_norm.weight",
    "model.layers.1.attn.wkv.weight_packed": "layers.1.attn.wkv.weight_packed",
    "model.layers.1.attn.compressor.indexer.scorer.weights_proj.qzeros": ("layers.1.attn.indexer.weights_proj.qzeros"),
    "model.layers.1.attn.compressor.indexer.kv_norm.weight": "layers.1.attn.indexer.compressor.norm.weight",
    "model.layers.1.attn.compressor.indexer.kv_proj.scales": "layers.1.attn.indexer.compressor.wkv.scales",
    "model.layers.1.attn.compressor.kv_norm.weight": "layers.1.attn.compressor.norm.weight",
    "model.layers.1.attn.compressor.position_bias": "layers.1.attn.compressor.ape",
    "model.layers.1.attn.sinks": "layers.1.attn.attn_sink",
    "model.layers.1.ffn.experts.10.down_proj.g_idx": "layers.1.ffn.experts.10.w2.g_idx",
    "model.layers.1.ffn.shared_experts.up_proj.qweight": "layers.1.ffn.shared_experts.w3.qweight",
    "model.layers.1.ffn.experts.10.wgate.qweight": "layers.1.ffn.experts.10.w1.qweight",
    "model.layers.1.attn.compressor.wgate.qweight": "layers.1.attn.compressor.wgate.qweight",
    "model.layers.1.mlp.gate.e_score_correction_bias": "layers.1.ffn.gate.bias",
    "model.layers.1.ffn_hc.scale": "layers.1.hc_ffn_scale",
    "model.hc_head.hc_scale": "hc_head_scale",
    "model.embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "layers.0.attn.wq_a.scale": "layers.0.attn.wq_a.scale",
    "layers.0.self_attn.q_a_proj.weight_scale_inv": "layers.0.attn.wq_a.weight_scale_inv",
    # Module names, as in ignore lists.
    "lm_head": "head",
    "model.layers.1.attn.indexer.compressor.scorer.weights_proj": "layers.1.attn.indexer.weights_proj",
    "model.layers.1.mlp.gate": "layers.1.ffn.gate",
    # Stacks.
    "model.layers.3.mlp.experts.gate_up_proj": "layers.3.ffn.experts.gate_up_proj",
    "layers.3.ffn.experts.down_proj": "layers.3.ffn.experts.down_proj",
}


@pytest.mark.parametrize(("stored", "native"), FOUND.items())
def test_names_found_in_the_wild(stored: str, native: str) -> None:
    assert native_name(stored) == native


@pytest.mark.parametrize(
    "stored",
    [
        "model.layers.0.attn.wq_c.weight",
        "model.layers.0.attn.wq_a.deeper.weight",
        "model.layers.00.attn.wq_a.weight",
        "model.layers.0.ffn.experts.w1.weight",
        "model.layers.0.ffn.experts.*.w1.weight",
        "model.layers.0.ffn.experts.1.w4.weight",
        "model.layers.0.attn.attn_sink.weight",
        "model.layers.0",
        "vision.blocks.0.weight",
        "hc_head_fn.weight",
        "",
    ],
)
def test_other_names_are_unknown(stored: str) -> None:
    assert native_name(stored) is None


def test_mtp_is_recognised() -> None:
    assert names.is_mtp("mtp.0.e_proj.weight")
    assert names.is_mtp("model.mtp.2.norm.weight")
    assert not names.is_mtp("model.layers.0.attn_norm.weight")
    assert native_name("model.mtp.0.attn.wq_a.weight") == "mtp.0.attn.wq_a.weight"


def test_fused_parts_are_the_experts_tensors(tmp_path: Path) -> None:
    spec = CONFIGS["odd"]
    tensors = random_tensors(spec)
    directory = write_checkpoint(tmp_path, spec, fused=True, tensors=tensors)
    rebuilt: dict[str, torch.Tensor] = {}
    with safe_open(directory / "model.safetensors", "pt") as stored:
        for key in stored.keys():  # noqa: SIM118
            native = native_name(key)
            assert native is not None
            shape = names.fused_shape(spec.config, native)
            if shape is not None:
                stack = stored.get_tensor(key)
                assert stack.shape == shape
                rebuilt |= {name: stack[index] for name, index in names.fused_parts(spec.config, native)}
    experts = {name for name in tensors if names.expert_index(name) is not None}
    assert set(rebuilt) == experts
    assert all(torch.equal(rebuilt[name], tensors[name]) for name in experts)


def test_stored_name_of_nothing() -> None:
    with pytest.raises(KeyError):
        stored_name("layers.0.attn.wq_z.weight", "transformers")
