"""Decoding steps from recordings: the same bits as from the layers, whatever changes between the steps."""

from collections import Counter

import pytest
import torch

from testing import engine, tiny
from vllm_deepseek_v4flash.checkpoint.loader import CheckpointError
from vllm_deepseek_v4flash.ops.cpu import replay
from vllm_deepseek_v4flash.ops.cpu.recording import Recording

LENGTHS = (1010, 3, 150)
"""Of prompts that decode together; the longest passes 1024, where the recordings' bound doubles."""


@pytest.fixture
def replays(monkeypatch):
    """How often each number of tokens was replayed."""
    counts: Counter[str] = Counter()
    original = Recording.replay

    def counted(recording):
        counts["replays"] += 1
        original(recording)

    monkeypatch.setattr(Recording, "replay", counted)
    return counts


def prompts(spec):
    generator = torch.Generator().manual_seed(1)
    vocab = spec.config.vocab_size
    return [torch.randint(8, vocab, (length,), generator=generator).tolist() for length in LENGTHS]


def same(ours, theirs):
    return all(a == b and torch.equal(p, q) for (a, p), (b, q) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["mixed", "topk"])
def test_replayed_steps_are_the_same(name, tmp_path, replays, monkeypatch):
    spec = tiny.CONFIGS[name]
    path, asked = tiny.write_checkpoint(tmp_path, spec), prompts(spec)
    options = {"max_model_len": 2048, "max_num_batched_tokens": 2048}
    with engine.running(path, enforce_eager=True, **options) as llm:
        expected = engine.decode(llm, asked, 40)
    assert replays["replays"] == 0
    with engine.running(path, **options) as llm:
        steps = llm.apply_model(lambda model: model.model.steps)[0].replays.recorded
        for _ in range(2):
            # Other blocks and slots the second time, and other numbers of tokens a step in between.
            assert same(engine.decode(llm, asked, 40), expected)
            assert same(engine.decode(llm, asked[1:2], 40), engine.decode(llm, asked[1:2], 40))
        assert {tokens for tokens, _ in steps} >= {1, 3}
        assert {bound for tokens, bound in steps if tokens == 3} == {1024, 2048}
        assert not any(call.recording.obstacle for call in steps.values() if call is not None)
        assert replays["replays"] > 150
        monkeypatch.setattr(replay, "MOST_BYTES", 0)
        steps.clear()
        assert same(engine.decode(llm, asked, 40), expected)
        assert sum(step is not None for step in steps.values()) <= 1, "one recording is more than enough bytes"
        with pytest.raises(CheckpointError):
            llm.apply_model(lambda model: model.load_weights([]))
        assert not steps, "weights may be elsewhere after a load"


def test_caches_that_moved_are_not_written_where_they_were(tmp_path, replays):
    spec = tiny.CONFIGS["mixed"]
    with engine.running(tiny.write_checkpoint(tmp_path, spec)) as llm:
        asked = prompts(spec)[1:]
        expected = engine.decode(llm, asked, 20)
        assert same(engine.decode(llm, asked, 20), expected)
        model = llm.apply_model(lambda model: model)[0]
        for cache in model.model.steps.caches:
            old = cache.kv_cache
            cache.bind_kv_cache(torch.zeros(old.shape, dtype=old.dtype))
            old.fill_(torch.nan if old.dtype.is_floating_point else 255)
        before = replays["replays"]
        assert same(engine.decode(llm, asked, 20), expected)
        assert replays["replays"] > before
