"""Which row format each cache uses, from `--kv-cache-dtype` and `--additional-config '{"index_cache_dtype": …}'`."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import DeepseekV4Config
from ..ops.rows import RowFormat
from ..ops.torch_or_dtypes import torch

_PLAIN = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FP8 = ("fp8", "fp8_e4m3", "fp8_ds_mla")
# vLLM has no option for float32 rows: `auto` chooses them for a model in float32.
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", *_FP8)
INDEX_CACHE_DTYPES = ("auto", "fp8", "fp4", "model")


@dataclass(frozen=True)
class CacheFormats:
    """rows: window rows and main compressed entries, [head_dim]; index: the indexer's keys, [index_head_dim]."""

    rows: RowFormat
    index: RowFormat

    @classmethod
    def select(
        cls, config: DeepseekV4Config, cache_dtype: str, index_cache_dtype: str, model_dtype: torch.dtype
    ) -> CacheFormats:
        """Resolve the two options for a model that computes in `model_dtype`.

        `auto` is fp8, as V4 was trained, for a 16-bit model and fp32 for an fp32 model. The indexer's keys follow the
        rows unless `index_cache_dtype` says otherwise; `model` keeps them in the model's dtype, `fp4` in 4 bits.

        Raises:
            ValueError: an option has another value; the message lists those allowed.
        """
        if cache_dtype == "auto":
            cache_dtype = "float32" if model_dtype == torch.float32 else "fp8"
        if cache_dtype in _FP8:
            rows = RowFormat.fp8(config.head_dim, config.qk_rope_head_dim)
        elif cache_dtype in _PLAIN:
            rows = RowFormat.plain(config.head_dim, _PLAIN[cache_dtype])
        else:
            raise ValueError(
                f"--kv-cache-dtype={cache_dtype}: not a row format of this cache. Use one of "
                f"{', '.join(KV_CACHE_DTYPES)}, or start without --kv-cache-dtype for the default."
            )
        if index_cache_dtype == "auto":
            index_cache_dtype = "fp8" if rows.codec == "e4m3" else "model"
        return cls(rows, _index_format(index_cache_dtype, config.index_head_dim, rows, model_dtype))


def _index_format(name: str, dim: int, rows: RowFormat, model_dtype: torch.dtype) -> RowFormat:
    if name == "fp8":
        return RowFormat.fp8(dim)
    if name == "fp4":
        return RowFormat.fp4(dim)
    if name == "model":
        return RowFormat.plain(dim, rows.dtype if rows.codec == "plain" else model_dtype)
    raise ValueError(
        f"--additional-config.index_cache_dtype={name}: not a row format of the indexer's cache. Use one of "
        f"{', '.join(INDEX_CACHE_DTYPES)}."
    )
