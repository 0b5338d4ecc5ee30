"""DeepSeek-V4 as vLLM runs it, in the order of docs/model.md.

Every token is carried by `hc_mult` residual streams. A layer mixes them into one vector, attends, spreads the result
back over the streams, and does the same around its experts. What a layer attends to besides the sliding window is its
kind: nothing (window), 512 compressed entries chosen by the lightning indexer (CSA, ratio 4), or all entries (HCA,
ratio 128).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .checkpoint.loader import load_weights
from .compat import (
    IntermediateTensors,
    LogitsProcessor,
    ParallelLMHead,
    VllmConfig,
    VocabParallelEmbedding,
    eager_break_during_capture,
    extract_layer_index,
    get_pp_group,
    make_layers,
    maybe_prefix,
)
from .config import DeepseekV4Config, LayerKind
from .kv_cache.formats import CacheFormats
from .kv_cache.layer_caches import LayerCaches
from .kv_cache.step_replay import StepReplay
from .layers.attention import DeepseekV4Attention
from .layers.hyper_connections import HyperConnection, Residual, merge_streams, mixing_parameters
from .layers.methods import Unpacked
from .layers.moe import MoE
from .layers.norm import RMSNorm
from .layers.projections import merged_parts, packed_modules_mapping
from .layers.rotary import RotaryEmbedding
from .log import logger_name
from .ops.dispatch import describe, prepare

logger = logging.getLogger(logger_name(__name__))


class DeepseekV4DecoderLayer(nn.Module):
    """Attention and experts, each between a hyper-connection's two halves (docs/model.md, "Residual streams")."""

    def __init__(self, config: DeepseekV4Config, vllm_config: VllmConfig, formats: CacheFormats, prefix: str) -> None:
        super().__init__()
        layer = extract_layer_index(prefix)
        self.kind = config.layer_kinds[layer]
        registry = vllm_config.compilation_config.static_forward_context
        self.caches = LayerCaches(
            config, layer, formats, max_model_len=vllm_config.model_config.max_model_len,
            prefix=f"{prefix}.attn", registry=registry,
        )  # fmt: skip
        quant_config = vllm_config.quant_config or Unpacked()
        self.attn = DeepseekV4Attention(config, layer, quant_config=quant_config, prefix=f"{prefix}.attn")
        # Piecewise CUDA graphs stop before this and go on after it. vLLM 0.32's decorator asks when it is applied
        # whether they are wanted, which is known once the model is built; 0.33's asks at every call.
        self.attend = eager_break_during_capture(self._attend)
        self.ffn = MoE(
            config,
            layer,
            expert_parallel=vllm_config.parallel_config.enable_expert_parallel,
            quant_config=quant_config,
            prefix=f"{prefix}.ffn",
        )
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(self, "hc_attn", self.attn_norm, config)
        self.ffn_hc = HyperConnection(self, "hc_ffn", self.ffn_norm, config)

    def forward(
        self,
        residual: Residual,
        positions: torch.Tensor,
        input_ids: torch.Tensor | None,
        cos_sin: torch.Tensor,
        inv_freq: torch.Tensor,
    ) -> Residual:
        """Attend, then visit the experts; cos_sin [T, R] and inv_freq [R/2] are those of the layer's kind."""
        x, residual = self.attn_hc.enter(residual)
        o = x.new_empty(x.shape[0], self.attn.heads, self.attn.dim)
        self.attend(x, positions, cos_sin, inv_freq, o)
        residual = residual.leave(self.attn.project_out(o))
        x, residual = self.ffn_hc.enter(residual)
        return residual.leave(self.ffn(x, input_ids))

    def _attend(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, inv_freq: torch.Tensor, o: torch.Tensor
    ) -> None:
        """Put what the tokens attend to into `o` [T, local heads, head_dim]; zeros for padding.

        The caches, and with them the number of tokens, are those of the step in which this is called.
        """
        n = 0
        for step in self.caches.steps(positions):
            n = step.positions.shape[0]
            self.attn.attend(x[:n], cos_sin[:n], inv_freq, step, o[:n])
        if n < x.shape[0]:
            o[n:].zero_()


