"""The compressor, one window and one channel at a time (docs/model.md, "Compressor")."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from testing.ops import codecs
from testing.ops.numeric import FUNCTION, U32, U, assert_exact, f64, integers, normal
from testing.ops.paging import POISON, make_cache
from vllm_deepseek_v4flash.ops.compress import compress
from vllm_deepseek_v4flash.ops.rows import RowFormat

DIM, ROPE, EPS = 16, 4, 1e-3
INV_FREQ = [0.9, 0.05]
# Row sizes with and without a partly filled last block, and 4-bit index entries.
ENTRY_FORMATS = {
    "fp32": RowFormat.plain(DIM, torch.float32),
    "bf16": RowFormat.plain(DIM, torch.bfloat16),
    "fp8": RowFormat.fp8(DIM, ROPE),
    "fp8-no-tail": RowFormat.fp8(DIM),
}


class Problem:
    """Whole sequences of projections, of which `step` processes any tokens in any order of calls."""

    def __init__(self, rng, device, *, ratio, overlap, lengths, fmt=ENTRY_FORMATS["fp32"], dtype=torch.float32,
                 state_rows=4, entry_rows=3, far=False):  # fmt: skip
        self.device, self.ratio, self.overlap, self.dtype, self.fmt = device, ratio, overlap, dtype, fmt
        self.dim = fmt.dim
        channels = 2 * self.dim if overlap else self.dim
        self.kv, self.gate = ([normal(rng, n, channels, device=device) for n in lengths] for _ in range(2))
        self.ape = normal(rng, ratio, channels, device=device)
        self.norm_weight = normal(rng, self.dim, device=device, dtype=dtype)
        self.inv_freq = torch.tensor(INV_FREQ, device=device)
        states = RowFormat.plain(2 * channels, torch.float32)
        self.states = make_cache(states, state_rows, lengths, rng, device, far=far)
        self.entries = make_cache(fmt, entry_rows, [n // ratio for n in lengths], rng, device, far=far)

    def step(self, tokens, padding=()):
        """Process (request, position) pairs, then padded tokens that hold such pairs too."""
        pairs = [*tokens, *padding]
        slots = [self.states.slot(*pair) for pair in tokens] + [-1 - i for i in range(len(padding))]
        take = lambda rows: torch.stack([rows[r][p] for r, p in pairs])  # noqa: E731
        compress(
            take(self.kv), take(self.gate), self.ape, self.norm_weight, self.inv_freq,
            torch.tensor([p for _, p in pairs], device=self.device),
            torch.tensor([r for r, _ in pairs], dtype=torch.int32, device=self.device),
            self.states.rows, torch.tensor(slots, device=self.device), self.entries.rows,
            ratio=self.ratio, eps=EPS, dtype=self.dtype,
        )  # fmt: skip

    def pooled(self, r, w):
        """The gated sum of window w of request r and a bound on what fp32 may move it, both [dim] fp64."""
        kv, gate, ape = f64(self.kv[r]), f64(self.gate[r]), f64(self.ape)
        rows = []
        if self.overlap and w > 0:
            for p in range((w - 1) * self.ratio, w * self.ratio):
                rows.append((gate[p, : self.dim] + ape[p % self.ratio, : self.dim], kv[p, : self.dim]))
        half = slice(self.dim, None) if self.overlap else slice(None)
        for p in range(w * self.ratio, (w + 1) * self.ratio):
            rows.append((gate[p, half] + ape[p % self.ratio, half], kv[p, half]))
        value, bound = torch.zeros(self.dim, dtype=torch.float64), torch.zeros(self.dim, dtype=torch.float64)
        for c in range(self.dim):
            gates = [g[c].item() for g, _ in rows]
            weights = [math.exp(g - max(gates)) for g in gates]
            total = sum(weights)
            value[c] = sum(w * v[c].item() for w, (_, v) in zip(weights, rows, strict=True)) / total
            # gate + ape is rounded before exp, whose argument is within 2 * reach; sums of len(rows) above and below.
            reach = max(abs(g) for g in gates)
            size = sum(w * abs(v[c].item()) for w, (_, v) in zip(weights, rows, strict=True)) / total
            bound[c] = (8 * reach * U32 + 2 * FUNCTION + 2 * len(rows) * U32) * size
        return value, bound

    def entry(self, r, w):
        """What entry w should hold before it is quantised, and a bound, both [dim] fp64."""
        value, bound = self.pooled(r, w)
        # One rounding to the dtype, then the norm and another, then the rotation and a third.
        step = U[self.dtype]
        bound = bound + step * (value.abs() + bound)
        norm = 1 / math.sqrt(sum(v * v for v in value.tolist()) / self.dim + EPS)
        # The root of a mean of squares moves no more than the largest relative error of the vector's norm.
        shift = bound.norm() / value.norm() + self.dim * U32 + FUNCTION
        weight = f64(self.norm_weight)
        value, bound = value * norm * weight, (bound * norm + shift * (value * norm).abs()) * weight.abs()
        bound = bound + step * (value.abs() + bound)
        first = self.dim - ROPE
        for k, freq in enumerate(INV_FREQ):
            i = first + 2 * k
            # The angle is an fp32 product of a position and a frequency that fp32 holds.
            angle = (torch.tensor(float(w * self.ratio)) * torch.tensor(freq)).item()
            z = complex(*value[i : i + 2].tolist()) * complex(math.cos(angle), math.sin(angle))
            bound[i : i + 2] = bound[i : i + 2].sum() + FUNCTION * value[i : i + 2].abs().sum()
            value[i], value[i + 1] = z.real, z.imag
        bound[first:] += step * (value[first:].abs() + bound[first:])
        return value, bound

    def check_entry(self, r, w):
        expected, bound = self.entry(r, w)
        stored = self.entries.get(r, w)
        size = expected.abs() + bound
        if self.fmt.codec == "plain":
            bound = bound + U[self.fmt.dtype] * size
            assert torch.equal(
                stored, stored.to(self.dtype).double()
            )  # computed in the model's dtype, even in a wider tensor
        else:
            # e4m3 has 4 significant bits: half a step is 2^-4 of a value, or 2^-10 of the scale below its normals.
            head = slice(0, self.fmt.quantised)
            scale = codecs.ue8m0(max(self.entries.raw(r, w)[1]))
            amax = size[head].max().item()
            assert amax / 448 / 1.1 <= scale <= 2 * amax / 448
            bound[head] += 2.0**-4 * size[head] + scale * 2.0**-10
            bound[self.fmt.quantised :] += U[torch.bfloat16] * size[self.fmt.quantised :]
        assert ((stored - expected).abs() <= bound).all(), (r, w, stored, expected, bound)

    def check(self, lengths):
        """Requests have been processed up to `lengths` tokens: their states and entries are there, and nothing else."""
        for r, length in enumerate(lengths):
            for p in range(length):
                state = torch.cat((self.kv[r][p], self.gate[r][p] + self.ape[p % self.ratio]))
                assert_exact(self.states.get(r, p).float(), state)
            for p in range(length, len(self.kv[r])):
                assert self.states.is_poison(r, p)
            for w in range(len(self.kv[r]) // self.ratio):
                if w < length // self.ratio:
                    self.check_entry(r, w)
                else:
                    assert self.entries.is_poison(r, w)


def tokens(r, start, stop):
    return [(r, p) for p in range(start, stop)]


KINDS = {"csa": (4, True), "hca-8": (8, False), "hca-128": (128, False), "overlap-16": (16, True), "pairs": (2, True)}


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def kind(request):
    return dict(zip(("ratio", "overlap"), request.param, strict=True))


@pytest.mark.parametrize("fmt", ENTRY_FORMATS.values(), ids=ENTRY_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call(device, rng, kind, fmt, dtype):
    length = min(3 * kind["ratio"] + 1, 30) if kind["ratio"] < 128 else 259
    problem = Problem(rng, device, lengths=[length], fmt=fmt, dtype=dtype, **kind)
    problem.step(tokens(0, 0, length))
    problem.check([length])


@pytest.mark.parametrize("fmt", [*ENTRY_FORMATS.values(), RowFormat.fp4(64)], ids=[*ENTRY_FORMATS, "fp4"])
@pytest.mark.parametrize("inputs", ["kv", "gate"])
def test_a_nan_reaches_its_entry_and_no_other(device, rng, fmt, inputs):
    problem = Problem(rng, device, lengths=[8], fmt=fmt, ratio=4, overlap=False)
    getattr(problem, inputs)[0][1, 3] = math.nan
    problem.step(tokens(0, 0, 8))
    assert problem.entries.get(0, 0).isnan().all()
    assert problem.entries.get(0, 1).isfinite().all()


@pytest.mark.parametrize("pieces", [[1] * 26, [3, 4, 5, 1, 13], [7, 19], [4, 8, 12, 2], [25, 1]], ids=str)
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (4, False), (8, True), (5, False)])
def test_pieces_give_what_one_call_gives(device, rng, pieces, ratio, overlap):
    problem = Problem(rng, device, lengths=[26], ratio=ratio, overlap=overlap)
    done = 0
    for piece in pieces:
        problem.step(tokens(0, done, done + piece))
        done += piece
    problem.check([26])


def test_pieces_of_a_long_window(device, rng):
    problem = Problem(rng, device, lengths=[259], ratio=128, overlap=False)
    for start, stop in ((0, 127), (127, 128), (128, 129), (129, 255), (255, 257), (257, 259)):
        problem.step(tokens(0, start, stop))
    problem.check([259])


def test_interleaved_requests(device, rng):
    problem = Problem(rng, device, lengths=[17, 9, 22], ratio=4, overlap=True)
    done = [0, 0, 0]
    for counts in ((3, 0, 5), (6, 2, 0), (1, 1, 1), (1, 5, 2), (6, 1, 14)):
        batch = []
        for r in (2, 0, 1):  # the order in the batch is not that of the block table
            batch += tokens(r, done[r], done[r] + counts[r])
            done[r] += counts[r]
        problem.step(batch)
        problem.check(done)
    assert done == [17, 9, 22]


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (8, False), (8, True)])
def test_states_below_the_retained_window_are_not_read(device, rng, ratio, overlap):
    """vLLM frees the rows that no later token reaches; here they turn into NaN between the steps."""
    problem = Problem(rng, device, lengths=[41], ratio=ratio, overlap=overlap)
    retained = 2 * ratio if overlap else ratio
    done = 0
    for piece in (1, 9, 2, 11, 1, 1, 7, 9):
        problem.step(tokens(0, done, done + piece))
        done += piece
        for p in range(max(0, done + 1 - retained)):
            problem.states.poison(0, p)
    for w in range(41 // ratio):
        problem.check_entry(0, w)


def test_first_window_has_no_previous_one(device, rng):
    problem = Problem(rng, device, lengths=[4], ratio=4, overlap=True)
    # The first halves of window 0 are the previous window of window 1 and must not reach entry 0.
    problem.kv[0][:, :DIM] = 1e30
    problem.gate[0][:, :DIM] = 1e4
    problem.step(tokens(0, 0, 4))
    problem.check_entry(0, 0)


def test_incomplete_windows_write_states_only(device, rng, kind):
    length = kind["ratio"] - 1
    problem = Problem(rng, device, lengths=[kind["ratio"]], **kind)
    before = problem.entries.bytes
    problem.step(tokens(0, 0, length))
    problem.check([length])
    assert torch.equal(problem.entries.bytes, before)


def test_padded_tokens_write_nothing(device, kind):
    ratio = kind["ratio"]
    stop = ratio + ratio // 2
    # Beside real tokens, and alone. Each seems to complete a window: one that is complete and one that is not.
    padding = [(0, ratio - 1), (0, 2 * ratio - 1), (0, 2 * ratio - 1)]
    padded, plain = (Problem(torch.Generator().manual_seed(1), device, lengths=[2 * ratio], **kind) for _ in range(2))
    for problem in (padded, plain):
        problem.states.storage.zero_()  # an entry pooled from these is not the poison that entries start with
    padded.step(tokens(0, 0, stop), padding)
    padded.step([], padding[1:])
    plain.step(tokens(0, 0, stop))
    assert torch.equal(padded.states.bytes, plain.states.bytes)
    assert torch.equal(padded.entries.bytes, plain.entries.bytes)
    assert padded.entries.is_poison(0, 1)


@pytest.mark.parametrize("rows", [(1, 1), (3, 2), (64, 64)])
def test_any_page_size(device, rng, rows):
    problem = Problem(rng, device, lengths=[13, 8], ratio=4, overlap=True, state_rows=rows[0], entry_rows=rows[1])
    problem.step(tokens(0, 0, 13) + tokens(1, 0, 8))
    problem.check([13, 8])


@pytest.mark.parametrize("last", [20003, 2**20 - 1])
def test_rotation_takes_the_position_of_the_window_far_from_the_start(device, rng, last):
    """The second window of 8 tokens that end at `last`; fp32 angles of 2^20 tokens are many turns, and exact."""
    problem = Problem(rng, device, lengths=[8], ratio=4, overlap=True)
    base = last - 7
    states, entries = problem.states.rows, make_cache(problem.fmt, 1, [2], rng, device)
    # Positions base.. are stored where 0.. would be; no page holds the windows before them.
    far_states, far_entries = (
        torch.zeros((1, last // 4 + 1), dtype=torch.int32, device=device) for _ in (states, entries)
    )
    far_states[0, -2:], far_entries[0, -2:] = states.block_table[0, :2], entries.rows.block_table[0, :2]
    compress(
        problem.kv[0], problem.gate[0], problem.ape, problem.norm_weight, problem.inv_freq,
        torch.arange(base, base + 8, device=device), torch.zeros(8, dtype=torch.int32, device=device),
        dataclasses.replace(states, block_table=far_states),
        torch.tensor([problem.states.slot(0, p) for p in range(8)], device=device),
        dataclasses.replace(entries.rows, block_table=far_entries), ratio=4, eps=EPS, dtype=torch.float32,
    )  # fmt: skip
    value, bound = problem.entry(0, 1)
    # The same pooled values as window 1, whose rotation is undone and done again at the window's first token.
    for k, freq in enumerate(INV_FREQ):
        i = DIM - ROPE + 2 * k
        near, there = ((torch.tensor(float(p)) * torch.tensor(freq)).item() for p in (4, last - 3))
        z = complex(*value[i : i + 2].tolist()) * complex(math.cos(there - near), math.sin(there - near))
        value[i], value[i + 1] = z.real, z.imag
        bound[i : i + 2] = bound[i : i + 2].sum()
    assert ((entries.get(0, 1) - value).abs() <= bound + U32 * value.abs()).all()
    assert set(entries.bytes[0].tolist()) == {POISON}


LONG = {"csa": (4, True, 16), "overlap-16": (16, True, 16), "hca": (128, False, 256)}


@pytest.mark.parametrize(("ratio", "overlap", "dim"), LONG.values(), ids=LONG)
def test_the_bytes_do_not_depend_on_the_steps(device, ratio, overlap, dim):
    """Steps of 1, 3, 5, 127 and 129 tokens, so that windows come from inputs, from states and from both."""
    length, images = 257 if ratio == 128 else 131, []
    for chunk in (length, 1, 3, 5, 127, 129):
        rng = torch.Generator().manual_seed(1)
        problem = Problem(rng, device, lengths=[length], ratio=ratio, overlap=overlap, fmt=RowFormat.fp8(dim, ROPE))
        for start in range(0, length, chunk):
            problem.step(tokens(0, start, min(start + chunk, length)))
        images.append((problem.states.bytes, problem.entries.bytes))
    for states, entries in images[1:]:
        assert torch.equal(states, images[0][0])
        assert torch.equal(entries, images[0][1])


def test_a_window_of_many_rows_and_channels(device, rng):
    """Flash's HCA shape, gates of very different sizes."""
    problem = Problem(rng, device, lengths=[129], ratio=128, overlap=False, fmt=RowFormat.fp8(512, ROPE))
    problem.gate[0] *= 20
    problem.step(tokens(0, 0, 50))
    problem.step(tokens(0, 50, 129))
    problem.check_entry(0, 0)


