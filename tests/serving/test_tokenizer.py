"""The tokenizers of our modes: ids as the `tokenizers` library gives them, through each of vLLM's doors."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil

import pytest

from testing.serving.messages import answer, call, result, system, tool, user
from testing.serving.tokenizer import ids_of, write_encoder, write_tokenizer
from testing.tiny import CONFIGS
from vllm_deepseek_v4flash.serving.encoding import encode_chat
from vllm_deepseek_v4flash.serving.modes import EFFORTS, MODES, Generation
from vllm_deepseek_v4flash.serving.tokenizer import OWN_TEMPLATE

APRIL, JULY = Generation
TOKENIZER_MODES = {APRIL: "deepseek_v4_april", JULY: "deepseek_v4_0731"}
TOOLS = [tool("weather", "The weather of a place.", place={"type": "string"})]
CONVERSATIONS = {
    "one turn": ([system("Sei höflich."), user("Wie spät ist es? 現在")], None),
    "turns": ([user("U"), answer("A", reasoning="R"), user([{"type": "text", "text": "a"}])], None),
    "tools": (
        [
            system("S"), user("U"), answer(None, reasoning="R", tool_calls=[call("weather", '{"place": "Köln"}', "a")]),
            result("12 °C", "a"),
        ],
        TOOLS,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _registered():
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A directory for each generation, with all that a server reads before the weights."""
    made = {}
    for generation in Generation:
        directory = write_tokenizer(tmp_path_factory.mktemp(generation.value))
        config = {**CONFIGS["mixed"].hf_config, "torch_dtype": "float32", "vocab_size": 129280}
        (directory / "config.json").write_text(json.dumps(config))
        made[generation] = write_encoder(directory, generation)
    return made


def engine_config(directory, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(directory), max_model_len=1024, **arguments).create_engine_config()


@pytest.fixture(scope="module")
def configs(directories):
    return {generation: engine_config(directory) for generation, directory in directories.items()}


@pytest.fixture(scope="module")
def renderers(configs):
    from vllm.renderers.registry import renderer_from_config

    return {generation: renderer_from_config(config) for generation, config in configs.items()}


@pytest.fixture(scope="module")
def tokenizers(renderers):
    return {generation: renderer.get_tokenizer() for generation, renderer in renderers.items()}


@pytest.mark.parametrize("generation", Generation)
def test_the_encoder_of_a_directory_picks_the_mode(configs, generation):
    assert configs[generation].model_config.tokenizer_mode == TOKENIZER_MODES[generation]


@pytest.mark.parametrize("generation", Generation)
def test_dspark_keys_do_not_decide(directories, tmp_path, generation):
    """The DSpark preview has them and April's encoder; a checkpoint of 0731 may lack them, as `directories` do."""
    directory = shutil.copytree(directories[generation], tmp_path / "dspark")
    keys = {"dspark_block_size": 5, "dspark_noise_token_id": 128799, "dspark_target_layer_ids": [0, 1, 2]}
    config = json.loads((directory / "config.json").read_text()) | keys | {"dspark_markov_rank": 256}
    (directory / "config.json").write_text(json.dumps(config))
    assert engine_config(directory).model_config.tokenizer_mode == TOKENIZER_MODES[generation]


@pytest.mark.parametrize("mode", ["deepseek_v4_april", "deepseek_v4_vllm", "hf"])
def test_a_chosen_mode_is_kept(directories, mode):
    assert engine_config(directories[JULY], tokenizer_mode=mode).model_config.tokenizer_mode == mode


@pytest.mark.usefixtures("configs")
def test_a_thinking_budget_may_be_larger_than_any_context():
    """vLLM sends it to its engine as it is, which takes 64 bits, and 32 on a GPU."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    budgets = [
        SamplingParams(thinking_token_budget=budget).thinking_token_budget for budget in (7, 2**31 - 1, 2**31, 2**70)
    ]
    assert budgets == [7, 2**31 - 1, None, None]
    with pytest.raises(VLLMValidationError, match="thinking_token_budget"):
        SamplingParams(thinking_token_budget=-2)


def test_a_thinking_budget_needs_no_flag(configs, directories):
    """vLLM refuses a request's budget where this is not set."""
    ours = configs[APRIL].reasoning_config
    assert (ours.reasoning_start_token_ids, ours.reasoning_end_token_ids) == ([128821], [128822])
    assert engine_config(directories[APRIL], tokenizer_mode="hf").reasoning_config is None
    assert engine_config(directories[APRIL], skip_tokenizer_init=True).reasoning_config is None


