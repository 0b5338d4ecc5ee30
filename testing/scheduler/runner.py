"""Runs requests on an engine in this process step by step, and controls its scheduler between the steps.

    runner = Runner(llm)
    run = runner.run([Request(prompt, 12), Request(other, 8, arrival=3, abort_after=5)], budgets=(1, 7, 128))
    run.results[0].logprobs, run.chunks(0), run.preemptions

`budgets` are the numbers of tokens of the steps, used in turn. A `Squeeze` takes free blocks away for some steps, so
that running requests are preempted. Both use private attributes of vLLM's scheduler: a release without them fails here
with an AttributeError.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from testing.engine import dense_logprobs

# The order of sums changes with the batch: by up to 1e-5 in these tests. A wrong row makes 1e-2 and more.
TOLERANCE = 1e-4
MAX_STEPS = 20_000


@dataclass(frozen=True)
class Request:
    """A request for exactly `max_tokens` tokens, greedy or, with a seed, sampled at temperature 1.

    arrival: the step before which it is added. abort_after: how many steps later it is aborted, if it still runs.
    prompt_logprobs: ask for the distribution after every prompt token; such a request does not read the prefix cache.
    n: sequences, which needs a seed if there are several: sequence i is then that of `seed + i`.
    priority: less is more urgent, with `scheduling_policy="priority"`.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    arrival: int = 0
    abort_after: int | None = None
    prompt_logprobs: bool = False
    seed: int | None = None
    n: int = 1
    priority: int = 0


@dataclass(frozen=True)
class Squeeze:
    """For `steps` steps, beginning with step `start`, only `free` blocks are left free."""

    start: int
    steps: int
    free: int = 0


@dataclass(frozen=True)
class Result:
    """tokens: the generated ones. logprobs: [tokens, vocab], the distribution that each was drawn from.

    prompt_logprobs: [prompt - 1, vocab], if requested. cached: prompt tokens from the prefix cache.
    """

    tokens: list[int]
    logprobs: torch.Tensor
    prompt_logprobs: torch.Tensor | None
    cached: int


@dataclass
class Run:
    """results: one for each request, None if it was aborted. steps: the tokens of each step by request.

    sequences: all `n` results of each request, the first being that in `results`; none if it was aborted.
    """

    results: list[Result | None]
    steps: list[dict[int, int]] = field(default_factory=list)
    preemptions: int = 0
    sequences: list[list[Result]] = field(default_factory=list)

    def chunks(self, request: int) -> list[int]:
        """The tokens of one request in each step that it took part in."""
        return [step[request] for step in self.steps if request in step]

    def result(self, request: int) -> Result:
        result = self.results[request]
        assert result is not None, f"request {request} was aborted"
        return result


class Runner:
    """Drives the engine of one `LLM` that was made with `multiprocessing=False`."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.vocab = llm.model_config.get_vocab_size()
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.max_budget = self.scheduler.scheduler_config.max_num_batched_tokens
        self._schedule = self.scheduler.schedule
        self._log: list[Any] = []
        self._names = itertools.count()
        self._held: dict[Squeeze, Any] = {}
        self.scheduler.schedule = self._recorded_schedule

    def _recorded_schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        self._log.append((dict(output.num_scheduled_tokens), len(output.preempted_req_ids or ())))
        return output

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.engine.reset_prefix_cache(), "a request still holds blocks"

    def alone(self, prompt: Sequence[int], max_tokens: int, seed: int | None = None) -> Result:
        """The reference: no other request runs, nothing is cached, and the prompt is one step."""
        assert len(prompt) <= self.max_budget
        self.forget()
        run = self.run([Request(tuple(prompt), max_tokens, prompt_logprobs=True, seed=seed)])
        assert run.chunks(0) == [len(prompt)] + [1] * (max_tokens - 1)
        assert run.result(0).cached == 0
        self.forget()
        return run.result(0)

    def run(self, requests: Sequence[Request], budgets: Sequence[int] = (), squeezes: Sequence[Squeeze] = ()) -> Run:
        """Run the requests to their ends; AssertionError if that takes more than MAX_STEPS steps."""
        self._log.clear()
        outputs: dict[str, Any] = {}
        names = [f"{next(self._names)}" for _ in requests]
        internal: dict[str, int] = {}
        last_arrival = max(request.arrival for request in requests)
        budget = itertools.cycle(budgets or (self.max_budget,))
        step = 0
        try:
            while step <= last_arrival or self.engine.has_unfinished_requests():
                assert step < MAX_STEPS, f"the engine does not come to an end: {self.scheduler.get_request_counts()}"
                for number, request in enumerate(requests):
                    if request.arrival == step:
                        internal |= dict.fromkeys(self._add(names[number], request), number)
                    elif request.abort_after is not None and request.arrival + request.abort_after == step:
                        self.engine.abort_request([names[number]])
                self._squeeze(squeezes, step)
                self.scheduler.max_num_scheduled_tokens = next(budget)
                if self.engine.has_unfinished_requests():
                    outputs |= {output.request_id: output for output in self.engine.step()}
                step += 1
        finally:
            self.scheduler.max_num_scheduled_tokens = self.max_budget
            self._release(*self._held)
        steps = [_by_request(tokens, internal) for tokens, _ in self._log if tokens]
        found = [self._results(outputs.get(name), request) for name, request in zip(names, requests, strict=True)]
        first = [sequences[0] if sequences else None for sequences in found]
        return Run(first, steps, sum(preempted for _, preempted in self._log), found)

    def _squeeze(self, squeezes: Sequence[Squeeze], step: int) -> None:
        for squeeze in squeezes:
            if squeeze.start == step:
                count = max(0, self.pool.get_num_free_blocks() - squeeze.free)
                self._held[squeeze] = self.pool.get_new_blocks(count)
            elif squeeze.start + squeeze.steps == step:
                self._release(squeeze)

    def _release(self, *squeezes: Squeeze) -> None:
        for squeeze in squeezes:
            self.pool.free_blocks(self._held.pop(squeeze))

    def _add(self, name: str, request: Request) -> list[str]:
        """The names of its sequences in the scheduler."""
        prompt = {"prompt_token_ids": list(request.prompt)}
        added = self.engine.add_request(name, prompt, _sampling(request), priority=request.priority)
        return [added] if request.n == 1 else [f"{index}_{added}" for index in range(request.n)]

    def _results(self, output: Any, request: Request) -> list[Result]:
        if output is None:
            assert request.abort_after is not None, "vLLM lost a request"
            return []
        assert [completion.index for completion in output.outputs] == list(range(request.n))
        return [read_output(output, self.vocab, index) for index in range(request.n)]


def _by_request(tokens: dict[str, int], requests: dict[str, int]) -> dict[int, int]:
    """The tokens of a step, by the number of the request that the scheduler's names belong to."""
    counts: dict[int, int] = {}
    for name, count in tokens.items():
        counts[requests[name]] = counts.get(requests[name], 0) + count
    return counts


