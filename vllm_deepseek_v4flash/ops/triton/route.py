from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import block, launch

_TILE = 512  # logits of one program, which is one warp: its many reductions then need no barrier


def route(
    logits: torch.Tensor,
    topk: int,
    *,
    bias: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    scaling: float,
    renormalize: bool = True,
    shared: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, experts = logits.shape
    weights = torch.empty((num_tokens, topk + shared), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((num_tokens, topk + shared), dtype=torch.int64, device=logits.device)
    block_e = block(experts)
    block_t = max(1, _TILE // block_e)
    launch(
        _route, (triton.cdiv(num_tokens, block_t),),
        logits, *logits.stride(), None if bias is None else bias.contiguous(),
        None if expert_ids is None else expert_ids.contiguous(), weights, chosen, num_tokens, scaling,
        EXPERTS=experts, TOPK=topk, RENORMALIZE=renormalize, SHARED=shared,
        BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=block(topk + shared), num_warps=1,
    )  # fmt: skip
    return weights, chosen


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits, stride, expert_stride, bias, expert_ids, weights, chosen, num_tokens, scaling,
    EXPERTS: tl.constexpr, TOPK: tl.constexpr, RENORMALIZE: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = (t < num_tokens) & (k < TOPK)
    if expert_ids is not None:
        ids = tl.load(expert_ids + t * TOPK + k, mask=mask, other=0).to(tl.int64)
    else:
        ids = _best(logits, stride, expert_stride, bias, t, t < num_tokens, k, EXPERTS, TOPK, BLOCK_T, BLOCK_E, BLOCK_K)
    picked = mask & (ids >= 0) & (ids < EXPERTS)
    share = tl.where(picked, _score(tl.load(logits + t * stride + ids * expert_stride, mask=picked, other=0.0)), 0.0)
    if RENORMALIZE:
        # Beyond the last token nothing is picked; 0 / 0 there would only make the interpreter warn.
        share = share / tl.where(t < num_tokens, tl.sum(share, axis=1)[:, None], 1.0)
    share *= scaling
    WIDTH: tl.constexpr = TOPK + 1 if SHARED else TOPK
    if SHARED:
        mask = (t < num_tokens) & (k < WIDTH)
        share, ids = tl.where(k == TOPK, 1.0, share), tl.where(k == TOPK, EXPERTS, ids)
    at = t * WIDTH + k
    tl.store(weights + at, share, mask=mask)
    tl.store(chosen + at, ids, mask=mask)


@triton.jit
def _best(
    logits, stride, expert_stride, bias, t, live, k,
    EXPERTS: tl.constexpr, TOPK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The experts of the TOPK largest biased scores, [BLOCK_T, BLOCK_K] int64; of equal ones, the first."""
    e = tl.arange(0, BLOCK_E)[None, :]
    choice = _score(tl.load(logits + t * stride + e * expert_stride, mask=live & (e < EXPERTS), other=0.0))
    if bias is not None:
        choice += tl.load(bias + e, mask=e < EXPERTS, other=0.0).to(tl.float32)
    # -inf stands for what is taken already or no expert; a diverged model's own -inf and NaN must differ from it.
    choice = tl.where(choice > -3.0e38, choice, -3.0e38)
    choice = tl.where(e < EXPERTS, choice, -float("inf"))
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int64)
    for rank in tl.static_range(TOPK):
        first = tl.min(tl.where(choice == tl.max(choice, axis=1)[:, None], e, EXPERTS), axis=1)[:, None]
        ids = tl.where(k == rank, first.to(tl.int64), ids)
        choice = tl.where(e == first, -float("inf"), choice)
    return ids


@triton.jit
def _score(logit):
    """The root of softplus, to a few ulp also where softplus is tiny."""
    small = tl.exp(-tl.abs(logit))
    # log(1 + small): what `1 + small` rounds away is made good by the quotient.
    above = 1 + small
    log = tl.where(above == 1, small, tl.log(above) * (small / tl.where(above == 1, 1.0, above - 1)))
    # Far below zero the root is that of exp(logit), which itself would be flushed to zero from -87 on.
    return tl.where(logit < -20, tl.exp(0.5 * logit), tl.sqrt(tl.maximum(logit, 0) + log))
