"""Times the steps of an engine in this process: the wall-clock time of `engine.step()`."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .connector import PRETEND
from .families import Event
from .results import FailedError, NotRunError
from .stepping import Steps

SETTLED = 3
"""Calls of `step()` after which all requests that fit have started."""


@dataclass(frozen=True)
class Decode:
    """Decoding steps of one batch, in milliseconds a step.

    events: the kernels of `profiled` steps, with graphs if there are any (`graphs` is not None).
    """

    graphs: float | None
    eager: float
    events: list[Event]
    profiled: int


class TimedEngine:
    """llm: with the connector of connector.py and without a prefix cache. dry: a step or two of everything."""

    def __init__(self, llm: Any, dry: bool) -> None:
        self.engine, self.dry = llm.llm_engine, dry
        self.vocab = llm.model_config.get_vocab_size()
        self.steps = Steps(llm)
        # With a connector vLLM hashes every prompt, for a prefix cache that is off: seconds for 128 long prompts.
        self.engine.engine_core.engine_core.request_block_hasher = None
        self.names = itertools.count()
        self.warm, self.timed, self.profiled = (1, 1, 1) if dry else (4, 24, 4)

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt's arrival to its first token, the median of three."""
        times = []
        for turn in range(1 if self.dry else 4):
            self.synchronize()
            started = time.perf_counter()
            (name,) = self.add(1, tokens, 1, pretend=False)
            output = self.finish(name)
            if turn or self.dry:  # the first may compile
                times.append(time.perf_counter() - started)
            logprob = next(iter(output.outputs[0].logprobs[0].values())).logprob
            if not math.isfinite(logprob):
                raise FailedError(f"the first token after {tokens} has the log-probability {logprob}")
        return statistics.median(times)

    def decode(self, batch: int, context: int) -> Decode:
        """Requests that begin with `context` cached tokens; the same requests step with graphs and eagerly."""
        most = 3 * self.warm + 2 * self.timed + 2 * self.profiled + 8
        names = self.add(batch, context, most, pretend=True)
        try:
            self.advance(names[-1], self.warm, batch)
            captured = self.steps.captured > 0
            graphs, events = None, []
            if captured:
                graphs = self.milliseconds(names[-1])
                events = self.profile(lambda: self.advance(names[-1], self.profiled))
            with self.steps.eagerly():
                self.advance(names[-1], self.warm)
                eager = self.milliseconds(names[-1])
                if not captured:
                    events = self.profile(lambda: self.advance(names[-1], self.profiled))
            return Decode(graphs, eager, events, self.profiled)
        finally:
            self.engine.abort_request(names)
            while self.engine.has_unfinished_requests():
                self.engine.step()

    def milliseconds(self, name: str) -> float:
        self.synchronize()
        started = time.perf_counter()
        made = self.advance(name, self.timed)
        self.synchronize()
        return (time.perf_counter() - started) * 1000 / made

    def add(self, batch: int, tokens: int, new: int, pretend: bool) -> list[str]:
        from vllm import SamplingParams

        names = []
        for _ in range(batch):
            names.append(f"timed-{next(self.names)}")
            ids = torch.randint(3, self.vocab, (tokens,)).tolist()
            params = SamplingParams(
                temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=None if pretend else 1,
                extra_args=PRETEND if pretend else None,
            )  # fmt: skip
            self.engine.add_request(names[-1], {"prompt_token_ids": ids}, params)
        return names

    def advance(self, name: str, count: int, batch: int = 0) -> int:
        """Step until the request has at least `count` more tokens; returns how many more.

        Raises:
            NotRunError: `batch` requests do not fit at once.
        """
        first = last = None
        for number in range(50 * count + 500):
            if number == SETTLED and batch:
                running, waiting = self.engine.engine_core.engine_core.scheduler.get_request_counts()
                if running < batch:
                    raise NotRunError(f"the cache holds {running} of these requests at once, {waiting} wait")
            for output in self.engine.step():
                if output.request_id == name:
                    last = len(output.outputs[0].token_ids)
                    first = last - 1 if first is None else first
                    if output.finished:
                        raise FailedError(f"{name} ended after {last} tokens")
            if first is not None and last is not None and last - first >= count:
                return last - first
        raise FailedError(f"{name} makes no progress: {last} tokens")

    def finish(self, name: str) -> Any:
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.request_id == name and output.finished:
                    return output
        raise FailedError(f"vLLM lost {name}")

    def profile(self, work: Callable[[], Any]) -> list[Event]:
        """The kernels that `work` runs, including copies and fills."""
        # Recording the CPU as well would slow it down and make the GPU idle.
        activity = torch.profiler.ProfilerActivity
        kinds = [activity.CPU] if self.dry else [activity.CUDA]
        self.synchronize()
        with torch.profiler.profile(activities=kinds) as profiler:
            work()
            self.synchronize()
        return [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]

    def synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