def test_rows_of_this_step_are_not_read_from_the_cache(device, rng, implementation):
    """On a GPU other programs of the launch write them; here the block table points to rows that are never written."""
    if implementation not in ("interpreted", "cuda"):
        pytest.skip("programs run side by side in Triton alone")
    problem = Problem(rng, device, lengths=[8], ratio=4, overlap=True)
    slots = torch.tensor([problem.states.slot(0, p) for p in range(8)], device=device)
    states = problem.states.rows
    compress(
        problem.kv[0], problem.gate[0], problem.ape, problem.norm_weight, problem.inv_freq,
        torch.arange(8, device=device), torch.zeros(8, dtype=torch.int32, device=device),
        dataclasses.replace(states, block_table=torch.zeros_like(states.block_table)), slots, problem.entries.rows,
        ratio=4, eps=EPS, dtype=torch.float32,
    )  # fmt: skip
    problem.check([8])


def test_rows_of_a_wider_tensor(device, rng):
    """The projections may be two halves of one product."""
    problem, plain = (
        Problem(torch.Generator().manual_seed(1), device, lengths=[9], ratio=4, overlap=True) for _ in range(2)
    )
    kv, gate = torch.cat((problem.kv[0], problem.gate[0]), dim=1).chunk(2, dim=1)
    slots = torch.tensor([problem.states.slot(0, p) for p in range(9)], device=device)
    compress(
        kv, gate, problem.ape, problem.norm_weight, problem.inv_freq, torch.arange(9, device=device),
        torch.zeros(9, dtype=torch.int64, device=device), problem.states.rows, slots, problem.entries.rows,
        ratio=4, eps=EPS, dtype=torch.float32,
    )  # fmt: skip
    plain.step(tokens(0, 0, 9))
    problem.check([9])
    assert torch.equal(problem.entries.bytes, plain.entries.bytes)


