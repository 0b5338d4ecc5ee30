"""What the caches declare to vLLM, and how they take its memory."""

from types import SimpleNamespace

import pytest
import torch

from testing.flash import FLASH_CONFIG as FLASH
from vllm_deepseek_v4flash.compat import MLAAttentionSpec, SlidingWindowMLASpec
from vllm_deepseek_v4flash.config import LayerKind
from vllm_deepseek_v4flash.kv_cache.formats import CacheFormats
from vllm_deepseek_v4flash.kv_cache.paged_cache import PagedCache, kv_bytes_per_token, layer_specs
from vllm_deepseek_v4flash.ops.rows import RowFormat, read_rows, write_rows

WINDOW_LAYER, CSA_LAYER, HCA_LAYER = 0, 2, 3


def formats(index="auto", rows="fp8"):
    return CacheFormats.select(FLASH, rows, index, torch.bfloat16)


def test_layers_are_of_the_kinds_the_tests_take_them_for():
    kinds = [FLASH.layer_kinds[i] for i in (WINDOW_LAYER, CSA_LAYER, HCA_LAYER)]
    assert kinds == [LayerKind.WINDOW, LayerKind.CSA, LayerKind.HCA]


@pytest.mark.parametrize(("index", "limit"), [("fp8", 3850), ("fp4", 3514)])
def test_bytes_per_token_of_flash(index, limit):
    # 448 e4m3 + 64 bf16 + 7 scales; 128 e4m3 + 2 scales or 64 bytes of codes + 4 scales.
    row, index_row = 448 + 128 + 7, {"fp8": 128 + 2, "fp4": 64 + 4}[index]
    exact = 21 * (row + index_row) / 4 + 20 * row / 128
    actual = kv_bytes_per_token(FLASH, formats(index))
    assert exact <= actual <= limit
    # Pages of 256 tokens are filled up to 16 bytes, once per entry cache of the 41 compressed layers and 21 indexers.
    assert actual - exact < 62 * 16 / 256


def test_bytes_per_token_of_other_rows():
    assert kv_bytes_per_token(FLASH, formats("model", "bfloat16")) == 2 * (21 * (512 + 128) / 4 + 20 * 512 / 128)
    window_only = FLASH.replace(
        num_hidden_layers=2, layer_kinds=FLASH.layer_kinds[:2], compress_ratios=(0, 0), num_hash_layers=0
    )
    assert kv_bytes_per_token(window_only, formats()) == 0


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (WINDOW_LAYER, {"window"}),
        (HCA_LAYER, {"window", "entries", "states"}),
        (CSA_LAYER, {"window", "entries", "states", "index_entries", "index_states"}),
    ],
)
def test_caches_of_each_kind_of_layer(layer, names):
    specs = layer_specs(FLASH, layer, formats())
    assert set(specs) == names
    for name, (spec, fmt) in specs.items():
        assert type(spec) is (MLAAttentionSpec if "entries" in name else SlidingWindowMLASpec)
        assert (spec.num_kv_heads, spec.dtype) == (1, fmt.dtype)
        content = spec.block_size // spec.tokens_per_state * fmt.row_size * fmt.dtype.itemsize
        # Widest loads need 16 bytes; no page is longer than that makes it.
        assert content <= spec.page_size_bytes < content + 16
        assert spec.page_size_bytes % 16 == 0


@pytest.mark.parametrize(
    ("layer", "name", "fmt", "window"),
    [
        (WINDOW_LAYER, "window", RowFormat.fp8(512, 64), 128),
        (CSA_LAYER, "window", RowFormat.fp8(512, 64), 128),
        # Two windows of 4 tokens, each a row of kv and gate, both 2 * 512 wide (or 2 * 128).
        (CSA_LAYER, "states", RowFormat.plain(2048, torch.float32), 8),
        (CSA_LAYER, "index_states", RowFormat.plain(512, torch.float32), 8),
        (HCA_LAYER, "states", RowFormat.plain(1024, torch.float32), 128),
    ],
)
def test_rows_of_a_token_live_as_long_as_a_query_or_an_entry_needs_them(layer, name, fmt, window):
    spec, actual = layer_specs(FLASH, layer, formats())[name]
    assert actual == fmt
    assert spec.sliding_window == window


