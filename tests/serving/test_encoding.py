"""The text of a prompt: golden strings for every mode, and vLLM's copy of DeepSeek's encoder on drawn conversations."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testing.serving.messages import answer, call, result, system, tool, user
from vllm_deepseek_v4flash.serving.encoding import encode_chat
from vllm_deepseek_v4flash.serving.modes import MODES, NON_THINK, Generation

APRIL, JULY = Generation
BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
HIGH = MODES[APRIL]["high"]
ALL_MODES = [
    pytest.param(generation, effort, id=f"{generation.value}-{effort}")
    for generation in Generation
    for effort in ("none", "low", "high", "max")
]
OPENERS = {False: "</think>", True: "<think>"}


@pytest.mark.parametrize(("generation", "effort"), ALL_MODES)
def test_one_turn_with_a_system_text(generation, effort):
    mode = MODES[generation][effort]
    expected = f"{BOS}{mode.text}S{USER}U{ASSISTANT}{OPENERS[effort != 'none']}"
    assert encode_chat([system("S"), user("U")], mode) == expected


@pytest.mark.parametrize(("generation", "effort"), ALL_MODES)
def test_two_turns_lose_the_old_reasoning(generation, effort):
    mode = MODES[generation][effort]
    messages = [system("S"), user("U"), answer("A", reasoning="R"), user("U2")]
    expected = f"{BOS}{mode.text}S{USER}U{ASSISTANT}</think>A{EOS}{USER}U2{ASSISTANT}{OPENERS[effort != 'none']}"
    assert encode_chat(messages, mode) == expected


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_old_reasoning_is_kept_on_demand(key):
    messages = [user("U"), answer("A", **{key: "R"}), user("U2")]
    expected = f"{BOS}{USER}U{ASSISTANT}<think>R</think>A{EOS}{USER}U2{ASSISTANT}<think>"
    assert encode_chat(messages, HIGH, drop_thinking=False) == expected
    assert "R" not in encode_chat(messages, NON_THINK, drop_thinking=False)


TOOLS = [tool("weather", "The weather of a place.", place={"type": "string"})]
TOOLS_BLOCK = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{"name": "weather", "description": "The weather of a place.", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""  # noqa: E501


@pytest.mark.parametrize(("generation", "effort"), ALL_MODES)
def test_tools_follow_the_system_text(generation, effort):
    mode = MODES[generation][effort]
    opener = OPENERS[effort != "none"]
    text = encode_chat([system("S"), user("U")], mode, tools=TOOLS)
    assert text == f"{BOS}{mode.text}S\n\n{TOOLS_BLOCK}{USER}U{ASSISTANT}{opener}"


def test_tools_without_a_system_text():
    assert encode_chat([user("U")], HIGH, tools=TOOLS) == f"{BOS}\n\n{TOOLS_BLOCK}{USER}U{ASSISTANT}<think>"


def test_a_tool_loop_keeps_its_reasoning():
    """Calls with a string and JSON parameters; results in the order of the calls; the loop goes on in one thought."""
    calls = [call("weather", '{"place": "Köln", "days": 2}', "a"), call("list", {"flags": [True, None]}, "b")]
    messages = [
        user("U"),
        answer("Looking.", reasoning="R", tool_calls=calls),
        result("two", "b"),
        result("one", "a"),
        user("And?"),
    ]
    assert encode_chat(messages, HIGH, tools=TOOLS).removeprefix(f"{BOS}\n\n{TOOLS_BLOCK}") == (
        f"{USER}U{ASSISTANT}<think>R</think>Looking.\n\n"
        '<｜DSML｜tool_calls>\n'
        '<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="place" string="true">Köln</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="list">\n'
        '<｜DSML｜parameter name="flags" string="false">[true, null]</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        f"</｜DSML｜tool_calls>{EOS}"
        f"{USER}<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>\n\nAnd?{ASSISTANT}<think>"
    )  # fmt: skip


def test_a_tool_loop_without_thinking():
    messages = [user("U"), answer(None, reasoning="R", tool_calls=[call("f", "{}", "a")]), result("1", "a")]
    assert encode_chat(messages, NON_THINK) == (
        f'{BOS}{USER}U{ASSISTANT}</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'
        f"</｜DSML｜tool_calls>{EOS}{USER}<tool_result>1</tool_result>{ASSISTANT}</think>"
    )


def test_the_blank_line_before_calls_is_not_doubled():
    """vLLM's parsers leave it on the text that a client sends back."""
    calls = [call("f", {}, "a")]
    texts = {
        encode_chat([user("U"), answer(content, tool_calls=calls), result("1", "a")], NON_THINK)
        for content in ("Looking.", "Looking.\n\n")
    }
    assert len(texts) == 1
    assert "Looking.\n\n<｜DSML｜tool_calls>" in texts.pop()


