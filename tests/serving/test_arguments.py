"""The arguments of a call, without a parser around them: in any pieces, cut off, nested deeply, and in linear time."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_deepseek_v4flash.serving import arguments
from vllm_deepseek_v4flash.serving.arguments import ArgumentReader
from vllm_deepseek_v4flash.serving.nesting import MAX_NESTING

PROPERTIES = {"path": {"type": "string"}, "n": {"type": "integer"}, "thing": {"type": "object"}, "any": {}}


def parameter(name, value, string="true"):
    return f'<｜DSML｜parameter name="{name}" string="{string}">{value}</｜DSML｜parameter>\n'


def read(text, closed=True, step=10**9, properties=PROPERTIES):
    """The arguments of `text`, which arrives in pieces of `step` characters."""
    reader = ArgumentReader(properties)
    pieces = [reader.read(text[start : start + step]) for start in range(0, len(text), step)]
    pieces.append(reader.finish(closed))
    assert "".join(pieces) == reader.json
    return json.loads(reader.json)


def every_way(text, closed=True, properties=PROPERTIES):
    whole = read(text, closed, properties=properties)
    for step in (1, 2, 3, 7):
        assert read(text, closed, step, properties) == whole, step
    return whole


# ---- a body without parameters


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", {}),
        (" \n", {}),
        ("{}", {}),
        ('{"path": "/a", "n": 3}', {"path": "/a", "n": 3}),
        ('\n{"path": "/a"}\n', {"path": "/a"}),
        ('{"arguments": {"path": "/a"}}', {"path": "/a"}),
        ('{"input": "{\\"n\\": 3}"}', {"n": 3}),
        ('{"path": "/a"}</｜DSML｜parameter>', {"path": "/a"}),
        # What cannot be the arguments is not lost, and not taken for no arguments.
        ('{"arguments": "ls -la"}', {"arguments": "ls -la"}),
        ('{"other": 1}', {"other": 1}),
        ("ls -la", {"arguments": "ls -la"}),
        ('{"path": "/a"', {"arguments": '{"path": "/a"'}),
        ("[1, 2]", {"arguments": [1, 2]}),
        ('<parameter name="path">/a</parameter>', {"arguments": '<parameter name="path">/a</parameter>'}),
    ],
)
def test_a_body_that_is_the_arguments(body, expected):
    assert every_way(body) == expected


def test_a_body_for_a_tool_without_a_schema():
    assert every_way('{"a": {"b": [1]}}', properties={}) == {"a": {"b": [1]}}


# ---- cut off: the invoke has no end tag


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", {}),
        ("12.", {}),
        ("-", {}),
        ("12\n", {"n": 12}),
        ("12</｜DSML｜par", {}),
        ("true", {"n": True}),
        ("tru", {}),
        ("null", {"n": None}),
        ('{"a": 1}', {"n": {"a": 1}}),
        ('{"a": 1', {}),
        ("[1, 2", {}),
        ('"abc', {}),
        ('"abc"', {"n": "abc"}),
    ],
)
def test_a_value_in_json_that_is_cut_off(text, expected):
    """A number that ends where the reply does may have had more digits."""
    head = '<｜DSML｜parameter name="n" string="false">'
    assert every_way(head + text, closed=False) == expected
    assert every_way(parameter("path", "/a") + head + text, closed=False) == {"path": "/a"} | expected


def test_a_number_that_the_model_called_a_string_is_cut_off():
    assert every_way('<｜DSML｜parameter name="n" string="true">12', closed=False) == {}
    assert every_way('<｜DSML｜parameter name="n" string="true">12', closed=True) == {"n": 12}


@pytest.mark.parametrize(
    "end", ["", "<", "</｜DSML", "</｜DSML｜parameter", "</｜DSML｜invoke", "</｜DSML｜tool_calls"]
)
def test_a_string_that_is_cut_off_ends_before_the_tag(end):
    assert every_way(f'<｜DSML｜parameter name="path" string="true">a < b{end}', closed=False) == {"path": "a < b"}


@pytest.mark.parametrize(
    "end", ['<｜DSML｜parameter name="n', "<｜DSML｜parameter ", '<｜DSML｜parameter name="n" string="']
)
def test_a_tag_that_is_cut_off(end):
    assert every_way(parameter("path", "/a") + end, closed=False) == {"path": "/a"}


# ---- streaming


def test_a_string_comes_as_it_is_written():
    """Nothing is held back of a text that has no tag, and of one that might have a tag no more than the tag."""
    reader = ArgumentReader(PROPERTIES)
    assert reader.read('<｜DSML｜parameter name="path" string="true">') == '{"path": "'
    assert [reader.read(word) for word in ("The ", "quick ", 'br"own ')] == ["The ", "quick ", 'br\\"own ']
    assert [reader.read(text) for text in ("a <", "｜DSML", " b", "\n", "c")] == ["a ", "", "<｜DSML b", "", "\\nc"]
    assert reader.read("</｜DSML｜parameter>\n") == '"'
    assert reader.finish(closed=True) == "}"
    assert reader.finish(closed=True) == ""


text_pieces = st.lists(
    st.sampled_from(
        ["</｜DSML｜parameter>", '<｜DSML｜parameter name="', '" string="true">', '">', "<｜DSML｜parameter ", 'name="',
         "path", "arguments", '{"n": 1}', "｜DSML｜", "a", "<", "5", "\n", '"', ">", " "]
    ),
    max_size=14,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(pieces=text_pieces, step=st.integers(1, 9), closed=st.booleans())
def test_any_text_gives_the_same_in_any_pieces(pieces, step, closed):
    text = "".join(pieces)
    assert read(text, closed, step) == read(text, closed)


# ---- depth


@pytest.mark.parametrize("depth", [MAX_NESTING + 1, 4_000, 100_000])
@pytest.mark.parametrize("name", ["thing", "any", "n"])
def test_what_nests_too_deeply_stays_text(name, depth):
    text = "[" * depth + "]" * depth
    assert read(parameter(name, text, "false"), step=100) == {name: text}
    assert read(text, step=100) == {"arguments": text}
    assert read(parameter("arguments", text), step=100) == {"arguments": text}


def test_the_deepest_value_is_read():
    text = "[" * MAX_NESTING + "]" * MAX_NESTING
    assert every_way(parameter("any", text, "false")) == {"any": json.loads(text)}


# ---- linear time


class CountingPattern:
    """Counts the characters that a pattern is given to search."""

    def __init__(self, pattern):
        self.pattern, self.characters = pattern, 0

    def finditer(self, text, *span):
        self.characters += len(text)
        return self.pattern.finditer(text, *span)

    def search(self, text, *span):
        self.characters += len(text)
        return self.pattern.search(text, *span)


LENGTH = 40_000
LONG = {
    "a string": parameter("path", "abc <d> \n" * (LENGTH // 9)),
    "a value in JSON": parameter("thing", '{"a": [' + "1, " * (LENGTH // 3) + "1]}", "false"),
    "a body": '{"path": "' + "x" * LENGTH + '"}',
    "many parameters": "".join(parameter(f"p{number}", "v" * 20) for number in range(LENGTH // 80)),
    "angle brackets": parameter("path", "<" * LENGTH),
    "a name that does not end": '<｜DSML｜parameter name="' + "x" * LENGTH,
    "blanks in a tag": "<｜DSML｜parameter" + " " * LENGTH + "name",
    "beginnings of tags": '<｜DSML｜parameter name="a' * (LENGTH // 24),
    "a wrapper": parameter("arguments", '{"path": "' + "x" * LENGTH + '"}'),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("step", [4, 10**9])
def test_every_character_is_looked_at_a_bounded_number_of_times(name, step, monkeypatch):
    """A piece of 4 characters is searched with at most `_SHORT` characters before it, and a longer text after doubling.

    So each is searched less than 2 + 2 * _SHORT / 4 times; the quadratic reading of before searched each 5,000 times.
    """
    counters = [CountingPattern(arguments._NEXT), CountingPattern(arguments._COMPLETE)]
    monkeypatch.setattr(arguments, "_NEXT", counters[0])
    monkeypatch.setattr(arguments, "_COMPLETE", counters[1])
    text = LONG[name]
    read(text, step=step)
    assert sum(counter.characters for counter in counters) < len(text) * (4 + 2 * arguments._SHORT / 4)