def generate(llm: Any, requests: Sequence[Request]) -> list[Result]:
    """Run requests all at once on an engine of any kind; arrivals and aborts are ignored."""
    prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
    outputs = llm.generate(prompts, [_sampling(request) for request in requests], use_tqdm=False)
    return [read_output(output, llm.model_config.get_vocab_size()) for output in outputs]


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0 if request.seed is None else 1.0, seed=request.seed, n=request.n,
        max_tokens=request.max_tokens, ignore_eos=True, detokenize=False,
        logprobs=-1, prompt_logprobs=-1 if request.prompt_logprobs else None, flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def read_output(output: Any, vocab: int, index: int = 0) -> Result:
    """A sequence of a finished vLLM RequestOutput with all its distributions."""
    completion = output.outputs[index]
    prompt_logprobs = None
    if output.prompt_logprobs is not None:
        # vLLM has no distribution for the first token of a prompt.
        prompt_logprobs = dense_logprobs(output.prompt_logprobs, vocab)[1:]
    return Result(
        list(completion.token_ids),
        dense_logprobs(completion.logprobs, vocab),
        prompt_logprobs,
        output.num_cached_tokens,
    )


def difference(result: Result, reference: Result, tolerance: float = TOLERANCE) -> float:
    """The largest |Δlogprob| between `result` and `reference`, which may have more tokens.

    Raises:
        AssertionError: a difference above `tolerance`, or another token where the reference's choice is clear.
    """
    count = len(result.tokens)
    assert 0 < count <= len(reference.tokens)
    worst = 0.0
    if result.prompt_logprobs is not None:
        assert reference.prompt_logprobs is not None
        worst = _largest(result.prompt_logprobs, reference.prompt_logprobs, "prompt", tolerance)
    for place in range(count):
        ours, theirs = result.logprobs[place], reference.logprobs[place]
        worst = max(worst, _largest(ours[None], theirs[None], f"new token {place}", tolerance))
        if result.tokens[place] != reference.tokens[place]:
            best, second = theirs.topk(2).values.tolist()
            # Two tokens within rounding of each other: both are right, and what follows differs.
            assert best - second <= 2 * tolerance, f"new token {place}: {result.tokens} is not {reference.tokens}"
            break
    return worst


def _largest(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float) -> float:
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} is not {tuple(theirs.shape)}"
    if not ours.numel():
        return 0.0  # a prompt of one token has no prompt logprobs
    # A NaN must not count as small.
    gaps = (ours - theirs).abs().nan_to_num(nan=torch.inf).amax(-1)
    worst, row = float(gaps.max()), int(gaps.argmax())
    assert worst <= tolerance, f"{what}, row {row} of {len(ours)}: logprobs differ by {worst:.2e}"
    return worst
