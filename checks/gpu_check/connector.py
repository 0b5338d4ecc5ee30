"""Requests that begin with a long context that was never computed, by vLLM's own connector for decode benchmarks.

A request with `PRETEND` in its sampling parameters counts its prompt, except for the last token, as loaded from
elsewhere, so its first step is a decoding step. vLLM's connector would fill our packed rows with zeros, whose scores
all tie; here they are random rows in the format of each cache.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector

from vllm_deepseek_v4flash.ops.rows import PagedRows, write_rows

PRETEND: dict[str, Any] = {"kv_transfer_params": {"pretend": True}}
"""For `SamplingParams.extra_args`."""
CONFIG: dict[str, Any] = {
    "kv_connector": "PretendedContext", "kv_connector_module_path": __name__, "kv_role": "kv_both",
}  # fmt: skip
"""For `vllm.LLM`'s kv_transfer_config."""
_PAGES = 32
"""Pages of random rows for each cache, which are assigned at random."""


class PretendedContext(DecodeBenchConnector):
    """vLLM's connector, restricted to requests with PRETEND."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.caches = vllm_config.compilation_config.static_forward_context
        self.patterns: dict[str, torch.Tensor] = {}
        if self.connector_worker is not None:
            self.filled_by_vllm = self.connector_worker._fill_blocks
            self.connector_worker._fill_blocks = self._fill_blocks

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not (request.kv_transfer_params or {}).get("pretend"):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def _fill_blocks(self, group: int, block_ids: list[int], num_tokens: int) -> None:
        """Write random rows to the pages of our caches; vLLM fills those of other models."""
        worker = self.connector_worker
        names = worker.group_to_layers[group]
        if not all(hasattr(self.caches.get(name), "format") for name in names):
            self.filled_by_vllm(group, block_ids, num_tokens)
            return
        for name in names if block_ids else ():
            pages = self.caches[name].kv_cache
            chosen = torch.tensor(block_ids, device=pages.device)
            pattern = self._pattern(name, pages)
            pages[chosen] = pattern[torch.randint(len(pattern), chosen.shape, device=pages.device)]

    def _pattern(self, name: str, pages: torch.Tensor) -> torch.Tensor:
        """Pages of the cache's shape, full of random rows. pages: [P, 1, rows, row_size]."""
        if name not in self.patterns:
            fmt, (rows, size) = self.caches[name].format, pages.shape[2:]
            made = torch.zeros((_PAGES, rows * size), dtype=pages.dtype, device=pages.device)
            table = torch.empty((0, 0), dtype=torch.int32, device=pages.device)
            row = torch.arange(_PAGES * rows, device=pages.device)
            values = torch.randn((len(row), fmt.dim), device=pages.device)
            write_rows(PagedRows(made, rows, fmt, table), row // rows, row % rows, values)
            self.patterns[name] = made.view(_PAGES, 1, rows, size)
        return self.patterns[name]