@pytest.mark.parametrize("fmt", [ENTRY_FORMATS["fp8"], RowFormat.fp4(64)], ids=["fp8", "fp4"])
def test_caches_larger_than_32_bit_offsets(device, rng, fmt):
    problem, near = (
        Problem(torch.Generator().manual_seed(1), device, lengths=[9], ratio=4, overlap=True, fmt=fmt, far=far)
        for far in (True, False)
    )
    for start, stop in ((0, 6), (6, 9)):  # the second window needs states of both steps
        problem.step(tokens(0, start, stop))
        near.step(tokens(0, start, stop))
    for r in range(9):
        assert problem.states.raw(0, r) == near.states.raw(0, r)
    for w in range(2):
        assert problem.entries.raw(0, w) == near.entries.raw(0, w)


def test_four_bit_entries_hold_the_transformed_values(device, rng):
    fmt = RowFormat.fp4(64)
    problem = Problem(rng, device, lengths=[12], ratio=4, overlap=True, fmt=fmt)
    problem.step(tokens(0, 0, 12))
    for w in range(3):
        value, bound = problem.entry(0, w)
        wanted = torch.tensor(codecs.sylvester(value.tolist()), dtype=torch.float64)
        data, scales = problem.entries.raw(0, w)
        stored = problem.entries.get(0, w)
        for b, scale in enumerate(codecs.ue8m0(s) for s in scales):
            part = slice(32 * b, 32 * b + 32)
            assert wanted[part].abs().max() / 6 <= scale * 1.001 <= wanted[part].abs().max() / 3
            # Half a step of e2m1 below 2, 4 and 6 is 1/4, 1/2 and 1, at the edge of a range the larger one.
            size = wanted[part].abs() / scale * (1 + 1e-4)
            half_step = torch.where(size < 2, 0.25, torch.where(size < 4, 0.5, 1.0)) * scale
            assert ((stored - wanted)[part].abs() <= half_step + bound.norm()).all()
        assert len(data) == 32


