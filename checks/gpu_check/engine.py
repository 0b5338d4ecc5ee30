"""The part `engine`: small checkpoints in vLLM, and their tokens compared with the CPU's.

In fp32 every token must be the CPU's. In 16 bits, or with fp8 rows, two correct implementations round differently, so a
reply may differ from the CPU's where the choice was close: within `NEAR`, and in at most 1 - `LEAST` of the replies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import checkpoints, expected
from . import scheduling as steering
from .checkpoints import SETTINGS, Setting
from .expected import Reply
from .results import FailedError, NotRunError, Recorder
from .stepping import Steps, graph_options, imitate_graphs

NEAR = 1.0
"""Nats between the best two tokens. On a CPU, PyTorch's ops and Numba's, which sum in another order, differ in that
distance by 0.01 on average and by up to 1.3 in 16 bits with fp8 rows, and by 0.001 at most in fp32."""
LEAST = 0.95
"""The share of replies that must be the CPU's in 16 bits, as in tests/test_gpu.py. Those two sets of ops agree on all
64 replies of every setting, and so do 16 bits and fp32; a wrong kernel changes nearly all."""
NEEDS = 20.0
"""Seconds for an engine's start, captures and requests; if the last engine took longer, as long as that."""


@dataclass(frozen=True)
class Start:
    """One engine. graphs: with CUDA graphs and then eagerly; otherwise without options, which is eager."""

    setting: Setting
    graphs: bool = True
    alone: int = 0
    """How many of the prompts also run one at a time."""

    @property
    def name(self) -> str:
        return f"{self.setting.name}{'' if self.graphs else ', default start'}"


def starts(dry: bool) -> list[Start]:
    """The most important first, in case the budget does not suffice for all."""
    by_name = {setting.name: setting for setting in SETTINGS}
    if dry:
        # On a CPU a step with packed experts cannot be recorded.
        return [Start(SETTINGS[0]), Start(by_name["toy-int4, bfloat16, fp8 rows"], graphs=False, alone=1)]
    order = [
        Start(by_name["scheduler, float32, fp32 rows"]),
        Start(by_name["toy, bfloat16, fp8 rows"], alone=8),
        Start(by_name["toy-int4, bfloat16, fp8 rows"], alone=8),
        Start(by_name["toy-fp4, bfloat16, fp8 rows"], alone=8),
        Start(by_name["toy, float32, fp32 rows"], alone=checkpoints.PROMPTS),
        Start(by_name["toy, bfloat16, bfloat16 rows"], alone=8),
        Start(by_name["toy, bfloat16, fp8 rows"], graphs=False),
    ]
    done = {start.setting for start in order}
    return order + [Start(setting) for setting in SETTINGS if setting not in done]


def run(recorder: Recorder) -> None:
    stored = expected.read()
    recorder.result.notes.append(
        f"In fp32 all tokens must be the CPU's. In 16 bits at least {LEAST:.0%} of the replies must be, and a reply "
        f"may differ only from a token on whose lead over the second best is less than {NEAR:g} nats."
    )
    needs = NEEDS
    with tempfile.TemporaryDirectory() as scratch:
        for start in starts(recorder.dry):
            before = recorder.clock()
            recorder.attempt(start.name, partial(serve, start, stored, Path(scratch), recorder), needs)
            needs = max(NEEDS, recorder.clock() - before)


def serve(start: Start, stored: dict[str, Any], scratch: Path, recorder: Recorder) -> str:
    """Start the engine and run everything on it; records a case for each, in addition to that of the start."""
    from testing import engine

    setting = start.setting
    path = checkpoints.checkpoint(setting.checkpoint, scratch)
    if checkpoints.fingerprint(path) != stored["checkpoints"][setting.checkpoint]:
        raise FailedError(f"the checkpoint {setting.checkpoint} is not the one that expected.json was made from")
    trained = setting.checkpoint != "scheduler"
    options: dict[str, Any] = {**setting.options, **(graph_options(recorder.dry) if start.graphs else {})}
    options |= {"max_num_seqs": checkpoints.PROMPTS} if trained else steering.OPTIONS
    with engine.running(path, **options) as llm:
        if recorder.dry and start.graphs:
            imitate_graphs(llm)
        steps = Steps(llm)
        steps.taken()
        begun = recorder.clock()
        for way in ("graphs", "eager") if start.graphs else ("default",):
            if way == "eager":
                with steps.eagerly():
                    serve_all(start, way, llm, steps, stored, recorder)
            else:
                serve_all(start, way, llm, steps, stored, recorder)
        return f"started; {steps.captured} whole graphs captured; served in {recorder.clock() - begun:.1f} s"


def serve_all(start: Start, way: str, llm: Any, steps: Steps, stored: dict[str, Any], recorder: Recorder) -> None:
    wanted = expected.replies(stored, start.setting)

    def case(what: str, found: Callable[[], str]) -> None:
        def counted() -> str:
            steps.taken()
            text = found()
            modes = dict(steps.counts)
            text = f"{text}; steps: {steps.taken()}"
            if way == "graphs" and not modes.get("FULL"):
                raise FailedError(f"no decoding step was a whole CUDA graph; {text}")
            return text

        recorder.attempt(f"{start.name}: {what}, {way}", counted)

    if start.setting.checkpoint == "scheduler":
        cases = steering.cases(llm, wanted, recorder.dry)
        # In a dry run both ways do the same.
        for what, found in cases[:1] if recorder.dry and way == "eager" else cases:
            case(what, found)
        return
    prompts = checkpoints.prompts(start.setting.checkpoint)
    count, most = (4, 5) if recorder.dry else (len(prompts), None)
    replies: list[Reply] = []

    def at_once() -> str:
        replies.extend(expected.generate(llm, start.setting, prompts[:count], most))
        return compare(replies, cut(wanted[:count], most), start.setting.exact)

    def alone() -> str:
        if not replies:
            raise NotRunError("there are no replies to compare with")
        each = [expected.generate(llm, start.setting, [prompt], most)[0] for prompt in prompts[: start.alone]]
        return compare(each, replies[: start.alone], start.setting.exact)

    case(f"{count} requests at once, against the CPU", at_once)
    if start.alone and way != "eager":
        case(f"{start.alone} of them alone, against themselves among others", alone)


def cut(replies: Sequence[Reply], most: int | None) -> list[Reply]:
    return [Reply(reply.tokens[:most], reply.gaps[:most]) for reply in replies]


def compare(found: Sequence[Reply], wanted: Sequence[Reply], exact: bool) -> str:
    """How many replies are equal, as text.

    Raises:
        FailedError: too many differ, or one differs where the choice was clear.
    """
    same, parted, drift = 0, [], 0.0
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours.tokens == theirs.tokens:
            same += 1
            drift = max([drift, *(abs(a - b) for a, b in zip(ours.gaps, theirs.gaps, strict=True))])
            continue
        pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(ours.tokens), len(theirs.tokens)))
        parted.append((number, at, theirs.gaps[at] if at < len(theirs.gaps) else float("inf")))
    text = f"{same} of {len(wanted)} replies are equal, distances to the second best token within {drift:.3f}"
    told = "; ".join(f"reply {number} from token {at} on, where {gap:.3f} nats decided" for number, at, gap in parted)
    wrong = [gap for _, _, gap in parted if exact or gap > NEAR]
    if wrong or same < (1.0 if exact else LEAST) * len(wanted) - 0.5:
        raise FailedError(f"{text}; others are {told}")
    return f"{text}; others: {told}" if parted else text
