"""Reasoning and tool calls of replies: ours are right, whole and streamed in any steps; and what vLLM's get wrong.

The second half asserts each mistake of vLLM that docs/serving.md lists: once vLLM has fixed one, its test fails and our
fix can go.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testing.serving.messages import answer, call, tool, user
from testing.serving.parsing import Reply, make_parser, make_request, ours, stock, streamed, tokenizer, whole
from testing.serving.tokenizer import ids_of
from vllm_deepseek_v4flash.serving import parsers as parsing_module
from vllm_deepseek_v4flash.serving.arguments import ArgumentReader
from vllm_deepseek_v4flash.serving.parsers import PiecewiseLexer

STEPS = (1, 2, 3, 7, 10**6)
TOOLS = [
    tool(
        "f", "d",
        text={"type": "string"}, number={"type": "integer"}, thing={"type": "object"}, untyped={"$ref": "#/$defs/T"},
        either={"anyOf": [{"type": "string"}, {"type": "integer"}]}, optional={"type": ["string", "null"]},
    ),
    tool("g"),
]  # fmt: skip


def parameter(name, value, string="true"):
    return f'<｜DSML｜parameter name="{name}" string="{string}">{value}</｜DSML｜parameter>\n'


def invoke(name, *parameters):
    return f'<｜DSML｜invoke name="{name}">\n{"".join(parameters)}</｜DSML｜invoke>\n'


def calls(*invokes):
    return f"\n\n<｜DSML｜tool_calls>\n{''.join(invokes)}</｜DSML｜tool_calls>"


def one(*parameters):
    """A reply of one call of `f`."""
    return "R</think>" + calls(invoke("f", *parameters))


def every_way(parsers, text, **chat_template_kwargs):
    """The reply parsed whole, which every way of streaming it must give too."""
    reply = whole(parsers, text, TOOLS, **chat_template_kwargs)
    for step in STEPS:
        assert streamed(parsers, text, TOOLS, step=step, **chat_template_kwargs) == reply, step
    return reply


# ---- ours


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("R</think>A", "R", "A"),
        ("</think>A", "", "A"),
        ("R\n</think>\nA\n", "R\n", "\nA\n"),
        ("R goes on", "R goes on", ""),
        ("R</think>", "R", ""),
        ("R</think>the </think> and <think> tags", "R", "the </think> and <think> tags"),
        ("R</think>Write ｜DSML｜ or < or <｜DSML｜ here", "R", "Write ｜DSML｜ or < or <｜DSML｜ here"),
        ("R</think>1 < 2 </ div> ``` 世界 😀", "R", "1 < 2 </ div> ``` 世界 😀"),
    ],
)
def test_replies_without_calls(text, reasoning, content):
    assert every_way(ours(), text) == Reply(reasoning, content)


@pytest.mark.parametrize("effort", ["none", "low", "max"])
@pytest.mark.parametrize("switches", [{}, {"thinking": False}, {"enable_thinking": True}, {"thinking": True}])
def test_where_the_reply_starts(effort, switches):
    """In the thinking exactly where the prompt ends with <think>, whatever the switches say together."""
    request: dict[str, Any] = switches | {"reasoning_effort": effort}
    prompt = tokenizer().apply_chat_template([user("U")], tokenize=False, **request)
    reply = Reply("text", "") if prompt.endswith("<think>") else Reply("", "text")
    assert every_way(ours(), "text", **request) == reply


CONTINUED: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}


def test_the_rest_of_a_continued_answer_is_content():
    """Whole only: streamed, vLLM looks at the prompt's ids (`test_a_continued_answer` in test_served.py)."""
    assert whole(ours(), " and so on", reasoning_effort="high", **CONTINUED) == Reply("", " and so on")
    assert whole(ours(), calls(invoke("g")), TOOLS, **CONTINUED) == Reply("", "", [("g", "{}")])


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        pytest.param(one(parameter("text", "x")), "", [("f", {"text": "x"})], id="string"),
        pytest.param(
            one(parameter("number", "5", "false"), parameter("thing", '{"a": [1, null]}', "false")),
            "", [("f", {"number": 5, "thing": {"a": [1, None]}})], id="json",
        ),
        pytest.param("R</think>" + calls(invoke("g")), "", [("g", {})], id="no-parameters"),
        pytest.param(
            "R</think>" + calls(invoke("f", parameter("text", "x")), invoke("g"), invoke("f", parameter("text", "y"))),
            "", [("f", {"text": "x"}), ("g", {}), ("f", {"text": "y"})], id="parallel",
        ),
        pytest.param("R</think>Looking." + calls(invoke("g")), "Looking.\n\n", [("g", {})], id="text-before"),
        pytest.param("R</think>" + calls(invoke("g")) + "\n\nafter", "", [("g", {})], id="text-after-is-dropped"),
        pytest.param("R</think>" + calls(invoke("g")) + calls(invoke("g")), "", [("g", {})] * 2, id="two-blocks"),
        pytest.param(
            one(parameter("text", '\n say "hi" > \\ {} </x>\n\n')), "",
            [("f", {"text": '\n say "hi" > \\ {} </x>\n\n'})], id="string-is-kept-to-the-letter",
        ),
        pytest.param(one(parameter("text", "Größe 世界 😀")), "", [("f", {"text": "Größe 世界 😀"})], id="unicode"),
        pytest.param(
            one(parameter("text", "a</think>b<think>c")), "", [("f", {"text": "a</think>b<think>c"})], id="think-tags",
        ),
        pytest.param(
            one(parameter("text", "5"), parameter("either", "5"), parameter("optional", "null")), "",
            [("f", {"text": "5", "either": "5", "optional": "null"})], id="declared-strings",
        ),
        pytest.param(
            one(parameter("untyped", "1.5", "false")), "", [("f", {"untyped": 1.5})], id="json-without-a-type"
        ),
        pytest.param(one(parameter("untyped", "true", "false")), "", [("f", {"untyped": True})], id="json-boolean"),
        # malformed: what can be read is read
        pytest.param(one(parameter("number", "5")), "", [("f", {"number": 5})], id="number-declared-a-string"),
        pytest.param(one(parameter("text", "5", "false")), "", [("f", {"text": "5"})], id="string-declared-json"),
        pytest.param(one(parameter("thing", "{'a'", "false")), "", [("f", {"thing": "{'a'"})], id="broken-json"),
        pytest.param(one(parameter("untyped", "1e999", "false")), "", [("f", {"untyped": "1e999"})], id="no-infinity"),
        pytest.param(one(parameter("untyped", "NaN", "false")), "", [("f", {"untyped": "NaN"})], id="no-nan"),
        pytest.param(
            one(parameter("text", "x").replace(' string="true"', "")), "", [("f", {"text": "x"})], id="no-string-flag"
        ),
        pytest.param(
            one('<｜DSML｜parameter name="text" string="true">x\n', parameter("number", "5", "false")), "",
            [("f", {"text": "x", "number": 5})], id="parameter-not-closed",
        ),
        pytest.param(
            one(parameter("number", "5", "false"), '<｜DSML｜parameter name="text" string="true">x\n'), "",
            [("f", {"number": 5, "text": "x"})], id="last-parameter-not-closed",
        ),
        pytest.param(
            one(parameter("text", "x")).replace("</｜DSML｜invoke>\n", ""), "", [("f", {"text": "x"})],
            id="invoke-not-closed",
        ),
        pytest.param(
            one(parameter("text", "x")).replace("<｜DSML｜tool_calls>\n", ""), "", [("f", {"text": "x"})],
            id="block-not-opened",
        ),
        pytest.param(
            one(parameter("text", "x"), parameter("text", "y")), "", [("f", {"text": "x"})], id="parameter-twice"
        ),
        pytest.param(one(parameter("arguments", '{"text": "x"}')), "", [("f", {"text": "x"})], id="wrapped-string"),
        pytest.param(
            one(parameter("input", '{"text": "x"}', "false")), "", [("f", {"text": "x"})], id="wrapped-json"
        ),
        pytest.param(one(parameter("input", "x")), "", [("f", {"input": "x"})], id="not-a-wrapper"),
        pytest.param(
            "R</think>" + calls(invoke("f", '{"text": "/a", "number": 3}\n')), "",
            [("f", {"text": "/a", "number": 3})], id="json-body",
        ),
        pytest.param(
            "R</think>" + calls(invoke("f", '{"arguments": {"text": "/a"}}\n')), "", [("f", {"text": "/a"})],
            id="wrapped-json-body",
        ),
        pytest.param(
            one(parameter("thing", "[" * 5_000 + "]" * 5_000, "false")), "",
            [("f", {"thing": "[" * 5_000 + "]" * 5_000})], id="nested-too-deeply",
        ),
        # cut off by max_tokens
        pytest.param(
            one(parameter("text", "x"), parameter("number", "1234", "false")).split("34")[0], "",
            [("f", {"text": "x"})], id="cut-off-in-a-number",
        ),
        pytest.param(
            one(parameter("text", "abc")).split("c</")[0],
            "", [("f", {"text": "ab"})], id="cut-off-in-a-string",
        ),
    ],
)  # fmt: skip
def test_calls(text, content, expected):
    reply = every_way(ours(), text)
    assert (reply.reasoning, reply.content) == ("R", content)
    assert [(name, json.loads(arguments)) for name, arguments in reply.calls] == expected