def test_a_users_own_end_of_thinking_is_kept(directories):
    from vllm.config.reasoning import ReasoningConfig

    chosen = ReasoningConfig(reasoning_start_str="<think>", reasoning_end_str="I must answer.</think>")
    assert len(engine_config(directories[APRIL], reasoning_config=chosen).reasoning_config.reasoning_end_token_ids) > 1


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_ids_are_those_of_the_tokenizers_library(tokenizers, generation, name, effort):
    messages, tools = CONVERSATIONS[name]
    ids = tokenizers[generation].apply_chat_template(messages, tools, reasoning_effort=effort)
    assert ids == ids_of(encode_chat(messages, MODES[generation][effort], tools=tools))
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert ids[-2:] == [128804, 128822 if effort == "none" else 128821]


@pytest.mark.parametrize("generation", Generation)
def test_the_names_of_special_tokens_are_single_tokens(tokenizers, generation):
    text = tokenizers[generation].apply_chat_template(CONVERSATIONS["tools"][0], TOOLS, tokenize=False)
    ids = ids_of(text)
    names = {"<｜begin▁of▁sentence｜>": 0, "<｜User｜>": 128803, "<｜Assistant｜>": 128804, "｜DSML｜": 128825}
    names |= {"<｜end▁of▁sentence｜>": 1, "<think>": 128821, "</think>": 128822}
    assert {name: ids.count(number) for name, number in names.items()} == {name: text.count(name) for name in names}


@pytest.mark.parametrize("generation", Generation)
def test_a_pickled_tokenizer_encodes_the_same(tokenizers, generation):
    """vLLM sends tokenizers to other processes."""
    again = pickle.loads(pickle.dumps(tokenizers[generation]))
    assert again.apply_chat_template([user("U")], reasoning_effort="max") == tokenizers[generation].apply_chat_template(
        [user("U")], reasoning_effort="max"
    )


@pytest.mark.parametrize("generation", Generation)
def test_vllms_get_tokenizer(directories, tokenizers, generation):
    from vllm.tokenizers import get_tokenizer

    alone = get_tokenizer(str(directories[generation]), tokenizer_mode=TOKENIZER_MODES[generation])
    assert alone.chat_generation is generation
    assert alone.apply_chat_template([user("U")]) == tokenizers[generation].apply_chat_template([user("U")])


