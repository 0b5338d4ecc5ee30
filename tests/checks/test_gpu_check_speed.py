"""What the `width` and `peer` parts measure with: the roofline, kernel families, made-up models and contexts."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import floor
from benchmarks.report import Peaks
from checks.gpu_check import families, peer, random_model, stepping, timed, width
from checks.gpu_check.results import FailedError, NotRunError, Recorder

GIB = 1 << 30


@pytest.mark.parametrize(
    ("kind", "megabytes", "gigaflops"),
    [
        ("CSA", (177.7, 678, 1887, 3344), (0.73, 5.8, 23, 93)),
        ("HCA", (159.7, 657, 1852, 3258), (0.60, 4.8, 19, 77)),
        ("window", (151.3, 648, 1842, 3245), (0.59, 4.7, 19, 75)),
    ],
)
def test_a_layers_bytes_and_operations_are_those_computed_independently(kind, megabytes, gigaflops):
    """Decoding at 8k tokens of context, against a table computed by other code."""
    for batch, mb, gflop in zip((1, 8, 32, 128), megabytes, gigaflops, strict=True):
        cost = floor.decode_layer(kind, batch, 8192)
        # To the last digit of the table's figures.
        assert cost.bytes / 1e6 == pytest.approx(mb, abs=1 if mb > 200 else 0.06)
        assert cost.flops / 1e9 == pytest.approx(gflop, abs=0.51 if gflop > 10 else 0.051)


@pytest.mark.parametrize(("tokens", "petaflops"), [(8192, 0.230), (65536, 2.04), (1 << 20, 87.5)])
def test_a_prompts_operations_are_those_computed_independently(tokens, petaflops):
    assert floor.prefill(floor.FLASH_LAYERS, tokens, 8192).flops / 1e15 == pytest.approx(petaflops, rel=0.003)


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    assert floor.Cost(3e9, 1e9).seconds(3000, 1) == pytest.approx(1e-3)
    assert floor.Cost(3e9, 5e9).seconds(3000, 1) == pytest.approx(5e-3)
    assert floor.decode({"CSA": 1}, 1, 8192).bytes == pytest.approx(
        floor.decode_layer("CSA", 1, 8192).bytes + 129280 * 4096 * 2
    )
    assert [round(floor.distinct_experts(b), 1) for b in (1, 8, 32, 128)] == [6.0, 44.2, 136.1, 243.7]
    assert floor.FLASH_LAYERS == {"window": 2, "CSA": 21, "HCA": 20}


def test_every_kernel_file_of_ours_has_a_family():
    files = {path.stem for path in families.TRITON.glob("*.py")}
    assert families.FILES.keys() <= files
    # What these hold is inlined into kernels of the others, or is small enough to be "other".
    assert files - families.FILES.keys() == {
        "__init__", "codecs", "launch", "packed_weights", "rms_norm", "rope", "rope_table", "rows",
    }  # fmt: skip
    found = families.triton_kernels()
    assert found["_attend"] == "attention"
    assert found["_down"] == found["_route"] == "MoE"


def test_no_name_of_a_kernel_is_in_two_families(monkeypatch, tmp_path):
    """The profiler knows a kernel by its function's name alone."""
    everything = families.triton_kernels()
    for path in families.TRITON.glob("*.py"):
        monkeypatch.setattr(families, "TRITON", tmp_path / path.stem)
        (tmp_path / path.stem).mkdir()
        (tmp_path / path.stem / path.name).write_text(path.read_text())
        for name, family in families.triton_kernels.__wrapped__().items():
            assert everything[name] == family, f"{name} of {path.name} is also in another file"


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("void (anonymous namespace)::gate_up<0>(Weights, Routing, unsigned short const*)", "MoE"),
        ("void (anonymous namespace)::down<1>(Weights, Routing)", "MoE"),
        ("void marlin_moe_wna16::Marlin<...>", "MoE"),
        ("nvjet_tst_128x64_64x6_1x2_h_bz_TNT", "linears"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn", "linears"),
        ("sm90::decode::sparse_fp8::flash_fwd_splitkv_mla_fp8_sparse_kernel", "attention"),
        ("void persistent_topk_kernel<512>", "indexer"),
        ("Memset (Device)", "other"),
        ("_select", "indexer"),
        ("_compress", "compressor"),
        ("_enter_sublayer", "mHC"),
    ],
)
def test_the_family_of_a_kernel(kernel, family):
    assert families.family(kernel) == family


def test_a_profile_by_family():
    events = [("_attend", 0.0, 100.0), ("_down", 50.0, 250.0), ("Memset (Device)", 400.0, 500.0)]
    found = families.milliseconds(events, steps=2)
    nothing = dict.fromkeys(families.FAMILIES, 0.0)
    assert found == nothing | {"attention": 0.05, "MoE": 0.1, "other": 0.05, "idle": 0.075}
    assert families.unknown(events) == ["Memset (Device) (0.10 ms)"]
    assert families.milliseconds([], 4) == nothing