def test_results_without_ids_keep_their_order():
    calls = [call("f", {}), call("g", {})]
    text = encode_chat([user("U"), answer(None, tool_calls=calls), result("1"), result("2")], NON_THINK)
    assert "<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>" in text


def test_unset_fields_of_a_tool_are_not_shown():
    bare = {"type": "function", "function": {"name": "f"}}
    unset = {"type": "function", "function": {"parameters": None, "description": None, "name": "f", "strict": None}}
    ordered, shuffled = ({"function": dict(items)} for items in (_FIELDS, reversed(_FIELDS)))
    assert encode_chat([user("U")], HIGH, tools=[bare]) == encode_chat([user("U")], HIGH, tools=[unset])
    assert '\n{"name": "f"}\n' in encode_chat([user("U")], HIGH, tools=[bare])
    assert encode_chat([user("U")], HIGH, tools=[ordered]) == encode_chat([user("U")], HIGH, tools=[shuffled])


_FIELDS = [("name", "f"), ("description", "d"), ("parameters", {"b": 1, "a": 2}), ("strict", True)]


def test_response_format():
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    shown = (
        "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object", "properties": {"größe": {"type": "integer"}}}'
    )
    text = encode_chat([system("S"), user("U")], NON_THINK, response_format=schema)
    assert text == f"{BOS}S\n\n{shown}{USER}U{ASSISTANT}</think>"
    assert f"{TOOLS_BLOCK}\n\n{shown}{USER}" in encode_chat([user("U")], HIGH, tools=TOOLS, response_format=schema)


def test_a_developer_message_is_a_system_message():
    for messages in ([system("S"), user("U")], [user("U"), answer("A"), system("S"), user("U2")]):
        renamed = [message | {"role": message["role"].replace("system", "developer")} for message in messages]
        assert encode_chat(renamed, HIGH) == encode_chat(messages, HIGH)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("effort", ["none", "low"])
def test_a_reminder_is_where_deepseeks_encoder_has_it(place, effort):
    from vllm.tokenizers.deepseek_v4_encoding import encode_messages

    messages = [system("S"), user("U"), answer("A", reasoning="R"), user("U2")]
    messages.insert(place, {"role": "latest_reminder", "content": "2026"})
    expected = encode_messages(messages, "chat" if effort == "none" else "thinking", reasoning_effort="low")
    assert "<｜latest_reminder｜>2026" in expected
    assert encode_chat(messages, MODES[JULY][effort]) == expected


def test_lists_of_text_parts():
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": ""}]
    assert encode_chat([system(parts), user(parts)], NON_THINK) == f"{BOS}a\n\nb\n\n{USER}a\n\nb\n\n{ASSISTANT}</think>"


def test_neighbouring_user_messages_are_one_turn():
    assert encode_chat([user("a"), user("b")], NON_THINK) == f"{BOS}{USER}a\n\nb{ASSISTANT}</think>"


