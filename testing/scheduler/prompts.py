"""The model and the texts of the scheduler tests.

Every run of a prompt must give the same tokens, so no choice in it may depend on fp32 rounding: neither a token's
experts nor the entries that the indexer keeps. The seeds below were searched for texts whose narrowest choice is wider
than `MIN_MARGIN`; `test_reference.py` checks that with transformers.
"""

from __future__ import annotations

import torch

from testing.tiny import TinySpec

SPEC = TinySpec(
    "one layer of each kind and a second CSA layer; 16 of up to 190 entries chosen by scores that do not tie",
    {
        "num_hidden_layers": 4,
        "compress_ratios": [0, 4, 128, 4, 0],
        "num_hash_layers": 2,
        "index_topk": 16,
        "index_n_heads": 32,
    },
    prompt_length=760,
)
# In standard deviations of the scores; fp32 rounding moves a score of this model by some 3e-6.
MIN_MARGIN = 3e-5
TEXT_LENGTH = 760

# (seed of the stem, its length, seed of the rest). The first two share 300 tokens, the next two 530.
_TEXTS = ((37, 300, 0), (37, 300, 2), (24, 530, 0), (24, 530, 1), (11, 1, 0))


def random_ids(count: int, seed: int) -> list[int]:
    """`count` random ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SPEC.config.vocab_size, (count,), generator=generator).tolist()


def text(stem_seed: int, stem_length: int, rest_seed: int) -> tuple[int, ...]:
    """BOS, a stem and a rest, TEXT_LENGTH tokens in all."""
    stem = random_ids(stem_length - 1, stem_seed)
    return (0, *stem, *random_ids(TEXT_LENGTH - stem_length, 1000 * (stem_seed + 1) + rest_seed))


TEXTS = tuple(text(*seeds) for seeds in _TEXTS)
