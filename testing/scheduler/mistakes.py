"""Mistakes for `testing.mutate.mutated` that the comparisons of these tests must notice."""

# A compressor that pools only what the step itself brought: states of earlier steps are read as zeros.
FORGET_STATES = (
    "ops.compress:compress",
    (
        "pooled = _pool(",
        """
    begin = torch.full((int(request.max()) + 1,), 1 << 40).scatter_reduce(0, request.long(), positions, 'amin')
    token = last[:, None] - torch.arange(kv.shape[1] // entries.format.dim * ratio)
    page, row = states.locate(owner[:, None], token.clamp(min=0))
    forgotten = (token >= 0) & (token < begin[owner.long()][:, None])
    write_rows(states, page[forgotten], row[forgotten], torch.zeros(int(forgotten.sum()), states.format.dim))
    pooled = _pool(""",
    ),
)

# Every token looks into the pages of the first request of its step.
SHARE_PAGES = (
    "kv_cache.metadata:DeepseekV4MetadataBuilder.build",
    ("request.clamp_(max=common.num_reqs - 1)", "request.zero_()"),
)

# What a rejected draft has written stays, because its place is taken: entries, states, window rows. Only in a cache
# that no other request has used.
FIRST_ENTRY_STAYS = (
    "ops.compress:compress",
    (
        "write_rows(entries, *entries.locate(owner, last // ratio), entry)",
        """
    page, row = entries.locate(owner, last // ratio)
    free = read_rows(entries, page, row, torch.ones_like(owner, dtype=torch.bool)).abs().sum(-1) == 0
    write_rows(entries, page[free], row[free], entry[free])""",
    ),
)
FIRST_STATE_STAYS = (
    "ops.compress:compress",
    (
        "write_rows(states, state_slots.div(rows, rounding_mode='floor'), state_slots % rows, state)",
        """
    page, row = state_slots.div(rows, rounding_mode='floor'), state_slots % rows
    free = read_rows(states, page, row, state_slots >= 0).abs().sum(-1) == 0
    write_rows(states, page[free], row[free], state[free])""",
    ),
)
FIRST_WINDOW_ROW_STAYS = (
    "ops.qnorm_rope_kv_insert:qnorm_rope_kv_insert",
    (
        "write_rows(window, slots.div(rows, rounding_mode='floor'), slots % rows, apply_rope(kv, cos_sin))",
        """
    from .rows import read_rows
    page, row = slots.div(rows, rounding_mode='floor'), slots % rows
    free = (read_rows(window, page, row, slots >= 0).abs().sum(-1) == 0) & (slots >= 0)
    write_rows(window, page[free], row[free], apply_rope(kv, cos_sin)[free])""",
    ),
)
