"""The selection kernel by itself, on given scores."""

import math

import pytest
import torch

import vllm_deepseek_v4flash.ops.triton.topk as kernel
from testing.ops.interpreted import need_interpreter

INF = math.inf


@pytest.fixture(params=[pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu":
        need_interpreter()
    return torch.device(request.param)


def tiles(monkeypatch, segment, small):
    monkeypatch.setattr(kernel, "SEGMENT", segment)
    monkeypatch.setattr(kernel, "SMALL_SEGMENT", small)


def run(scores, counts, width, device, limit=None):
    """The selection, from strided rows, with NaN where there is no score."""
    room = torch.full((len(scores), scores.shape[1] + 5), math.nan)
    for row, values, count in zip(room, scores, counts, strict=True):
        row[:count] = values[:count]
    wide = torch.full((len(scores), width + 3), -7, dtype=torch.int32, device=device)
    limit = scores.shape[1] if limit is None else limit
    kernel.topk(
        room.to(device)[:, : scores.shape[1]], torch.tensor(counts, dtype=torch.int32, device=device),
        wide[:, :width], limit=limit,
    )  # fmt: skip
    assert (wide[:, width:] == -7).all()
    return wide[:, :width].cpu()


def expected(scores, counts, width):
    rows = torch.full((len(scores), width), -1, dtype=torch.int32)
    for row, values, count in zip(rows, scores, counts, strict=True):
        values = values[:count].where(~values[:count].isnan(), -INF)
        best = values.sort(descending=True, stable=True).indices[:width].sort().values
        row[: len(best)] = best
    return rows


@pytest.mark.parametrize(("segment", "width"), [(8, 1), (8, 4), (16, 3), (64, 4)])
def test_rows_of_every_length(device, rng, monkeypatch, segment, width):
    """Segments that are full, partial, shorter than the choice, and rounds upon rounds of them."""
    tiles(monkeypatch, segment, 4)
    counts = [0, 1, width, width + 1, 8, 9, 17, 24, 33, 60]
    scores = torch.randn(len(counts), 60, generator=rng)
    assert torch.equal(run(scores, counts, width, device), expected(scores, counts, width))


@pytest.mark.parametrize(
    "values", [[0.0], [0.0, 1.0], [-1.0, 0.0, 1.0], [-0.0, 0.0], [-INF, INF, 0.5], [math.nan, 2.0]]
)
def test_ties_across_segments_go_to_the_smaller_index(device, rng, monkeypatch, values):
    tiles(monkeypatch, 16, 8)
    pick = torch.randint(len(values), (4, 50), generator=rng)
    scores = torch.tensor(values)[pick]
    counts = [50, 49, 33, 12]
    assert torch.equal(run(scores, counts, 7, device), expected(scores, counts, 7))


def test_neighbouring_numbers_are_distinguished(device, monkeypatch):
    """Every power of two with its next number, of both signs, subnormal ones and infinities too."""
    tiles(monkeypatch, 1024, 256)
    exponents = torch.arange(0, 255, dtype=torch.int32) << 23
    magnitudes = torch.cat((exponents, exponents + 1, torch.tensor([0x7F800000]))).view(torch.float32)
    scores = torch.cat((magnitudes, -magnitudes))[torch.randperm(1022, generator=torch.Generator().manual_seed(5))]
    for width in (1, 100, 511):
        assert torch.equal(run(scores[None], [1022], width, device), expected(scores[None], [1022], width))


@pytest.mark.parametrize("dense", [False, True])
def test_512_of_262144(device, rng, dense):
    """At full size: a row of 16 segments, one that ends within a segment, short ones, one with nothing to choose."""
    counts = [262144, 200001, 16385, 2049, 512]
    scores = torch.randn(len(counts), 262144, generator=rng)
    if dense:
        scores = scores.round()  # some 1,600 scores are 3 or more, so that ties decide
    assert torch.equal(run(scores, counts, 512, device), expected(scores, counts, 512))


def test_a_limit_far_above_the_counts(device, rng, monkeypatch):
    tiles(monkeypatch, 16, 8)
    scores = torch.randn(3, 500, generator=rng)
    assert torch.equal(run(scores, [20, 9, 2], 4, device), expected(scores, [20, 9, 2], 4))
    assert torch.equal(run(scores, [20, 9, 2], 4, device, limit=20), expected(scores, [20, 9, 2], 4))


def test_choices_wider_than_a_segment(device, rng, monkeypatch):
    tiles(monkeypatch, 16, 8)
    scores = torch.randn(2, 300, generator=rng)
    assert torch.equal(run(scores, [300, 100], 90, device), expected(scores, [300, 100], 90))