@pytest.mark.parametrize("native", [False, True], ids=["int4", "fp4"])
def test_a_made_up_checkpoint_is_one_to_inspect_and_takes_no_disk(tmp_path, native):
    shape = random_model.Shape(1, dry=False)
    directory = random_model.write(tmp_path / "model", shape, native)
    planned = random_model.capacity(directory, shape, 80 * GIB, 128)
    # Per layer 3.5 GB: all 43 are 148.8 GB as int4, 153.2 GB as MXFP4.
    assert planned.weights / 1e9 == pytest.approx(3 * 3.5 + 2.1, rel=0.05)
    file = directory / "model.safetensors"
    assert file.stat().st_size > 10 * GIB
    assert file.stat().st_blocks * 512 < 64 << 20
    assert shape.config.compress_ratios == (0, 4, 128)
    assert sum(shape.layers.values()) == shape.count == shape.config.num_hidden_layers


def test_as_many_layers_as_fit(tmp_path):
    counts = [random_model.choose(tmp_path / f"{m}", m * GIB, 128, 65792, 8192).count for m in (40, 79, 139)]
    assert counts == sorted(counts)
    assert 3 <= counts[0] < counts[1] < counts[2] < 43
    with pytest.raises(NotRunError, match="8 GiB do not hold three layers"):
        random_model.choose(tmp_path / "8", 8 * GIB, 128, 65792, 8192)


def test_random_parameters_are_such_that_nothing_is_nan():
    model: Any = types.SimpleNamespace(config=types.SimpleNamespace(n_routed_experts=16))

    def filled(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        data = torch.full(shape, 77, dtype=torch.uint8).expand(shape).clone().to(dtype)
        random_model.fill_one(name, data, model)
        return data

    table = filled("model.layers.0.ffn.gate.tid2eid", (50, 4), torch.int32)
    assert table.min() >= 0
    assert table.max() < 16
    assert all(len(set(row)) == 4 for row in table.tolist())
    codes = filled("layers.0.attn.wq_a.qweight", (64, 64), torch.float8_e4m3fn).float()
    assert codes.isfinite().all()
    assert codes.min() < 0 < codes.max()
    assert filled("layers.0.ffn.experts.w13_qweight", (8, 512), torch.uint8).unique().numel() == 256
    assert set(filled("layers.0.ffn.experts.w13_scales", (8, 512), torch.uint8).unique().tolist()) <= {118, 119}
    assert (filled("layers.0.attn.wq_a.scales", (8, 8), torch.bfloat16) > 0).all()
    assert (filled("layers.0.attn_norm.weight", (8,), torch.bfloat16) == 1).all()
    assert (filled("layers.0.hc_attn_scale", (3,), torch.float32) == 1).all()
    assert filled("layers.0.attn.wkv.weight", (64, 64), torch.bfloat16).float().std() == pytest.approx(1 / 8, rel=0.1)


class Manager:
    """As much of vLLM's CUDA graph manager as is looked at."""

    def __init__(self) -> None:
        self.graphs, self._graphs_captured = {"a": 1, "b": 2}, True

    def dispatch(self, tokens: int) -> types.SimpleNamespace:
        mode = "FULL" if self._graphs_captured and tokens == 1 else "NONE"
        return types.SimpleNamespace(cg_mode=types.SimpleNamespace(name=mode))


def llm_with(manager: Manager, v2: bool = True) -> types.SimpleNamespace:
    worker = types.SimpleNamespace(model_runner=types.SimpleNamespace(cudagraph_manager=manager))
    executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(worker=worker))
    core = types.SimpleNamespace(engine_core=types.SimpleNamespace(model_executor=executor))
    config = types.SimpleNamespace(use_v2_model_runner=v2)
    return types.SimpleNamespace(llm_engine=types.SimpleNamespace(engine_core=core, vllm_config=config))


def test_steps_are_counted_and_can_be_made_eager():
    manager = Manager()
    steps = stepping.Steps(llm_with(manager))
    for tokens in (1, 1, 7):
        manager.dispatch(tokens)
    with steps.eagerly():
        manager.dispatch(1)
    assert steps.taken() == "2 whole graphs, 2 eager"
    assert steps.taken() == "no steps"
    assert steps.captured == 2
    assert manager._graphs_captured
    with pytest.raises(AssertionError, match="V2 model runner"):
        stepping.Steps(llm_with(manager, v2=False))


def timed_engine(replies: list[int | None], ends: bool = False) -> timed.TimedEngine:
    """Its steps say these numbers of tokens of the request "r"; None: a step without an output."""
    found = timed.TimedEngine.__new__(timed.TimedEngine)
    left = iter(replies)

    def step() -> list[types.SimpleNamespace]:
        count = next(left, None)
        if count is None:
            return []
        output = types.SimpleNamespace(token_ids=[0] * count)
        other = types.SimpleNamespace(request_id="other", outputs=[output], finished=True)
        return [other, types.SimpleNamespace(request_id="r", outputs=[output], finished=ends)]

    scheduler = types.SimpleNamespace(get_request_counts=lambda: (3, 5))
    core = types.SimpleNamespace(engine_core=types.SimpleNamespace(scheduler=scheduler))
    found.engine = types.SimpleNamespace(step=step, engine_core=core)
    return found


