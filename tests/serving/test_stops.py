"""Stop strings of a request that thinks, and the finish_reason of calls, on the objects that vLLM's server makes."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from testing.serving.messages import tool, user
from testing.serving.parsing import make_parser, make_request, ours, tokenizer
from testing.serving.tokenizer import ids_of
from vllm_deepseek_v4flash.integration.reasoning import stop_in_answers_only
from vllm_deepseek_v4flash.integration.tool_calls import report_cut_calls
from vllm_deepseek_v4flash.serving.parsers import ends_in_call

DSML = "｜DSML｜"


def request_of(stop, *, parser=True, thinking=True, **sampling) -> Any:
    from vllm.sampling_params import SamplingParams

    params = SamplingParams(stop=stop, skip_special_tokens=False, **sampling)
    return SimpleNamespace(
        request_id="r", sampling_params=params,
        prompt_token_ids=tokenizer().apply_chat_template([user("U")], thinking=thinking),
        reasoning_parser_kwargs={} if parser else None, prompt_embeds=None,
    )  # fmt: skip


def patched():
    """The class as the plugin leaves it, and a copy of vLLM's own, whichever was imported first."""
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer

    class Stock(IncrementalDetokenizer):
        @classmethod
        def from_new_request(cls, tokenizer, request):
            return FastIncrementalDetokenizer(tokenizer, request)

    class Ours(Stock):
        pass

    stop_in_answers_only(Ours)
    return Ours, Stock


def generate(cls, request, text, step=1):
    """`(stop string, text, number of tokens)` of the output of a reply that arrives `step` tokens at a time."""
    made = cls.from_new_request(tokenizer(), request)
    ids = ids_of(text)
    for start in range(0, len(ids), step):
        stop = made.update(ids[start : start + step], False)
        if stop is not None:
            return stop, made.get_next_output_text(True, False), made.num_output_tokens()
    return None, made.get_next_output_text(True, False), made.num_output_tokens()


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("stop", "text", "found", "left"),
    [
        ("Question:", "A Question: B</think>C", None, "A Question: B</think>C"),
        ("Question:", "A Question: B</think>C Question: D", "Question:", "A Question: B</think>C "),
        (["C", "D"], "CD</think>aDC", "D", "CD</think>a"),
        ("</think>", "A</think>B", None, "A</think>B"),
        ("k>B", "A</think>B", None, "A</think>B"),
        ("B", "A</think>B", "B", "A</think>"),
        ("x", f"x<{DSML}tool_calls>\nx", "x", f"x<{DSML}tool_calls>\n"),
        ("\n", f"a\n<{DSML}tool_calls>\nx", "\n", f"a\n<{DSML}tool_calls>"),
    ],
)
def test_stop_strings_are_looked_for_in_the_answer(stop, text, found, left, step):
    assert generate(patched()[0], request_of(stop), text, step)[:2] == (found, left)


def test_the_tokens_end_with_the_stop_string():
    text = "A stop B</think>C stop D and more"
    assert generate(patched()[0], request_of("stop"), text, step=1000)[2] == len(ids_of("A stop B</think>C stop"))


def test_min_tokens_and_the_stop_string_itself():
    text = "A</think>x and then x and more"
    ours, _ = patched()
    assert generate(ours, request_of("x", include_stop_str_in_output=True), text)[1] == "A</think>x"
    late = generate(ours, request_of("x", min_tokens=5), text)
    assert late[:2] == ("x", "A</think>x and then ")


@pytest.mark.parametrize("options", [{"parser": False}, {"thinking": False}], ids=str)
def test_other_requests_stop_as_in_vllm(options):
    """Without a reasoning parser the client sees one text, and without thinking there is only an answer."""
    ours, stock = patched()
    request = request_of("Question:", **options)
    expected = ("Question:", "A ", generate(stock, request, "A Question: B")[2])
    assert generate(ours, request, "A Question: B") == generate(stock, request, "A Question: B") == expected


def test_stock_stops_in_the_thinking():
    assert generate(patched()[1], request_of("Question:"), "A Question: B</think>C")[:2] == ("Question:", "A ")


# ---- calls that are cut off


def invoke(text, closed=True):
    return f'<{DSML}tool_calls>\n<{DSML}invoke name="f">\n{text}' + (f"</{DSML}invoke>" if closed else "")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("", False),
        ("text", False),
        (invoke("x"), False),
        (invoke("x", closed=False), True),
        (invoke("x") + invoke("y", closed=False), True),
        (invoke("x", closed=False) + f"</{DSML}tool_calls>", False),
    ],
)
def test_ends_in_call(text, inside):
    assert ends_in_call(text) is inside


