#!/usr/bin/env python3
"""Reads what a release of a quantisation tool packs, and compares it with the tool's own reading, bit for bit.

    python scripts/check_packers.py auto-round              # the newest release on the package index
    python scripts/check_packers.py auto-round --version 0.15.1 --save DIR

The release and the packages that its packing code imports are installed without dependencies into a temporary
directory, so that neither torch nor the environment changes. `--save` also writes `config.json`, `model.safetensors`
and `dequant.json` as `testing/data/checkpoints.tar.xz` holds them.

AutoRound before 0.16 misreads a zero point of 0 that it stored minus one, and says so here: the errors against the
source show whose reading is right. llm-compressor's case is its `model_free_ptq`, run on a checkpoint of one matrix.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_HUGGING_FACE = ("accelerate", "datasets", "multiprocess", "dill", "pyarrow", "pandas", "xxhash", "pytz")
IMPORTED = {
    "auto-round": (*_HUGGING_FACE, "python-dateutil", "py-cpuinfo"),
    "gptqmodel": (*_HUGGING_FACE, "pypcre", "logbar", "tokenicer", "device-smi", "defuser", "threadpoolctl"),
    "compressed-tensors": (),
    "llmcompressor": (*_HUGGING_FACE, "python-dateutil", "compressed-tensors"),
}
GROUP = 64
# A weight's native module, its `quantization_config`, its stored tensors, what the tool makes of them (fp32 [out, in],
# or [tokens, channels] of an embedding), and the weight that it packed.
Case = tuple[str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor, torch.Tensor]
AWQ_CONFIG = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True}


def weight(n: int = 128, k: int = 128) -> torch.Tensor:
    """Values around a mean that differs by group, so that zero points cover their whole range."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.linspace(-3, 3, n * (k // GROUP)).reshape(n, k // GROUP).repeat_interleave(GROUP, 1)
    return torch.randn(n, k, generator=generator) + centre


