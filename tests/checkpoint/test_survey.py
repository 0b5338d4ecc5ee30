"""One verdict, in the same words, from `inspect`, from vLLM's configuration and from the loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from testing import format_cases as cases
from testing import tiny
from testing.fake_model import FakeModel
from testing.fixtures import unpacked
from vllm_deepseek_v4flash.checkpoint.dtypes import header_of
from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError
from vllm_deepseek_v4flash.checkpoint.loader import load_weights
from vllm_deepseek_v4flash.checkpoint.survey import refuse, survey
from vllm_deepseek_v4flash.config import DeepseekV4Config
from vllm_deepseek_v4flash.inspect.contents import inspect_checkpoint
from vllm_deepseek_v4flash.integration.quantization import DeepseekV4QuantConfig, check_unquantised

SPEC = tiny.CONFIGS["mixed"]
CONFIG = SPEC.config
GPTQ = cases.gptq(group=32).config
NORM, EXPERTS = "layers.1.attn_norm.weight", "layers.2.ffn.experts"


@dataclass
class Checkpoint:
    """What is written: tensors by stored name, and the `quantization_config` where there is one."""

    tensors: dict[str, torch.Tensor]
    quantization: Any = None

    def pack(self, module: str, group: int = 32) -> None:
        """Replace the plain weight of a module by GPTQ's tensors."""
        n, k = self.tensors.pop(f"{module}.weight").shape
        leaves = cases.gptq(n=n, k=k, group=group).leaves
        self.tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in leaves.items()}

    def write(self, directory: Path) -> Path:
        directory.mkdir(exist_ok=True)
        quantization = {} if self.quantization is None else {"quantization_config": self.quantization}
        (directory / "config.json").write_text(json.dumps({**SPEC.hf_config, **quantization}))
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, directory / "model.safetensors")
        return directory


def plain() -> Checkpoint:
    return Checkpoint(tiny.random_tensors(SPEC))


def packed() -> Checkpoint:
    """GPTQ for the head and the experts of layer 2."""
    checkpoint = Checkpoint(tiny.random_tensors(SPEC), GPTQ)
    for expert in range(CONFIG.n_routed_experts):
        for name in ("w1", "w2", "w3"):
            checkpoint.pack(f"{EXPERTS}.{expert}.{name}")
    checkpoint.pack("head")
    return checkpoint


def of_inspect(checkpoint: Checkpoint, directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        refuse(inspect_checkpoint(checkpoint.write(directory)).problems)
    return str(error.value)


def check_as_vllm(checkpoint: Checkpoint, path: str) -> None:
    if checkpoint.quantization is None:
        check_unquantised(CONFIG, path, "auto")
    else:
        DeepseekV4QuantConfig(checkpoint.quantization).maybe_update_config(path, hf_config=SPEC.hf_config)


def of_vllm(checkpoint: Checkpoint, directory: Path) -> str:
    path = str(checkpoint.write(directory))
    with pytest.raises(CheckpointError) as error:
        check_as_vllm(checkpoint, path)
    return str(error.value)


def of_loader(checkpoint: Checkpoint) -> str:
    # safetensors stores tensors by the size of their type, then by name.
    tensors = sorted(checkpoint.tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    with pytest.raises(CheckpointError) as error:
        load_weights(FakeModel(CONFIG), CONFIG, tensors, quantization=checkpoint.quantization)
    return str(error.value)


def _edit(edit: Callable[[Checkpoint], object], make: Callable[[], Checkpoint] = plain) -> Callable[[], Checkpoint]:
    def made() -> Checkpoint:
        checkpoint = make()
        edit(checkpoint)
        return checkpoint

    return made


def _put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Checkpoint], object]:
    return lambda checkpoint: checkpoint.tensors.update({name: torch.zeros(shape, dtype=dtype)})


def _fuse(checkpoint: Checkpoint) -> None:
    """Fused experts next to the separate ones of one layer."""
    fused = tiny.fuse_experts(CONFIG, checkpoint.tensors)
    checkpoint.tensors["layers.0.ffn.experts.down_proj"] = fused["layers.0.ffn.experts.down_proj"]


def _unpack_w2(checkpoint: Checkpoint) -> None:
    for name in [name for name in checkpoint.tensors if ".w2." in name and name.startswith(EXPERTS)]:
        del checkpoint.tensors[name]
    shape = (CONFIG.hidden_size, CONFIG.moe_intermediate_size)
    for expert in range(CONFIG.n_routed_experts):
        checkpoint.tensors[f"{EXPERTS}.{expert}.w2.weight"] = torch.zeros(shape)


WQ_A = "layers.1.attn.wq_a.weight"
HIDDEN, VOCAB = CONFIG.hidden_size, CONFIG.vocab_size