def test_without_a_generation_prompt():
    assert encode_chat([user("U")], HIGH, add_generation_prompt=False) == f"{BOS}{USER}U"
    whole = encode_chat([user("U"), answer("A", reasoning="R")], HIGH, add_generation_prompt=False)
    assert whole == f"{BOS}{USER}U{ASSISTANT}<think>R</think>A{EOS}"


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_continuing_the_last_message(add_generation_prompt):
    messages = [user("U"), answer("A", reasoning="R"), user("U2"), answer("So", reasoning="T")]
    text = encode_chat(messages, HIGH, continue_final_message=True, add_generation_prompt=add_generation_prompt)
    assert text == f"{BOS}{USER}U{ASSISTANT}</think>A{EOS}{USER}U2{ASSISTANT}<think>T</think>So"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"^messages=\[\]: .* Send at least one\.$"),
        (["hi"], r"messages\[0\]='hi': must be an object"),
        ([[user("U")]], r"messages\[0\]=\[.*: must be an object"),
        ([{"content": "x"}], r"messages\[0\].role=None: .*Use one of system, developer"),
        ([user("U"), {"role": "function", "content": "x"}], r"messages\[1\].role='function': .*Use one of"),
        ([user(None)], r"messages\[0\].content=None: .*Send a string or text parts"),
        ([user(5)], r"messages\[0\].content=5: "),
        (
            [user([{"type": "image_url", "image_url": {}}])],
            r"content\[0\].type='image_url': this model reads text only",
        ),
        ([user([{"type": "text"}])], r"messages\[0\].content\[0\].type='text': "),
        ([user([7])], r"content\[0\].type=7: "),
        ([user("U"), result("x", "a")], r"messages\[1\].tool_call_id='a': no call precedes"),
        (
            [user("U"), answer(None, tool_calls=[call("f", {}, "a")]), result("x", "b")],
            r"messages\[2\].tool_call_id='b': .*call before it. Use one of 'a'\.$",
        ),
        (
            [user("U"), answer(None, tool_calls=[call("f", {}, "a")]), result("x", "a"), answer("A"), result("y", "a")],
            r"messages\[4\].tool_call_id='a': no call precedes",
        ),
        (
            [user("U"), answer(None, tool_calls=[call("f", "{", "a")])],
            r"tool_calls\[0\].function.arguments='{': not JSON",
        ),
        (
            [user("U"), answer(None, tool_calls=[call("f", "[1]", "a")])],
            r"arguments=\[1\]: not a JSON object",
        ),
        ([user("U"), answer(None, tool_calls=[{"id": "a"}])], r"messages\[1\].tool_calls\[0\]=.*: has no function"),
        ([user("U"), answer("A", reasoning=3)], r"messages\[1\].reasoning=3: must be a string"),
        (
            [user("U") | {"task": "action"}],
            r"messages\[0\].task='action': not part of a message in this API\. Remove it",
        ),
        ([system("S") | {"tools": TOOLS}], r"messages\[0\].tools=.*: not part of .*\. Set the request's tools"),
        ([user("U"), answer("A", prefix="yes")], r"messages\[-1\].prefix='yes': not a boolean"),
        ([user("U") | {"prefix": True}], r"messages\[-1\].prefix=True: the message is the user's"),
        (
            [user("U"), answer(None, tool_calls=[call("f", "[" * 50_000)])],
            r"tool_calls\[0\].function.arguments='\[+\.+\[+': too deep \(objects and arrays nest deeper than 128",
        ),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(ValueError, match=message) as refusal:
        encode_chat(messages, HIGH)
    assert re.fullmatch(r"messages[^=]*=.+: .+\. [A-Z].+\.", str(refusal.value), re.DOTALL)  # what, why, what to do


@pytest.mark.parametrize("effort", ["none", "high"])
def test_an_assistants_last_message_opens_a_new_answer(effort):
    """As a Jinja template does; clients such as opencode end a conversation with one."""
    opened = "<｜Assistant｜>" + ("</think>" if effort == "none" else "<think>")
    messages = [user("U"), answer("A", reasoning="R")]
    closed = encode_chat(messages, MODES[JULY][effort], add_generation_prompt=False)
    assert encode_chat(messages, MODES[JULY][effort]) == closed + opened
    assert closed.endswith("A<｜end▁of▁sentence｜>")


