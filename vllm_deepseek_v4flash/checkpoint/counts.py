"""Whether config.json's numbers of layers and experts are those of the tensors.

Everything else that is wrong is listed tensor by tensor. A count that is much too high would make that list endless.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..config import DeepseekV4Config
from . import names
from .errors import CheckpointError
from .headers import TensorHeader

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(?:.*\.experts\.(\d+)\.)?")
_FUSED = (names.FUSED_GATE_UP.rpartition(".")[2], names.FUSED_DOWN.rpartition(".")[2])


def check_counts(config: DeepseekV4Config, headers: Iterable[TensorHeader]) -> None:
    """Compare the two counts with the stored names.

    Raises:
        CheckpointError: config.json has more layers or experts than there are in the whole checkpoint.
    """
    layers: set[str] = set()
    experts: set[str] = set()
    stacked = 0
    for header in headers:
        found = _LAYER.match(header.name)
        if found is None:
            continue
        layers.add(found[1])
        if found[2] is not None:
            experts.add(found[2])
        elif header.name.endswith(_FUSED) and header.shape:
            stacked = max(stacked, header.shape[0])
    _compare("num_hidden_layers", config.num_hidden_layers, "layers", len(layers))
    _compare("n_routed_experts", config.n_routed_experts, "routed experts", max(len(experts), stacked))


def _compare(field: str, asked: int, what: str, stored: int) -> None:
    if stored < asked:
        raise CheckpointError(
            f"{field}={asked} in config.json: the tensors have {stored} {what}. Use the config.json of this "
            "checkpoint, or download the shards that are missing."
        )
