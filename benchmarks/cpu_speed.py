"""The speed of a small model on a CPU, compared with `transformers` on the same checkpoint and prompts.

    python -m benchmarks.cpu_speed [--model examples/toy] [--dtype float32] [--threads 2] [--write docs/cpu-speed.md]

Prompts are random token ids of one length, so that transformers can batch them without padding, which V4's
compressors would pool. Both decode greedily and ignore the end token. No other work should run on the machine; if some
must, `--clock process` measures the CPU time of the process, in one thread, instead of wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

PROMPT, NEW_TOKENS, STREAMS = 64, 128, (1, 16)
CONTEXTS = (1024, 4096, 8192, 16384, 32768)
STEPS = 32
"""Decode steps in the mean of a context's step time."""
ROUNDS = 3
"""How often each time is measured. The shortest counts, because other work only adds to it."""
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "process": time.process_time}
MARK = "<!-- written by benchmarks.cpu_speed -->\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("examples/toy"))
    parser.add_argument("--dtype", default="float32", help="of our engine; transformers is correct in float32 only")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="numbers of prompts at once")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="a stream")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="of the step and prefill times")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: CPU time, with one thread")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not time the kernels' compilation (half a minute)"
    )
    parser.add_argument("--write", type=Path, help=f"put the tables into this Markdown file, after {MARK.strip()}")
    options = parser.parse_args(argv)
    if options.clock == "process" and options.threads != 1:
        parser.error(f"--threads {options.threads}: --clock process adds up the time of all threads. Use --threads 1")
    if options.write and MARK not in options.write.read_text():
        parser.error(f"--write {options.write}: there is no line {MARK.strip()}. Add it where the tables should go")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    report = measure(options)
    text = markdown(report)
    print(text)
    print(json.dumps(report))
    if options.write:
        options.write.write_text(options.write.read_text().partition(MARK)[0] + MARK + text)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of the report; times in seconds, rates in tokens a second."""
    import torch

    torch.set_num_threads(options.threads)
    contexts, longest = options.contexts, max(options.contexts)
    report: dict[str, Any] = {
        "model": str(options.model), "dtype": options.dtype, "threads": options.threads, "clock": options.clock,
        "cpu": processor(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
        "prompt": PROMPT, "new_tokens": options.new_tokens,
    }  # fmt: skip
    report["compile"] = {} if options.no_compile else compile_times()
    report["transformers"] = transformers_rates(options)
    engine = Engine(options)
    report["ours"] = {str(n): engine.rate(n) for n in options.streams}
    with without_model(engine.model()):
        report["vllm"] = {str(n): engine.rate(n) for n in options.streams}
    report["steps"] = {str(n): engine.step_time(n) for n in contexts}
    report["prefill"] = {str(n): engine.prefill_rate(n) for n in contexts}
    report["profile"] = {f"{n} streams": engine.profile(partial(engine.one_rate, n)) for n in options.streams}
    decode = engine.decoding(longest)
    report["profile"][f"step at {longest}"] = engine.profile(decode)
    report["profile"][f"prefill of {longest}"] = engine.profile(lambda: engine.seconds(engine.fresh(1, longest), 1))
    return report


def compile_times() -> dict[str, float]:
    """Seconds until the CPU's kernels are ready in a new process: compiled, or read from disk."""
    code = (
        "import time, numba, torch; from vllm_deepseek_v4flash.ops.dispatch import prepare; start = time.perf_counter()"
        "; prepare(torch.device('cpu')); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"NUMBA_CACHE_DIR": directory}
        run = [sys.executable, "-c", code]
        return {
            name: float(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout)
            for name in ("first", "later")
        }


def prompts(count: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    # The first ids are special tokens.
    return torch.randint(8, vocab, (count, length), generator=generator).tolist()


def transformers_rates(options: argparse.Namespace) -> dict[str, float]:
    """New tokens a second of transformers' `generate` in fp32 with its cache."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    clock, new_tokens = CLOCKS[options.clock], options.new_tokens
    oracle = DeepseekV4ForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()

    def run(streams: int) -> float:
        ids = torch.tensor(prompts(streams, PROMPT, oracle.config.vocab_size))
        start = clock()
        with torch.no_grad():
            out = oracle.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                do_sample=False, pad_token_id=2,
            )  # fmt: skip
        assert out.shape == (streams, PROMPT + new_tokens)
        return streams * new_tokens / (clock() - start)

    return {str(n): max(run(n) for _ in range(ROUNDS)) for n in options.streams}


class Engine:
    """Our model in vLLM, in this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM

        self.clock, self.new_tokens = CLOCKS[options.clock], options.new_tokens
        length = max([*options.contexts, PROMPT + self.new_tokens]) + STEPS + 256
        self.llm = LLM(
            str(options.model), dtype=options.dtype, skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 30,
            max_model_len=length, max_num_batched_tokens=2048, max_num_seqs=max(options.streams),
            enable_prefix_caching=True, disable_log_stats=True, use_tqdm_on_load=False, seed=0,
            hf_overrides={"max_position_embeddings": length},
        )  # fmt: skip
        self.vocab = self.llm.model_config.get_vocab_size()
        self.seed = 0

    def rate(self, streams: int) -> float:
        """New tokens a second; the time includes prompts."""
        return max(self.one_rate(streams) for _ in range(ROUNDS))

    def one_rate(self, streams: int) -> float:
        return streams * self.new_tokens / self.seconds(self.fresh(streams, PROMPT), self.new_tokens)

    def prefill_rate(self, length: int) -> float:
        return length / min(self.seconds(self.fresh(1, length), 1) for _ in range(ROUNDS))

    def step_time(self, context: int) -> float:
        """Seconds of one decode step of one request at this context."""
        decode = self.decoding(context)
        return (min(decode() for _ in range(ROUNDS)) - min(decode(1) for _ in range(ROUNDS))) / STEPS

    def decoding(self, context: int) -> Callable[..., float]:
        """A function that times `STEPS` + 1 tokens after a prompt that is in the prefix cache."""
        # Whole blocks are found: one more token leaves one to compute.
        prompt = self.fresh(1, context + 1)
        self.seconds(prompt, 1)
        return lambda tokens=1 + STEPS: self.seconds(prompt, tokens)

    def fresh(self, count: int, length: int) -> list[list[int]]:
        self.seed += 1
        return prompts(count, length, self.vocab, self.seed)

    def seconds(self, ids: list[list[int]], tokens: int) -> float:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = self.clock()
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in ids], params, use_tqdm=False)
        elapsed = self.clock() - start
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return elapsed

    def model(self) -> Any:
        return self.llm.collective_rpc(lambda worker: worker.get_model())[0]

    def profile(self, run: Callable[[], Any]) -> dict[str, float]:
        """The share of time in each of our ops, in linear layers, in the rest of the model, and in vLLM."""
        with timed(self.model(), self.clock) as seconds:
            start = self.clock()
            run()
            total = self.clock() - start
        inside = seconds.pop("model")
        shares = {name: value / total for name, value in seconds.items()}
        shares["rest of the model"] = (inside - sum(seconds.values())) / total
        shares["vLLM"] = 1 - inside / total
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