def test_a_prefix_is_continued():
    """DeepSeek's way to say continue_final_message; in an earlier message it means nothing."""
    messages = [user("U"), answer("A", reasoning="R")]
    continued = encode_chat(messages, HIGH, continue_final_message=True)
    assert encode_chat([user("U"), answer("A", reasoning="R", prefix=True)], HIGH) == continued
    assert continued.endswith("</think>A")
    earlier = encode_chat([user("U"), answer("A", prefix=True), user("V")], HIGH)
    assert earlier == encode_chat([user("U"), answer("A"), user("V")], HIGH)
    assert encode_chat([*messages[:1], answer("A", prefix=False)], HIGH) == encode_chat([user("U"), answer("A")], HIGH)


def test_a_tool_reference_is_the_tools_name():
    parts = [{"type": "tool_reference", "name": "f"}, {"type": "tool_reference", "name": "g"}]
    messages = [user("U"), answer(None, tool_calls=[call("find", {}, "a")]), result(parts, "a")]
    assert encode_chat(messages, NON_THINK).endswith(f"{USER}<tool_result>f\ng</tool_result>{ASSISTANT}</think>")


def test_schemas_that_nest_too_deeply():
    schema: dict = {}
    for _ in range(2_000):
        schema = {"items": schema}
    with pytest.raises(ValueError, match=r"^tools\[\]=.+: objects and arrays nest deeper than 128 levels\. Use"):
        encode_chat([user("U")], HIGH, tools=[{"name": "f", "parameters": schema}])
    with pytest.raises(ValueError, match=r"^response_format=.+: objects and arrays nest deeper than 128 levels\. Use"):
        encode_chat([user("U")], HIGH, response_format=schema)


def test_nothing_to_continue():
    with pytest.raises(ValueError, match="continue_final_message=True: the last message is the user's, and only"):
        encode_chat([user("U")], HIGH, continue_final_message=True)


@pytest.mark.parametrize("bad", [{}, {"function": {"description": "d"}}, "f", {"type": "function", "function": "f"}])
def test_bad_tools(bad):
    with pytest.raises(ValueError, match=r"tools\[\]=.*: has no function with a name"):
        encode_chat([user("U")], HIGH, tools=[bad])


# ---- vLLM's copy of DeepSeek's encoder (0731's), where both should agree

texts = st.text(alphabet='ab \n<>｜{}"é', min_size=1, max_size=8)
values = st.one_of(texts, st.integers(), st.booleans(), st.none(), st.lists(texts, max_size=2))
arguments = st.dictionaries(st.sampled_from(["x", "y", "größe"]), values, max_size=3)


@st.composite
def conversations(draw):
    """System text or none, then turns; an assistant may call tools, whose results come in any order."""
    messages = [system(draw(texts))] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(0, 3))):
        messages += [user(draw(texts)) for _ in range(draw(st.integers(1, 2)))]
        while draw(st.booleans()):
            ids = [f"{turn}.{len(messages)}.{number}" for number in range(draw(st.integers(1, 3)))]
            calls = [call("f", json.dumps(draw(arguments)), name) for name in ids]
            messages.append(answer(draw(texts).rstrip("\n"), reasoning=draw(texts), tool_calls=calls))
            messages += [result(draw(texts), name) for name in draw(st.permutations(ids))]
        messages.append(answer(draw(texts), reasoning=draw(st.one_of(st.none(), texts))))
    return [*messages, user(draw(texts))]


@settings(max_examples=200, deadline=None)
@given(
    messages=conversations(),
    effort=st.sampled_from(["none", "low", "high", "max"]),
    drop=st.booleans(),
    tools=st.sampled_from([None, TOOLS]),
)
def test_as_deepseeks_encoder(messages, effort, drop, tools):
    from vllm.tokenizers.deepseek_v4_encoding import encode_messages

    theirs = messages
    if tools:
        theirs = messages if messages[0]["role"] == "system" else [{"role": "system"}, *messages]
        theirs = [theirs[0] | {"tools": tools}, *theirs[1:]]
    expected = encode_messages(
        theirs,
        thinking_mode="chat" if effort == "none" else "thinking",
        reasoning_effort=None if effort == "none" else effort,
        drop_thinking=drop,
    )
    assert encode_chat(messages, MODES[JULY][effort], tools=tools, drop_thinking=drop) == expected
