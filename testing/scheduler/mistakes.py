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
