from __future__ import annotations

import torch

from ..apply_rope import apply_rope
from ..rms_norm import rms_norm
from ..rows import PagedRows, write_rows


def qnorm_rope_kv_insert(
    q: torch.Tensor, kv: torch.Tensor, cos_sin: torch.Tensor, window: PagedRows, slots: torch.Tensor, *, eps: float
) -> torch.Tensor:
    rows = window.rows_per_page
    write_rows(window, slots.div(rows, rounding_mode="floor"), slots % rows, apply_rope(kv, cos_sin))
    return apply_rope(rms_norm(q, None, eps), cos_sin)
