"""vLLM's own DeepSeek-V4 class stays reachable, because vLLM's vision wrapper builds on it.

`DeepseekV4ForConditionalGeneration` remains vLLM's, but it looks up its language model in the model registry under the
architecture name that this plugin takes over. vLLM's class is therefore kept under a second name, and the plugin's
class (`registered_model.py`) hands over to it inside the wrapper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import ARCHITECTURE

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig

IN_TREE_ARCHITECTURE = f"{ARCHITECTURE}_vllm_in_tree"


def keep_in_tree_class(models: dict[str, Any], our_module: str) -> None:
    """Keep what vLLM has registered for the architecture under `IN_TREE_ARCHITECTURE`, unless it is `our_module`'s."""
    current = models.get(ARCHITECTURE)
    if current is not None and getattr(current, "module_name", None) != our_module:
        models[IN_TREE_ARCHITECTURE] = current


def build_in_tree_model(vllm_config: VllmConfig, prefix: str) -> nn.Module | None:
    """vLLM's own text model if `vllm_config` is that of its vision wrapper, else None."""
    model_config = vllm_config.model_config
    if not getattr(model_config.hf_config, "vision_n_layers", 0):
        return None
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models.registry import ModelRegistry

    in_tree, _ = ModelRegistry.resolve_model_cls([IN_TREE_ARCHITECTURE], model_config)
    return initialize_model(vllm_config, prefix=prefix, model_class=in_tree)
