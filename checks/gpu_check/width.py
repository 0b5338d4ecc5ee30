"""The part `width`: Flash's real widths with random 4-bit weights and as many layers as fit, in vLLM's engine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import floor
from benchmarks.report import Peaks
from benchmarks.roofline import measure_peaks, time_us

from . import connector, families, random_model
from .families import FAMILIES
from .random_model import Shape
from .results import Recorder
from .stepping import graph_options
from .timed import Decode, TimedEngine

CHUNK = 8192
START, POINT = 45.0, 8.0
"""Seconds for a start, and for a point."""
LAYERS = sum(floor.FLASH_LAYERS.values())


@dataclass(frozen=True)
class Points:
    prefills: tuple[int, ...] = (2048, 16384)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    contexts: tuple[int, ...] = (1024, 65536)

    @property
    def length(self) -> int:
        """--max-model-len: room for what a point generates."""
        return max(*self.prefills, *self.contexts) + 256


FLASH, TINY = Points(), Points((40,), (1, 2), (24, 300))


@dataclass
class Bench:
    """What the points of one engine share. A dry run has no `peaks` and no `head`."""

    recorder: Recorder
    points: Points
    shape: Shape
    peaks: Peaks | None
    chunk: int
    head: dict[int, float] = field(default_factory=dict)
    """Milliseconds of the head's product by batch: the part of a step that does not grow with the layers."""

    def scaled(self, milliseconds: float, batch: int) -> float:
        """To Flash's 43 layers."""
        head = self.head.get(batch, 0.0)
        return head + (milliseconds - head) * LAYERS / self.shape.count

    def floor_ms(self, cost: floor.Cost) -> float:
        assert self.peaks is not None
        return 1000 * cost.seconds(self.peaks.copy_gb_per_s, self.peaks.matmul_tflop_per_s)


def run(recorder: Recorder) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        recorder.attempt("engine", lambda: measure(recorder, Path(scratch)), START)


def measure(recorder: Recorder, scratch: Path) -> str:
    points, dry = TINY if recorder.dry else FLASH, recorder.dry
    bench = prepare(recorder, scratch, points)
    directory = random_model.write(scratch / "model", bench.shape)
    record: dict[str, int] = {}
    with engine(directory, engine_options(bench, record)) as llm:
        timed = TimedEngine(llm, dry)
        add_prefills(bench, timed, "prefill")
        bench.head = head_ms(llm, bench)
        add_decodes(bench, timed, "decode")
        recorder.attempt("memory", lambda: memory(bench, llm, directory, record))
        return f"{bench.shape.count} layers ({layer_text(bench.shape)}); {timed.steps.captured} whole graphs captured"


def prepare(recorder: Recorder, scratch: Path, points: Points) -> Bench:
    """Choose the number of layers and measure the device's peaks."""
    if recorder.dry:
        return Bench(recorder, points, Shape(1, dry=True), None, 64)
    peaks = measure_peaks(torch.device("cuda"))
    torch.cuda.empty_cache()
    memory = torch.cuda.mem_get_info()[1]
    shape = random_model.choose(scratch, memory, max(points.batches), points.length, CHUNK)
    recorder.result.notes.append(
        f"{shape.count} of Flash's {LAYERS} layers ({layer_text(shape)}), random weights. Measured here: copies at "
        f"{peaks.copy_gb_per_s:.0f} GB/s, bf16 products at {peaks.matmul_tflop_per_s:.0f} TFLOP/s. Floors are the "
        f"bytes and operations of docs/gpu-check.md at these rates. Contexts have random rows; none was computed."
    )
    return Bench(recorder, points, shape, peaks, CHUNK)


def layer_text(shape: Shape) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in shape.layers.items())


def engine_options(bench: Bench, record: dict[str, int]) -> dict[str, Any]:
    """For `vllm.LLM`. record: receives the bytes of the weights when they are created."""
    options: dict[str, Any] = {
        "load_format": random_model.register_loader(record), "dtype": "bfloat16",
        "max_model_len": bench.points.length, "max_num_batched_tokens": bench.chunk,
        "max_num_seqs": max(bench.points.batches), "kv_transfer_config": connector.CONFIG, "max_logprobs": 1,
        **graph_options(bench.recorder.dry),
    }  # fmt: skip
    if not bench.recorder.dry:
        # vLLM measures how much memory it can use.
        options |= {"kv_cache_memory_bytes": None, "gpu_memory_utilization": random_model.UTILIZATION}
    return options


@contextlib.contextmanager
def engine(directory: Path, options: dict[str, Any]) -> Iterator[Any]:
    from testing.engine import running

    with running(directory, **options) as llm:
        yield llm


def add_prefills(bench: Bench, timed: TimedEngine, title: str) -> None:
    recorder, dry = bench.recorder, bench.recorder.dry
    head = ["prompt", "ms", "tokens/s", f"ms, {LAYERS} layers", f"tokens/s, {LAYERS} layers", "floor ms", "% of it"]
    table = recorder.table(title, head)
    for tokens in bench.points.prefills:

        def point(tokens: int = tokens) -> str:
            ms = 1000 * timed.prefill(tokens)
            whole = ms * LAYERS / bench.shape.count
            least = None if dry else bench.floor_ms(floor.prefill(floor.FLASH_LAYERS, tokens, bench.chunk))
            rate, rate43 = (1000 * tokens / each for each in (ms, whole))
            table.rows.append([
                f"{tokens}", *map(recorder.figure, (ms, rate, whole, rate43, least)),
                recorder.figure(None if least is None else 100 * least / whole, ".0f"),
            ])  # fmt: skip
            keep(recorder, title, {"tokens": tokens, "ms": ms})
            return f"{recorder.figure(rate, '.0f')} tokens/s, the first token's log-probability is finite"

        recorder.attempt(f"{title}, {tokens} tokens", point, POINT)


