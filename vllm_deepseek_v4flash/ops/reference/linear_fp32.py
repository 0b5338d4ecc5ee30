from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.is_cuda and x.dtype == weight.dtype != torch.float32:
        # cuBLAS sums in fp32 and can keep the sums; the CPU's GEMM would round them.
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())
