"""The routed experts over packed weights: bit-exact columns from one-hot activations, then sums against fp64."""

import dataclasses
import itertools

import pytest
import torch

from testing.ops.numeric import FUNCTION, U, assert_exact, assert_within, f64, normal
from testing.ops.packed_weights import SCHEMES, check_experts, dense, experts_in_fp64, random_weight, scheme_of, stacked
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.packed_experts import packed_experts
from vllm_deepseek_v4flash.ops.packed_linear import packed_linear
from vllm_deepseek_v4flash.ops.packed_weight import Scheme, canonical_shapes, dequantise, shard_scheme
from vllm_deepseek_v4flash.ops.swiglu import swiglu

IDENTITY = Scheme("int4", 32, scale_dtype=torch.bfloat16)


@dataclasses.dataclass
class Experts:
    """Weights of E experts as `packed_experts` takes them; `dense13` is [E, 2I, H]."""

    w13: dict
    w2: dict
    scheme13: Scheme
    scheme2: Scheme
    dense13: torch.Tensor
    dense2: torch.Tensor

    def __call__(self, x, weights, ids, *, limit=10.0, held=slice(None), first=0):
        w13, w2 = ({name: t[held] for name, t in w.items()} for w in (self.w13, self.w2))
        return packed_experts(
            x, w13, w2, self.scheme13, self.scheme2, weights, ids, swiglu_limit=limit, first_expert=first
        )

    def check(self, actual, x, weights, ids, *, limit=10.0, held=slice(None), first=0):
        expected = experts_in_fp64(x, self.dense13[held], self.dense2[held], weights, ids, limit, first)
        check_experts(actual, expected, x)


def experts(name, device, *, num=3, hidden=64, inner=64, dtype=torch.bfloat16):
    scheme13, scheme2 = scheme_of(name, hidden), scheme_of(name, inner)
    w13 = stacked([random_weight(scheme13, inner, hidden, device) for _ in range(2 * num)], num, 2)
    w2 = stacked([random_weight(scheme2, hidden, inner, device) for _ in range(num)], num)
    dense13 = dense(w13, scheme13, dtype).flatten(1, 2)
    return Experts(w13, w2, scheme13, scheme2, dense13, dense(w2, scheme2, dtype))


def routed(rng, device, *, tokens=7, hidden=64, num=3, topk=2, dtype=torch.bfloat16):
    x = normal(rng, tokens, hidden, scale=0.1, device=device, dtype=dtype)
    weights = torch.rand(tokens, topk, generator=rng).to(device)
    return x, weights, torch.randint(0, num, (tokens, topk), generator=rng).to(device)


def constant(scheme, n, k, value):
    """A weight whose every entry is `value`, a power of two."""
    exponent = value.bit_length() - 1
    fill = {"int4": 0x99, "fp4": 0x22, "fp8": 1.0}[scheme.kind]  # codes of 1
    weight = {}
    for name, (shape, dtype) in canonical_shapes(scheme, n, k).items():
        if name == "perm":
            weight[name] = torch.arange(k, dtype=dtype)
        elif name == "scales":
            weight[name] = torch.full(shape, 127 + exponent if scheme.kind == "fp4" else value).to(dtype)
        else:
            weight[name] = torch.full(shape, 8 if name == "zeros" else fill).to(dtype)
    assert (dequantise(weight, scheme) == value).all()
    return weight


