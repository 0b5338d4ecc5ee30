from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import Pointer, block, launch

_TILE = 512  # logits of one program, which is one warp: its many reductions then need no barrier


class Logits(NamedTuple):
    """[T, E]; strides in elements."""

    data: Pointer
    token_stride: int
    expert_stride: int


class Rule(NamedTuple):
    """What the kernel is compiled for."""

    experts: int
    topk: int
    renormalize: bool
    shared: bool
    """Whether the shared expert is listed after the chosen ones, with weight 1."""
    block_t: int
    block_e: int
    block_k: int


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
        Logits(logits, *logits.stride()), None if bias is None else bias.contiguous(),
        None if expert_ids is None else expert_ids.contiguous(), weights, chosen, num_tokens, scaling,
        RULE=Rule(experts, topk, renormalize, shared, block_t, block_e, block(topk + shared)), num_warps=1,
    )  # fmt: skip
    return weights, chosen


@triton.jit(do_not_specialize=["num_tokens"])
def _route(logits: Logits, bias, expert_ids, weights, chosen, num_tokens, scaling, RULE: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * RULE.block_t + tl.arange(0, RULE.block_t)[:, None]
    k = tl.arange(0, RULE.block_k)[None, :]
    mask = (t < num_tokens) & (k < RULE.topk)
    # ids = expert_ids, or (score + bias).topk(topk).indices
    if expert_ids is not None:
        ids = tl.load(expert_ids + t * RULE.topk + k, mask=mask, other=0).to(tl.int64)  # [BLOCK_T, BLOCK_K]
    else:
        ids = _best(logits, bias, t, t < num_tokens, k, RULE)
    # share = score.gather(1, ids)
    picked = mask & (ids >= 0) & (ids < RULE.experts)
    at = logits.data + t * logits.token_stride + ids * logits.expert_stride
    share = tl.where(picked, _score(tl.load(at, mask=picked, other=0.0)), 0.0)  # [BLOCK_T, BLOCK_K]
    # share = share / share.sum(1, keepdim=True) * scaling
    if RULE.renormalize:
        # Beyond the last token nothing is picked; 0 / 0 there would only make the interpreter warn.
        share = share / tl.where(t < num_tokens, tl.sum(share, axis=1)[:, None], 1.0)
    share *= scaling
    WIDTH: tl.constexpr = RULE.topk + 1 if RULE.shared else RULE.topk
    if RULE.shared:
        mask = (t < num_tokens) & (k < WIDTH)
        share, ids = tl.where(k == RULE.topk, 1.0, share), tl.where(k == RULE.topk, RULE.experts, ids)
    at = t * WIDTH + k
    tl.store(weights + at, share, mask=mask)  # [BLOCK_T, BLOCK_K]
    tl.store(chosen + at, ids, mask=mask)  # [BLOCK_T, BLOCK_K]


@triton.jit
def _best(logits: Logits, bias, t, live, k, RULE: tl.constexpr):
    """The experts of the TOPK largest biased scores, [BLOCK_T, BLOCK_K] int64; of equal ones, the first."""
    e = tl.arange(0, RULE.block_e)[None, :]
    at = logits.data + t * logits.token_stride + e * logits.expert_stride
    choice = _score(tl.load(at, mask=live & (e < RULE.experts), other=0.0))  # [BLOCK_T, BLOCK_E]
    if bias is not None:
        choice += tl.load(bias + e, mask=e < RULE.experts, other=0.0).to(tl.float32)  # [1, BLOCK_E]
    # -inf stands for what is taken already or no expert; a diverged model's own -inf and NaN must differ from it.
    choice = tl.where(choice > -3.0e38, choice, -3.0e38)
    choice = tl.where(e < RULE.experts, choice, -float("inf"))
    BLOCK_T: tl.constexpr = RULE.block_t
    BLOCK_K: tl.constexpr = RULE.block_k
    TOPK: tl.constexpr = RULE.topk
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int64)
    for rank in tl.static_range(TOPK):
        first = tl.min(tl.where(choice == tl.max(choice, axis=1)[:, None], e, RULE.experts), axis=1)[:, None]
        ids = tl.where(k == rank, first.to(tl.int64), ids)
        choice = tl.where(e == first, -float("inf"), choice)
    return ids


@triton.jit
def _score(logit):
    """softplus(logit).sqrt(), to a few ulp also where softplus is tiny."""
    small = tl.exp(-tl.abs(logit))
    # log(1 + small): the quotient restores what `1 + small` rounds away.
    above = 1 + small
    log = tl.where(above == 1, small, tl.log(above) * (small / tl.where(above == 1, 1.0, above - 1)))
    # Far below zero the root is that of exp(logit), which itself would be flushed to zero below -87.
    return tl.where(logit < -20, tl.exp(0.5 * logit), tl.sqrt(tl.maximum(logit, 0) + log))
