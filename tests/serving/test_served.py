"""`vllm serve` on the toy with the flags for tools: the `openai` client against what the tokenizer alone says.

The toy has learnt no tools, so its calls are forced: by a choice of one reply, or by `tool_choice`.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from testing.server import Server
from testing.serving.messages import answer, call, result, system, tool, user
from testing.tiny import TOY
from vllm_deepseek_v4flash.serving.tokenizer import OWN_TEMPLATE

OPTIONS = (
    "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(512 << 20),
    "--reasoning-parser", "deepseek_v4", "--tool-call-parser", "deepseek_v4", "--enable-auto-tool-choice",
    "--tokenizer-mode", "deepseek_v4_april", "--chat-template", OWN_TEMPLATE,
    # The toy has learnt no JSON: it would write blanks between the braces for ever.
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
)  # fmt: skip
TOOLS = [
    tool("add", "Adds.", a={"type": "integer"}, b={"type": "integer"}),
    tool("say", "Says.", text={"type": "string"}),
]
# What makes the toy call, after its thoughts.
CALL: dict[str, Any] = {"tools": TOOLS[:1], "tool_choice": {"type": "function", "function": {"name": "add"}}}
END_THINK = 6
REQUEST_TIMEOUT = 1200  # seconds


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with Server(TOY, tmp_path_factory.mktemp("server") / "log.txt", OPTIONS) as server:
        server.wait_until_healthy()
        assert server.output().count("Chat encoding: DeepSeek-V4 april, by --tokenizer-mode deepseek_v4_april.") == 1
        assert "system-first ordering" not in server.output(), "vLLM would move later system texts"
        yield openai.OpenAI(base_url=server.api, api_key="unused", timeout=REQUEST_TIMEOUT, max_retries=0)


@pytest.fixture(scope="module")
def tokenizer():
    from vllm_deepseek_v4flash.serving.tokenizer import AprilTokenizer

    return AprilTokenizer.from_pretrained(str(TOY))


@pytest.fixture(scope="module")
def question():
    """A question that the toy answers rightly with thinking, greedily in fp32."""
    rows = [json.loads(line) for line in (TOY / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    return next(row for row in rows if row["greedy_correct"] and row["thinking"])


def ask(client, messages, *, stream=False, **body):
    """`(reasoning, content, calls, the first chunk or the whole response)` of a chat, put together if streamed."""
    extra = {"return_token_ids": True} | body.pop("extra_body", {})
    request = {
        "model": Server.NAME,
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": 64,
        "extra_body": extra,
    } | body
    if not stream:
        response = client.chat.completions.create(**request)
        message = response.choices[0].message
        calls = [(one.function.name, one.function.arguments) for one in message.tool_calls or []]
        return message.reasoning or "", message.content or "", calls, response
    reasoning, content, chunks = "", "", []
    parts: list[list[str]] = []
    for chunk in client.chat.completions.create(stream=True, **request):
        chunks.append(chunk)
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            content += choice.delta.content or ""
            for one in choice.delta.tool_calls or []:
                parts += [["", ""]] * (one.index + 1 - len(parts))
                name, arguments = parts[one.index]
                parts[one.index] = [name + (one.function.name or ""), arguments + (one.function.arguments or "")]
    return reasoning, content, [tuple(one) for one in parts], chunks[0]


# ---- modes

MESSAGES = {
    "one turn": ([system("S"), user("14+36?")], None),
    "turns": ([user("U"), answer("A", reasoning="R"), user([{"type": "text", "text": "a"}])], None),
    "tools": (
        [user("U"), answer(None, reasoning="R", tool_calls=[call("add", '{"a": 1, "b": 2}', "x")]), result("3", "x")],
        TOOLS,
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize(
    ("top", "switches"),
    [
        (None, {}),
        ("none", {}),
        ("low", {}),
        ("xhigh", {}),
        ("max", {"enable_thinking": True}),
        ("max", {"thinking": False}),
        (None, {"thinking": True, "reasoning_effort": "none"}),
        (None, {"enable_thinking": False, "thinking": True}),
    ],
    ids=str,
)
def test_the_prompt_is_the_tokenizers(client, tokenizer, name, top, switches):
    messages, tools = MESSAGES[name]
    expected = tokenizer.apply_chat_template(messages, tools, **switches | ({"reasoning_effort": top} if top else {}))
    body = {"tools": tools} if tools else {}
    body |= {"reasoning_effort": top} if top else {}
    *_, response = ask(client, messages, max_tokens=1, extra_body={"chat_template_kwargs": switches}, **body)
    assert response.prompt_token_ids == expected


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_and_answer_are_told_apart(client, question, stream):
    reasoning, content, calls, _ = ask(client, [user(question["question"])], stream=stream)
    assert reasoning
    assert "think>" not in reasoning + content
    assert (content.strip(), calls) == (question["answer"], [])


@pytest.mark.parametrize("stream", [False, True])
def test_do_not_think_wins_over_an_effort(client, question, stream):
    """With vLLM's own parser the answer would come back as reasoning."""
    reasoning, content, *_ = ask(
        client, [user(question["question"])], stream=stream, reasoning_effort="high",
        extra_body={"chat_template_kwargs": {"thinking": False}},
    )  # fmt: skip
    assert reasoning == ""
    assert content


