"""The class that vLLM constructs for the architecture `DeepseekV4ForCausalLM`.

What vLLM may ask of the model (pipeline parallelism) is declared here and not in `model.py`: vLLM inspects a class once
and caches the answer under a hash of the file that it was registered with, so a declaration elsewhere could change
without vLLM noticing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsPP

from ..model import DeepseekV4ForCausalLM as Model
from .in_tree import build_in_tree_model
from .workarounds import end_failed_reload, keep_seeded_requests_on_cpu


class DeepseekV4ForCausalLM(Model, SupportsPP):
    """`model.DeepseekV4ForCausalLM`; inside vLLM's vision wrapper, vLLM's own text model."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        in_tree = build_in_tree_model(vllm_config, prefix)
        if in_tree is not None:
            return in_tree
        if torch.get_default_device().type == "cpu":
            keep_seeded_requests_on_cpu()
        return super().__new__(cls)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """`model.DeepseekV4ForCausalLM.load_weights`. After a failed reload, requests still find weights on the device.

        They are a mixture of old and new ones: the caller, who gets the error, reloads or ends the engine.
        """
        try:
            return super().load_weights(weights)
        except Exception:
            end_failed_reload(self)
            raise