def add_decodes(bench: Bench, timed: TimedEngine, title: str) -> None:
    recorder = bench.recorder
    head = ["batch", "context", "ms, graphs", "ms, eager", f"ms, {LAYERS} layers", "floor ms", "% of it", "tokens/s"]
    note = (
        f"{LAYERS} layers: the faster of the two times, times {LAYERS}/{bench.shape.count} except for the head. "
        f"tokens/s: of all requests together, at {LAYERS} layers."
    )
    recorder.table(title, head, note)
    recorder.table(family_title(title), ["batch", "context", "run", *FAMILIES])
    for context in bench.points.contexts:
        for batch in bench.points.batches:

            def point(batch: int = batch, context: int = context) -> str:
                return add_decode(bench, timed, title, batch, context)

            recorder.attempt(f"{title}, batch {batch}, context {context}", point, POINT)


def family_title(title: str) -> str:
    return f"GPU time of a step by family, ms ({title})"


def add_decode(bench: Bench, timed: TimedEngine, title: str, batch: int, context: int) -> str:
    recorder, figure = bench.recorder, bench.recorder.figure
    found: Decode = timed.decode(batch, context)
    best = min(filter(None, (found.graphs, found.eager)))
    whole = bench.scaled(best, batch)
    least = None if bench.peaks is None else bench.floor_ms(floor.decode(floor.FLASH_LAYERS, batch, context))
    share = None if least is None else 100 * least / whole
    recorder.table(title, []).rows.append([
        f"{batch}", f"{context}", figure(found.graphs, ".2f"), figure(found.eager, ".2f"), figure(whole, ".2f"),
        figure(least, ".2f"), figure(share, ".0f"), figure(1000 * batch / whole, ".0f"),
    ])  # fmt: skip
    by_family = families.milliseconds(found.events, found.profiled)
    way = "eager" if found.graphs is None else "graphs"
    scaled = {name: time * LAYERS / bench.shape.count for name, time in by_family.items()}
    scaled["linears"] = bench.scaled(by_family["linears"], batch)
    rows = recorder.table(family_title(title), []).rows
    for what, times in ((way, by_family), (f"{way}, {LAYERS} layers", scaled)):
        rows.append([f"{batch}", f"{context}", what, *(figure(times[name], ".3f") for name in FAMILIES)])
    point = {"batch": batch, "context": context, "graphs": found.graphs, "eager": found.eager}
    more = {"head": bench.head.get(batch), "families": by_family, "other": families.unknown(found.events)}
    keep(recorder, title, point | more)
    return f"{figure(best, '.2f')} ms a step; {timed.steps.taken()}"


def keep(recorder: Recorder, title: str, point: dict[str, Any]) -> None:
    """Add a point's numbers to the JSON report, except in a dry run."""
    if not recorder.dry:
        recorder.result.data.setdefault(title, []).append(point)


def head_ms(llm: Any, bench: Bench) -> dict[int, float]:
    """The time of the head's product, by batch."""
    if bench.recorder.dry:
        return {}
    hidden = llm.model_config.get_hidden_size()

    def of(model: Any) -> dict[int, float]:
        found = {}
        for batch in bench.points.batches:
            x = torch.randn((batch, hidden), device="cuda", dtype=torch.bfloat16)
            found[batch] = time_us([partial(model.compute_logits, x)]) / 1000
        return found

    return llm.apply_model(of)[0]


def memory(bench: Bench, llm: Any, directory: Path, record: dict[str, int]) -> str:
    """What vLLM uses, and what `inspect` reports for the same directory."""
    total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 8 << 30
    planned = random_model.capacity(directory, bench.shape, total, max(bench.points.batches))
    caches = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    storages = {c.kv_cache.untyped_storage().data_ptr(): c.kv_cache.untyped_storage().nbytes() for c in caches}
    pool = sum(storages.values())
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    step = random_model.activation_bytes(
        bench.shape.config, random_model.limits(total, max(bench.points.batches)), bench.chunk
    )
    table = bench.recorder.table("memory, GiB", ["what", "`inspect`", "measured"])

    def row(what: str, plan: float | None, found: float | None) -> None:
        cells = ["" if value is None else f"{value / 2**30:.2f}" for value in (plan, found)]
        table.rows.append([what, cells[0], bench.recorder.figure(None) or cells[1]])

    row("weights", planned.weights, record["weights"])
    row("a step, without weights and cache", step, peak - record["weights"] - pool)
    row("the cache pool", planned.budget - planned.weights - step, pool)
    row("PyTorch's peak allocation", None, peak)
    row("PyTorch's peak reservation", None, reserved)
    row("a block of the pool, x 1024", planned.pool.block_bytes * 1024, pool / blocks * 1024)
    keep(bench.recorder, "memory", {"weights": record["weights"], "pool": pool, "peak": peak, "reserved": reserved})
    off = record["weights"] / planned.weights - 1
    return f"the weights differ by {off:+.2%} from what `inspect` reports"
