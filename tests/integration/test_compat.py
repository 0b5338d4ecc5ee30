"""What the plugin takes from vLLM, name by name: when vLLM moves something, the test of that name fails first.

Nothing of the plugin that needs vLLM is imported at the top of this file, so a vanished symbol fails its own test and
not the collection.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_deepseek_v4flash

PACKAGE = Path(vllm_deepseek_v4flash.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT_VLLM = {"compat.py", "serving/compat.py"} | {
    f"integration/{name}.py"
    for name in (
        "in_tree",
        "install",
        "quantization",
        "refusals",
        "reasoning",
        "registered_model",
        "rust_frontend",
        "serving",
        "speculation",
        "tool_calls",
        "workarounds",
    )
}
# What `register` imports in every process, and so may import vLLM only when it runs.
LIGHT = ("in_tree", "install", "refusals", "rust_frontend", "serving", "speculation", "switch", "workarounds")
FORBIDDEN = ("vllm.models.deepseek_v4", "vllm.v1.core")


def relative(path):
    return path.relative_to(PACKAGE).as_posix()


def imported_symbols(tree):
    """Every (module, name) that a file imports from vLLM, at any depth; `import vllm.x` gives (vllm.x, None)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and is_vllm(node.module):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if is_vllm(alias.name))


def is_vllm(module):
    return module == "vllm" or module.startswith("vllm.")


