"""Which rows the caches hold for which options."""

import pytest
import torch

from testing.flash import FLASH_CONFIG as FLASH
from vllm_deepseek_v4flash.kv_cache.formats import CacheFormats
from vllm_deepseek_v4flash.ops.rows import RowFormat

FP8, BF16, FP32, FP16 = (
    RowFormat.fp8(512, 64),
    *(RowFormat.plain(512, d) for d in (torch.bfloat16, torch.float32, torch.float16)),
)
INDEX_FP8, INDEX_FP4 = RowFormat.fp8(128), RowFormat.fp4(128)


def index_plain(dtype):
    return RowFormat.plain(128, dtype)


@pytest.mark.parametrize(
    ("cache_dtype", "index_dtype", "model_dtype", "rows", "index"),
    [
        ("auto", "auto", torch.bfloat16, FP8, INDEX_FP8),
        ("auto", "auto", torch.float16, FP8, INDEX_FP8),
        ("auto", "auto", torch.float32, FP32, index_plain(torch.float32)),
        ("fp8", "auto", torch.float32, FP8, INDEX_FP8),
        ("fp8_e4m3", "fp4", torch.bfloat16, FP8, INDEX_FP4),
        ("fp8_ds_mla", "fp8", torch.bfloat16, FP8, INDEX_FP8),
        ("fp8", "model", torch.bfloat16, FP8, index_plain(torch.bfloat16)),
        ("bfloat16", "auto", torch.bfloat16, BF16, index_plain(torch.bfloat16)),
        ("float16", "auto", torch.float16, FP16, index_plain(torch.float16)),
        ("float32", "fp4", torch.bfloat16, FP32, INDEX_FP4),
        ("bfloat16", "fp8", torch.float32, BF16, INDEX_FP8),
    ],
)
def test_select(cache_dtype, index_dtype, model_dtype, rows, index):
    formats = CacheFormats.select(FLASH, cache_dtype, index_dtype, model_dtype)
    assert (formats.rows, formats.index) == (rows, index)


@pytest.mark.parametrize("cache_dtype", ["fp8_e5m2", "int8", "nvfp4", ""])
def test_other_cache_dtypes_are_refused(cache_dtype):
    with pytest.raises(ValueError, match=f"--kv-cache-dtype={cache_dtype}: .*Use one of auto, .*fp8"):
        CacheFormats.select(FLASH, cache_dtype, "auto", torch.bfloat16)


def test_other_index_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"index_cache_dtype=fp5: .*auto, fp8, fp4, model"):
        CacheFormats.select(FLASH, "fp8", "fp5", torch.bfloat16)


def test_four_bit_index_rows_need_a_power_of_two():
    config = FLASH.replace(index_head_dim=96)
    with pytest.raises(ValueError, match=r"index_head_dim.*96.*fp8"):
        CacheFormats.select(config, "fp8", "fp4", torch.bfloat16)