def test_steps_are_those_that_made_tokens():
    # With asynchronous scheduling some calls give nothing.
    assert timed_engine([None, 5, 6, None, 7, 8]).advance("r", 3) == 3
    with pytest.raises(FailedError, match="makes no progress"):
        timed_engine([5]).advance("r", 3)
    with pytest.raises(FailedError, match="ended after 5 tokens"):
        timed_engine([5], ends=True).advance("r", 1)
    assert timed_engine([1, 2, 3, 4, 5]).advance("r", 4, batch=3) == 4
    with pytest.raises(NotRunError, match="the cache holds 3 of these requests at once, 5 wait"):
        timed_engine([1, 2, 3, 4, 5]).advance("r", 4, batch=8)


def test_a_points_figures(tmp_path):
    """15 layers, of whose 4 ms 0.4 are the head's: 43 take 0.4 + 3.6 x 43 / 15."""
    recorder = Recorder("width", tmp_path / "part.json", 60, dry=False)
    shape, peaks = random_model.Shape(7, dry=False), Peaks(3000.0, 700.0)
    bench = width.Bench(recorder, width.Points((2048,), (8,), (8192,)), shape, peaks, 8192, {8: 0.4})
    found = timed.Decode(4.0, 9.0, [("_attend", 0.0, 2000.0), ("nvjet", 3000.0, 4000.0)], 2)
    steps = types.SimpleNamespace(taken=lambda: "24 whole graphs")
    engine: Any = types.SimpleNamespace(decode=lambda *_: found, prefill=lambda tokens: 0.3, steps=steps)
    width.add_prefills(bench, engine, "prefill")
    width.add_decodes(bench, engine, "decode")
    assert [check.status for check in recorder.result.checks] == ["passed", "passed"]
    prefill, decode, by_family = recorder.result.tables
    assert prefill.rows[0][:5] == ["2048", "300.0", "6826.7", "860.0", "2381.4"]
    whole = 0.4 + 3.6 * 43 / 15
    least = 1000 * floor.decode(floor.FLASH_LAYERS, 8, 8192).bytes / 3e12
    assert decode.rows == [[
        "8", "8192", "4.00", "9.00", f"{whole:.2f}", f"{least:.2f}", f"{100 * least / whole:.0f}",
        f"{8000 / whole:.0f}",
    ]]  # fmt: skip
    assert by_family.rows == [
        ["8", "8192", "graphs", "1.000", *["0.000"] * 4, "0.500", "0.000", "0.500"],
        # The head is one of the linears.
        ["8", "8192", "graphs, 43 layers", "2.867", *["0.000"] * 4, f"{0.4 + 0.1 * 43 / 15:.3f}", "0.000", "1.433"],
    ]
    assert "43/15" in decode.note
    (point,) = recorder.result.data["decode"]
    assert (point["graphs"], point["eager"], point["head"]) == (4.0, 9.0, 0.4)


@pytest.mark.parametrize(
    ("capability", "why"), [((8, 0), "needs SM90 or newer, this is SM80"), ((9, 0), "needs FlashMLA")]
)
def test_the_peer_says_what_it_lacks(monkeypatch, capability, why):
    from vllm.v1.attention.ops import flashmla

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(flashmla, "is_flashmla_sparse_supported", lambda: (False, "no such op"))
    with pytest.raises(NotRunError, match=why):
        peer.require()


def test_a_pretended_context_is_read_and_not_computed(tmp_path: Path) -> None:
    """The first step of such a request is one token; the rows it reads are random; other requests are as ever."""
    from vllm import SamplingParams

    from checks.gpu_check import checkpoints, connector, expected
    from testing import engine
    from testing.scheduler.runner import Request, Runner

    setting = checkpoints.SETTINGS[1]
    prompts = checkpoints.prompts("toy")[:2]
    path = checkpoints.checkpoint("toy", tmp_path)
    with engine.running(path, kv_transfer_config=connector.CONFIG, async_scheduling=False) as llm:
        replies = expected.generate(llm, setting, prompts, 4)
        runner = Runner(llm)
        run = runner.run([Request(tuple(prompts[0]), 2)])
        assert run.chunks(0) == [len(prompts[0]), 1]
        params = SamplingParams(
            temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=1, extra_args=connector.PRETEND
        )  # fmt: skip
        runner._log.clear()
        outputs = [llm.generate([{"prompt_token_ids": [5] * 600}], params, use_tqdm=False)[0].outputs[0] for _ in "ab"]
        assert [sum(step.values()) for step, _ in runner._log if step] == [1, 1, 1, 1, 1, 1]
        caches = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        entries = caches["model.layers.1.attn.entries"].kv_cache
        assert (entries.view(torch.uint8) != 0).any(dim=-1).sum() >= 600 // 4
    wanted = expected.replies(expected.read(), setting)
    assert [reply.tokens for reply in replies] == [reply.tokens[:4] for reply in wanted[:2]]
    first, second = (next(iter(output.logprobs[0].values())).logprob for output in outputs)
    assert first != second, "the same prompt twice, but its context's rows are random"
