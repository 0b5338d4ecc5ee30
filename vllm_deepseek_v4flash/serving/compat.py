"""The vLLM symbols that the chat side uses, in one place.

Not part of the model's `compat.py`: the API server needs these and none of the model's, a worker only the model's.
"""

from __future__ import annotations

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.parser.deepseek_v4 import DeepSeekV4Parser, deepseek_v4_config
from vllm.parser.engine.adapters import ParserEngineReasoningAdapter, ParserEngineToolAdapter
from vllm.parser.engine.incremental_lexer import IncrementalLexer
from vllm.parser.engine.parser_engine_config import ParserState
from vllm.renderers.deepseek_v4 import DeepseekV4Renderer
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.tool_parsers.utils import coerce_to_schema_type, extract_types_from_schema, find_tool_properties
from vllm.transformers_utils.repo_utils import get_hf_file_bytes
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, check_stop_strings, uses_fast_detokenizer
