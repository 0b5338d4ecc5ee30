"""`LLM()` with DeepSeek's real tokenizer on a small random model: chats, thinking budgets, guided output, sampling.

The weights are random, so whatever ends or shapes a reply is what the request asked for. The checkpoint has 0731's
encoder file, and no flag is passed.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from testing import engine, tiny
from testing.serving.messages import answer, call, result, system, tool, user
from testing.serving.tokenizer import ids_of, reference, write_encoder, write_tokenizer
from vllm_deepseek_v4flash.serving.modes import EFFORTS, MODES, Generation

JULY = Generation.JULY
THINK, END_THINK, EOS = 128821, 128822, 1
VOCABULARY = 129280
TOOLS = [tool("weather", "The weather of a place.", place={"type": "string"})]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    spec = tiny.CONFIGS["streams3"]
    spec = dataclasses.replace(spec, overrides={**spec.overrides, "vocab_size": VOCABULARY})
    path = tiny.write_checkpoint(tmp_path_factory.mktemp("real"), spec)
    write_encoder(write_tokenizer(path), JULY)
    options = {
        "skip_tokenizer_init": False,
        "max_logprobs": 20,
        # Random weights would write blanks between the braces for ever.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    with engine.running(path, **options) as running:
        yield running


def params(**fields):
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": 1} | fields)


def chat(llm, messages=None, tools=None, switches=None, **sampling):
    (output,) = llm.chat(
        messages or [user("U")], params(**sampling), tools=tools, chat_template_kwargs=switches, use_tqdm=False
    )
    return output


def tokens(output):
    return list(output.outputs[0].token_ids)


# ---- prompts

CONVERSATIONS = {
    "one turn": ([system("S"), user("U")], None),
    "turns": (
        [user("U"), answer("A", reasoning="R"), user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        None,
    ),
    "tools": (
        [user("U"), answer(None, reasoning="R", tool_calls=[call("weather", '{"place": "K"}', "a")]), result("1", "a")],
        TOOLS,
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(
    "switches",
    [None, *({"reasoning_effort": effort} for effort in EFFORTS), {"thinking": False, "reasoning_effort": "max"}],
    ids=str,
)
def test_chat_gives_the_tokenizers_ids(llm, name, switches):
    messages, tools = CONVERSATIONS[name]
    expected = llm.get_tokenizer().apply_chat_template(messages, tools, **switches or {})
    assert chat(llm, messages, tools, switches).prompt_token_ids == expected


def test_the_checkpoints_generation(llm):
    assert llm.model_config.tokenizer_mode == "deepseek_v4_0731"
    assert chat(llm).prompt_token_ids == ids_of(
        f"<｜begin▁of▁sentence｜>{MODES[JULY]['high'].text}<｜User｜>U<｜Assistant｜><think>"
    )


def test_bad_messages_are_value_errors_and_the_engine_goes_on(llm):
    with pytest.raises(ValueError, match="no call precedes"):
        chat(llm, [user("U"), result("x", "a")])
    with pytest.raises(ValueError, match="reasoning_effort='extreme': "):
        chat(llm, switches={"reasoning_effort": "extreme"})
    assert len(tokens(chat(llm))) == 1


# ---- thinking budgets


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_ends_the_thinking_and_an_answer_follows(llm, budget):
    ids = tokens(chat(llm, max_tokens=24, thinking_token_budget=budget, ignore_eos=True))
    free = tokens(chat(llm, max_tokens=24, ignore_eos=True))
    assert END_THINK not in free
    assert ids[:budget] == free[:budget]
    assert ids.index(END_THINK) == budget
    assert len(ids) == 24


def test_a_budget_that_is_not_used_up_changes_nothing(llm):
    assert tokens(chat(llm, max_tokens=8, thinking_token_budget=100)) == tokens(chat(llm, max_tokens=8))


def test_a_budget_without_thinking_changes_nothing(llm):
    switches = {"thinking": False}
    expected = tokens(chat(llm, switches=switches, max_tokens=8))
    assert tokens(chat(llm, switches=switches, max_tokens=8, thinking_token_budget=0)) == expected


def test_budgets_of_a_batch_are_each_its_own(llm):
    budgets = [None, 0, 3, 7, None, 1]
    outputs = llm.chat(
        [[user(f"U{number}")] for number in range(len(budgets))],
        [params(max_tokens=12, thinking_token_budget=budget, ignore_eos=True) for budget in budgets],
        use_tqdm=False,
    )
    ends = [tokens(output).index(END_THINK) if END_THINK in tokens(output) else None for output in outputs]
    assert ends == budgets


# ---- guided output

SCHEMA = {
    "type": "object",
    "properties": {
        "stadt": {"enum": ["Köln", "東京"]},
        "tage": {"type": "integer", "minimum": 1, "maximum": 9},
        "genau": {"type": "boolean"},
    },
    "required": ["stadt", "tage", "genau"],
    "additionalProperties": False,
}


def guided(**constraint):
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(**constraint)


@pytest.mark.parametrize("seed", range(3))
def test_json_by_a_schema(llm, seed):
    output = chat(
        llm, switches={"thinking": False}, structured_outputs=guided(json=SCHEMA),
        max_tokens=64, temperature=1.0, seed=seed,
    )  # fmt: skip
    reply = json.loads(output.outputs[0].text)
    assert list(reply) == SCHEMA["required"]
    assert reply["stadt"] in ("Köln", "東京")
    assert isinstance(reply["tage"], int)
    assert 1 <= reply["tage"] <= 9
    assert isinstance(reply["genau"], bool)
    assert output.outputs[0].finish_reason == "stop"


def test_a_choice_and_a_regex(llm):
    output = chat(llm, switches={"thinking": False}, structured_outputs=guided(choice=["ja", "nein"]), max_tokens=8)
    assert output.outputs[0].text in ("ja", "nein")
    output = chat(llm, switches={"thinking": False}, structured_outputs=guided(regex=r"\d{4}-\d{2}"), max_tokens=16)
    year, _, month = output.outputs[0].text.partition("-")
    assert (len(year), len(month)) == (4, 2)


def test_a_special_token_can_be_forced(llm):
    """DSML's marker is one token, which a grammar must let through: guided tool calls are made of it."""
    output = chat(
        llm, switches={"thinking": False}, structured_outputs=guided(choice=["<｜DSML｜tool_calls>"]), max_tokens=16,
        skip_special_tokens=False,
    )  # fmt: skip
    assert output.outputs[0].text == "<｜DSML｜tool_calls>"