@pytest.mark.parametrize(
    ("layer", "name", "fmt", "ratio"),
    [
        (CSA_LAYER, "entries", RowFormat.fp8(512, 64), 4),
        (CSA_LAYER, "index_entries", RowFormat.fp4(128), 4),
        (HCA_LAYER, "entries", RowFormat.fp8(512, 64), 128),
    ],
)
def test_entries_have_one_row_per_ratio_tokens(layer, name, fmt, ratio):
    spec, actual = layer_specs(FLASH, layer, formats("fp4"))[name]
    assert actual == fmt
    assert (spec.block_size, spec.tokens_per_state) == (256, ratio)


def test_other_ratios_are_kept():
    config = FLASH.replace(compress_ratios=tuple({4: 8, 128: 32, 0: 0}[r] for r in FLASH.compress_ratios))
    specs = layer_specs(config, CSA_LAYER, formats())
    assert specs["entries"][0].tokens_per_state == 8
    assert specs["states"][0].sliding_window == 16
    specs = layer_specs(config, HCA_LAYER, formats())
    assert specs["entries"][0].tokens_per_state == 32
    assert specs["states"][0].sliding_window == 32


def test_a_block_must_hold_whole_entries():
    assert layer_specs(FLASH, HCA_LAYER, formats(), 128)["entries"][0].block_size == 128
    with pytest.raises(ValueError, match=r"--block-size=64: .* 128 tokens"):
        layer_specs(FLASH, HCA_LAYER, formats(), 64)


def make(name="entries", layer=CSA_LAYER, prefix="model.layers.2.attn.entries", registry=None):
    return PagedCache(name, layer, FLASH, formats(), prefix=prefix, registry={} if registry is None else registry)


def test_a_cache_registers_itself_once():
    registry: dict[str, object] = {}
    cache = make(registry=registry)
    assert registry == {"model.layers.2.attn.entries": cache}
    with pytest.raises(ValueError, match=r"model\.layers\.2\.attn\.entries"):
        make(registry=registry)


def vllm_config(block_tokens):
    return SimpleNamespace(cache_config=SimpleNamespace(block_size=block_tokens))


@pytest.mark.parametrize("block_tokens", [256, 128])
def test_the_spec_follows_the_block_size_that_vllm_first_asks_with(block_tokens):
    cache = make()
    assert cache.get_kv_cache_spec(vllm_config(block_tokens)).block_size == block_tokens
    # vLLM then puts the smallest block of all caches there, and asks again.
    assert cache.get_kv_cache_spec(vllm_config(4)).block_size == block_tokens


def test_window_and_state_blocks_do_not_depend_on_the_block_size():
    for name in ("window", "states", "index_states"):
        cache = make(name=name)
        assert cache.get_kv_cache_spec(vllm_config(128)) == layer_specs(FLASH, CSA_LAYER, formats())[name][0]


def test_use_before_binding_is_named():
    with pytest.raises(RuntimeError, match=r"model\.layers\.2\.attn\.entries"):
        make().rows(SimpleNamespace(block_table=torch.zeros(1, 1, dtype=torch.int32)))


@pytest.mark.parametrize("pages", [1, 5])
@pytest.mark.parametrize(("layer", "name"), [(CSA_LAYER, "entries"), (HCA_LAYER, "entries"), (HCA_LAYER, "window")])
def test_rows_go_to_the_memory_vllm_gave(pages, layer, name):
    """vLLM's view is [pages, 1, rows, head size], with gaps between pages; the ops must write to it, not to a copy."""
    cache = make(name=name, layer=layer)
    spec = layer_specs(FLASH, layer, formats())[name][0]
    rows, size = spec.block_size // spec.tokens_per_state, spec.head_size
    memory = torch.full((pages, rows * size + 48), 0xFF, dtype=torch.uint8)
    cache.bind_kv_cache(memory.as_strided((pages, 1, rows, size), (memory.stride(0), rows * size, size, 1)))
    view = cache.rows(SimpleNamespace(block_table=torch.tensor([[pages - 1]], dtype=torch.int32)))
    assert (view.rows_per_page, view.format) == (rows, cache.format)
    values = torch.arange(512, dtype=torch.float32)[None] / 8
    page, row = view.locate(torch.tensor([0]), torch.tensor([rows - 1]))
    write_rows(view, page, row, values)
    assert (memory[pages - 1] != 0xFF).any()
    assert (memory[:, rows * size :] == 0xFF).all()
    # e4m3 keeps 4 significant bits, bf16 8.
    error = (read_rows(view, page, row, torch.tensor([True])) - values).abs()
    assert (error[:, :448] <= values[:, :448] / 16 + 2.0**-10).all()
    assert (error[:, 448:] <= values[:, 448:] / 256).all()
