"""The canonical form: what its codes mean, by hand, and the shapes of its tensors."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_deepseek_v4flash.ops.packed_weight import QuantizationError, Scheme, canonical_shapes, dequantise


def packed(rows: list[list[int]]) -> torch.Tensor:
    """Two codes a byte, the even column low."""
    return torch.tensor([[row[i] + 16 * row[i + 1] for i in range(0, len(row), 2)] for row in rows], dtype=torch.uint8)


def test_int4_symmetric_has_zero_at_8() -> None:
    canonical = {"qweight": packed([list(range(16))]), "scales": torch.tensor([[0.5, 2.0]], dtype=torch.float16)}
    scheme = Scheme("int4", 8, scale_dtype=torch.float16)
    want = [0.5 * (code - 8) for code in range(8)] + [2.0 * (code - 8) for code in range(8, 16)]
    assert dequantise(canonical, scheme).tolist() == [want]


@pytest.mark.parametrize("zero", [0, 7, 15])
def test_int4_zero_points(zero: int) -> None:
    canonical = {
        "qweight": packed([list(range(16))] * 2),
        "scales": torch.tensor([[1.0], [-3.0]]),
        "zeros": torch.tensor([[zero], [8]], dtype=torch.uint8),
    }
    weight = dequantise(canonical, Scheme("int4", 16, zero_points=True))
    assert weight.tolist() == [[code - zero for code in range(16)], [-3.0 * (code - 8) for code in range(16)]]
    assert not torch.signbit(weight[weight == 0]).any()


def test_int4_act_order_puts_columns_back() -> None:
    perm = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    canonical = {"qweight": packed([[9, 10, 11, 12]]), "scales": torch.tensor([[1.0, 10.0]]), "perm": perm}
    scheme = Scheme("int4", 2, act_order=True)
    weight = dequantise(canonical, scheme)
    assert weight.tolist() == [[2.0, 40.0, 1.0, 30.0]]
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    in_order = dequantise(canonical, Scheme("int4", 2))
    assert torch.equal(weight @ x, in_order @ x[perm.long()])


def test_fp4_table() -> None:
    """All sixteen e2m1 codes under every finite ue8m0 scale."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    canonical = {
        "qweight": packed([list(range(16)) * 2] * 255),
        "scales": torch.arange(255, dtype=torch.uint8)[:, None],
    }
    weight = dequantise(canonical, Scheme("fp4", 32))
    want = torch.tensor([[value * 2.0 ** (code - 127) for value in values * 2] for code in range(255)])
    assert torch.equal(weight.view(torch.int32), want.view(torch.int32))
    assert math.isinf(weight[254, 7]), "6 * 2^127 is beyond fp32"


def e4m3(code: int) -> float:
    """Sign, four exponent bits of bias 7, three mantissa bits; no infinity (OCP FP8, section 5)."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_fp8_table() -> None:
    """All 256 e4m3 codes, in each of four blocks that are cut short."""
    codes = torch.arange(256, dtype=torch.uint8)
    weight = codes.view(torch.float8_e4m3fn).expand(130, 256)
    scales = torch.tensor([[1.0, 0.5], [4.0, 3.0]])
    found = dequantise({"qweight": weight, "scales": scales}, Scheme("fp8", 128))
    values = torch.tensor([e4m3(code) for code in range(256)])
    for row, block in ((0, 0), (127, 0), (128, 1), (129, 1)):
        want = torch.cat([values[:128] * scales[block, 0], values[128:] * scales[block, 1]])
        assert torch.equal(found[row].nan_to_num(nan=1e9), want.nan_to_num(nan=1e9))


def test_plain() -> None:
    weight = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    assert dequantise({"weight": weight}, Scheme("plain", dtype=torch.bfloat16)).dtype == torch.float32


def test_canonical_shapes() -> None:
    half = torch.float16
    assert canonical_shapes(Scheme("int4", 64, True, True, half), 10, 256) == {
        "qweight": ((10, 128), torch.uint8),
        "scales": ((10, 4), half),
        "zeros": ((10, 4), torch.uint8),
        "perm": ((256,), torch.int32),
    }
    assert set(canonical_shapes(Scheme("int4", 64), 10, 256)) == {"qweight", "scales"}
    assert canonical_shapes(Scheme("fp4", 32), 10, 64) == {
        "qweight": ((10, 32), torch.uint8),
        "scales": ((10, 2), torch.uint8),
    }
    assert canonical_shapes(Scheme("fp8", 128), 129, 200) == {
        "qweight": ((129, 200), torch.float8_e4m3fn),
        "scales": ((2, 2), torch.float32),
    }
    assert canonical_shapes(Scheme("plain", dtype=half), 3, 5) == {"weight": ((3, 5), half)}


@pytest.mark.parametrize(("group", "k"), [(64, 96), (0, 64), (3, 9)])
def test_a_cut_group_is_refused(group: int, k: int) -> None:
    with pytest.raises(QuantizationError, match=rf"layers\.0\.attn\.wkv: {k} input columns"):
        canonical_shapes(Scheme("int4", group, module="layers.0.attn.wkv"), 8, k)


def test_equal_schemes_share_a_parameter() -> None:
    one = Scheme("int4", 64, source="gptq_v1", module="layers.0.ffn.experts.0.w1", shape=(8, 64))
    assert one == Scheme("int4", 64, source="awq_gemm", module="layers.0.ffn.experts.0.w3", shape=(16, 64))
    assert one != Scheme("int4", 32)
