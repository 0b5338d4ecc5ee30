"""The vLLM symbols that the model side uses, in one place.

`kv_cache/`, `layers/` and `model.py` import vLLM through this module only, so that a release that moves something fails
here, in one sentence, and is fixed here; docs/compatibility.md lists what the next release is going to move. It is a
leaf and not part of `integration/`, because imports run downwards and the layers import it; it registers and patches
nothing. `serving/compat.py` is the same for the API server.

Importing it imports torch and most of vLLM, so `register` does not. `tests/integration/test_compat.py` checks every
name, dataclass field and signature that the plugin relies on.
"""

from __future__ import annotations

from vllm.version import __version__ as VLLM_VERSION

try:
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture
    from vllm.config import VllmConfig
    from vllm.distributed import (
        get_pp_group,
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_reduce,
    )
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        LinearBase,
        LinearMethodBase,
        MergedColumnParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
        UnquantizedLinearMethod,
    )
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.models.utils import (
        extract_layer_index,
        make_layers,
        maybe_prefix,
    )
    from vllm.model_executor.utils import set_weight_attrs
    from vllm.sequence import IntermediateTensors
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionCGSupport,
        AttentionMetadata,
        AttentionMetadataBuilder,
        CommonAttentionMetadata,
        MultipleOf,
    )
    from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec, SlidingWindowMLASpec

    try:
        from vllm.v1.kv_cache_layout import KVCacheLayout
    except ImportError:  # vLLM 0.32 has it in both places; one is enough
        from vllm.v1.kv_cache_interface import KVCacheLayout
except ImportError as error:
    # Without the traceback: vLLM shows this in place of a reason why the model cannot be inspected.
    raise ImportError(
        f"vllm={VLLM_VERSION}: vllm-deepseek-v4flash does not support this version ({error}). Install one of those in "
        f"docs/compatibility.md, or set VLLM_DEEPSEEK_V4FLASH_DISABLE=1 for vLLM's own model.",
        name=error.name,
        path=error.path,
    ) from None
