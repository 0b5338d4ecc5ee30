"""DeepSeek-V4-Flash at its real shape (docs/model.md, "Config")."""

from vllm_deepseek_v4flash.config import DeepseekV4Config

FLASH = DeepseekV4Config.from_dict(
    {
        "model_type": "deepseek_v4",
        "vocab_size": 129280,
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "sliding_window": 128,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
        "num_hash_layers": 3,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536},
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)
