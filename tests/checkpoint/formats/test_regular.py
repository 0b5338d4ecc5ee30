"""A regular expression of a checkpoint's config cannot hold up whoever reads it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from testing.fixtures import headers
from testing.format_cases import CASES
from vllm_deepseek_v4flash.checkpoint.formats import format_of, patterns, regular
from vllm_deepseek_v4flash.checkpoint.formats.regular import PatternError, rule

NAME = "layers.42.attn.indexer.weights_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*)*\d\d\d\dq$",
        r"(a+)+b",
        r"([a-z.]+)*!",
        r"(?:layers|layers\.|l)*!",
        r"((?:a|ab))*!",
        r"(\w?){50}!",
        r"(?:(?:.*))*?!",
        r"(?=(.*)*!)",
        r"(x)?(?(1)(.*)*!|b)",
        ".*" * 8 + "!",
        r"[a-z0-9._]*" * 7 + "!",
        ".?" * 40 + "!",
        "." * 30 + ".{0,20}" * 8,
    ],
)
def test_a_pattern_that_can_take_very_long_is_refused_before_it_runs(pattern: str) -> None:
    start = time.perf_counter()
    with pytest.raises(PatternError) as caught:
        patterns.regex_match(pattern, NAME, anchored=True)
    assert repr(pattern) in str(caught.value)
    assert "which can take very long" in str(caught.value)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("pattern", "needed"),
    [
        (r".*layers\.\d+\..*experts\.\d+\..*(gate|up|down)_proj.*", "experts."),
        (r".*model\.layers\.0\.self_attn\.o_a_proj.*", "model.layers.0.self_attn.o_a_proj"),
        (r"^(?!.*(experts|lm_head)).*$", ""),
        (r"(?i).*GATE$", ""),
        (r"(model\.)?layers\.(0|1[0-9]|2)\.(self_)?attn\..*", "layers."),
        (r".*\.w[13]$", ".w"),
        (r"(?:\d)+x|y*", ""),
    ],
)
def test_patterns_of_the_tools_run(pattern: str, needed: str) -> None:
    assert rule(pattern).needed == needed


@pytest.mark.parametrize("pattern", ["*", "(", "a{99999999999}", "(" * 20000])
def test_what_is_no_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match="is not a regular expression"):
        rule(pattern)


def test_a_text_that_a_name_lacks_decides_without_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular.Rule, "timed", None)
    assert patterns.regex_match(r".*experts\.\d+.*", NAME, anchored=True) == "none"


def test_all_patterns_of_a_survey_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular, "_MAX_SECONDS", 0.0)
    regular.restart_clock()
    assert patterns.regex_match(".*attn.*", NAME, anchored=True) == "all"
    with pytest.raises(PatternError, match=r"take more than 0 s .*'\.\*proj\.\*'"):
        patterns.regex_match(".*proj.*", NAME, anchored=True)
    regular.restart_clock()
    assert patterns.regex_match(".*proj.*", NAME, anchored=True) == "all"


EVIL = r"(.*)*\d\d\d\dq$"
PLACES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dynamic": ("gptq", "v1-g64-sym", {"dynamic": {f"+:{EVIL}": {}}}),
    "dynamic, excluded": ("gptq", "v1-g64-sym", {"dynamic": {f"-:{EVIL}": {}}}),
    "extra_config": ("auto-round", "no-label", {"extra_config": {EVIL: {"bits": 16}}}),
    "ignore": ("compressed-tensors", "g64-sym-None", {"ignore": [f"re:{EVIL}"]}),
    "targets": (
        "compressed-tensors",
        "g64-sym-None",
        {"config_groups": {"g": {"targets": [f"re:{EVIL}"], "weights": {"num_bits": 4}}}},
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_config_has_patterns(place: str) -> None:
    name, case_name, changes = PLACES[place]
    case = CASES[name][case_name]()
    config = {**case.config, **changes}
    with pytest.raises(PatternError, match="which can take very long"):
        format_of(config).describe(config, case.module, headers(case.leaves))
