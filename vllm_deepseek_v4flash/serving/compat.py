"""Everything the serving side takes from vLLM outside its registries, apart from the model's `compat.py`.

The API server needs this and none of the model's imports, a worker the other way round.
"""

from __future__ import annotations

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.parser.deepseek_v4 import DeepSeekV4Parser, deepseek_v4_config
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter, ParserEngineToolAdapter
from vllm.parser.engine.parser_engine_config import ParserState
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.tool_parsers.utils import coerce_to_schema_type, extract_types_from_schema, find_tool_properties
from vllm.transformers_utils.repo_utils import get_hf_file_bytes
