"""DeepSeek-V4-Flash (docs/model.md, "Config" and "Tensors"): its configuration, and checkpoints without data.

Their files have real headers, are sparse and take no disk space.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vllm_deepseek_v4flash.checkpoint.headers import DTYPE_BITS, INDEX
from vllm_deepseek_v4flash.checkpoint.names import Style, expected_tensors, stored_name
from vllm_deepseek_v4flash.config import DeepseekV4Config

Declared = dict[str, tuple[str, tuple[int, ...]]]
"""dtype code and shape of each stored tensor."""

FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "max_position_embeddings": 1048576,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "num_hash_layers": 3,
    "num_nextn_predict_layers": 1,
    "hc_mult": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
}
SMALL = {**FLASH, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1,
         "n_routed_experts": 8}  # fmt: skip
"""Flash with fewer layers and experts: one of each kind, and all of its sizes."""
FLASH_CONFIG = DeepseekV4Config.from_dict(FLASH)
NATIVE_QUANTIZATION: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
GPTQ_QUANTIZATION: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
}  # fmt: skip
PACKED_QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["head", "re:.*compressor.*w(kv|gate)$", "re:.*weights_proj$", "re:.*ffn\\.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "actorder": None,
            },
        }
    },
}

# DeepSeek quantises these; compressors, weights_proj, the router, embedding and head stay in bf16.
_DENSE = (".wq_a", ".attn.wq_b", ".indexer.wq_b", ".attn.wkv", ".wo_a", ".wo_b", ".shared_experts.w1",
          ".shared_experts.w2", ".shared_experts.w3")  # fmt: skip
_FP32 = ("hc_", ".attn_sink", ".ape", ".gate.bias")


def native(values: dict[str, Any], expert_dtype: str = "fp4") -> Declared:
    """FP8 dense weights and FP4 (or, as in Base, FP8) experts, under DeepSeek's own names, without mtp.*."""
    declared: Declared = {}
    for name, spec in expected_tensors(DeepseekV4Config.from_dict(values)).items():
        module, shape = name.removesuffix(".weight"), spec.shape
        scale = f"{module}.scale"
        if ".ffn.experts." in name and expert_dtype == "fp4":
            declared[name] = "I8", (shape[0], shape[1] // 2)
            declared[scale] = "F8_E8M0", (shape[0], shape[1] // 32)
        elif is_packed(module):
            declared[name] = "F8_E4M3", shape
            declared[scale] = "F8_E8M0", (-(-shape[0] // 128), -(-shape[1] // 128))
        else:
            declared[name] = unpacked_dtype(name, spec.integer), shape
    return declared


def mtp(values: dict[str, Any]) -> Declared:
    """The multi-token-prediction block that follows Flash's backbone (docs/model.md, "Multi-token prediction")."""
    block = {**values, "num_hidden_layers": 4, "compress_ratios": [0, 0, 0, 0]}
    declared = {
        "mtp.0." + name.removeprefix("layers.3."): value
        for name, value in native(block).items()
        if name.startswith("layers.3.")
    }
    hidden, streams = values["hidden_size"], values["hc_mult"]
    for name in ("e_proj", "h_proj"):
        declared[f"mtp.0.{name}.weight"] = "F8_E4M3", (hidden, hidden)
        declared[f"mtp.0.{name}.scale"] = "F8_E8M0", (hidden // 128, hidden // 128)
    for name in ("enorm", "hnorm", "norm"):
        declared[f"mtp.0.{name}.weight"] = "BF16", (hidden,)
    for leaf, shape in (("fn", (streams, streams * hidden)), ("base", (streams,)), ("scale", (1,))):
        declared[f"mtp.0.hc_head_{leaf}"] = "F32", shape
    return declared


def gptq(values: dict[str, Any], style: Style = "transformers", group: int = 128, act_order: bool = False) -> Declared:
    """GPTQ v1, 4 bit, symmetric (its zero points are stored all the same), for what DeepSeek quantises."""
    declared: Declared = {}
    for name, spec in expected_tensors(DeepseekV4Config.from_dict(values)).items():
        module, shape = name.removesuffix(".weight"), spec.shape
        if not is_packed(module):
            declared[stored_name(name, style)] = unpacked_dtype(name, spec.integer), shape
            continue
        (n, k), stored = shape, stored_name(f"{module}.weight", style).removesuffix(".weight")
        declared[f"{stored}.qweight"] = "I32", (k // 8, n)
        declared[f"{stored}.qzeros"] = "I32", (k // group, n // 8)
        declared[f"{stored}.scales"] = "F16", (k // group, n)
        if act_order:
            declared[f"{stored}.g_idx"] = "I32", (k,)
    return declared


def pack_quantized(values: dict[str, Any], style: Style = "saved", group: int = 128) -> Declared:
    """compressed-tensors, 4 bit, symmetric: no zero points, so the file is as large as the model in memory."""
    declared: Declared = {}
    for name, spec in expected_tensors(DeepseekV4Config.from_dict(values)).items():
        module, shape = name.removesuffix(".weight"), spec.shape
        if not is_packed(module):
            declared[stored_name(name, style)] = unpacked_dtype(name, spec.integer), shape
            continue
        (n, k), stored = shape, stored_name(f"{module}.weight", style).removesuffix(".weight")
        declared[f"{stored}.weight_packed"] = "I32", (n, k // 8)
        declared[f"{stored}.weight_scale"] = "BF16", (n, k // group)
        declared[f"{stored}.weight_shape"] = "I64", (2,)
    return declared


def is_packed(module: str) -> bool:
    return module.endswith(_DENSE) or ".ffn.experts." in module


def unpacked_dtype(name: str, integer: bool = False) -> str:
    return "I64" if integer else "F32" if any(part in name for part in _FP32) else "BF16"


def write_checkpoint(
    directory: Path, values: dict[str, Any], declared: Declared, quantization: Any = None, shards: int = 1
) -> Path:
    """config.json, a tokenizer's file, and `shards` sparse safetensors files, with an index if there are several."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text("{}")
    config = values if quantization is None else {**values, "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    names, weight_map = list(declared), {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        write_file(directory / file, {name: declared[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        total = sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for dtype, shape in declared.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index))
    return directory


def write_file(path: Path, declared: Declared) -> None:
    """One safetensors file whose data is a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in declared.items():
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