def test_the_gate_weights_each_channel_separately(device):
    """A gate that is 100 higher in one row of a channel makes that row the channel's value."""
    problem = Problem(torch.Generator().manual_seed(0), device, lengths=[4], ratio=4, overlap=False)
    problem.ape.zero_()
    problem.gate[0].zero_()
    problem.kv[0] = integers(torch.Generator().manual_seed(1), 1, 9, 4, DIM, device=device)
    chosen = [c % 4 for c in range(DIM)]
    for c, row in enumerate(chosen):
        problem.gate[0][row, c] = 100.0
    value, _ = problem.pooled(0, 0)
    # exp(-100) is far below half a step of fp64 relative to values 1..9.
    assert value.tolist() == [problem.kv[0][row, c].item() for c, row in enumerate(chosen)]
    problem.step(tokens(0, 0, 4))
    problem.check([4])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv", torch.zeros(3, 24), f"kv must be {DIM} or, with overlap, {2 * DIM} wide, got 24"),
        ("gate", torch.zeros(3, DIM), rf"gate must have shape \[3, {2 * DIM}\]"),
        ("gate", torch.zeros(3, 2 * DIM).bfloat16(), "gate must be torch.float32"),
        ("ape", torch.zeros(5, 2 * DIM), rf"ape must have shape \[4, {2 * DIM}\]"),
        ("norm_weight", torch.zeros(2 * DIM), rf"norm_weight must have shape \[{DIM}\]"),
        ("state_slots", torch.zeros(2).long(), r"state_slots must have shape \[3\]"),
    ],
)
def test_wrong_arguments_are_named(device, rng, name, value, message):
    problem = Problem(rng, device, lengths=[4], ratio=4, overlap=True)
    arguments: dict[str, Any] = {
        "kv": problem.kv[0][:3], "gate": problem.gate[0][:3], "ape": problem.ape, "norm_weight": problem.norm_weight,
        "inv_freq": problem.inv_freq, "positions": torch.arange(3, device=device),
        "request": torch.zeros(3, dtype=torch.int32, device=device), "states": problem.states.rows,
        "state_slots": torch.full((3,), -1, device=device), "entries": problem.entries.rows,
    }  # fmt: skip
    arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        compress(**arguments, ratio=4, eps=EPS, dtype=torch.float32)


def test_state_rows_of_another_dtype_are_named(device, rng):
    problem = Problem(rng, device, lengths=[4], ratio=4, overlap=True)
    problem.states = make_cache(RowFormat.plain(4 * DIM, torch.bfloat16), 4, [4], rng, device)
    with pytest.raises(ValueError, match=r"states must be torch\.float32, got torch\.bfloat16"):
        problem.step(tokens(0, 0, 4))


def test_state_rows_of_another_width_are_named(device, rng):
    problem = Problem(rng, device, lengths=[4], ratio=4, overlap=True)
    problem.states = make_cache(RowFormat.plain(2 * DIM, torch.float32), 4, [4], rng, device)
    with pytest.raises(ValueError, match=f"state rows must hold kv and gate, {4 * DIM} values, got {2 * DIM}"):
        problem.step(tokens(0, 0, 4))