def test_vllms_own_encoding_stays_reachable(directories):
    from vllm.tokenizers import get_tokenizer

    alone = get_tokenizer(str(directories[APRIL]), tokenizer_mode="deepseek_v4_vllm")
    assert alone.apply_chat_template([user("U")], tokenize=False).startswith("<｜begin▁of▁sentence｜>Reasoning Effort")


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(
    "request_",
    [
        {},
        *({"reasoning_effort": effort} for effort in EFFORTS),
        *({"chat_template_kwargs": {"reasoning_effort": effort}} for effort in EFFORTS),
        {"chat_template_kwargs": {"thinking": True}},
        {"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "max"},
        {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"},
        {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
        {"chat_template_kwargs": {"thinking": True, "enable_thinking": False}},
        {"chat_template_kwargs": {"drop_thinking": False}},
    ],
    ids=str,
)
def test_a_chat_request_gets_the_same_ids(renderers, tokenizers, generation, name, request_):
    """What the server does to a request up to the engine, against the tokenizer alone."""
    messages, tools = CONVERSATIONS[name]
    switches = dict(request_.get("chat_template_kwargs", {}))
    switches |= {key: value for key, value in request_.items() if key == "reasoning_effort"}
    expected = tokenizers[generation].apply_chat_template(messages, tools, **switches)
    assert render(renderers[generation], messages, tools, **request_) == expected


def online(renderer, chat_template=None):
    """The code that the server runs from a request to the engine's input."""
    from vllm.renderers.online_renderer import OnlineRenderer

    return OnlineRenderer(
        renderer.model_config, renderer, request_logger=None, chat_template=chat_template,
        chat_template_content_format="auto", enable_auto_tools=True, tool_parser="deepseek_v4",
        reasoning_parser="deepseek_v4",
    )  # fmt: skip


def render(renderer, messages, tools=None, **request):
    """Prompt token ids of a request to /v1/chat/completions."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    body = {"messages": messages, "model": "m", "max_tokens": 1} | ({"tools": tools} if tools else {}) | request
    _, (engine_input,) = asyncio.run(online(renderer).render_chat(ChatCompletionRequest.model_validate(body)))
    return engine_input["prompt_token_ids"]


def render_anthropic(renderer, chat_template=None, **body):
    """Of a request to /v1/messages; `chat_template` as in `--chat-template`."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    request = AnthropicMessagesRequest.model_validate({"model": "m", "max_tokens": 100} | body)
    server = online(renderer, chat_template)
    merge = AnthropicServingMessages._should_merge_inline_system(server)
    chat = AnthropicServingMessages.to_chat_completion_request(request, merge_inline_system=merge)
    _, (engine_input,) = asyncio.run(server.render_chat(chat))
    return engine_input["prompt_token_ids"]


def render_response(renderer, **body):
    """Of a request to /v1/responses."""
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    rendered = asyncio.run(online(renderer).render_responses(ResponsesRequest.model_validate({"model": "m"} | body)))
    return rendered.engine_input["prompt_token_ids"]


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize(
    ("request_", "switches"),
    [
        ({}, {}),
        ({"thinking": {"type": "disabled"}}, {"thinking": False}),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, {"thinking": False}),
        ({"thinking": {"type": "adaptive"}}, {}),
        *(({"output_config": {"effort": effort}}, {"reasoning_effort": effort}) for effort in EFFORTS[2:]),
    ],
    ids=str,
)
def test_a_request_to_anthropics_api_gets_the_same_ids(renderers, tokenizers, generation, request_, switches):
    expected = tokenizers[generation].apply_chat_template([system("S"), user("U")], **switches)
    assert render_anthropic(renderers[generation], system="S", messages=[user("U")], **request_) == expected


def test_later_system_texts_of_anthropics_api_stay_where_they_are(renderers, tokenizers):
    """Claude Code sends one a turn. Where vLLM may not keep them there, the second prompt misses the first's cache."""
    turns = [system("R"), user("U"), answer("A"), system("R2"), user("U2")]
    expected = [tokenizers[APRIL].apply_chat_template([system("S"), *turns[:end]]) for end in (2, 5)]
    cached = expected[0][:-1]  # up to the token that opens the answer
    assert expected[1][: len(cached)] == cached
    for template, kept in ((OWN_TEMPLATE, True), (None, False)):
        prompts = [render_anthropic(renderers[APRIL], template, system="S", messages=turns[:end]) for end in (2, 5)]
        assert (prompts[1][: len(cached)] == cached) == kept
        assert (prompts == expected) == kept


@pytest.mark.parametrize("effort", [None, *EFFORTS])
@pytest.mark.parametrize("generation", Generation)
def test_a_request_to_the_responses_api_gets_the_same_ids(renderers, tokenizers, generation, effort):
    expected = tokenizers[generation].apply_chat_template([system("S"), user("U")], reasoning_effort=effort)
    request = {"reasoning": {"effort": effort}} if effort else {}
    assert render_response(renderers[generation], instructions="S", input="U", **request) == expected


def test_a_tool_loop_is_the_same_through_every_api(renderers, tokenizers):
    """Two calls with their thoughts before them, and their results, in the forms in which agents send them back."""
    parameters = {"type": "object", "properties": {"place": {"type": "string"}}}
    calls = {"a": {"place": "Köln"}, "b": {"place": "Bonn"}}
    messages = [
        user("U"),
        answer(None, reasoning="R\n", tool_calls=[call("weather", json.dumps(of), name) for name, of in calls.items()]),
        *(result(f"{name}!", name) for name in calls),
    ]
    expected = tokenizers[APRIL].apply_chat_template(messages, TOOLS)
    assert render(renderers[APRIL], messages, TOOLS) == expected

    blocks = [{"type": "tool_use", "id": name, "name": "weather", "input": of} for name, of in calls.items()]
    results = [{"type": "tool_result", "tool_use_id": name, "content": f"{name}!"} for name in calls]
    turns = [{"role": "assistant", "content": [{"type": "thinking", "thinking": "R\n", "signature": "s"}, *blocks]}]
    tools = [{"name": "weather", "description": "The weather of a place.", "input_schema": parameters}]
    request = {"messages": [user("U"), *turns, user(results)], "tools": tools}
    assert render_anthropic(renderers[APRIL], **request) == expected

    made = [
        {"type": "function_call", "call_id": name, "name": "weather", "arguments": json.dumps(of)}
        for name, of in calls.items()
    ]
    results = [{"type": "function_call_output", "call_id": name, "output": f"{name}!"} for name in calls]
    thoughts = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "R\n"}]}
    tools = [
        {"type": "function", "name": "weather", "description": "The weather of a place.", "parameters": parameters}
    ]
    assert render_response(renderers[APRIL], input=[user("U"), thoughts, *made, *results], tools=tools) == expected