def test_a_call_inside_the_thinking_ends_it():
    reply = every_way(ours(), "R" + calls(invoke("f", parameter("text", "x"))))
    assert reply == Reply("R\n\n", "", [("f", '{"text": "x"}')])


def test_calls_without_thinking():
    reply = every_way(ours(), "Looking." + calls(invoke("f", parameter("text", "x"))), thinking=False)
    assert reply == Reply("", "Looking.\n\n", [("f", '{"text": "x"}')])


@pytest.mark.parametrize("parsers", [stock, ours])
def test_strings_are_streamed_as_they_come(parsers):
    """A file's content, for one: every token of a text without a tag comes with the next delta."""
    request = make_request(TOOLS)
    parser = make_parser(parsers(), request, thinking=False)
    head = calls(invoke("f", parameter("text", ""))).split("</｜DSML｜parameter")[0]
    parser.parse_delta(head, ids_of(head), request, prompt_token_ids=[0], finished=False)
    sent = []
    for word in ["The", " quick", " brown", " fox"] * 25:
        delta = parser.parse_delta(word, ids_of(word), request, finished=False)
        sent.append("".join(call.function.arguments or "" for call in delta.tool_calls) if delta else "")
    assert sent == (["The", " quick", " brown", " fox"] * 25 if parsers is ours else [""] * 100)


