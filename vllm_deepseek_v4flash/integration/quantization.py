"""vLLM's quantization config for DeepSeek-V4 checkpoints, and only those, whatever tool packed them.

`register` imports it in every process, so the methods are imported only when a model is built.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..checkpoint.formats import is_supported, same_method
from ..checkpoint.headers import TensorHeader, holds_weights, read_headers
from ..checkpoint.survey import refuse, survey
from ..config import MODEL_TYPE, DeepseekV4Config

if TYPE_CHECKING:
    from ..checkpoint.plan import PackedModule
    from ..ops.packed_weight import Scheme

NAME = "deepseek_v4flash"
# The load formats of vLLM that read the *.safetensors of a directory.
_READ_AS_SAFETENSORS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")


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
        """`NAME` for a DeepSeek-V4 text checkpoint of a supported method; None leaves every other one to vLLM.

        Raises:
            ValueError: `--quantization` asks for another method than the checkpoint's.
        """
        if getattr(hf_config, "model_type", None) != MODEL_TYPE or getattr(hf_config, "vision_n_layers", 0):
            return None
        method = str((hf_quant_cfg or {}).get("quant_method"))
        if not is_supported(method):
            return None
        if user_quant is not None and user_quant != NAME and not same_method(user_quant, method):
            raise ValueError(
                f"--quantization={user_quant}: config.json says quant_method {method!r}, and the weights are read as "
                f"they are stored. Start without --quantization."
            )
        return NAME

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Survey the checkpoint's safetensors headers, and plan how each packed module is stored.

        Raises:
            CheckpointError: it does not fit its config.json, with every reason; nothing is allocated yet.
        """
        found = survey(DeepseekV4Config.from_hf(hf_config), self.source, _headers(model_name, revision))
        refuse(found.problems)
        self.plan = found.plan()
        self.schemes = {module: packed.scheme for module, packed in self.plan.items()}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method for a linear layer or a layer's routed experts; an unquantized one where nothing is packed."""
        from ..layers.methods import method_for

        return method_for(layer, prefix, self.schemes)


def check_unquantised(config: DeepseekV4Config, model: str, load_format: str) -> None:
    """Survey a directory whose config.json has no `quantization_config`; for these vLLM makes no config to ask.

    What is not in a directory, or not read by vLLM's default loader, is surveyed as it is loaded.

    Raises:
        CheckpointError: the checkpoint does not fit its config.json, with every reason; nothing is allocated yet.
    """
    if load_format in _READ_AS_SAFETENSORS and holds_weights(model):
        refuse(survey(config, None, read_headers(model).values()).problems)


def _headers(model: str, revision: str | None) -> Iterable[TensorHeader]:
    """The header of each tensor in a directory or a hub repository."""
    if Path(model).is_dir():
        return read_headers(model).values()
    from huggingface_hub import get_safetensors_metadata

    files = get_safetensors_metadata(model, revision=revision).files_metadata.items()
    return [
        TensorHeader(t.dtype, tuple(t.shape), name, Path(file))
        for file, data in files
        for name, t in data.tensors.items()
    ]
