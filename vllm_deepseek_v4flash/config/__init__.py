"""The DeepSeek-V4 hyper-parameters as one frozen dataclass, whatever wrote the config.json.

Four sources are read: DeepSeek's own file (`compress_ratios`, flat `rope_scaling`, `num_hash_layers`), a file saved
again by transformers (`layer_types`, `compress_rates`, `mlp_layer_types`, nested `rope_parameters`), and the config
objects of vLLM and of transformers. Standard library only, so that reading a config never waits for torch.
"""

from .hyper_parameters import ARCHITECTURE, BLOCK_TOKENS, MODEL_TYPE, DeepseekV4Config
from .layer_kinds import LayerKind
from .rotary import RopeScaling
from .text import line, parse_json, printable, shown

__all__ = [
    "ARCHITECTURE",
    "BLOCK_TOKENS",
    "MODEL_TYPE",
    "DeepseekV4Config",
    "LayerKind",
    "RopeScaling",
    "line",
    "parse_json",
    "printable",
    "shown",
]
