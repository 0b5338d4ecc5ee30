"""vLLM's quantization config for DeepSeek-V4 checkpoints, and only those, whatever tool packed them.

`register` imports it in every process, so the methods are imported only when a model is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..checkpoint.formats import is_supported
from ..config import MODEL_TYPE, DeepseekV4Config

if TYPE_CHECKING:
    from ..checkpoint.plan import PackedModule
    from ..ops.packed_weight import Scheme

NAME = "deepseek_v4flash"


class DeepseekV4QuantConfig(QuantizationConfig):
    """Decides module by module, from the checkpoint's tensors, how each weight is packed."""

    def __init__(self, source: dict[str, Any]) -> None:
        super().__init__()
        self.source = source
        self.plan: dict[str, PackedModule] = {}
        self.schemes: dict[str, Scheme] = {}

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DeepseekV4QuantConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """`NAME` for a DeepSeek-V4 text checkpoint of a supported method; None leaves every other one to vLLM."""
        if getattr(hf_config, "model_type", None) != MODEL_TYPE or getattr(hf_config, "vision_n_layers", 0):
            return None
        return NAME if is_supported(str((hf_quant_cfg or {}).get("quant_method"))) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the checkpoint's safetensors headers and plan how each packed module is stored.

        Raises:
            QuantizationError, CheckpointError: before anything is allocated.
        """
        from ..checkpoint.plan import plan_weights

        self.plan = plan_weights(
            DeepseekV4Config.from_hf(hf_config), self.source, _stored_tensors(model_name, revision)
        )
        self.schemes = {module: packed.scheme for module, packed in self.plan.items()}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method for a linear layer or a layer's routed experts; an unquantized one where nothing is packed."""
        from ..layers.methods import method_for

        return method_for(layer, prefix, self.schemes)


def _stored_tensors(model: str, revision: str | None) -> list[tuple[str, str, tuple[int, ...], str]]:
    """Name, dtype code, shape and file of each tensor, from the headers in a directory or a hub repository."""
    if Path(model).is_dir():
        from ..checkpoint.headers import read_headers

        return [(t.name, t.dtype, t.shape, t.file.name) for t in read_headers(model).values()]
    from huggingface_hub import get_safetensors_metadata

    files = get_safetensors_metadata(model, revision=revision).files_metadata.items()
    return [(name, t.dtype, tuple(t.shape), file) for file, data in files for name, t in data.tensors.items()]
