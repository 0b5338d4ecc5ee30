"""The console script `vllm-deepseek-v4flash`."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_deepseek_v4flash import __version__
from vllm_deepseek_v4flash.config import line, shown

if TYPE_CHECKING:
    from vllm_deepseek_v4flash.inspect.capacity import Capacity
    from vllm_deepseek_v4flash.inspect.contents import Report

_MOST_BYTES = float(1 << 63)
_LEAST_BYTES = 1 << 20  # no GPU has less: a forgotten unit
_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {_prefix: 1000**_power, f"{_prefix}B": 1000**_power, f"{_prefix}IB": 1024**_power}

_INSPECT = """\
Read config.json and the safetensors headers of a checkpoint, print its modules by format, group size, shape, count and
bytes, list what is missing, unexpected or mis-shaped, and check the files that a chat needs. With --gpus and --memory
also say what fits. Of a Hugging Face repository only these parts are downloaded; of a directory without its shards the
index, or config.json alone, gives an estimate. Reads no weights, needs no GPU, no vLLM and no torch. Exit status: 0 it
can be served, 1 it cannot (the reasons come last), 2 wrong usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name may have characters that the terminal's encoding has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.gpus is None) != (options.memory is None):
        parser.error("--gpus and --memory go together: --gpus 2 --memory 80GiB")
    try:
        status = _inspect(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python flushes stdout once more at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse_size(text: str) -> int:
    """Bytes of "80GiB", "80 GB", "80G" (the same as 80GB), "81920MiB" or a plain number.

    Raises:
        argparse.ArgumentTypeError: for anything else, and below 1 MiB, as "80" without a unit is.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = float(match[1]) * unit if match and unit else 0.0
    if not _LEAST_BYTES <= size < _MOST_BYTES:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not the memory of a GPU: write 80GiB (1024^3) or 80G, 80GB (1000^3)"
        )
    return int(size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-deepseek-v4flash", description="Tools for DeepSeek-V4 under vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="what a checkpoint holds, and what fits", description=_INSPECT)
    inspect.add_argument(
        "model", metavar="MODEL", help="a directory with config.json and *.safetensors, or OWNER/NAME on Hugging Face"
    )
    inspect.add_argument(
        "--revision", metavar="REVISION", help="branch, tag or commit on Hugging Face; HF_TOKEN and HF_ENDPOINT apply"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    fit = inspect.add_argument_group("what fits", "GPUs share the model by tensor parallelism")
    fit.add_argument("--gpus", type=_positive, metavar="N", help="how many GPUs")
    fit.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="memory of each GPU, as CUDA reports it (about 79GiB of an 80 GB card)",
    )
    fit.add_argument("--gpu-memory-utilization", type=_share, default=0.92, metavar="SHARE",
                     help="same as vLLM's; default %(default)s")  # fmt: skip
    fit.add_argument(
        "--kv-cache-dtype", default="auto", metavar="DTYPE", help="same as vLLM's: auto (fp8), fp8, bfloat16"
    )
    fit.add_argument("--index-cache-dtype", default="auto", metavar="DTYPE",
                     help="the indexer's keys: auto (same as the cache), fp8, fp4, model")  # fmt: skip
    fit.add_argument("--enable-expert-parallel", action="store_true", help="same as vLLM's: whole experts on each GPU")
    fit.add_argument(
        "--max-num-seqs", type=_positive, default=256, metavar="N", help="same as vLLM's; default %(default)s"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from 1 up to 999999999")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a share of the memory: above 0, at most 1")
    return share


def _inspect(options: argparse.Namespace) -> int:
    # Imported here because they import torch where it is installed, which `--help` and wrong options do not need.
    from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError
    from vllm_deepseek_v4flash.inspect.contents import inspect_checkpoint
    from vllm_deepseek_v4flash.inspect.report import as_json, as_text

    try:
        report = inspect_checkpoint(options.model, options.revision)
    except CheckpointError as error:
        if options.json:
            print(json.dumps({"servable": False, "reasons": [str(error)]}, indent=1))
        else:
            print(f"This checkpoint cannot be served:\n  {error}")
        return 1
    reasons, capacity = _problem_reasons(report), None
    if report.basis == "headers":
        # What is not downloaded yet need not lack them.
        reasons += report.chat.problems
    if options.gpus is not None:
        capacity, more = _fit(report, options)
        reasons += more
    if options.json:
        print(json.dumps(as_json(report, capacity, reasons), indent=1))
    else:
        print(as_text(report, capacity, reasons, _cache_flags(options)))
    return 1 if reasons else 0


def _problem_reasons(report: Report) -> list[str]:
    if not report.problems:
        return []
    first = report.problems[0]
    reason = f"{len(report.problems):,} problems in its tensors or config.json"
    return [f"{reason}, first {line(f'{first.kind}: {first.name}: {first.text}')}"]


def _fit(report: Report, options: argparse.Namespace) -> tuple[Capacity | None, list[str]]:
    """What fits, and the reasons why it does not; without a plan where the model cannot be divided at all."""
    from vllm_deepseek_v4flash.inspect.capacity import Limits, division_problems, plan_capacity
    from vllm_deepseek_v4flash.kv_cache.formats import CacheFormats
    from vllm_deepseek_v4flash.ops.torch_or_dtypes import torch

    limits = Limits(
        options.gpus, options.memory, options.gpu_memory_utilization, options.enable_expert_parallel,
        options.max_num_seqs,
    )  # fmt: skip
    divisions = division_problems(report.config, report.resident, limits)
    if divisions:
        return None, [f"--gpus {limits.gpus}: {name} {why}" for name, why in divisions]
    try:
        formats = CacheFormats.select(report.config, options.kv_cache_dtype, options.index_cache_dtype, torch.bfloat16)
    except ValueError as error:
        return None, [str(error)]
    capacity = plan_capacity(report.config, report.resident, formats, limits)
    if capacity.best is not None:
        return capacity, []
    smallest = capacity.fits[-1]
    return capacity, [
        f"it does not fit {limits.gpus} x {limits.memory:,} bytes at --gpu-memory-utilization {limits.utilization:g}: "
        f"weights take {capacity.weights:,} and a step of {smallest.batch_tokens} tokens {smallest.activations:,} of "
        f"{capacity.budget:,}, which leaves {smallest.cache:,} for the cache. Use more GPUs, larger ones, or more of "
        f"their memory."
    ]


def _cache_flags(options: argparse.Namespace) -> list[str]:
    flags = [] if options.kv_cache_dtype == "auto" else [f"--kv-cache-dtype {options.kv_cache_dtype}"]
    if options.index_cache_dtype != "auto":
        value = json.dumps({"index_cache_dtype": options.index_cache_dtype})
        flags.append(f"--additional-config '{value}'")
    return flags


if __name__ == "__main__":
    sys.exit(main())
