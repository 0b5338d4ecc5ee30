"""Starts a small `vllm.LLM`, within seconds, and reads whole distributions from it.

    llm = make_llm(path)                      # fp32, in this process, one step for any prompt here
    llm = make_llm(path, max_num_batched_tokens=127, num_gpu_blocks_override=40, enable_prefix_caching=True)
    llm = make_llm(path, multiprocessing=True, tensor_parallel_size=2)
    rows = full_logprobs(llm, [tokens])       # [tensor [T, V]]
    runs = greedy(llm, [tokens], 40)          # [[40 token ids]]
    runs = decode(llm, [tokens], 40)          # [([40 token ids], tensor [40, V])]
    shutdown(llm)                             # before the next engine in this process

`running(path, **overrides)` is the same as a context manager. Prompts and results are token ids: the small
checkpoints have no tokenizer (pass `skip_tokenizer_init=False` for one that has).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Set before torch starts its threads, and inherited by engines in other processes. One thread: these models are too
# small to share, and threads of two engines that spin on the same cores take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# vLLM reads these when it is imported. It would bind the process to cores, and with it all engines of the test run.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

CACHE_BYTES = 256 << 20
MAX_MODEL_LEN = 1024


def make_llm(path: Path | str, *, multiprocessing: bool = False, **overrides: Any) -> Any:
    """An engine on the checkpoint directory `path`, in fp32.

    Args:
        multiprocessing: run the engine core in its own process, as `vllm serve` does. Must be False for tests that
            patch the model, and True for tensor or pipeline parallelism.
        overrides: arguments of `vllm.LLM` that replace or extend the defaults below. With the defaults a prompt of up
            to MAX_MODEL_LEN tokens is one step, and nothing is reused from the prefix cache.

    Returns:
        `vllm.LLM`; end it with `shutdown`.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(multiprocessing))
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": str(path),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        # Without a GPU its kernels are interpreted, and vLLM 0.33's warm-up runs one that the interpreter cannot.
        arguments["kernel_config"] = {"enable_jit_warmup": False}
    try:
        return LLM(**(arguments | overrides))
    except BaseException:
        _leave_process_groups()
        raise


def shutdown(llm: Any) -> None:
    """End the engine and, if it ran in this process, vLLM's process groups, so that another engine can start."""
    llm.llm_engine.engine_core.shutdown()
    _leave_process_groups()


def _leave_process_groups() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


@contextlib.contextmanager
def running(path: Path | str, **overrides: Any) -> Iterator[Any]:
    """`make_llm`, and `shutdown` at the end of the `with` block."""
    llm = make_llm(path, **overrides)
    try:
        yield llm
    finally:
        shutdown(llm)


class NanError(AssertionError):
    """A log-probability is missing or NaN."""


def full_logprobs(llm: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The log-softmax over the vocabulary after every token of each prompt, fp32 [T, V]; one batch.

    Row t is the distribution of token t + 1. The first new token is drawn from the last row.
    """
    params = _greedy_params(1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True)
    vocab = llm.model_config.get_vocab_size()
    results = []
    for output in _generate(llm, prompts, params):
        # vLLM has no distribution for the first token of a prompt.
        assert output.prompt_logprobs.end_indices[0] == 0
        rows = [dense_logprobs(output.prompt_logprobs, vocab)[1:], dense_logprobs(output.outputs[0].logprobs, vocab)]
        table = torch.cat(rows)
        assert table.shape == (len(output.prompt_token_ids), vocab), table.shape
        if table.isnan().any():
            raise NanError("vLLM left out a token of the vocabulary, or the model returned NaN")
        results.append(table)
    return results


def greedy(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Exactly `max_tokens` greedy tokens after each prompt, all prompts in one call; no stop token is applied."""
    outputs = _generate(llm, prompts, _greedy_params(max_tokens))
    return [list(output.outputs[0].token_ids) for output in outputs]


def decode(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[list[int], torch.Tensor]]:
    """Like `greedy`, each with the distributions [max_tokens, V] that its tokens were drawn from."""
    vocab = llm.model_config.get_vocab_size()
    outputs = _generate(llm, prompts, _greedy_params(max_tokens, logprobs=-1, flat_logprobs=True))
    return [
        (list(output.outputs[0].token_ids), dense_logprobs(output.outputs[0].logprobs, vocab)) for output in outputs
    ]


def _greedy_params(max_tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **more)


def _generate(llm: Any, prompts: Sequence[Sequence[int]], params: Any) -> list[Any]:
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return llm.generate(requests, params, use_tqdm=False)


def dense_logprobs(flat: Any, vocab: int) -> torch.Tensor:
    """vLLM's FlatLogprobs as [positions, vocab] fp32; NaN where it has no entry."""
    starts, ends = torch.tensor(flat.start_indices), torch.tensor(flat.end_indices)
    position = torch.arange(len(starts)).repeat_interleave(ends - starts)
    table = torch.full((len(starts), vocab), torch.nan)
    table[position, torch.tensor(flat.token_ids, dtype=torch.long)] = torch.tensor(flat.logprobs)
    return table