def identity(n, k):
    """The leading n rows of an identity matrix of k columns, in `IDENTITY`."""
    codes = torch.full((n, k), 8, dtype=torch.uint8)
    codes.fill_diagonal_(9)
    scales = torch.ones(n, k // 32, dtype=torch.bfloat16)
    return {"qweight": codes[:, ::2] | codes[:, 1::2] << 4, "scales": scales}


def one_hot(count, device, dtype):
    """[count, count] tokens, the same weight for each, and expert 1 of 2."""
    ids = torch.ones(count, 1, dtype=torch.int64, device=device)
    # silu(64) is 64 exactly; the router's weight takes it back.
    return torch.eye(count, dtype=dtype, device=device), torch.full((count, 1), 1 / 64, device=device), ids


def on(device, *weights):
    """A stack of the weights twice, the first time as noise, on a device."""
    stack = stacked([*weights, *weights], 2, *([len(weights)] if len(weights) > 1 else []))
    for name, tensor in stack.items():
        if name == "qweight":
            tensor[0] = torch.randint(0, 100, tensor[0].shape).to(tensor.dtype)
    return {name: tensor.to(device) for name, tensor in stack.items()}


@pytest.mark.parametrize("name", SCHEMES)
def test_one_hot_tokens_return_the_columns_of_w3_bit_for_bit(device, name):
    width = 128 if name in ("int4-g128", "fp8") else 64
    scheme = scheme_of(name, width)
    up = random_weight(scheme, 32, width)
    w13, w2 = on(device, constant(scheme, 32, width, 64), up), on(device, identity(width, 32))
    if "perm" in w13:
        w13["perm"][1, 1] = up["perm"].to(device)
    x, weights, ids = one_hot(width, device, torch.bfloat16)
    out = packed_experts(x, w13, w2, scheme, IDENTITY, weights, ids, swiglu_limit=None)
    assert_exact(out[:, :32], dequantise(up, scheme).T.to(torch.bfloat16).float())
    assert not out[:, 32:].any()


@pytest.mark.parametrize("name", ["int4-g64-zeros", "int4-act-order", "fp4"])
def test_one_hot_tokens_return_the_columns_of_w1_through_silu(device, name):
    scheme = scheme_of(name, 64)
    gate = random_weight(scheme, 32, 64)
    w13, w2 = on(device, gate, constant(scheme, 32, 64, 64)), on(device, identity(64, 32))
    x, weights, ids = one_hot(64, device, torch.float32)
    out = packed_experts(x, w13, w2, scheme, IDENTITY, weights, ids, swiglu_limit=None)
    columns = f64(dequantise(gate, scheme).T)
    silu = columns * torch.sigmoid(columns)
    assert_within(out[:, :32], silu, 2 * FUNCTION * silu.abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_one_hot_activations_return_the_columns_of_w2_bit_for_bit(device, name, dtype):
    if dtype is not torch.bfloat16 and name not in ("int4-g32", "int4-g32-zeros-fp32", "fp4"):
        pytest.skip("other formats differ in nothing that the dtype changes")
    width = 128 if name in ("int4-g128", "fp8") else 64
    scheme = scheme_of(name, width)
    down = random_weight(scheme, 32, width)
    # Each of 32 tokens has one channel, of every group and of every place in a word.
    channels = torch.arange(32) * width // 32 + torch.arange(32) % (width // 32)
    up = identity(32, 32)
    for tensor, fill in (("qweight", 0x88), ("scales", 1)):
        wide = torch.full((width, up[tensor].shape[1]), fill, dtype=up[tensor].dtype)
        up[tensor] = wide.index_copy_(0, channels, up[tensor])
    w13, w2 = on(device, constant(IDENTITY, width, 32, 64), up), on(device, down)
    x, weights, ids = one_hot(32, device, dtype)
    out = packed_experts(x, w13, w2, IDENTITY, scheme, weights, ids, swiglu_limit=None)
    assert_exact(out, dequantise(down, scheme).T[channels].to(dtype).float())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_are_those_of_the_dequantised_weights(device, rng, name, dtype):
    # More columns than a tile has, and rows that fill no tile.
    hidden, inner = (384, 128) if name in ("int4-g128", "fp8") else (320, 64)
    if dtype is torch.float32 and inner == 64:
        hidden = 64
    ours = experts(name, device, num=2, hidden=hidden, inner=inner, dtype=dtype)
    x, weights, ids = routed(rng, device, tokens=3, hidden=hidden, num=2, dtype=dtype)
    ours.check(ours(x, weights, ids), x, weights, ids)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_clamp_binds_on_both_sides(device, rng, limit):
    ours = experts("int4-g32", device)
    x, weights, ids = routed(rng, device)
    gate, up = (f64(x) @ f64(ours.dense13).transpose(1, 2)).chunk(2, dim=-1)
    assert (gate > 0.5).any()
    assert (gate < -0.5).any()
    assert (up > 0.5).any()
    assert (up < -0.5).any()
    ours.check(ours(x, weights, ids, limit=limit), x, weights, ids, limit=limit)


@pytest.mark.parametrize(("name", "ids_dtype"), [("int4-g32", torch.int32), ("fp4", torch.int64)])
def test_ranks_sum_to_the_whole(device, rng, name, ids_dtype):
    ours = experts(name, device, num=6)
    x, weights, ids = routed(rng, device, tokens=9, num=8)  # two experts that no rank holds
    ids[0] = -1
    total = torch.zeros(x.shape, device=device)
    for low, high in itertools.pairwise([0, 1, 4, 4, 6]):
        part = ours(x, weights, ids.to(ids_dtype), held=slice(low, high), first=low)
        ours.check(part, x, weights, ids, held=slice(low, high), first=low)
        total += part
    assert not total[0].any()
    ours.check(total, x, weights, ids)


@pytest.mark.parametrize("name", ["int4-g32", "int4-channel", "fp4"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_share_of_the_channels(device, rng, name, ranks):
    whole, hidden = 256, 64
    inner = whole // ranks
    ours = experts(name, device, num=2, hidden=hidden, inner=inner)
    assert ours.scheme2 == shard_scheme(scheme_of(name, whole), (hidden, inner), (hidden, whole))
    x, weights, ids = routed(rng, device, tokens=3, hidden=hidden, num=2)
    ours.check(ours(x, weights, ids), x, weights, ids)


def test_all_tokens_on_one_expert(device, rng):
    ours = experts("int4-g32", device)
    x, weights, ids = routed(rng, device, tokens=37, topk=1)
    ids[:] = 1
    for name in ("qweight", "scales"):
        ours.w13[name][::2] = ours.w2[name][::2] = 255 if name == "qweight" else torch.nan
    ours.check(ours(x, weights, ids), x, weights, ids)


def test_an_expert_listed_twice_counts_twice(device, rng):
    ours = experts("fp4", device)
    x, weights, ids = routed(rng, device)
    ids[:] = 2
    ours.check(ours(x, weights, ids), x, weights, ids)


@pytest.mark.parametrize("tokens", [5, 90])  # that look for their pairs themselves, and that are sorted
def test_the_shared_expert_can_be_one_of_the_routed_experts(device, rng, implementation, tokens):
    ours = experts("int4-g32", device, num=5, hidden=32, inner=32)
    x, weights, ids = routed(rng, device, tokens=tokens, hidden=32, num=4)
    all_weights = torch.nn.functional.pad(weights, (0, 1), value=1.0)
    all_ids = torch.nn.functional.pad(ids, (0, 1), value=4)
    merged = ours(x, all_weights, all_ids)
    ours.check(merged, x, all_weights, all_ids)
    if implementation not in ("reference", "torch"):
        return
    w13, w2 = ({name: t[4] for name, t in w.items()} for w in (ours.w13, ours.w2))
    gate, up = (packed_linear(x, {name: t[i] for name, t in w13.items()}, ours.scheme13) for i in (0, 1))
    separate = ours(x, weights, ids, held=slice(0, 4))
    separate += packed_linear(swiglu(gate, up, 10.0).to(x.dtype), w2, ours.scheme2).float()
    assert torch.equal(merged, separate)


@pytest.mark.parametrize("tokens", [4001, 300, 150])  # 1000, 75 and 37 for an expert on average
def test_many_tokens(device, rng, tokens):
    num, topk = 8, 2
    ours = experts("int4-g32", device, num=num, hidden=32, inner=32)
    x, weights, ids = routed(rng, device, tokens=tokens, hidden=32, num=num, topk=topk)
    ids[:, 0] = torch.where(ids[:, 0] == 5, 6, ids[:, 0])
    ids[:, 1] = 3
    out = ours(x, weights, ids)
    some = torch.arange(0, tokens, 29, device=device)
    ours.check(out[some], x[some], weights[some], ids[some])
    if tokens < 4001:
        assert torch.equal(ours(x, weights, ids), out)


def test_many_tokens_on_one_of_several_ranks(device, rng):
    ours = experts("fp4", device, num=5, hidden=32, inner=32)
    x, weights, ids = routed(rng, device, tokens=140, hidden=32, num=9)
    out = ours(x, weights, ids, held=slice(2, 5), first=3)
    ours.check(out, x, weights, ids, held=slice(2, 5), first=3)


@pytest.mark.parametrize("name", ["int4-g64-zeros", "fp4"])
def test_a_token_gets_what_it_gets_alone(device, rng, name):
    ours = experts(name, device)
    x, weights, ids = routed(rng, device, tokens=12)
    together = ours(x, weights, ids)
    for t in (0, 5, 11):
        alone = ours(x[t : t + 1], weights[t : t + 1], ids[t : t + 1])
        ours.check(alone, x[t : t + 1], weights[t : t + 1], ids[t : t + 1])
        # A GEMM may take its sums in another order for more rows: both are within the roundings of the formula.
        out, size = experts_in_fp64(
            x[t : t + 1], ours.dense13, ours.dense2, weights[t : t + 1], ids[t : t + 1], 10.0
        )  # fmt: skip
        assert ((together[t : t + 1] - alone).abs().cpu() <= 2 * 4 * U[x.dtype] * size + U[x.dtype] * out.abs()).all()


def test_no_tokens_and_no_experts(device, rng):
    ours = experts("fp4", device)
    x, weights, ids = routed(rng, device)
    assert ours(x[:0], weights[:0], ids[:0]).shape == (0, 64)
    assert not ours(x, weights, ids, held=slice(0, 0)).any()


def test_strided_tokens(device, rng):
    ours = experts("int4-g32", device)
    x, weights, ids = routed(rng, device)
    wide = torch.full((7, 2 * 64 + 1), torch.nan, dtype=x.dtype, device=device)
    wide[:, 1:65] = x
    assert torch.equal(ours(wide[:, 1:65], weights, ids), ours(x, weights, ids))


@pytest.mark.parametrize("module", ["packed_linear", "torch.packed_linear"])
def test_only_routed_experts_are_unpacked(module, monkeypatch):
    scheme, num = SCHEMES["int4-g32"], 8
    w13 = {n: t.expand(num, 2, *t.shape) for n, t in random_weight(scheme, 64, 64).items()}
    w2 = {n: t.expand(num, *t.shape) for n, t in random_weight(scheme, 64, 64).items()}
    calls = []

    def counted(weight, scheme):
        calls.append(weight["qweight"].data_ptr())
        return dequantise(weight, scheme)

    monkeypatch.setattr(f"vllm_deepseek_v4flash.ops.{module}.dequantise", counted)
    ids = torch.tensor([[5, 1]])
    with dispatch.use("torch" if "torch" in module else "reference"):
        packed_experts(torch.randn(1, 64), w13, w2, scheme, scheme, torch.rand(1, 2), ids, swiglu_limit=10.0)
    assert len(calls) == 3 * 2  # w1, w3 and w2 of two experts of eight


def test_weights_that_no_kernel_reads_are_named(device, rng, implementation):
    if implementation in ("reference", "torch"):
        pytest.skip("PyTorch reads them all")
    ours = experts("int4-g32", device)
    x, weights, ids = routed(rng, device)
    contiguous = ours.w2["qweight"]
    ours.w2["qweight"] = contiguous.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="qweight must be contiguous"):
        ours(x, weights, ids)
    ours.w2["qweight"], ours.scheme2 = contiguous, dataclasses.replace(ours.scheme2, group_size=24)
    with pytest.raises(ValueError, match="got 24: set VLLM_DEEPSEEK_V4FLASH_OPS=reference"):
        ours(x, weights, ids)