def codes(source: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points, fp32 [N, G], of unsigned 4-bit codes."""
    groups = source.unflatten(1, (-1, GROUP))
    if symmetric:
        scales = groups.abs().amax(2) / 7
        return scales.half().float(), torch.full_like(scales, 8)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    return scales, (-low / scales).round().clamp(0, 15)


def auto_round() -> list[Case]:
    try:
        from auto_round.utils import model_free_utils as tool
    except ImportError:  # before 0.16
        from auto_round.compressors import model_free as tool
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    made: list[Case] = []
    module, source = "layers.0.attn.wq_a", weight()
    for default in (True, False):
        for symmetric in (True, False):
            scheme = {"bits": 4, "group_size": GROUP, "data_type": "int", "act_bits": 16}
            override = {module: {**scheme, "sym": symmetric}} if symmetric != default else {}
            arguments: dict[str, Any] = {"bits": 4, "group_size": GROUP, "sym": symmetric}
            minus_one = True
            if hasattr(tool, "_declared_int_packing"):
                arguments["packing"] = tool._declared_int_packing(symmetric)
                minus_one = arguments["packing"] == "auto_round:auto_gptq"
            stored = dict(
                zip(("qweight", "qzeros", "scales"), tool.quantize_weight_rtn(source, **arguments), strict=True)
            )
            config = tool._build_quantization_config({**scheme, "sym": default}, override, [], [module], [])
            config = json.loads(json.dumps(config))
            tool_layer = (qlinear_torch_zp if minus_one else qlinear_torch).QuantLinear
            made.append((module, config, stored, _auto_round_reading(tool_layer, stored, source), source))
    return made + _auto_round_layers(module, source)


def _auto_round_layers(module: str, source: torch.Tensor) -> list[Case]:
    """The layouts of the paths that quantise a loaded model."""
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    made: list[Case] = []
    n, k = source.shape
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = source
    scales, zeros = codes(source, False)
    for label, layer in (("auto_round:gptqmodel", qlinear_torch), ("auto_round:auto_gptq", qlinear_torch_zp)):
        packed = layer.QuantLinear(4, GROUP, k, n, bias=False)
        packed.device = torch.device("cpu")
        packed.pack(linear, scales, zeros.int(), None, device="cpu")
        stored = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
        config = {"quant_method": "auto-round", "packing_format": label, "bits": 4, "group_size": GROUP, "sym": False}
        made.append((module, config, stored, _auto_round_reading(layer.QuantLinear, stored, source), source))
    awq = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.t(), zeros=zeros.t(), device="cpu")
    stored = {"qweight": awq.qweight, "qzeros": awq.qzeros, "scales": awq.scales.contiguous()}
    read = dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"].float(), 4, GROUP)
    made.append((module, AWQ_CONFIG, stored, read.t().contiguous(), source))
    return made


def _auto_round_reading(layer: Any, stored: dict[str, torch.Tensor], source: torch.Tensor) -> torch.Tensor:
    n, k = source.shape
    reader = layer(4, GROUP, k, n, bias=False)
    for name, tensor in stored.items():
        setattr(reader, name, tensor.float() if name == "scales" else tensor)
    # One product a value: the product with the identity is the weight itself.
    return reader(torch.eye(k)).t().contiguous()


def gptqmodel() -> list[Case]:
    from gptqmodel import BACKEND
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear, TorchQuantEmbeddings
    from gptqmodel.quantization import FORMAT
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    made: list[Case] = []
    for module, layer, v1 in (
        ("layers.0.attn.wq_a", TorchLinear, True),
        ("layers.0.attn.wq_a", TorchLinear, False),
        ("embed", TorchQuantEmbeddings, True),
    ):
        for symmetric in (True, False):
            embedding = module == "embed"
            source = weight(256, 192) if embedding else weight()
            # It quantises an embedding as a layer from tokens to channels.
            matrix = source.t().contiguous() if embedding else source
            n, k = matrix.shape
            scales, zeros = codes(matrix, symmetric)
            holder: Any = torch.nn.Embedding(*source.shape) if embedding else torch.nn.Linear(k, n, bias=False)
            holder.weight.data = source
            packed = layer(
                bits=4, group_size=GROUP, desc_act=False, sym=symmetric, in_features=k, out_features=n, bias=False,
                pack_dtype=torch.int32, backend=BACKEND.GPTQ_TORCH, adapter=None, register_buffers=True,
                format=FORMAT.GPTQ if v1 else FORMAT.GPTQ_V2,
            )  # fmt: skip
            packed.pack_original(holder, scales, zeros.int(), torch.arange(k) // GROUP)
            packed.scales = packed.scales.float()
            if not hasattr(packed, "wf_unsqueeze_zero"):
                packed.post_init()
            read = packed.dequantize_weight()
            read = read if embedding else read.t()
            if v1:
                convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=4, group_size=GROUP))
            config = {
                "quant_method": "gptq", "checkpoint_format": "gptq" if v1 else "gptq_v2", "bits": 4,
                "group_size": GROUP, "sym": symmetric, "desc_act": False, "pack_dtype": "int32",
                "meta": {"quantizer": [f"gptqmodel:{importlib.metadata.version('gptqmodel')}"]},
            }  # fmt: skip
            stored = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
            stored |= {"scales": stored["scales"].half(), "g_idx": stored["g_idx"].int()}
            made.append((module, config, stored, read.float().contiguous(), source))
    return [*made, _gptqmodel_awq()]


def _gptqmodel_awq() -> Case:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear, dequantize_gemm

    source = weight()
    n, k = source.shape
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = source
    scales, zeros = codes(source, False)
    packed = AwqTorchLinear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=k, out_features=n, bias=False,
        pack_dtype=torch.int32, adapter=None, register_buffers=True,
    )  # fmt: skip
    packed.pack(linear, scales.half(), zeros)
    stored = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    read = dequantize_gemm(
        qweight=packed.qweight, qzeros=packed.qzeros, scales=packed.scales.float(), bits=4, group_size=GROUP
    )
    config = {**AWQ_CONFIG, "quant_method": "gptq", "checkpoint_format": "gemm", "sym": False}
    return "layers.0.attn.wq_a", config, stored, read.float().t().contiguous(), source


def compressed_tensors() -> list[Case]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    made: list[Case] = []
    source = weight()
    for symmetric in (True, False):
        arguments = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=GROUP)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        scales, zeros = codes(source, symmetric)
        state = {"weight": source, "weight_scale": scales, "weight_zero_point": (zeros - 8).to(torch.int8)}
        stored = PackedQuantizationCompressor.compress(state, scheme)
        read = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        config = QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized", ignore=[]).to_dict()
        stored = {name: stored[name] for name in stored if name.startswith("weight_")}
        made.append(("layers.0.attn.wq_a", json.loads(json.dumps(config, default=str)), stored, read.float(), source))
    return made


def llmcompressor() -> list[Case]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.entrypoints.model_free import model_free_ptq
    from safetensors.torch import load_file, save_file

    made: list[Case] = []
    module, source = "layers.0.attn.wq_a", weight()
    with tempfile.TemporaryDirectory() as directory:
        plain = Path(directory) / "plain"
        plain.mkdir()
        save_file({f"{module}.weight": source}, plain / "model.safetensors")
        (plain / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
        for symmetric in (True, False):
            arguments = QuantizationArgs(
                num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=GROUP
            )
            scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
            written = Path(directory) / f"symmetric-{symmetric}"
            model_free_ptq(plain, written, scheme, device="cpu")
            config = json.loads((written / "config.json").read_text())["quantization_config"]
            tensors = load_file(written / "model.safetensors")
            stored = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()}
            read = PackedQuantizationCompressor.decompress(dict(stored), scheme)["weight"]
            made.append((module, config, stored, read.float(), source))
    return made


TOOLS: dict[str, Callable[[], list[Case]]] = {
    "auto-round": auto_round,
    "gptqmodel": gptqmodel,
    "compressed-tensors": compressed_tensors,
    "llmcompressor": llmcompressor,
}


def check(tool: str, save: Path | None) -> int:
    """Read every case of a tool that is installed; the exit status."""
    from safetensors.torch import save_file

    from vllm_deepseek_v4flash.checkpoint.dtypes import header_of
    from vllm_deepseek_v4flash.checkpoint.formats import format_of
    from vllm_deepseek_v4flash.ops.packed_weight import dequantise

    wrong = 0
    for number, (module, config, stored, want, source) in enumerate(TOOLS[tool]()):
        form = format_of(config)
        headers = {leaf: header_of(tensor) for leaf, tensor in stored.items()}
        scheme = form.describe(config, module, headers)
        if module == "embed":
            want, source = want.t().contiguous(), source.t().contiguous()
        # A zero of either sign is the same weight.
        found = {"stored": form.dequantise(stored, scheme), "repacked": dequantise(form.repack(stored, scheme), scheme)}
        equal = all(torch.equal(reading, want) for reading in found.values())
        wrong += not equal
        symmetry = "symmetric" if not scheme.zero_points else "asymmetric"
        label = config.get("packing_format") or config.get("checkpoint_format") or config.get("format")
        ours, theirs = (float((reading - source).norm() / source.norm()) for reading in (found["stored"], want))
        verdict = "equal" if equal else f"DIFFERS; the tool's own reading has an error of {theirs:.4f}"
        print(f"{number} {module} {symmetry}, {label}: error {ours:.4f} against the source, {verdict}")
        if save is not None:
            directory = save / str(number)
            directory.mkdir(parents=True)
            (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
            tensors = {f"{module}.{leaf}": tensor.contiguous() for leaf, tensor in stored.items()}
            save_file(tensors, directory / "model.safetensors")
            digest = hashlib.sha256((want + 0.0).contiguous().numpy().tobytes()).hexdigest()
            entry = {f"{module}.weight": {"shape": list(want.shape), "sha256": digest}}
            (directory / "dequant.json").write_text(json.dumps(entry))
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--version", help="the release; default: the newest")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write each case to DIR/0, DIR/1, ...")
    parser.add_argument("--installed", action="store_true", help="use the tool that this environment has")
    options = parser.parse_args()
    if options.installed:
        print(f"{options.tool} {importlib.metadata.version(options.tool)}")
        return check(options.tool, options.save)
    release = f"{options.tool}=={options.version}" if options.version else options.tool
    with tempfile.TemporaryDirectory() as directory:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory]
        subprocess.run([*install, release, *IMPORTED[options.tool]], check=True)
        save = ["--save", str(options.save)] if options.save else []
        environment = {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}", "TORCHDYNAMO_DISABLE": "1"}
        command = [sys.executable, __file__, options.tool, "--installed", *save]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