BROKEN: dict[str, tuple[Callable[[], Checkpoint], list[str]]] = {
    "missing": (_edit(lambda c: c.tensors.pop(NORM)), [f"missing: {NORM}: should be [128]"]),
    "unexpected": (
        _edit(_put("layers.9.attn.wq_a.weight", 2, 2)),
        ["unexpected: layers.9.attn.wq_a.weight: has [2, 2] F32; config.json asks for no such tensor"],
    ),
    "two names": (
        _edit(_put("model.layers.1.self_attn.q_a_proj.weight", 64, 128)),
        [f"duplicate: model.layers.1.self_attn.q_a_proj.weight: has [64, 128] F32; {WQ_A} is the same tensor"],
    ),
    "two names outside the layers": (
        _edit(_put("model.embed_tokens.weight", VOCAB, HIDDEN)),
        [
            f"duplicate: model.embed_tokens.weight: has [{VOCAB}, {HIDDEN}] F32; embed.weight is the same tensor, with "
            "other values"
        ],
    ),
    "fused and separate": (
        _edit(_fuse),
        [
            f"duplicate: layers.0.ffn.experts.{expert}.w2.weight: is stored separately and in "
            "layers.0.ffn.experts.down_proj"
            for expert in range(CONFIG.n_routed_experts)
        ],
    ),
    "shape": (
        _edit(_put("lm_head.weight", 5, 128), _edit(lambda c: c.tensors.pop("head.weight"))),
        [f"mis-shaped: lm_head.weight (head.weight): has [5, 128] F32, should be [{VOCAB}, {HIDDEN}]"],
    ),
    "dtype": (
        _edit(_put("layers.0.attn.attn_sink", 4, dtype=torch.int32)),
        ["mis-typed: layers.0.attn.attn_sink: has [4] I32, should be BF16, F16, F32 or F64"],
    ),
    "packed without a config": (
        _edit(lambda c: c.pack("head")),
        [
            "format: head: has g_idx [128] I32, qweight [16, 264] I32, qzeros [4, 33] I32, scales [4, 264] F16, should "
            "be a weight in BF16, F16, F32 or F64, because config.json has no quantization_config. Restore the one "
            "that the checkpoint was written with, or use a bfloat16, float16 or float32 copy."
        ],
    ),
    "no scales": (
        _edit(lambda c: c.tensors.pop("head.scales"), packed),
        ["format: head: tensor scales is missing; should be [4, 264] (qweight [16, 264], group_size 32)"],
    ),
    "another group size": (
        _edit(lambda c: c.pack(WQ_A[:-7], 64), packed),
        [
            "format: layers.1.attn.wq_a: tensor scales has shape [2, 64], should be [4, 64] (qweight [16, 64], "
            "group_size 32)"
        ],
    ),
    "another model's weight": (
        _edit(lambda c: c.pack(WQ_A[:-7]), _edit(_put(WQ_A, 32, 128), packed)),
        ["mis-shaped: layers.1.attn.wq_a: has [32, 128] (int4), should be [64, 128]"],
    ),
    "an expert that is not packed": (
        _edit(
            lambda c: (
                [c.tensors.pop(f"{EXPERTS}.3.w3.{leaf}") for leaf in ("qweight", "qzeros", "scales", "g_idx")],
                c.tensors.update({f"{EXPERTS}.3.w3.weight": torch.zeros(64, 128)}),
            ),
            packed,
        ),
        [
            f"format: {EXPERTS}.3.w3: is not packed, {EXPERTS}.0.w1 is int4 sym in groups of 32 with float16 scales; "
            "the experts of a layer are stacked and must be packed alike"
        ],
    ),
    "w2 not packed": (
        _edit(_unpack_w2, packed),
        [
            f"format: {EXPERTS}.0.w2: is not packed, {EXPERTS}.0.w1 is int4 sym in groups of 32 with float16 scales; "
            "the experts of a layer must all be packed, or none of them"
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_one_verdict_in_the_same_words(name: str, tmp_path: Path) -> None:
    make, lines = BROKEN[name]
    checkpoint = make()
    message = of_inspect(checkpoint, tmp_path)
    assert [line.strip() for line in message.splitlines()[1:]] == lines
    assert of_vllm(checkpoint, tmp_path) == of_loader(checkpoint) == message


@pytest.mark.parametrize("make", [plain, packed])
def test_what_fits_fits_everywhere(make: Callable[[], Checkpoint], tmp_path: Path) -> None:
    checkpoint = make()
    path = checkpoint.write(tmp_path)
    assert inspect_checkpoint(path).problems == ()
    found = survey(CONFIG, checkpoint.quantization, (header_of(t, name) for name, t in checkpoint.tensors.items()))
    assert found.problems == []
    if make is plain:
        check_unquantised(CONFIG, str(path), "auto")
        assert found.plan() == {}
        return
    config = DeepseekV4QuantConfig(checkpoint.quantization)
    config.maybe_update_config(str(path), hf_config=SPEC.hf_config)
    assert config.plan == {
        module: replace(entry, files=("model.safetensors",)) for module, entry in found.plan().items()
    }
    assert len(config.plan) == 3 * CONFIG.n_routed_experts + 1


def _twice(checkpoint: Checkpoint, name: str, native: str, dtype: torch.dtype) -> None:
    checkpoint.tensors[name] = checkpoint.tensors[native].to(dtype, copy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [plain, packed])
def test_a_tensor_that_is_stored_twice_with_the_same_values_fits(
    make: Callable[[], Checkpoint], dtype: torch.dtype, tmp_path: Path
) -> None:
    """AutoRound's `model_extra_tensors.safetensors`: the source's dtype next to that of the quantised model."""
    checkpoint = make()
    for name, native in (
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.norm.weight", "norm.weight"),
    ):
        _twice(checkpoint, name, native, dtype)
    path = str(checkpoint.write(tmp_path))
    assert inspect_checkpoint(path).problems == ()
    check_as_vllm(checkpoint, path)
    if make is packed:
        return
    for tensors in (checkpoint.tensors, dict(reversed(checkpoint.tensors.items()))):
        model = FakeModel(CONFIG)
        load_weights(model, CONFIG, tensors.items())
        # Whichever comes first, the wider one is kept.
        assert torch.equal(model.get_parameter("model.embed.weight"), checkpoint.tensors["embed.weight"])


def test_one_value_that_differs_is_seen_in_any_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_deepseek_v4flash.checkpoint.doubles._PIECE", 100)
    checkpoint = plain()
    _twice(checkpoint, "model.embed_tokens.weight", "embed.weight", torch.float32)
    assert inspect_checkpoint(checkpoint.write(tmp_path)).problems == ()
    checkpoint.tensors["model.embed_tokens.weight"][-1, -1] += 1
    assert [problem.kind for problem in inspect_checkpoint(checkpoint.write(tmp_path)).problems] == ["duplicate"]


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("n_routed_experts", 100_000, "the tensors have 8 routed experts"),
        ("num_hidden_layers", 20_000, "the tensors have 5 layers"),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_counts_that_the_tensors_do_not_bear_out_are_refused_at_once(
    field: str, value: int, text: str, fused: bool, tmp_path: Path
) -> None:
    checkpoint = plain()
    if fused:
        checkpoint.tensors = tiny.fuse_experts(CONFIG, checkpoint.tensors)
    path = checkpoint.write(tmp_path)
    values = {**SPEC.hf_config, field: value}
    values["compress_ratios"] = values["compress_ratios"] + [0] * (value if field == "num_hidden_layers" else 0)
    (path / "config.json").write_text(json.dumps(values))
    want = rf"{field}={value} in config\.json: {text}\. Use"
    with pytest.raises(CheckpointError, match=want):
        inspect_checkpoint(path)
    with pytest.raises(CheckpointError, match=want):
        check_unquantised(DeepseekV4Config.from_dict(values), str(path), "auto")


def test_a_pattern_that_no_module_can_be_compared_with_is_one_problem(tmp_path: Path) -> None:
    checkpoint = packed()
    checkpoint.quantization = {**GPTQ, "dynamic": {r"+:(.*)*\d\d\d\dq$": {}}}
    (problem,) = inspect_checkpoint(checkpoint.write(tmp_path)).problems
    assert (problem.kind, problem.name) == ("config", "quantization_config")
    assert r"(.*)*\\d" in problem.text
    assert problem.text in of_vllm(checkpoint, tmp_path)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    checkpoint = packed()
    del checkpoint.tensors[NORM], checkpoint.tensors["head.scales"]
    checkpoint.tensors["rotary.inv_freq"] = torch.zeros(32)
    message = of_vllm(checkpoint, tmp_path)
    assert message.startswith("the checkpoint does not fit its config.json: 1 unexpected, 1 format, 1 missing\n")


@pytest.mark.parametrize(
    ("fixture", "method"), [("llmc_rtn_g32_asym", "compressed_tensors"), ("gm_gptq_desc_act", "GPTQ")]
)
def test_a_method_that_vllm_spells_anew_is_accepted_by_both(fixture: str, method: str, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    path = tmp_path / fixture
    shutil.copytree(unpacked() / fixture, path)
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"]["quant_method"] = method
    (path / "config.json").write_text(json.dumps(values))
    report = inspect_checkpoint(path)
    assert report.problems == ()
    made = EngineArgs(model=str(path), skip_tokenizer_init=True, max_model_len=512).create_engine_config()
    assert len(made.quant_config.plan) == sum(row.count for row in report.rows if row.scheme.kind != "plain")


def test_a_packed_module_of_an_unknown_method_is_not_judged(tmp_path: Path) -> None:
    checkpoint = packed()
    checkpoint.quantization = {"quant_method": "bitsandbytes"}
    (problem,) = inspect_checkpoint(checkpoint.write(tmp_path)).problems
    assert (problem.kind, problem.name) == ("config", "quantization_config")
    assert problem.text.startswith("quant_method='bitsandbytes'")