@pytest.mark.parametrize("budget", [0, 2])
def test_a_thinking_budget(client, question, budget):
    _, content, _, response = ask(client, [user(question["question"])], extra_body={"thinking_token_budget": budget})
    ids = response.choices[0].token_ids
    assert ids.index(END_THINK) == budget < question["greedy_token_ids"].index(END_THINK)
    assert content
    assert response.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_continued_answer(client, question, tokenizer, stream):
    """The first half of an answer goes back; the model writes the other half, and none of it is thinking."""
    reasoning, content, *_ = ask(client, [user(question["question"])])
    half = len(content) // 2
    messages = [user(question["question"]), answer(content[:half], reasoning=reasoning)]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    found = ask(client, messages, stream=stream, extra_body=body)
    assert found[:3] == ("", content[half:], [])
    assert found[-1].prompt_token_ids == tokenizer.apply_chat_template(messages, **body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_last_message_of_the_assistant(client, question, tokenizer, stream):
    """It opens a new answer; with DeepSeek's prefix it is continued."""
    reasoning, content, *_ = ask(client, [user(question["question"])])
    half = len(content) // 2
    messages = [user(question["question"]), answer(content[:half], reasoning=reasoning)]
    opened = ask(client, messages, stream=stream)
    assert opened[0]
    assert opened[-1].prompt_token_ids == tokenizer.apply_chat_template(messages)
    messages[-1]["prefix"] = True
    continued = ask(client, messages, stream=stream)
    assert continued[:3] == ("", content[half:], [])
    assert continued[-1].prompt_token_ids == tokenizer.apply_chat_template(messages)
    if not stream:
        assert continued[-1].usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_stops_the_answer_only(client, question, stream):
    reasoning, content, *_ = ask(client, [user(question["question"])])
    body = {"stop": [reasoning[1:3]], "stream": stream}
    assert reasoning[1:3] not in content
    assert ask(client, [user(question["question"])], **body)[:2] == (reasoning, content)
    cut = ask(client, [user(question["question"])], stop=[content[1:]], stream=stream)
    assert cut[:2] == (reasoning, content[:1])


# ---- the other APIs


@pytest.mark.parametrize("effort", ["none", "high"])
def test_the_responses_api(client, question, effort):
    expected = ask(client, [user(question["question"])], reasoning_effort=effort)[:2]
    response = client.responses.create(
        model=Server.NAME, input=question["question"], reasoning={"effort": effort}, temperature=0.0,
        max_output_tokens=64,
    )  # fmt: skip
    texts = {item.type: item.content[0].text for item in response.output}
    assert (texts.get("reasoning", ""), texts["message"]) == expected


def test_the_responses_api_streamed(client, question):
    """With a call, as Codex uses it: the parts add up to what a chat gives."""
    expected = ask(client, [user(question["question"])], max_tokens=400, **CALL)
    function = {"type": "function", **CALL["tools"][0]["function"]}
    events = client.responses.create(
        model=Server.NAME, input=question["question"], temperature=0.0, max_output_tokens=400, stream=True,
        tools=[function], tool_choice={"type": "function", "name": "add"},
    )  # fmt: skip
    parts: dict[str, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            parts[event.type] = parts.get(event.type, "") + event.delta
    assert parts.pop("response.reasoning_text.delta") == expected[0]
    assert parts.pop("response.function_call_arguments.delta") == expected[2][0][1]
    assert "".join(parts.values()).strip() == expected[1].strip() == ""


@pytest.mark.parametrize(
    "thinking", [{"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}]
)
def test_anthropics_api(client, question, thinking):
    switch = {"chat_template_kwargs": {"thinking": thinking["type"] != "disabled"}}
    expected = ask(client, [user(question["question"])], extra_body=switch)[:2]
    response = client.post(
        "/messages", cast_to=dict,
        body={
            "model": Server.NAME, "messages": [user(question["question"])], "thinking": thinking, "temperature": 0.0,
            "max_tokens": 2000,
        },
    )  # fmt: skip
    texts = {block["type"]: block[block["type"]] for block in response["content"]}
    assert (texts.get("thinking", ""), texts["text"]) == expected
    assert response["stop_reason"] == "end_turn"


def test_anthropics_api_streamed(client, question):
    """With a call, as Claude Code uses it."""
    expected = ask(client, [user(question["question"])], max_tokens=400, **CALL)
    function = CALL["tools"][0]["function"]
    body = {
        "model": Server.NAME, "messages": [user(question["question"])], "max_tokens": 400, "temperature": 0.0,
        "tools": [{"name": "add", "description": "Adds.", "input_schema": function["parameters"]}],
        "tool_choice": {"type": "tool", "name": "add"}, "stream": True,
    }  # fmt: skip
    parts: dict[str, str] = {}
    with httpx.stream("POST", f"{client.base_url}messages", json=body, timeout=REQUEST_TIMEOUT) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: {")]
    for event in map(json.loads, lines):
        if event["type"] == "content_block_delta":
            kind = event["delta"].pop("type")
            parts[kind] = parts.get(kind, "") + "".join(event["delta"].values())
    assert parts.pop("thinking_delta") == expected[0]
    assert parts.pop("input_json_delta") == expected[2][0][1]
    assert parts.pop("text_delta", "").strip() == expected[1].strip() == ""


# ---- refusals


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"reasoning_effort": "extreme"}, ("reasoning_effort",)),
        ({"extra_body": {"chat_template_kwargs": {"reasoning_effort": "extreme"}}}, ("extreme", "minimal", "max")),
        ({"extra_body": {"chat_template_kwargs": {"thinking": "no"}}}, ("thinking", "true or false")),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": 1}}}, ("enable_thinking", "true or false")),
        ({"extra_body": {"thinking_token_budget": -2}}, ("thinking_token_budget",)),
        ({"messages": []}, ("messages=[]",)),
        ({"messages": [{"role": "robot", "content": "x"}]}, ("robot", "assistant")),
        ({"messages": [user("U"), result("x", "a")]}, ("messages[1]", "no call precedes")),
        (
            {"messages": [user("U"), answer(None, tool_calls=[call("f", "[" * 50_000, "a")]), result("x", "a")]},
            ("messages[1].tool_calls[0]", "too deep"),
        ),
        (
            {"messages": [user([{"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}])]},
            ("multimodal",),
        ),
        ({"tool_choice": "required"}, ("tool",)),
    ],
    ids=str,
)
def test_bad_requests_get_a_400_and_the_server_goes_on(client, body, words):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **{"messages": [user("U")]} | body)
    for word in words:
        assert word in str(caught.value)
    assert ask(client, [user("1+1?")], max_tokens=1)[-1].usage.completion_tokens == 1


def test_stock_ignores_unknown_parameters(client):
    """Of any client; with the middleware StrictRequests, which this server has not, they are refused."""
    thoughts = ask(client, [user("14+36?")], extra_body={"frobnicate": 1, "thinking": {"type": "disabled"}})[0]
    assert thoughts


# ---- tools


def force(*texts):
    """Guides the reply to one of `texts`, without thinking."""
    return {
        "chat_template_kwargs": {"thinking": False},
        "structured_outputs": {"choice": list(texts)},
    }


TWO_CALLS = """ok

<｜DSML｜tool_calls>
<｜DSML｜invoke name="add">
<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>
<｜DSML｜parameter name="b" string="false">2</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="say">
<｜DSML｜parameter name="text" string="true">5 > 4 "x"</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""


def test_the_flow_of_tools_by_forced_choice(client, tokenizer):
    """Two calls whole and streamed; their results go back, and the prompt begins with what the model wrote."""
    body = {"tools": TOOLS, "max_tokens": 400, "extra_body": force(TWO_CALLS)}
    reasoning, content, calls, response = ask(client, [user("U")], **body)
    assert (reasoning, content.strip()) == ("", "ok")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("add", {"a": 1, "b": 2}), ("say", {"text": '5 > 4 "x"'}),
    ]  # fmt: skip
    assert response.choices[0].finish_reason == "tool_calls"
    assert ask(client, [user("U")], stream=True, **body)[:3] == (reasoning, content, calls)

    message = response.choices[0].message
    history = [
        user("U"),
        answer(message.content, tool_calls=[one.model_dump() for one in message.tool_calls]),
        *(result("3", one.id) for one in message.tool_calls),
    ]
    *_, following = ask(
        client, history, tools=TOOLS, max_tokens=1, extra_body={"chat_template_kwargs": {"thinking": False}}
    )
    # As text: a grammar that allows a text allows any tokens for it, and the toy spells the marker byte by byte.
    written = tokenizer.decode(response.prompt_token_ids + response.choices[0].token_ids)
    assert tokenizer.decode(following.prompt_token_ids).startswith(written)


@pytest.mark.parametrize(
    ("limits", "reason", "arguments"),
    [
        ({"max_tokens": 400}, "tool_calls", [{"a": 1, "b": 2}, {"text": '5 > 4 "x"'}]),
        (
            {"max_tokens": 400, "stop": ["</｜DSML｜tool_calls>"]},
            "tool_calls",
            [{"a": 1, "b": 2}, {"text": '5 > 4 "x"'}],
        ),
        ({"max_tokens": 400, "stop": [" > 4"]}, "stop", [{"a": 1, "b": 2}, {"text": "5"}]),
        ({"max_tokens": 400, "stop": ["2</"]}, "stop", [{"a": 1}]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_ends_a_call(client, limits, reason, arguments, stream):
    body = {"tools": TOOLS, "extra_body": force(TWO_CALLS)} | limits
    request = {"model": Server.NAME, "messages": [user("U")], "temperature": 0.0} | body
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **request))
        assert [one.finish_reason for chunk in chunks for one in chunk.choices if one.finish_reason] == [reason]
    else:
        *_, calls, response = ask(client, [user("U")], **body)
        assert [json.loads(text) for _, text in calls] == arguments
        assert response.choices[0].finish_reason == reason


@pytest.mark.parametrize("tokens", [120, 200])
def test_a_call_that_is_cut_off_by_the_limit(client, tokens):
    """Whichever place it is cut at, the arguments are a part of the call's, and the reason is the limit."""
    body: dict[str, Any] = {"tools": TOOLS, "extra_body": force(TWO_CALLS), "max_tokens": tokens}
    _, _, calls, response = ask(client, [user("U")], **body)
    assert response.choices[0].finish_reason == "length"
    whole: list[dict[str, Any]] = [{"a": 1, "b": 2}, {"text": '5 > 4 "x"'}]
    for (_, text), full in zip(calls, whole, strict=False):
        found = json.loads(text)
        assert all(full[name] == value or str(full[name]).startswith(value) for name, value in found.items())
    assert ask(client, [user("U")], stream=True, **body)[2] == calls


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("choice", "thinking"), [(NAMED, False), (NAMED, True), ("required", True)])
def test_a_call_is_guided_by_tool_choice(client, stream, choice, thinking):
    _, content, calls, _ = ask(
        client, [user("1+2?")], stream=stream, tools=TOOLS[:1], tool_choice=choice, parallel_tool_calls=False,
        max_tokens=400,
        extra_body={"chat_template_kwargs": {"thinking": thinking}, "thinking_token_budget": 8},
    )  # fmt: skip
    ((name, arguments),) = calls
    assert name == "add"
    assert set(json.loads(arguments)) <= {"a", "b"}
    assert content.strip() == ""


def test_json_by_a_schema_after_thinking(client, question):
    """The grammar waits for the end of the thinking."""
    schema = {
        "type": "object", "properties": {"n": {"enum": [1, 22, 333]}}, "required": ["n"], "additionalProperties": False,
    }  # fmt: skip
    reasoning, content, *_ = ask(
        client, [user(question["question"])], max_tokens=256,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )  # fmt: skip
    assert reasoning
    assert json.loads(content)["n"] in (1, 22, 333)


# ---- the rest of the API


def test_logprobs_n_seed_stop_and_min_tokens(client, question):
    body: dict[str, Any] = {"n": 2, "seed": 7, "temperature": 1.0, "logprobs": True, "top_logprobs": 3}
    first, second = (ask(client, [user(question["question"])], **body)[-1] for _ in range(2))
    assert [one.token_ids for one in first.choices] == [one.token_ids for one in second.choices]
    for choice in first.choices:
        assert len(choice.logprobs.content) == len(choice.token_ids)
        assert all(len(row.top_logprobs) == 3 for row in choice.logprobs.content)

    body = {"extra_body": {"chat_template_kwargs": {"thinking": False}}}
    _, content, *_ = ask(client, [user(question["question"])], **body)
    _, cut, _, response = ask(client, [user(question["question"])], stop=[content[1:2]], **body)
    assert cut == content[: content.index(content[1:2])]
    assert response.choices[0].stop_reason == content[1:2]
    body["extra_body"] |= {"min_tokens": 20}
    assert ask(client, [user(question["question"])], max_tokens=24, **body)[-1].usage.completion_tokens >= 20


def test_echo(client, question, tokenizer):
    """Of a completion; its text has no special tokens."""
    prompt = tokenizer.apply_chat_template([user(question["question"])])
    completion = client.completions.create(
        model=Server.NAME,
        prompt=prompt,
        echo=True,
        max_tokens=32,
        temperature=0.0,
        extra_body={"skip_special_tokens": False},
    )
    assert completion.choices[0].text.startswith(tokenizer.decode(prompt))
    assert completion.choices[0].text.rstrip().endswith(question["answer"])