class Serving:
    """The two methods of vLLM's chat server that make replies, as far as a finish_reason goes."""

    async def chat_completion_full_generator(self, request, results):
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

        last = [result async for result in results][-1]
        choices = [
            {"index": output.index, "message": {"role": "assistant"},
             "finish_reason": "tool_calls" if "invoke" in output.text else output.finish_reason,
             "stop_reason": output.stop_reason}
            for output in last.outputs
        ]  # fmt: skip
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return ChatCompletionResponse(model="m", choices=choices, usage=usage)

    async def chat_completion_stream_generator(self, request, results):
        async for result in results:
            for output in result.outputs:
                reason = "tool_calls" if output.finish_reason == "stop" else output.finish_reason
                choice = {"index": output.index, "delta": {"content": output.text}, "finish_reason": reason}
                yield f"data: {json.dumps({'choices': [choice]}, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"


def finish_reasons(cls, *outputs):
    """Those of a reply in one piece and of one in deltas, whose choices are `outputs`: (text, finish, stop reason)."""

    async def results(pieces):
        for piece in pieces:
            yield SimpleNamespace(outputs=piece)

    def output(index, text, finish, stop):
        return SimpleNamespace(index=index, text=text, finish_reason=finish, stop_reason=stop)

    async def run():
        whole = [output(index, *one) for index, one in enumerate(outputs)]
        full = await cls().chat_completion_full_generator(None, results([whole]))
        deltas = []
        for index, (text, finish, stop) in enumerate(outputs):
            deltas += [[output(index, text[:9], None, None)], [output(index, text[9:], finish, stop)]]
        events = [event async for event in cls().chat_completion_stream_generator(None, results(deltas))]
        assert events[-1] == "data: [DONE]\n\n"
        chunks = [json.loads(event[6:])["choices"][0] for event in events[:-1]]
        streamed = {one["index"]: one["finish_reason"] for one in chunks if one["finish_reason"]}
        return [one.finish_reason for one in full.choices], [streamed[index] for index in sorted(streamed)]

    return asyncio.run(run())


CUT = [
    ("the limit of tokens", invoke("x", closed=False), "length", None, "length"),
    ("the limit of tokens behind a whole call", invoke("x"), "length", None, "length"),
    ("a stop string", invoke("x", closed=False), "stop", "y", "stop"),
    ("a stop string behind a whole call", invoke("x"), "stop", f"</{DSML}tool_calls>", "tool_calls"),
    ("the model, without an end tag", invoke("x", closed=False), "stop", None, "tool_calls"),
    ("a stop token", invoke("x"), "stop", 7, "tool_calls"),
]


@pytest.mark.parametrize(("text", "finish", "stop", "expected"), [case[1:] for case in CUT], ids=[c[0] for c in CUT])
def test_the_finish_reason_of_a_call_that_is_ended_by(text, finish, stop, expected):
    class Ours(Serving):
        pass

    report_cut_calls(Ours)
    report_cut_calls(Ours)
    assert finish_reasons(Ours, (text, finish, stop)) == ([expected], [expected])
    both = finish_reasons(Ours, (text, finish, stop), (invoke("x"), "stop", None))
    assert both == ([expected, "tool_calls"], [expected, "tool_calls"])


def finish_reason_of_vllms_server(stock, text, finish, stop):
    """That of a reply which is not streamed, by vLLM's own code around the engine's output."""
    from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.outputs import CompletionOutput, RequestOutput

    class Server(OpenAIServingChat):
        def __init__(self):
            self.parser_cls, self.enable_auto_tools, self.response_role = type(parser), True, "assistant"
            self._include_reasoning_tokens_details = self.enable_prompt_tokens_details = False
            self.enable_per_request_metrics = self.enable_log_outputs = False
            self.system_fingerprint = self.request_logger = None

    async def results():
        output = CompletionOutput(0, text, ids_of(text), None, None, finish_reason=finish, stop_reason=stop)
        yield RequestOutput("r", None, [0], None, [output], finished=True)

    request = make_request([tool("f")])
    parser = make_parser(ours(), request, thinking=False)
    method = Server.chat_completion_full_generator
    method = method.__wrapped__ if stock else method
    metadata = RequestResponseMetadata(request_id="r")
    reply = asyncio.run(method(Server(), request, results(), "r", "m", [], tokenizer(), metadata, parser=parser))
    (choice,) = reply.choices
    assert [call.function.name for call in choice.message.tool_calls] == ["f"]
    return choice.finish_reason


def test_stock_calls_a_cut_call_complete():
    for _, text, finish, stop, expected in CUT:
        assert finish_reason_of_vllms_server(False, text, finish, stop) == expected
        assert finish_reason_of_vllms_server(True, text, finish, stop) == "tool_calls"