# ---- sampling


def test_logprobs(llm):
    output = chat(llm, max_tokens=4, logprobs=5)
    for token, row in zip(tokens(output), output.outputs[0].logprobs, strict=True):
        assert len(row) in (5, 6)
        best = max(row, key=lambda candidate: row[candidate].logprob)
        assert token == best, "greedy takes the most likely"
        assert row[token].decoded_token == reference().decode([token], skip_special_tokens=False)


def test_n_and_seeds(llm):
    def sample(seed):
        output = chat(llm, max_tokens=6, temperature=1.0, n=3, seed=seed, ignore_eos=True)
        return [list(one.token_ids) for one in output.outputs]

    first = sample(1)
    assert len(first) == 3
    assert len({tuple(ids) for ids in first}) == 3
    assert sample(1) == first
    assert sample(2) != first


def test_stop_strings(llm):
    whole = chat(llm, max_tokens=12, ignore_eos=True).outputs[0]
    stop = reference().decode(list(whole.token_ids[3:5]), skip_special_tokens=False)
    output = chat(llm, max_tokens=12, stop=[stop], ignore_eos=True).outputs[0]
    assert output.text == whole.text[: whole.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_min_tokens(llm):
    """EOS is the only token that the bias leaves, until there are enough others."""
    bias = {EOS: 100.0}
    assert tokens(chat(llm, max_tokens=8, logit_bias=bias)) == [EOS]
    ids = tokens(chat(llm, max_tokens=8, logit_bias=bias, min_tokens=5))
    assert (len(ids), ids.index(EOS)) == (6, 5)
