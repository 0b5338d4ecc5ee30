"""What a step's metadata says, and that it says so in memory that a CUDA graph may have captured."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_deepseek_v4flash.compat import AttentionCGSupport
from vllm_deepseek_v4flash.kv_cache.metadata import DeepseekV4MetadataBuilder

MOST_TOKENS, MAX_MODEL_LEN = 16, 4096


@pytest.fixture
def builder():
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=MOST_TOKENS, max_num_seqs=8),
        model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN),
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    return DeepseekV4MetadataBuilder(SimpleNamespace(), [], config, torch.device("cpu"))


class Buffers:
    """vLLM's, which stay where they are."""

    def __init__(self):
        self.starts = torch.zeros(MOST_TOKENS + 1, dtype=torch.int32)
        self.table = torch.arange(8 * 4, dtype=torch.int32).view(8, 4)
        self.slots = torch.full((MOST_TOKENS,), -1, dtype=torch.int64)

    def step(self, lengths, *, padded_tokens=0, padded_requests=0):
        """A step of requests with these numbers of tokens, then padding."""
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        self.starts[: len(starts)] = starts
        self.starts[len(starts) :] = starts[-1]
        tokens, requests = sum(lengths) + padded_tokens, len(lengths) + padded_requests
        self.slots[: sum(lengths)], self.slots[sum(lengths) :] = torch.arange(sum(lengths)) + 100, -1
        return SimpleNamespace(
            num_actual_tokens=tokens, num_reqs=requests, max_seq_len=77, query_start_loc=self.starts[: requests + 1],
            block_table_tensor=self.table[:requests], slot_mapping=self.slots[:tokens],
        )  # fmt: skip


class Allocations(TorchDispatchMode):
    """Counts the results that lie in new memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = (t for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        self.count += any(t.untyped_storage().data_ptr() not in given for t in made)
        return result


@pytest.mark.parametrize("lengths", [[1], [3, 1, 5], [1, 1, 1, 1], [16]])
def test_every_token_belongs_to_its_request(builder, lengths):
    metadata = builder.build(0, Buffers().step(lengths))
    expected = [request for request, length in enumerate(lengths) for _ in range(length)]
    assert metadata.request.tolist() == expected
    assert metadata.num_tokens == sum(lengths)
    assert metadata.slot_mapping.tolist() == [100 + n for n in range(sum(lengths))]
    assert metadata.block_table.shape == (len(lengths), 4)
    assert metadata.max_seq_len == 77


def test_padding_belongs_to_the_last_request_and_has_no_slot(builder):
    """As in a graph of 6 that three decoding requests replay."""
    metadata = builder.build(0, Buffers().step([1, 1, 1], padded_tokens=3, padded_requests=3))
    assert metadata.request.tolist() == [0, 1, 2, 5, 5, 5]
    assert metadata.slot_mapping.tolist() == [100, 101, 102, -1, -1, -1]
    assert metadata.block_table.shape == (6, 4)


def test_a_later_step_fills_what_a_graph_has_captured(builder):
    buffers = Buffers()
    captured = builder.build_for_cudagraph_capture(buffers.step([1, 1, 1, 1]))
    later = builder.build(0, buffers.step([1, 1], padded_tokens=2, padded_requests=2))
    for name in ("request", "slot_mapping", "block_table"):
        old, new = getattr(captured, name), getattr(later, name)
        assert (old.data_ptr(), old.shape, old.stride()) == (new.data_ptr(), new.shape, new.stride()), name
    assert captured.request.tolist() == [0, 1, 3, 3]


def test_a_graph_serves_the_longest_request_there_may_be(builder):
    assert builder.build_for_cudagraph_capture(Buffers().step([1])).max_seq_len == MAX_MODEL_LEN


def test_a_step_allocates_nothing(builder):
    buffers = Buffers()
    steps = [buffers.step([3, 1, 5]), buffers.step([1, 1], padded_tokens=2, padded_requests=2)]
    with Allocations() as found:
        for step in steps:
            builder.build(0, step)
        assert found.count == 0
        torch.zeros(1)
    assert found.count == 1


def test_vllm_captures_whole_decoding_steps_only(builder):
    """Of one token a request; others keep attention out of their graphs."""
    support = builder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert builder.reorder_batch_threshold == 1
