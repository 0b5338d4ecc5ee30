"""The attention backend that vLLM finds behind every DeepSeek-V4 cache."""

from __future__ import annotations

from typing import Any

import torch

from ..compat import AttentionBackend, KVCacheLayout, MultipleOf
from ..config import BLOCK_TOKENS
from .metadata import DeepseekV4MetadataBuilder

BACKEND_NAME = "DEEPSEEK_V4FLASH"


class DeepseekV4Backend(AttentionBackend):
    """Window, CSA and HCA attention over mixed page sizes. The layers call the ops themselves, so there is no impl class."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError(
            f"{BACKEND_NAME} serves DeepSeek-V4's own layers only and has no implementation for other models' attention: "
            "leave --attention-backend unset"
        )

    @staticmethod
    def get_builder_cls() -> type[DeepseekV4MetadataBuilder]:
        return DeepseekV4MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return BLOCK_TOKENS

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Pages of different sizes lie side by side in a block, so blocks must be outermost.
        return (KVCacheLayout.BLHNC,)