@pytest.mark.parametrize("text", ["", "f", 'f"', 'f">'])
def test_a_call_that_is_cut_off_before_its_arguments_is_left_out(text):
    """Its name may be the beginning of another tool's."""
    before = "R</think>A" + calls(invoke("g")).removesuffix("</｜DSML｜tool_calls>")
    assert every_way(ours(), before + f'<｜DSML｜invoke name="{text}') == Reply("R", "A\n\n", [("g", "{}")])
    assert every_way(ours(), f'R</think>A<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{text}') == Reply("R", "A")


def test_two_calls_with_the_same_text_of_different_tools():
    """Each has the types of its own tool."""
    tools = [tool("f", x={"type": "string"}), tool("g", x={"type": "integer"})]
    text = "R</think>" + calls(*(invoke(name, parameter("x", "5")) for name in "fg"))
    assert whole(ours(), text, tools).arguments == streamed(ours(), text, tools).arguments == [{"x": "5"}, {"x": 5}]


# ---- linear time

LONG = {
    "a string": lambda length: one(parameter("text", "ab <c> " * (length // 7))),
    "an answer": lambda length: "R</think>" + "<d> " * (length // 4),
    "the thinking": lambda length: "<d> " * (length // 4) + "</think>A",
    "many calls": lambda length: "R</think>" + calls(*[invoke("f", parameter("text", "v"))] * (length // 100)),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("step", [None, 4])
def test_the_work_grows_with_the_length(name, step):
    """Twice the text, twice the characters that the lexer holds when it looks for a tag, and that are read of calls.

    Up to a piece's worth. vLLM's own lexer holds all of a whole text at every tag, and its parser converts all of a
    call's text with every delta.
    """

    def work(length):
        held = 0

        class Reader(ArgumentReader):
            def read(self, text):
                nonlocal held
                held += len(text)
                return super().read(text)

        class Counting(PiecewiseLexer):
            def _find_content_boundary(self):
                nonlocal held
                held += len(self.buffer)
                return super()._find_content_boundary()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parsing_module, "PiecewiseLexer", Counting)
            patch.setattr(parsing_module, "ArgumentReader", Reader)
            text = LONG[name](length)
            _ = whole(ours(), text, TOOLS) if step is None else streamed(ours(), text, TOOLS, step=step)
        return held

    assert 0 < work(8_000) < 2.1 * work(4_000)


scalars = st.one_of(st.text(alphabet='ab5"\\ \n>é{', max_size=6), st.integers(), st.booleans(), st.none())
drawn_calls = st.lists(
    st.dictionaries(
        st.sampled_from(["text", "untyped", "p", "q"]), st.one_of(scalars, st.lists(scalars, max_size=2)), max_size=3
    ),
    min_size=1,
    max_size=2,
)


@settings(max_examples=40, deadline=None)
@given(
    reasoning=st.text(alphabet="ab <>\n", max_size=6),
    # Blank text before calls is dropped by vLLM's state machine.
    content=st.text(alphabet="ab <>.", max_size=6).filter(lambda text: not text or text.strip()),
    arguments=drawn_calls,
    step=st.integers(1, 9),
)
def test_what_is_parsed_encodes_to_the_same_tokens(reasoning, content, arguments, step):
    """So a tool loop's next prompt begins with the tokens in the cache, and the model sees what it wrote."""
    arguments = [
        {name: value if name != "text" or isinstance(value, str) else "x" for name, value in one.items()}
        for one in arguments
    ]
    made = answer(content, reasoning=reasoning, tool_calls=[call("f", one) for one in arguments])
    encode = tokenizer().apply_chat_template
    prompt = encode([user("U")], TOOLS, tokenize=False)
    history = encode([user("U"), made], TOOLS, tokenize=False, add_generation_prompt=False)
    text = history.removeprefix(prompt).removesuffix("<｜end▁of▁sentence｜>")

    reply = streamed(ours(), text, TOOLS, step=step)
    assert reply == whole(ours(), text, TOOLS)
    assert reply.arguments == arguments
    sent_back = answer(
        reply.content, reasoning=reply.reasoning, tool_calls=[call(name, value) for name, value in reply.calls]
    )
    assert encode([user("U"), sent_back], TOOLS, add_generation_prompt=False) == ids_of(history)


# ---- vLLM's, of today


def valid(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_stock_takes_the_answer_for_thinking():
    request: dict[str, Any] = {
        "thinking": False,
        "enable_thinking": True,
        "reasoning_effort": "low",
    }  # as its server passes them on
    assert whole(stock(), "A", **request) == Reply("A", "")
    assert whole(ours(), "A", **request) == Reply("", "A")


def test_stock_takes_the_rest_of_a_continued_answer_for_thinking():
    assert whole(stock(), "A", **CONTINUED) == Reply("A", "")


def test_stock_loses_think_tags_of_the_answer():
    assert whole(stock(), "R</think>the </think> tag").content == "the  tag"
    assert whole(stock(), "R</think>a <think> b</think> c") == Reply("R b", "a  c")


def test_stock_tears_a_call_apart_at_a_think_tag():
    reply = whole(stock(), one(parameter("text", "a<think>b")), TOOLS)
    assert reply.arguments == [{}]
    assert reply.reasoning.startswith("Rb</｜DSML｜parameter>")


def test_stock_makes_numbers_of_declared_strings():
    text = one(parameter("either", "5"), parameter("optional", "null"))
    assert whole(stock(), text, TOOLS).arguments == [{"either": 5, "optional": None}]


def test_stock_makes_strings_of_json_without_a_type():
    assert whole(stock(), one(parameter("untyped", "1.5", "false")), TOOLS).arguments == [{"untyped": "1.5"}]


def test_stock_loses_a_parameter_that_is_not_closed():
    text = one('<｜DSML｜parameter name="text" string="true">x\n')
    assert whole(stock(), text, TOOLS).arguments == [{}]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(one('<｜DSML｜parameter name="text" string="true">x\n'), id="not-closed"),
        pytest.param(one(parameter("text", "x"), parameter("text", "y")), id="twice"),
        pytest.param(one(parameter("arguments", '{"text": "x"}')), id="wrapped"),
    ],
)
def test_stock_streams_arguments_that_are_no_json(text):
    ((_, arguments),) = streamed(stock(), text, TOOLS).calls
    assert not valid(arguments)
    assert valid(whole(stock(), text, TOOLS).calls[0][1])


def test_stock_loses_a_body_without_parameters():
    for body in ('{"text": "x"}', "ls -la"):
        assert whole(stock(), "R</think>" + calls(invoke("f", body)), TOOLS).arguments == [{}]


def test_stock_calls_half_a_name():
    text = 'R</think><｜DSML｜tool_calls>\n<｜DSML｜invoke name="wri'
    assert whole(stock(), text, TOOLS).calls == [("wri", "{}")]


def test_stock_fails_on_deep_values():
    with pytest.raises(RecursionError):
        whole(stock(), one(parameter("thing", "[" * 5_000 + "]" * 5_000, "false")), TOOLS)


def test_stock_trims_reasoning():
    assert whole(stock(), "R\n</think>A").reasoning == "R"


# Ours have these too: the state machine is vLLM's.


@pytest.mark.parametrize("parsers", [stock, ours])
def test_both_keep_the_blank_line_before_calls(parsers):
    """The encoder takes it off again."""
    assert whole(parsers(), "R</think>A" + calls(invoke("g")), TOOLS).content == "A\n\n"


@pytest.mark.parametrize("parsers", [stock, ours])
def test_both_drop_text_after_a_mention_of_the_block(parsers):
    assert whole(parsers(), "R</think>Write <｜DSML｜tool_calls> to call.", TOOLS).content == "Write "


@pytest.mark.parametrize("parsers", [stock, ours])
def test_both_drop_calls_of_a_request_without_tools(parsers):
    assert whole(parsers(), one(parameter("text", "x"))) == Reply("R")


@pytest.mark.parametrize("parsers", [stock, ours])
def test_both_drop_a_call_without_an_invoke(parsers):
    text = 'R</think><｜DSML｜tool_calls>\n{"name": "f", "arguments": {}}\n</｜DSML｜tool_calls>'
    assert whole(parsers(), text, TOOLS) == Reply("R")


@pytest.mark.parametrize("parsers", [stock, ours])
def test_both_misread_a_name_followed_by_a_space(parsers):
    text = one(parameter("text", "x")).replace('name="f">', 'name="f" >')
    ((name, _),) = whole(parsers(), text, TOOLS).calls
    assert name.startswith('f" >')
