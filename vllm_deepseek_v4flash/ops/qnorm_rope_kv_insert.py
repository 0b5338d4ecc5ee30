"""The last steps of a query and of a window row: norm, rotation, quantisation, store (docs/model.md, "Attention")."""

from __future__ import annotations

import torch

from .apply_rope import apply_rope
from .checks import check_cos_sin, check_shape
from .dispatch import op
from .rms_norm import rms_norm
from .rows import PagedRows, write_rows


def _check(q: torch.Tensor, kv: torch.Tensor, cos_sin: torch.Tensor, slots: torch.Tensor) -> None:
    num_tokens, _, head_dim = q.shape
    check_shape("kv", kv, (num_tokens, head_dim))
    check_cos_sin(cos_sin, num_tokens, head_dim)
    check_shape("slots", slots, (num_tokens,))


@op(_check)
def qnorm_rope_kv_insert(
    q: torch.Tensor, kv: torch.Tensor, cos_sin: torch.Tensor, window: PagedRows, slots: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """Normalise (weightless, per head) and rotate the queries; rotate the kv rows and write them into the window cache.

    Args:
        q: [T, H, D] from wq_b. kv: [T, D] after kv_norm. Same dtype.
        cos_sin: [T, R] fp32 at the tokens' positions.
        window: the window cache; rows of D values.
        slots: [T] int64, page * rows_per_page + row of each token, negative for padded tokens, which write nothing.
        eps: `rms_norm_eps`.

    Returns:
        [T, H, D], the dtype of `q`.
    """
    rows = window.rows_per_page
    write_rows(window, slots.div(rows, rounding_mode="floor"), slots % rows, apply_rope(kv, cos_sin))
    return apply_rope(rms_norm.reference(q, None, eps), cos_sin)