def test_the_requests_effort_replaces_the_one_in_chat_template_kwargs(renderers, tokenizers):
    """vLLM's doing, before anything of ours sees the request: the one "do not think" that is lost."""
    request = {"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "none"}}
    expected = tokenizers[APRIL].apply_chat_template([user("U")], reasoning_effort="high")
    assert render(renderers[APRIL], [user("U")], **request) == expected


def test_the_parts_of_a_tools_result_are_joined_as_vllm_joins_them(renderers, tokenizers):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [user("U"), answer(None, tool_calls=[call("weather", "{}", "a")]), result(parts, "a")]
    expected = tokenizers[APRIL].apply_chat_template(messages, TOOLS)
    assert render(renderers[APRIL], messages, TOOLS) == expected


def test_deepseeks_prefix_is_continued(renderers, tokenizers):
    """And without it an assistant's last message is followed by a new answer."""
    for last in (answer("A", reasoning="R", prefix=True), answer("A", reasoning="R")):
        messages = [user("U"), last]
        expected = tokenizers[APRIL].apply_chat_template(messages)
        assert render(renderers[APRIL], messages) == tokenize(renderers[APRIL], messages) == expected


def tokenize(renderer, messages, **request):
    """The ids that /tokenize counts."""
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

    chat = TokenizeChatRequest.model_validate({"messages": messages, "model": "m"} | request)
    preprocessed = online(renderer).preprocess_chat(chat, chat.messages, None, "auto", {})
    _, (engine_input,) = asyncio.run(preprocessed)
    return engine_input["prompt_token_ids"]


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_tokenize_counts_what_a_chat_gets(renderers, key):
    messages, switches = [user("U"), answer("A", **{key: "R"}), user("V")], {"drop_thinking": False}
    expected = render(renderers[APRIL], messages, chat_template_kwargs=switches)
    assert ids_of("R")[0] in expected
    assert tokenize(renderers[APRIL], messages, chat_template_kwargs=switches) == expected


def test_tokenize_knows_no_effort_but_that_of_the_template(renderers):
    """docs/serving.md says so: vLLM's request has no such field."""
    chat = render(renderers[APRIL], [user("U")], reasoning_effort="none")
    assert tokenize(renderers[APRIL], [user("U")], reasoning_effort="none") != chat
    assert tokenize(renderers[APRIL], [user("U")], chat_template_kwargs={"reasoning_effort": "none"}) == chat


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"messages": [user("U"), answer(None, tool_calls=[call("f", "[" * 50_000, "a")])]},
            r"tool_calls\[0\].function.arguments=.+: too deep",
        ),
        ({"messages": [user("U"), answer("A", prefix="yes")]}, "prefix='yes': not a boolean"),
        ({"chat_template_kwargs": {"thinking": "no"}}, "thinking='no': "),
        ({"chat_template_kwargs": {"reasoning_effort": "extreme"}}, "reasoning_effort='extreme': "),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role='robot': "),
        ({"messages": [result("x", "a")]}, "no call precedes"),
    ],
)
def test_bad_requests_are_value_errors(renderers, request_, message):
    """vLLM's server answers a ValueError with status 400 and its text."""
    with pytest.raises(ValueError, match=message):
        render(renderers[APRIL], **{"messages": [user("U")]} | request_)


def test_a_jinja_template_is_refused(tokenizers):
    with pytest.raises(ValueError, match=r"chat_template='\{\{ messages \}\}': .*--tokenizer-mode hf"):
        tokenizers[APRIL].apply_chat_template([user("U")], chat_template="{{ messages }}")


def test_the_length_of_a_prompt_can_be_limited(tokenizers):
    whole = tokenizers[APRIL].apply_chat_template([user("a b c d e f g")])
    cut = tokenizers[APRIL].apply_chat_template([user("a b c d e f g")], truncation=True, max_length=4)
    assert len(cut) == 4 < len(whole)


def test_stock_shows_unset_fields_of_tools(directories):
    """vLLM's own encoding, through its server: the model sees nulls that it was not trained on (docs/serving.md)."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tokenizers import get_tokenizer

    tools = [{"type": "function", "function": {"name": "f"}}]
    request = ChatCompletionRequest.model_validate({"messages": [user("U")], "model": "m", "tools": tools})
    dumped = [tool.model_dump() for tool in request.tools]
    stock = get_tokenizer(str(directories[APRIL]), tokenizer_mode="deepseek_v4_vllm")
    text = stock.apply_chat_template([user("U")], dumped, tokenize=False)
    assert '{"name": "f", "description": null, "parameters": null}' in text
