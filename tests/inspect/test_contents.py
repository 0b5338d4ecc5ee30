"""`inspect` counts real checkpoints exactly and names whatever does not fit, from headers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from testing.fixtures import unpacked
from testing.flash import (
    FLASH,
    GPTQ_QUANTIZATION,
    NATIVE_QUANTIZATION,
    PACKED_QUANTIZATION,
    SMALL,
    Declared,
    gptq,
    mtp,
    native,
    pack_quantized,
    write_checkpoint,
)
from testing.tiny import CONFIGS
from testing.tiny import write_checkpoint as write_tiny
from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError
from vllm_deepseek_v4flash.checkpoint.names import Style, expected_tensors
from vllm_deepseek_v4flash.inspect.capacity import Capacity, Limits, division_problems, plan_capacity
from vllm_deepseek_v4flash.inspect.contents import Report, inspect_checkpoint, model_dtype
from vllm_deepseek_v4flash.kv_cache.formats import CacheFormats

GIB = 1 << 30
W1 = "layers.1.ffn.experts.3.w1"


@pytest.fixture(scope="module")
def native_flash(tmp_path_factory: pytest.TempPathFactory) -> Report:
    declared = {**native(FLASH), **mtp(FLASH)}
    path = tmp_path_factory.mktemp("native")
    return inspect_checkpoint(write_checkpoint(path, FLASH, declared, NATIVE_QUANTIZATION, shards=46))


@pytest.fixture(scope="module")
def gptq_flash(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("gptq")
    return inspect_checkpoint(write_checkpoint(path, FLASH, gptq(FLASH), GPTQ_QUANTIZATION, shards=46))


def capacity(report: Report, gpus: int, memory: int = 80 * GIB, utilization: float = 0.92) -> Capacity:
    limits = Limits(gpus, memory, utilization)
    assert division_problems(report.config, report.resident, limits) == []
    formats = CacheFormats.select(report.config, "fp8", "auto", torch.bfloat16)
    return plan_capacity(report.config, report.resident, formats, limits)


def kinds(report: Report) -> dict[str, tuple[str, int, int]]:
    """Format, group size and count of each row with a shape; the last of those with one name."""
    return {r.module: (r.scheme.kind, r.scheme.group_size, r.count) for r in report.rows if r.shape}


def test_flash_as_deepseek_ships_it(native_flash: Report) -> None:
    """The totals are those of the hub's index (docs/model.md, "Tensors")."""
    assert (native_flash.tensors, native_flash.nbytes) == (67612, 156015698140)
    assert (native_flash.skipped, native_flash.skipped_bytes) == (1575, 3593787756)
    assert native_flash.problems == ()
    assert sum(row.nbytes for row in native_flash.rows) == native_flash.nbytes
    rows = kinds(native_flash)
    assert rows["layers.*.ffn.experts.*.w2"] == ("fp4", 32, 43 * 256)
    assert rows["layers.*.attn.wq_b"] == ("fp8", 128, 43)
    assert rows["layers.*.attn.indexer.wq_b"] == ("fp8", 128, 21)
    assert rows["head"] == ("plain", 0, 1)


@pytest.mark.parametrize(
    ("edit", "formats"),
    [
        (lambda declared: declared, {"fp8": 10, "fp4": 24, "plain bfloat16": 1}),
        (
            lambda declared: {
                name: ("BF16", shape) if name.endswith(".weight") else (dtype, shape)
                for name, (dtype, shape) in declared.items()
                if not name.endswith(".scale")
            },
            {"plain bfloat16": 35},
        ),
        (
            lambda declared: {n: d for n, d in declared.items() if not n.endswith("e_proj.scale")},
            {"fp8": 9, "fp4": 24, "plain bfloat16": 1, "unknown": 1},
        ),
    ],
)
def test_skipped_blocks_have_formats_of_their_own(edit: Any, formats: dict[str, int], tmp_path: Path) -> None:
    declared = {**pack_quantized(SMALL), **edit(mtp(SMALL))}
    report = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, declared, PACKED_QUANTIZATION))
    assert report.problems == ()
    assert report.skipped_formats == formats
    assert kinds(report)["layers.*.ffn.experts.*.w1"][0] == "int4"


def test_flash_in_int4(gptq_flash: Report) -> None:
    """148.8 GB in memory, 69.8 GiB on each of two GPUs; the file holds zero points besides, 149.9 GB in all."""
    assert gptq_flash.problems == ()
    assert f"{gptq_flash.nbytes / 1e9:.2f}" == "149.95"
    assert f"{capacity(gptq_flash, 1, 200 * GIB).weights / 1e9:.1f}" == "148.8"
    two = capacity(gptq_flash, 2)
    assert f"{two.weights / GIB:.1f}" == "69.8"
    assert kinds(gptq_flash)["layers.*.ffn.experts.*.w1"] == ("int4", 128, 43 * 256)


