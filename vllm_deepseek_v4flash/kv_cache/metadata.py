"""The metadata of a step: block tables, slots and each token's request, in buffers that never move."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..compat import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    KVCacheSpec,
    VllmConfig,
)


@dataclass
class DeepseekV4Metadata(AttentionMetadata):
    """One step as one KV-cache group sees it.

    T tokens (`num_tokens`), R requests; tokens of one request are adjacent, in order.
    """

    num_tokens: int
    """Tokens to process; the model's tensors may be longer (padding)."""
    block_table: torch.Tensor
    """[R, B] int32."""
    slot_mapping: torch.Tensor
    """[T] int64, page * block_size + token within the block; -1 for padding. Meaningless for compressed entries."""
    request: torch.Tensor
    """[T] int32, the row of `block_table` that each token belongs to."""
    max_seq_len: int
    """No request is longer than this (a host number, an upper bound)."""


class DeepseekV4MetadataBuilder(AttentionMetadataBuilder[DeepseekV4Metadata]):
    """Builds the metadata of one cache group without synchronising with the device or looping over tokens."""

    # Decoding steps only: which kernels run depends on how many tokens a request has, and a graph cannot branch.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Equal in every group: the V1 runner reorders the batch by the smallest threshold.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._max_model_len = vllm_config.model_config.max_model_len
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._token_index = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self._request = torch.zeros(max_tokens, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DeepseekV4Metadata:
        common = common_attn_metadata
        num_tokens = common.num_actual_tokens
        request = self._request[:num_tokens]
        # A token's request is the number of requests that end at or before it; padding falls to the last request.
        ends = common.query_start_loc[1 : common.num_reqs + 1].to(torch.int32)
        torch.searchsorted(ends, self._token_index[:num_tokens], right=True, out_int32=True, out=request)
        request.clamp_(max=common.num_reqs - 1)
        return DeepseekV4Metadata(
            num_tokens=num_tokens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping[:num_tokens],
            request=request,
            max_seq_len=common.max_seq_len,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> DeepseekV4Metadata:
        """The metadata that a graph is captured with: no request that replays it is longer than this allows."""
        metadata = self.build(0, common_attn_metadata)
        return replace(metadata, max_seq_len=self._max_model_len)