@contextmanager
def without_model(model: Any) -> Iterator[None]:
    """A model that computes nothing: the remaining time is vLLM's."""
    import torch

    hidden, dtype = model.config.hidden_size, model.model.norm.weight.dtype
    model.forward = lambda input_ids, positions, *rest, **more: torch.zeros(len(positions), hidden, dtype=dtype)
    try:
        yield
    finally:
        del model.forward


@contextmanager
def timed(model: Any, clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds by op, `linear` and `model` during the block. A nested call counts once, for the inner op."""
    from vllm.model_executor.layers.linear import LinearBase

    from vllm_deepseek_v4flash.ops import dispatch
    from vllm_deepseek_v4flash.ops.cpu.recording import Recording

    seconds: dict[str, float] = defaultdict(float)
    running: list[float] = []

    def timing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            running.append(0.0)
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = clock() - start
                within = running.pop()
                seconds[name] += elapsed - (0.0 if name == "model" else within)
                if running and name != "model":
                    running[-1] += elapsed

        return call

    def timed_replay(recording: Recording) -> None:
        for name, function, arguments in recording.calls:
            timing("torch" if name.startswith("aten") else name, function)(*arguments)

    replay = Recording.replay
    Recording.replay = timed_replay  # type: ignore[assignment, method-assign]
    modules = [m for m in model.modules() if isinstance(m, LinearBase)]
    for module in modules:
        module.forward = timing("linear", module.forward)
    forward = model.forward
    model.forward = timing("model", forward)
    try:
        with dispatch.wrap(timing):
            yield seconds
    finally:
        Recording.replay = replay  # type: ignore[method-assign]
        del model.forward
        for module in modules:
            del module.forward


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} threads)" if names else platform.processor()


def markdown(report: dict[str, Any]) -> str:
    ours, theirs, steps = report["ours"], report["transformers"], report["steps"]
    alone = " and ".join(f"{rate:.0f}" for rate in report["vllm"].values())
    clock = "" if report["clock"] == "wall" else " (CPU time, other work was running)"
    lines = [
        f"Measured {report['date']} on {report['cpu']}, {report['threads']} thread(s){clock}, torch {report['torch']}, "
        f"`{report['model']}` in {report['dtype']}, transformers in float32.",
        "",
        "| streams | ours, tokens/s | transformers, tokens/s | ratio |",
        "|---|---|---|---|",
        *(f"| {n} | {ours[n]:.0f} | {theirs[n]:.0f} | {ours[n] / theirs[n]:.1f} |" for n in ours),
        "",
        f"{report['prompt']} prompt tokens and {report['new_tokens']} new ones a stream; the time includes prompts. "
        f"vLLM with a model that computes nothing generates {alone} tokens/s.",
        "",
        f"| context | decode step, ms | relative to {next(iter(steps))} | prefill, tokens/s |",
        "|---|---|---|---|",
        *(
            f"| {n} | {1e3 * step:.2f} | {step / next(iter(steps.values())):.2f} | {report['prefill'][n]:.0f} |"
            for n, step in steps.items()
        ),
        "",
    ]
    if report["compile"]:
        first, later = report["compile"]["first"], report["compile"]["later"]
        lines += [
            f"Compiling the kernels takes {first:.0f} s at the first start; reading them {later:.1f} s later.",
            "",
        ]
    lines += ["Where the time goes, in percent:", ""]
    names = list(report["profile"])
    parts = sorted({part for shares in report["profile"].values() for part in shares})
    lines += [f"| part | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for part in parts:
        shares = [100 * report["profile"][name].get(part, 0.0) for name in names]
        if max(shares) >= 1:
            lines.append(f"| {part} | {' | '.join(f'{share:.0f}' for share in shares)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
