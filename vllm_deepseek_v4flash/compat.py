"""Everything the plugin takes from vLLM outside its public plugin surface, in one place.

The model side imports vLLM only through this module, so that a vLLM release that moves something breaks here,
by name, and is mended here.  Importing it imports torch and most of vLLM: `vllm_deepseek_v4flash/__init__.py`
must not, and does not.

`tests/test_compat.py` checks each name, each dataclass field and each signature that the plugin relies on.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger as _init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    is_pp_missing_parameter,
    make_layers,
    maybe_prefix,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec, SlidingWindowMLASpec

from vllm_deepseek_v4flash import logger_name

try:
    from vllm.v1.kv_cache_layout import KVCacheLayout
except ImportError:  # 0.32's kv_cache_interface re-exports it; keep both homes
    from vllm.v1.kv_cache_interface import KVCacheLayout

try:
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
except ImportError:

    def eager_break_during_capture(fn):  # type: ignore[no-untyped-def,misc]
        """Without breakable CUDA graphs there is nothing to break: the function itself."""
        return fn


def init_logger(module: str) -> Any:
    """vLLM's logger under a name that its default configuration prints (see `logger_name`)."""
    return _init_logger(logger_name(module))


@functools.cache
def spec_fields(spec_type: type) -> frozenset[str]:
    """The constructor arguments that this vLLM's KV-cache spec class knows."""
    return frozenset(field.name for field in dataclasses.fields(spec_type) if field.init)


def accepts_argument(function: Any, name: str) -> bool:
    """Whether a call `function(..., name=...)` is possible in this vLLM."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