def test_two_80_gb_cards_hold_int4_and_not_the_native_checkpoint(gptq_flash: Report, native_flash: Report) -> None:
    best = capacity(gptq_flash, 2).best
    assert best is not None
    # Below a quarter of a million tokens of context the two cards would not be worth it; more than 1M is impossible.
    assert 200_000 < best.max_model_len <= 1048576
    assert capacity(native_flash, 2).best is None
    assert capacity(gptq_flash, 1).best is None


def test_the_division_over_gpus_leaves_nothing_out(gptq_flash: Report) -> None:
    one, eight = capacity(gptq_flash, 1, 200 * GIB), capacity(gptq_flash, 8)
    copied = eight.by_part["weights copied to every GPU"]
    assert one.by_part["weights copied to every GPU"] == copied
    assert 8 * (eight.weights - copied) == one.weights - copied


@pytest.mark.parametrize("style", get_args(Style))
def test_every_naming_style_gives_the_same_table(tmp_path: Path, style: Style) -> None:
    report = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, gptq(SMALL, style), GPTQ_QUANTIZATION))
    other = inspect_checkpoint(write_checkpoint(tmp_path / "b", SMALL, gptq(SMALL, "native"), GPTQ_QUANTIZATION))
    assert report.problems == ()
    assert report.rows == other.rows
    assert report.resident == other.resident


def test_compressed_tensors(tmp_path: Path) -> None:
    report = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, pack_quantized(SMALL), PACKED_QUANTIZATION))
    assert report.problems == ()
    assert kinds(report)["layers.*.ffn.experts.*.w1"] == ("int4", 128, 24)
    assert kinds(report)["layers.*.attn.compressor.wgate"] == ("plain", 0, 1)


def test_base_has_fp8_experts(tmp_path: Path) -> None:
    report = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, native(SMALL, "fp8"), NATIVE_QUANTIZATION))
    assert report.problems == ()
    assert kinds(report)["layers.*.ffn.experts.*.w1"] == ("fp8", 128, 24)


@pytest.mark.parametrize("fused", [False, True])
def test_unquantised_with_experts_apart_or_fused(tmp_path: Path, fused: bool) -> None:
    path = write_tiny(tmp_path, CONFIGS["odd"], fused=fused)
    report = inspect_checkpoint(path)
    assert report.problems == ()
    assert sum(row.nbytes for row in report.rows) == report.nbytes
    assert any("gate_up_proj" in row.module for row in report.rows) == fused


@pytest.mark.parametrize("name", ["ar_sym", "ar_awq_asym", "gm_gptq_desc_act", "llmc_rtn_g32_asym"])
def test_what_the_tools_wrote(name: str) -> None:
    report = inspect_checkpoint(unpacked() / name)
    assert report.problems == ()
    assert sum(row.nbytes for row in report.rows) == report.nbytes
    assert any(row.scheme.kind == "int4" for row in report.rows)
    # Every tool packs at least the experts, the shared experts and four attention weights of each of three layers.
    assert sum(row.count for row in report.rows if row.scheme.kind == "int4") >= 3 * (4 * 3 + 3 + 4)


def _drop(name: str) -> Callable[[Declared], object]:
    return lambda declared: declared.pop(name)


def _put(name: str, dtype: str, *shape: int) -> Callable[[Declared], object]:
    return lambda declared: declared.update({name: (dtype, shape)})


BROKEN: dict[str, tuple[Callable[[Declared], object], str, str, str]] = {
    "norm missing": (_drop("layers.1.attn_norm.weight"), "missing", "layers.1.attn_norm.weight", r"should be \[4096\]"),
    "sink missing": (_drop("layers.0.attn.attn_sink"), "missing", "layers.0.attn.attn_sink", r"should be \[64\]"),
    "scales missing": (_drop(f"{W1}.scales"), "format", W1, "tensor scales is missing"),
    "unexpected": (_put("layers.9.attn.wq_a.weight", "BF16", 2, 2), "unexpected", "layers.9.attn.wq_a.weight", "BF16"),
    "no such name": (_put("rotary.inv_freq", "F32", 32), "unexpected", "rotary.inv_freq", r"\[32\] F32"),
    "router of a hash layer": (_put("layers.0.ffn.gate.bias", "F32", 8), "unexpected", "layers.0.ffn.gate.bias", "F32"),
    "plain of a wrong shape": (
        _put("head.weight", "BF16", 5, 4096), "mis-shaped", "head.weight", r"\[5, 4096\].*\[129280",
    ),
    "norm of a wrong shape": (_put("norm.weight", "BF16", 5), "mis-shaped", "norm.weight", r"\[5\] BF16.*\[4096\]"),
    "bare of a wrong type": (_put("hc_head_base", "I32", 4), "mis-typed", "hc_head_base", "I32, should be BF16, F16"),
    "table of a wrong type": (
        _put("layers.0.ffn.gate.tid2eid", "F32", 129280, 6), "mis-typed", "layers.0.ffn.gate.tid2eid", "should be I64",
    ),
    "packed norm": (
        _put("layers.1.attn_norm.qweight", "I32", 512), "mis-typed", "layers.1.attn_norm", "qweight, weight",
    ),
    "wrong group": (_put(f"{W1}.scales", "F16", 64, 2048), "format", W1, r"scales.*\[64, 2048\].*\[32, 2048\]"),
    "two names": (
        _put("model.layers.1.attn_norm.weight", "BF16", 4096), "duplicate", "model.layers.1.attn_norm.weight",
        "layers.1.attn_norm.weight is the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    change, kind, name, text = BROKEN[case]
    declared = gptq(SMALL, "native")
    change(declared)
    problems = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, declared, GPTQ_QUANTIZATION)).problems
    assert [(problem.kind, problem.name) for problem in problems] == [(kind, name)]
    assert re.search(text, problems[0].text)


