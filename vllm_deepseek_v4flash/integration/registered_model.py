"""The class that vLLM constructs for the architecture `DeepseekV4ForCausalLM`.

What vLLM may ask of the model (pipeline parallelism) is declared here and not in `model.py`: vLLM inspects a class once
and caches the answer under a hash of the file that it was registered with, so a declaration elsewhere could change
without vLLM noticing.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsPP

from ..model import DeepseekV4ForCausalLM as Model
from .in_tree import build_in_tree_model


class DeepseekV4ForCausalLM(Model, SupportsPP):
    """`model.DeepseekV4ForCausalLM`; inside vLLM's vision wrapper, vLLM's own text model."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        in_tree = build_in_tree_model(vllm_config, prefix)
        return super().__new__(cls) if in_tree is None else in_tree
