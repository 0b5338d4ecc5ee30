"""The table of reasoning modes, the precedence of a request's switches, and which generation a checkpoint is."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace

import pytest

from testing.serving.tokenizer import ENCODERS, write_encoder
from vllm_deepseek_v4flash.integration import serving as registration
from vllm_deepseek_v4flash.serving.generation import ENCODER, detect_generation
from vllm_deepseek_v4flash.serving.modes import EFFORTS, MODES, NON_THINK, Generation, select_mode

APRIL, JULY = Generation

# (text before the prompt, by its first words; opener) of every effort, as the two encoders have it.
PLAIN, ABSOLUTE, BEYOND = "", "Reasoning Effort: Absolute maximum with", "Reasoning Effort: Beyond maximum —"
TABLE = {
    APRIL: {"minimal": PLAIN, "low": PLAIN, "medium": PLAIN, "high": PLAIN, "xhigh": ABSOLUTE, "max": ABSOLUTE},
    JULY: {"minimal": PLAIN, "low": PLAIN, "medium": PLAIN, "high": ABSOLUTE, "xhigh": ABSOLUTE, "max": BEYOND},
}


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("effort", [effort for effort in EFFORTS if effort != "none"])
def test_every_effort(generation, effort):
    mode = select_mode(generation, reasoning_effort=effort)
    expected = TABLE[generation][effort]
    assert mode.thinking
    assert mode.text.startswith(expected)
    assert bool(mode.text) == bool(expected)


def test_the_texts_are_vllms():
    """vLLM has 0731's encoder, so its texts are DeepSeek's, to the letter; April's max is 0731's high."""
    from vllm.tokenizers.deepseek_v4_encoding import REASONING_EFFORT_PROMPTS as TEXTS

    assert {effort: MODES[JULY][effort].text for effort in TEXTS} == TEXTS
    assert (MODES[APRIL]["high"].text, MODES[APRIL]["max"].text) == ("", TEXTS["high"])


@pytest.mark.parametrize("generation", Generation)
def test_nothing_set_is_high(generation):
    assert select_mode(generation) is MODES[generation]["high"]
    assert select_mode(generation, thinking=True) is MODES[generation]["high"]
    assert select_mode(generation, enable_thinking=True) is MODES[generation]["high"]


SWITCHES = list(itertools.product((None, True, False), (None, True, False), (None, *EFFORTS)))


@pytest.mark.parametrize("generation", Generation)
def test_do_not_think_always_wins(generation):
    refusals = 0
    for thinking, enable_thinking, effort in SWITCHES:
        mode = select_mode(generation, thinking=thinking, enable_thinking=enable_thinking, reasoning_effort=effort)
        refused = thinking is False or enable_thinking is False or effort == "none"
        refusals += refused
        expected = NON_THINK if refused else MODES[generation][effort or "high"]
        assert mode is expected, (thinking, enable_thinking, effort)
    assert 0 < refusals < len(SWITCHES)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"thinking": "no"}, r"^thinking='no': not a boolean. Use true or false.$"),
        ({"enable_thinking": 1}, r"^enable_thinking=1: not a boolean. Use true or false.$"),
        (
            {"reasoning_effort": "extreme"},
            r"^reasoning_effort='extreme': unknown effort. Use one of none, minimal, low, .*max.$",
        ),
        ({"reasoning_effort": 3}, r"reasoning_effort=3: .*Use one of"),
        ({"reasoning_effort": ""}, r"reasoning_effort='': .*Use one of"),
        ({"reasoning_effort": "extreme", "thinking": False}, r"reasoning_effort='extreme': "),
        ({"reasoning_effort": ["low"]}, r"reasoning_effort=\['low'\]: "),
    ],
)
def test_unknown_values(request_, message):
    with pytest.raises(ValueError, match=message):
        select_mode(APRIL, **request_)


# ---- generation


@pytest.mark.parametrize("generation", Generation)
def test_generation_of_a_directory(tmp_path, generation):
    found, reason = detect_generation(str(write_encoder(tmp_path, generation)))
    assert found is generation
    assert ENCODER in reason


@pytest.mark.parametrize("content", [None, b"def encode_messages(): ...", b"\xff\xfe\x00broken", b""])
def test_a_directory_that_does_not_tell(tmp_path, content):
    if content is not None:
        write_encoder(tmp_path, APRIL)
        (tmp_path / ENCODER).write_bytes(content)
    found, reason = detect_generation(str(tmp_path))
    assert found is None
    assert ENCODER in reason


@pytest.mark.parametrize("generation", Generation)
def test_generation_of_a_repository(monkeypatch, generation):
    """A name that is no directory is looked up on the hub, at the model's revision."""
    from vllm_deepseek_v4flash.serving import compat

    asked = []

    def fetch(*arguments):
        asked.append(arguments)
        return ENCODERS[generation].encode()

    monkeypatch.setattr(compat, "get_hf_file_bytes", fetch)
    assert detect_generation("deepseek-ai/DeepSeek-V4-Flash", "abc")[0] is generation
    assert asked == [(ENCODER, "deepseek-ai/DeepSeek-V4-Flash", "abc")]


# ---- the mode of a model


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(registration, "_registered", True)
    messages: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record)

    handler = Handler()
    level = registration.logger.level
    registration.logger.addHandler(handler)
    registration.logger.setLevel(logging.INFO)
    yield messages
    registration.logger.removeHandler(handler)
    registration.logger.setLevel(level)


def model_config(directory, **fields):
    defaults = {"tokenizer_mode": "deepseek_v4", "revision": None, "skip_tokenizer_init": False}
    return SimpleNamespace(model=str(directory), **defaults | fields)


@pytest.mark.parametrize(("generation", "mode"), [(APRIL, "deepseek_v4_april"), (JULY, "deepseek_v4_0731")])
def test_the_mode_follows_the_encoder(tmp_path, log, generation, mode):
    config = model_config(write_encoder(tmp_path, generation))
    registration.select_tokenizer_mode(config)
    assert config.tokenizer_mode == mode
    (record,) = log
    assert record.levelno == logging.INFO
    assert f"DeepSeek-V4 {generation.value}" in record.getMessage()


def test_without_an_encoder_april_is_assumed_with_a_warning(tmp_path, log):
    config = model_config(tmp_path)
    registration.select_tokenizer_mode(config)
    assert config.tokenizer_mode == "deepseek_v4_april"
    (record,) = log
    assert record.levelno == logging.WARNING
    assert "--tokenizer-mode deepseek_v4_0731" in record.getMessage()


@pytest.mark.parametrize("mode", ["deepseek_v4_april", "deepseek_v4_0731", "deepseek_v4_vllm", "hf", "mistral"])
def test_a_chosen_mode_is_kept_and_logged(tmp_path, log, mode):
    config = model_config(write_encoder(tmp_path, JULY), tokenizer_mode=mode)
    registration.select_tokenizer_mode(config)
    assert config.tokenizer_mode == mode
    (record,) = log
    assert f"--tokenizer-mode {mode}" in record.getMessage()


def test_no_tokenizer_no_mode(tmp_path, log):
    config = model_config(tmp_path, skip_tokenizer_init=True)
    registration.select_tokenizer_mode(config)
    assert config.tokenizer_mode == "deepseek_v4"
    assert log == []