class DeepseekV4Model(nn.Module):
    """Embedding, this pipeline stage's layers, and on the last stage the merge of the streams."""

    def __init__(self, config: DeepseekV4Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        stage = get_pp_group()
        if stage.is_first_rank:
            self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed")
        formats = CacheFormats.select(
            config,
            vllm_config.cache_config.cache_dtype,
            (vllm_config.additional_config or {}).get("index_cache_dtype", "auto"),
            vllm_config.model_config.dtype,
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: DeepseekV4DecoderLayer(config, vllm_config, formats, prefix),
            prefix=f"{prefix}.layers",
        )
        # One set of frequencies for window layers, one for the compressed ones.
        self.rope_window = RotaryEmbedding(config, LayerKind.WINDOW)
        self.rope_compressed = RotaryEmbedding(config, LayerKind.CSA)
        if stage.is_last_rank:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            mixing_parameters(self, "hc_head", config, head=True)
        layers = self.layers[self.start_layer : self.end_layer]
        caches = [cache for layer in layers for cache in layer.caches.caches.values()]
        self.steps = StepReplay(self.compute, caches, vllm_config)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor | IntermediateTensors:
        """Token ids and positions [T] to [T, hidden], or to the streams [T, hc_mult, hidden] between stages."""
        return self.steps(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """`forward`, always by running the layers."""
        stage = get_pp_group()
        if stage.is_first_rank:
            hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
            residual = Residual(hidden[:, None].expand(-1, self.config.hc_mult, -1).contiguous())
        else:
            assert intermediate_tensors is not None
            residual = Residual(intermediate_tensors["streams"])
        window, compressed = self.rope_window, self.rope_compressed
        tables = window(positions), compressed(positions)
        for layer in self.layers[self.start_layer : self.end_layer]:
            rope, cos_sin = (window, tables[0]) if layer.kind is LayerKind.WINDOW else (compressed, tables[1])
            residual = layer(residual, positions, input_ids, cos_sin, rope.inv_freq)
        streams = residual.spread()
        if not stage.is_last_rank:
            return IntermediateTensors({"streams": streams})
        return self.norm(merge_streams(self, streams, self.config))


class DeepseekV4ForCausalLM(nn.Module):
    """Model and head. vLLM constructs `integration.registered_model`'s subclass, which adds what vLLM inspects."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        logger.info(describe(torch.get_default_device()))
        prepare(torch.get_default_device())
        self.config = DeepseekV4Config.from_hf(vllm_config.model_config.hf_config)
        self.quant_config = vllm_config.quant_config
        self.device, self.dtype = torch.get_default_device(), vllm_config.model_config.dtype
        self.model = DeepseekV4Model(self.config, vllm_config, maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.head = ParallelLMHead(
                self.config.vocab_size, self.config.hidden_size, prefix=maybe_prefix(prefix, "head")
            )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        # V4's head is fp32 (docs/model.md, "Head").
        self.logits_processor.head_dtype = torch.float32
        self.packed_modules_mapping = packed_modules_mapping(self)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] to [T, hidden]."""
        return self.model.embed(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Token ids and positions [T] to the normed hidden states [T, hidden]; between stages, to the streams."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[N, hidden] to [N, vocab_size] fp32; None on tensor-parallel ranks that do not sample."""
        return self.logits_processor(self.head, hidden_states)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What a later pipeline stage receives for `batch_size` tokens."""
        shape = (batch_size, self.config.hc_mult, self.config.hidden_size)
        return IntermediateTensors({"streams": torch.zeros(shape, dtype=dtype, device=device)})

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint under any of its names; returns the names of the parameters that were filled."""
        self.model.steps.forget()
        stage, layers = get_pp_group(), range(self.model.start_layer, self.model.end_layer)
        experts = self.model.layers[layers.start].ffn.experts
        return load_weights(
            self, self.config, weights, local_layers=layers, local_experts=experts.held,
            first_stage=stage.is_first_rank, last_stage=stage.is_last_rank,
            quantization=getattr(self.quant_config, "source", None), packed=getattr(self.quant_config, "plan", None),
            merged=merged_parts(self), device=self.device, dtype=self.dtype,
        )  # fmt: skip