def test_a_packed_weight_of_another_models_shape(tmp_path: Path) -> None:
    declared = gptq(SMALL, "native")
    for leaf, shape in (("qweight", (512, 1024)), ("qzeros", (32, 128)), ("scales", (32, 1024))):
        declared[f"{W1}.{leaf}"] = declared[f"{W1}.{leaf}"][0], shape
    (problem,) = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, declared, GPTQ_QUANTIZATION)).problems
    assert (problem.kind, problem.name) == ("mis-shaped", W1)
    assert problem.text == "has [1024, 4096] (int4), should be [2048, 4096]"


def test_experts_of_a_layer_must_be_packed_alike(tmp_path: Path) -> None:
    declared = gptq(SMALL, "native")
    for leaf in ("qweight", "qzeros", "scales"):
        del declared[f"{W1}.{leaf}"]
    declared[f"{W1}.weight"] = "BF16", (2048, 4096)
    (problem,) = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, declared, GPTQ_QUANTIZATION)).problems
    assert (problem.kind, problem.name) == ("format", W1)
    assert "packed alike" in problem.text


@pytest.mark.parametrize(
    ("quantization", "text"),
    [
        (None, "no quantization_config"),
        ("int4", "should be an object"),
        ({**GPTQ_QUANTIZATION, "bits": 8}, "8-bit"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({**GPTQ_QUANTIZATION, "group_size": 96}, "96"),
        ({**GPTQ_QUANTIZATION, "desc_act": True}, "g_idx"),
    ],
)
def test_a_config_that_is_not_of_these_weights(tmp_path: Path, quantization: Any, text: str) -> None:
    problems = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, gptq(SMALL), quantization)).problems
    assert any(text in problem.text for problem in problems)


def test_fp8_weights_without_a_quantization_config_are_refused(tmp_path: Path) -> None:
    problems = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, native(SMALL))).problems
    assert {problem.kind for problem in problems} == {"format"}
    assert len(problems) == 3 * (8 * 3 + 8) + 1
    assert all("no quantization_config" in problem.text for problem in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config.json"),
        ("{", "not JSON"),
        ("[]", "JSON list"),
        (json.dumps({**SMALL, "model_type": "deepseek_v41"}), "model_type.*V4.1"),
        (json.dumps({**SMALL, "hidden_size": "x"}), "config.json.*hidden_size"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    write_checkpoint(tmp_path, SMALL, {"x": ("F32", (1,))})
    (tmp_path / "config.json").unlink() if text is None else (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(tmp_path)


def test_broken_files_are_an_error_not_a_report(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, SMALL, native(SMALL), NATIVE_QUANTIZATION, shards=2)
    (path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        inspect_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a directory"):
        inspect_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float32"}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_model_dtype_is_what_vllms_auto_makes_of_it(values: dict[str, str], dtype: str) -> None:
    assert model_dtype(values) == dtype


def test_what_stays_in_fp32_is_counted_so(tmp_path: Path) -> None:
    """And tid2eid in int32, though files hold int64; compressors and router are 16-bit weights."""
    report = inspect_checkpoint(write_checkpoint(tmp_path, SMALL, native(SMALL), NATIVE_QUANTIZATION))
    four = {tensor.module for tensor in report.resident if tensor.value_bytes == 4}
    assert four == {
        "hc_head_fn", "hc_head_base", "hc_head_scale",
        *(f"layers.*.hc_{part}_{leaf}" for part in ("attn", "ffn") for leaf in ("fn", "base", "scale")),
        "layers.*.attn.attn_sink", "layers.*.attn.compressor.ape", "layers.*.attn.indexer.compressor.ape",
        "layers.*.ffn.gate.bias", "layers.*.ffn.gate.tid2eid",
    }  # fmt: skip
    assert sum(tensor.count for tensor in report.resident) == len(expected_tensors(report.config))