def optional_symbols(tree):
    """Those of a `try` whose handler imports them from elsewhere: one of the homes is enough."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(True for handler in node.handlers for _ in imported_symbols(handler)):
            yield from imported_symbols(node)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def required():
    for name in sorted(MAY_IMPORT_VLLM):
        tree = parse(PACKAGE / name)
        optional = set(optional_symbols(tree)) if name == "compat.py" else set()
        yield from sorted(set(imported_symbols(tree)) - optional)


@pytest.mark.parametrize(("module", "name"), sorted(set(required())), ids=lambda part: part)
def test_vllm_has(module, name):
    assert hasattr(importlib.import_module(module), name), f"vLLM no longer has {module}.{name}"


@pytest.mark.parametrize("name", sorted({name for _, name in optional_symbols(parse(PACKAGE / "compat.py"))}))
def test_compat_has_what_moves_between_releases(name):
    assert getattr(importlib.import_module("vllm_deepseek_v4flash.compat"), name) is not None


def test_the_contract_is_not_empty():
    assert len(set(required())) >= 35


# Attributes of what is imported above: (module, object, attributes that the plugin reads).
ATTRIBUTES = [
    ("vllm.model_executor.models.registry", "ModelRegistry", ("models", "register_model", "resolve_model_cls")),
    ("vllm.model_executor.models.config", "VerifyAndUpdateConfig",
     ("verify_and_update_model_config", "verify_and_update_config")),
    ("vllm.v1.attention.backends.registry", "AttentionBackendEnum", ("__members__",)),
    ("vllm.v1.attention.backend", "AttentionCGSupport", ("NEVER", "UNIFORM_BATCH")),
    ("vllm.v1.attention.backend", "AttentionMetadataBuilder", ("_init_reorder_batch_threshold", "build")),
    ("vllm.platforms", "current_platform", ("is_cpu",)),
    ("vllm", "envs", ("VLLM_USE_RUST_FRONTEND",)),
    ("vllm.config", "ModelConfig", ("use_mla",)),
    ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner", ("sample_tokens",)),
    ("vllm.distributed.kv_transfer.kv_connector.factory", "KVConnectorFactory", ("supports_hma_config",)),
    ("vllm.model_executor.model_loader.reload.layerwise", "LayerReloadingInfo", ("can_load", "reset")),
    ("vllm.model_executor.model_loader.reload.layerwise", "_place_kernel_tensors", ("__call__",)),
    ("vllm.model_executor.model_loader.reload.layerwise", "LOADING_LAYERS", ("clear",)),
    ("vllm.distributed", "get_pp_group", ("__call__",)),
    ("vllm_deepseek_v4flash.compat", "KVCacheLayout", ("BLHNC",)),
    ("vllm.tokenizers.registry", "TokenizerRegistry", ("tokenizers", "register")),
    ("vllm.renderers.registry", "RENDERER_REGISTRY", ("renderers", "register")),
    ("vllm.parser.engine.parser_engine_config", "ParserState", ("CONTENT",)),
    ("vllm.parser.engine.parser_engine", "ParserEngine",
     ("_accept_tool_name", "_emit_name_delta", "_ensure_tool_id", "_strip_content_whitespace",
      "_build_extracted_result")),
    ("vllm.parser.engine.incremental_lexer", "IncrementalLexer", ("_char_token_counts", "_drain")),
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat",
     ("chat_completion_full_generator", "chat_completion_stream_generator")),
    ("vllm.v1.engine.detokenizer", "IncrementalDetokenizer", ("from_new_request",)),
    ("vllm.sampling_params", "validate_thinking_token_budget", ("__call__",)),
    ("vllm.parser.engine.adapters", "ParserEngineReasoningAdapter", ("extract_reasoning",)),
    ("vllm.parser.engine.adapters", "ParserEngineToolAdapter", ("extract_tool_calls", "structural_tag_model")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "symbol", "names"), ATTRIBUTES, ids=lambda part: part if isinstance(part, str) else ""
)
def test_attributes(module, symbol, names):
    obj = getattr(importlib.import_module(module), symbol)
    assert [name for name in names if not hasattr(obj, name)] == []


FIELDS = [
    ("vllm.config", "VllmConfig",
     ("model_config", "cache_config", "parallel_config", "scheduler_config", "speculative_config",
      "compilation_config", "quant_config", "additional_config", "reasoning_config", "attention_config",
      "kernel_config", "kv_transfer_config", "load_config", "device_config")),
    ("vllm.config", "ModelConfig",
     ("model", "hf_config", "dtype", "quantization", "enforce_eager", "tokenizer_mode", "revision",
      "skip_tokenizer_init", "model_impl")),
    ("vllm.config", "AttentionConfig", ("backend", "backend_per_kind")),
    ("vllm.config", "KernelConfig", ("moe_backend",)),
    ("vllm.config", "KVTransferConfig", ("kv_connector",)),
    ("vllm.config.reasoning", "ReasoningConfig", ("reasoning_start_str", "reasoning_end_str")),
    ("vllm.parser.engine.parser_engine_config", "ParserEngineConfig",
     ("transitions", "strip_trailing_reasoning_whitespace")),
    ("vllm.config", "CacheConfig",
     ("cache_dtype", "block_size", "kv_cache_dtype_skip_layers", "user_specified_block_size")),
    ("vllm.config", "SchedulerConfig", ("max_num_batched_tokens", "disable_hybrid_kv_cache_manager")),
    ("vllm.config", "CompilationConfig", ("static_forward_context",)),
    ("vllm.config", "ParallelConfig",
     ("decode_context_parallel_size", "prefill_context_parallel_size", "data_parallel_size",
      "enable_expert_parallel", "_api_process_rank")),
    ("vllm.config.model_arch", "ModelArchitectureConfig", ("is_deepseek_mla",)),
    ("vllm.forward_context", "ForwardContext", ("attn_metadata",)),
    ("vllm.v1.attention.backend", "CommonAttentionMetadata",
     ("query_start_loc", "num_reqs", "num_actual_tokens", "max_seq_len", "block_table_tensor", "slot_mapping")),
    ("vllm.v1.kv_cache_interface", "MLAAttentionSpec",
     ("block_size", "num_kv_heads", "head_size", "dtype", "tokens_per_state")),
    ("vllm.v1.kv_cache_interface", "SlidingWindowMLASpec",
     ("block_size", "num_kv_heads", "head_size", "dtype", "sliding_window")),
]  # fmt: skip


@pytest.mark.parametrize(("module", "symbol", "names"), FIELDS, ids=[symbol for _, symbol, _ in FIELDS])
def test_fields(module, symbol, names):
    known = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), symbol))}
    assert [name for name in names if name not in known] == []


SPECS = {
    "window": ("SlidingWindowMLASpec", {"sliding_window": 128}, 64 * 40 * 2),
    "entries": ("MLAAttentionSpec", {"tokens_per_state": 4}, 64 // 4 * 40 * 2),
}


@pytest.mark.parametrize(("symbol", "extra", "page_bytes"), SPECS.values(), ids=SPECS)
def test_a_spec_means_what_it_did(symbol, extra, page_bytes):
    """The fields may stay and count something else: `tokens_per_state` was `compress_ratio` in another unit once."""
    import torch

    spec_type = getattr(importlib.import_module("vllm.v1.kv_cache_interface"), symbol)
    spec = spec_type(block_size=64, num_kv_heads=1, head_size=40, dtype=torch.bfloat16, **extra)
    assert spec.page_size_bytes == page_bytes


# Calls that the plugin makes: (module, callable, positional arguments, keywords).
CALLS = [
    ("vllm.model_executor.layers.linear", "ReplicatedLinear", 2, ("bias", "quant_config", "prefix", "return_bias")),
    ("vllm.model_executor.layers.linear", "ColumnParallelLinear", 2, ("bias", "quant_config", "prefix", "return_bias")),
    ("vllm.model_executor.layers.linear", "RowParallelLinear", 2,
     ("bias", "quant_config", "prefix", "return_bias", "input_is_parallel", "reduce_results")),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding", 2, ("prefix",)),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "ParallelLMHead", 2, ("prefix",)),
    ("vllm.model_executor.layers.logits_processor", "LogitsProcessor", 1, ()),
    ("vllm.model_executor.models.utils", "make_layers", 2, ("prefix",)),
    ("vllm.model_executor.models.utils", "maybe_prefix", 2, ()),
    ("vllm.model_executor.models.utils", "extract_layer_index", 1, ()),
    ("vllm.model_executor.utils", "set_weight_attrs", 2, ()),
    ("vllm.distributed", "tensor_model_parallel_all_reduce", 1, ()),
    ("vllm.sequence", "IntermediateTensors", 1, ()),
    ("vllm.v1.attention.backend", "MultipleOf", 1, ()),
    ("vllm.v1.attention.backends.registry", "register_backend", 2, ()),
    ("vllm.model_executor.layers.quantization", "register_quantization_config", 1, ()),
    ("vllm.model_executor.layers.quantization", "get_quantization_config", 1, ()),
    ("vllm.model_executor.model_loader.utils", "initialize_model", 1, ("prefix", "model_class")),
    ("vllm.distributed.utils", "get_pp_indices", 3, ()),
    ("vllm.tokenizers.hf", "get_cached_tokenizer", 1, ()),
    ("vllm.transformers_utils.repo_utils", "get_hf_file_bytes", 3, ()),
    ("vllm.parser.deepseek_v4", "deepseek_v4_config", 1, ()),
    ("vllm.tool_parsers.utils", "find_tool_properties", 2, ()),
    ("vllm.v1.engine.detokenizer", "check_stop_strings", 4, ()),
    ("vllm.v1.engine.detokenizer", "uses_fast_detokenizer", 1, ()),
    ("vllm.tool_parsers.utils", "extract_types_from_schema", 1, ()),
    ("vllm.tool_parsers.utils", "coerce_to_schema_type", 2, ()),
]  # fmt: skip


@pytest.mark.parametrize(("module", "symbol", "positional", "keywords"), CALLS, ids=[call[1] for call in CALLS])
def test_calls(module, symbol, positional, keywords):
    function = getattr(importlib.import_module(module), symbol)
    inspect.signature(function).bind(*[None] * positional, **dict.fromkeys(keywords))


def test_calls_of_methods():
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.reasoning import ReasoningParserManager
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.tool_parsers import ToolParserManager
    from vllm.v1.attention.backend import AttentionMetadataBuilder

    inspect.signature(TokenizerRegistry.register).bind("mode", "module", "Class")
    inspect.signature(RENDERER_REGISTRY.register).bind("mode", "module", "Class")
    inspect.signature(ReasoningParserManager.register_lazy_module).bind("name", "module", "Class")
    inspect.signature(ToolParserManager.register_lazy_module).bind("name", "module", "Class")
    inspect.signature(ModelRegistry.register_model).bind("Architecture", "module:Class")
    inspect.signature(ModelRegistry.resolve_model_cls).bind(["Architecture"], None)
    inspect.signature(AttentionMetadataBuilder._init_reorder_batch_threshold).bind(
        None, 1, supports_spec_as_decode=True
    )


# (our module, our class, the base in vLLM that declares these methods)
OVERRIDES = [
    ("kv_cache.backend", "DeepseekV4Backend", "AttentionBackend",
     ("get_name", "get_impl_cls", "get_builder_cls", "get_supported_kernel_block_sizes", "get_preferred_block_size",
      "supported_kv_cache_layouts")),
    ("kv_cache.metadata", "DeepseekV4MetadataBuilder", "AttentionMetadataBuilder", ("__init__", "build")),
    ("kv_cache.paged_cache", "PagedCache", "AttentionLayerBase",
     ("get_attn_backend", "get_kv_cache_spec", "bind_kv_cache")),
    ("layers.methods", "PackedLinearMethod", "LinearMethodBase",
     ("create_weights", "apply", "process_weights_after_loading")),
    ("layers.methods", "PlainLinearMethod", "LinearMethodBase",
     ("create_weights", "apply", "process_weights_after_loading")),
    ("layers.methods", "MergedLinearMethod", "LinearMethodBase", ("apply",)),
    ("serving.parsers", "V4Parser", "DeepSeekV4Parser", ("__init__", "parser_config")),
    ("serving.parsers", "V4Parser", "ParserEngine",
     ("_reset", "_handle_arg_chunk", "_handle_tool_end", "_single_pass_parse")),
    ("serving.parsers", "PiecewiseLexer", "IncrementalLexer", ("feed",)),
    ("serving.parsers", "V4ReasoningParser", "ParserEngineReasoningAdapter",
     ("is_reasoning_end", "extract_reasoning", "count_reasoning_tokens")),
    ("serving.renderer", "V4Renderer", "DeepseekV4Renderer", ("render_messages", "render_messages_async")),
    ("serving.stops", "AnswerDetokenizer", "FastIncrementalDetokenizer", ("__init__", "update")),
    ("integration.quantization", "DeepseekV4QuantConfig", "QuantizationConfig",
     ("get_name", "get_supported_act_dtypes", "get_min_capability", "get_config_filenames", "from_config",
      "override_quantization_method", "maybe_update_config", "get_quant_method")),
]  # fmt: skip


@pytest.mark.parametrize(("module", "ours", "base", "methods"), OVERRIDES, ids=[case[1] for case in OVERRIDES])
def test_overrides_take_what_vllm_passes(module, ours, base, methods):
    """vLLM calls these; a parameter that it adds or renames must be named here before it is a TypeError at run time."""
    cls = getattr(importlib.import_module(f"vllm_deepseek_v4flash.{module}"), ours)
    parents = [parent for parent in cls.__mro__ if parent.__name__ == base and is_vllm(parent.__module__)]
    assert len(parents) == 1, f"{ours} is no longer a {base} of vLLM's"
    parent = parents[0]
    for name in methods:
        theirs, mine = (inspect.signature(getattr(owner, name)).parameters for owner in (parent, cls))
        problems = mismatches(theirs, mine)
        assert not problems, f"{base}.{name}({', '.join(theirs)}) and our {ours}.{name}({', '.join(mine)}): {problems}"


def mismatches(theirs, mine):
    """Parameters of the base that the override would not accept by place and by name."""
    open_keywords = any(p.kind is p.VAR_KEYWORD for p in mine.values())
    named = [p for p in theirs.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    order = [name for name in mine if name in theirs]
    problems = [f"{p.name} is missing" for p in named if p.name not in mine and not open_keywords]
    if order != [p.name for p in named if p.name in mine] and not open_keywords:
        problems.append("other order")
    added = [p.name for p in mine.values() if p.name not in theirs and p.default is p.empty
             and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
    return problems + [f"{name} is required by ours only" for name in added]


def test_mismatches_are_found():
    """The check above, on a base that has moved."""

    def parameters(function):
        return inspect.signature(function).parameters

    base = parameters(lambda a, b, new=None: None)
    assert mismatches(base, parameters(lambda a, b, new=None, more=1: None)) == []
    assert mismatches(base, parameters(lambda a, b: None)) == ["new is missing"]
    assert mismatches(base, parameters(lambda b, a, new=None: None)) == ["other order"]
    assert mismatches(base, parameters(lambda a, b, c, new=None: None)) == ["c is required by ours only"]


@pytest.mark.parametrize(
    ("module", "ours", "base"), [case[:3] for case in OVERRIDES], ids=[case[1] for case in OVERRIDES]
)
def test_no_abstract_method_is_left(module, ours, base):
    cls = getattr(importlib.import_module(f"vllm_deepseek_v4flash.{module}"), ours)
    assert sorted(getattr(cls, "__abstractmethods__", ())) == []


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_compat_and_the_integration_import_vllm(path):
    found = sorted(imported_symbols(parse(path)), key=str)
    if relative(path) in MAY_IMPORT_VLLM:
        assert found, f"{relative(path)} no longer imports vLLM: take it out of MAY_IMPORT_VLLM"
    else:
        assert not found, f"{relative(path)} imports {found}; take them through compat.py"


@pytest.mark.parametrize("name", LIGHT)
def test_registrations_import_vllm_only_when_they_run(name):
    """`register` must not pay for, or fail on, what only some processes need."""
    tree = parse(PACKAGE / "integration" / f"{name}.py")
    top = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If))]
    assert not [symbol for node in top for symbol in imported_symbols(node)]
    guards = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    assert guards in ([], ["TYPE_CHECKING"])


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_vllms_own_v4_and_its_core_are_not_used(path):
    tree = parse(path)
    imported = [module if name is None else f"{module}.{name}" for module, name in imported_symbols(tree)]
    quoted = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [text for text in imported + quoted if any(name in text for name in FORBIDDEN)] == []


@pytest.mark.parametrize(
    "module",
    ["vllm_deepseek_v4flash", "vllm_deepseek_v4flash.config", "vllm_deepseek_v4flash.checkpoint.names",
     "vllm_deepseek_v4flash.integration.hf_config", "vllm_deepseek_v4flash.integration.install"],
)  # fmt: skip
def test_importing_is_light(module):
    code = (
        f"import sys, {module}\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
