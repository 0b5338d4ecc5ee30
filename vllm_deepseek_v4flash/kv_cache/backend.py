"""The attention backend of every DeepSeek-V4 cache."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..compat import AttentionBackend, KVCacheLayout, MultipleOf
from ..config import BLOCK_TOKENS
from . import BACKEND_NAME
from .metadata import DeepseekV4MetadataBuilder


class DeepseekV4Backend(AttentionBackend):
    """Window, CSA and HCA attention over pages of mixed sizes; the layers call the ops, so there is no impl class."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError(
            f"--attention-backend={BACKEND_NAME}: only for the layers of DeepSeek-V4. Leave the option unset."
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
        # A block holds pages of different sizes, so blocks must be outermost.
        return (KVCacheLayout.BLHNC,)
