"""What vLLM does to a running model besides serving it: made-up weights, reloads, seeds of prompts in several steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from testing import tiny
from testing.engine import full_logprobs, running
from testing.fixtures import unpacked
from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError

# As in tests/checkpoint/test_packed_served.py.
TOLERANCE = 1e-4
PACKED = "gm_gptq_desc_act"
SPEC = tiny.CONFIGS["mixed"]


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine with made-up weights, whose tokens are nearly uniform: no two seeds draw the same ones."""
    path = tiny.write_checkpoint(tmp_path_factory.mktemp("seeded") / "model", SPEC)
    with running(path, load_format="dummy") as llm:
        yield llm


def sample(llm: Any, prompts: list[list[int]], seeds: list[int | None], chunk: int) -> list[list[int]]:
    """The tokens of requests that run together, their prompts in steps of at most `chunk` tokens."""
    from vllm import SamplingParams

    llm.llm_engine.engine_core.engine_core.scheduler.scheduler_config.long_prefill_token_threshold = chunk
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=6, ignore_eos=True) for seed in seeds]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0].token_ids for output in llm.generate(requests, params, use_tqdm=False)]


def test_a_seed_gives_the_same_tokens_however_the_prompt_is_cut(seeded: Any) -> None:
    prompts = [tiny.prompt_tokens(SPEC, length, seed=length) for length in (150, 40, 97)]
    alone = [sample(seeded, [prompt], [seed], 0)[0] for seed, prompt in enumerate(prompts)]
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)
    for chunk in (0, 16, 40):
        assert sample(seeded, prompts, [0, 1, 2], chunk) == alone
    # Requests with and without a seed in one step.
    assert sample(seeded, prompts, [0, None, 2], 16)[::2] == alone[::2]


def test_vllm_still_needs_the_workaround() -> None:
    """Fails once vLLM sets the generators of discarded tokens back on a CPU: remove `keep_seeded_requests_on_cpu`."""
    import inspect

    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "gen.set_offset(gen.get_offset() - 4)" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
    with pytest.raises(RuntimeError, match="does not use offset"):
        torch.Generator().get_offset()


def test_packed_weights_are_made_up_and_reloaded() -> None:
    """Made-up weights serve; then the checkpoint's own arrive, a broken one is refused, and they arrive again."""
    reference = load_file(unpacked() / f"{PACKED}.ref" / "logits.safetensors")
    tokens = reference["input_ids"].flatten().tolist()
    expected = reference["logits"].float().reshape(len(tokens), -1).log_softmax(-1)
    weights = load_file(unpacked() / PACKED / "model.safetensors")
    broken = dict(weights)
    name = max(name for name in weights if name.endswith("norm.weight"))
    broken[name] = weights[name].clone().index_fill(0, torch.tensor(1), torch.nan)

    def reload(llm: Any, tensors: dict[str, torch.Tensor]) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})

    with running(unpacked() / PACKED, load_format="dummy") as llm:
        assert full_logprobs(llm, [tokens])[0].isfinite().all()
        reload(llm, weights)
        assert (full_logprobs(llm, [tokens])[0] - expected).abs().max() <= TOLERANCE
        with pytest.raises(CheckpointError, match=rf"{name}.*\[1\]=nan: every weight must be a finite number"):
            reload(llm, broken)
        assert not any(parameter.is_meta for parameter in llm.apply_model(lambda model: list(model.parameters()))[0])
        reload(llm, weights)
        assert (full_logprobs(llm, [tokens])[0] - expected).abs().max() <= TOLERANCE
