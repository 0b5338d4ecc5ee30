"""The cost of loading a packed checkpoint: time, and peak resident memory compared with the sizes of model and shards.

    python -m benchmarks.load_cost [--gigabytes 3] [--shard-megabytes 500] [--keep DIR]

Writes a random GPTQ checkpoint with DeepSeek's names, loads it with vLLM in this process and prints one JSON object.
The aim: the peak above what the process had before is at most the packed model plus two shards.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_deepseek_v4flash.checkpoint.names import expected_tensors
from vllm_deepseek_v4flash.config import DeepseekV4Config

GROUP = 128
EXPERTS, HIDDEN, INNER = 64, 2048, 1024


def config_json(layers: int) -> dict[str, Any]:
    """A V4 with wide experts; nearly all of its bytes are theirs, as in Flash."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "torch_dtype": "bfloat16",
        "vocab_size": 1024, "hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 128, "qk_rope_head_dim": 64, "q_lora_rank": 256, "o_lora_rank": 128,
        "o_groups": 2, "sliding_window": 128, "compress_ratios": ([0, 4, 128] * layers)[:layers],
        "index_n_heads": 8, "index_head_dim": 128, "index_topk": 512, "n_routed_experts": EXPERTS,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": INNER, "num_hash_layers": 0,
        "max_position_embeddings": 4096, "rope_scaling": None, "swiglu_limit": 10.0,
        "bos_token_id": 0, "eos_token_id": 1,
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
            "checkpoint_format": "gptq",
        },
    }  # fmt: skip


def packed_leaves(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Random GPTQ leaves of one symmetric weight [rows, columns]."""
    groups = columns // GROUP
    return {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), dtype=torch.int32),
        "qzeros": torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.full((groups, rows), 2.0**-8, dtype=torch.float16),
    }


def write_checkpoint(directory: Path, gigabytes: float, shard_bytes: int) -> tuple[int, int]:
    """Write the checkpoint shard by shard; returns its bytes and those of the largest shard."""
    expert = 3 * HIDDEN * INNER // 2
    layers = -(-int(gigabytes * 1e9) // (expert * EXPERTS))
    settings = config_json(layers)
    (directory / "config.json").write_text(json.dumps(settings))
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    sizes: list[int] = []

    def flush() -> None:
        name = f"model-{len(sizes) + 1:05d}.safetensors"
        save_file(shard, directory / name)
        index.update(dict.fromkeys(shard, name))
        sizes.append((directory / name).stat().st_size)
        shard.clear()

    for name, spec in expected_tensors(DeepseekV4Config.from_dict(settings)).items():
        if ".ffn.experts." in name:
            module = name.removesuffix(".weight")
            shard.update({f"{module}.{leaf}": t for leaf, t in packed_leaves(*spec.shape).items()})
        else:
            shard[name] = torch.zeros(spec.shape, dtype=torch.bfloat16)
        if sum(tensor.nbytes for tensor in shard.values()) >= shard_bytes:
            flush()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(sizes), max(sizes)


def resident_bytes() -> int:
    """The resident memory of this process, including mapped files."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """Samples resident memory every 5 ms while the `with` block runs."""

    def __enter__(self) -> Peak:
        self.before = self.highest = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def load(directory: Path) -> dict[str, float]:
    """Load with vLLM in this process: seconds, and the peak above the memory in use before."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    measured: dict[str, float] = {}
    original = DefaultModelLoader.load_model

    def load_model(*arguments: Any, **options: Any) -> torch.nn.Module:
        with Peak() as peak:
            started = time.monotonic()
            model = original(*arguments, **options)
            measured["seconds"] = time.monotonic() - started
        measured["peak"] = peak.highest - peak.before
        measured["packed"] = sum(p.nbytes for p in model.parameters())
        return model

    DefaultModelLoader.load_model = load_model
    LLM(
        str(directory), skip_tokenizer_init=True, max_model_len=512, max_num_batched_tokens=512, max_num_seqs=2,
        kv_cache_memory_bytes=64 << 20,
    )  # fmt: skip
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--shard-megabytes", type=int, default=500)
    parser.add_argument("--keep", type=Path, help="write the checkpoint here and keep it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.keep or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        total, largest = write_checkpoint(directory, options.gigabytes, options.shard_megabytes * 1_000_000)
        result = load(directory)
    bound = result["packed"] + 2 * largest
    print(json.dumps({
        "checkpoint_bytes": total, "largest_shard_bytes": largest, "model_bytes": int(result["packed"]),
        "peak_bytes": int(result["peak"]), "bound_bytes": int(bound), "within_bound": result["peak"] <= bound,
        "seconds": round(result["seconds"], 1), "megabytes_per_second": round(total / result["seconds"] / 1e6),
        "threads": torch.get_num_threads(),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
