"""The caches and indices that the attention benchmarks run on."""

import pytest
import torch

from benchmarks import inputs
from benchmarks.inputs import paged, spread_indices
from vllm_deepseek_v4flash.kv_cache.page_sizes import entry_page, window_page
from vllm_deepseek_v4flash.ops.rows import RowFormat


def test_pages_belong_to_one_request_each(bench):
    page = window_page(RowFormat.fp8(64, 16), 16)
    caches, note = paged(bench, "window", page, copies=2, requests=3, first=100, last=200)
    others, _ = paged(bench, "others", page, copies=1, requests=1, first=0, last=0)
    tables = torch.stack([cache.block_table for cache in caches])
    assert tables.shape == (2, 3, 4)  # blocks of 64 tokens: 1 to 3 hold 100..200
    assert (tables[..., 0] == 0).all()
    used = tables[..., 1:].flatten().tolist()
    assert sorted(used) == list(range(1, 19))
    assert used != sorted(used)
    assert note == ""
    assert others[0].pages.data_ptr() != caches[0].pages.data_ptr()
    values = inputs.stored(caches[0], torch.arange(19 * 64))
    assert values.isfinite().all()
    assert values.std() == pytest.approx(1.0, abs=0.05)


def test_pages_that_do_not_fit_are_dealt_out_again_in_order(bench):
    page = entry_page(RowFormat.fp8(64, 16), 4)
    bench.memory_bytes = 4 * 10 * 2 * page.page_bytes
    caches, note = paged(bench, "entries", page, copies=1, requests=4, first=0, last=5 * 256 - 1)
    dealt = caches[0].block_table.flatten().tolist()
    assert dealt[:10] == dealt[10:]
    assert len(set(dealt[:10])) == 10
    assert note == "each page of entries is shared by 2.0 requests"


def test_indices_are_spread_over_what_is_visible():
    visible = torch.tensor([0, 3, 8, 9, 1000])
    found = spread_indices(visible, 8)
    assert found.dtype == torch.int32
    assert found[:3].tolist() == [[-1] * 8, [0, 1, 2] + [-1] * 5, list(range(8))]
    for row, count in zip(found[3:].tolist(), (9, 1000), strict=True):
        assert row == sorted(set(row))
        assert all(i * count // 8 <= entry < (i + 1) * count // 8 for i, entry in enumerate(row))


def test_quarter_turns_are_rotations(bench):
    cos, sin = inputs.quarter_turns(bench, 50, 16).chunk(2, dim=1)
    assert torch.equal(cos**2 + sin**2, torch.ones(50, 8))
    assert cos.unique().tolist() == sin.unique().tolist() == [-1, 0, 1]
