"""examples/demo.py: what it refuses, and how it counts; the engine is a stub except in the last test."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testing.scripts import imported
from vllm_deepseek_v4flash.config import DeepseekV4Config

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "demo.py"
TOY = ROOT / "examples" / "toy"


@pytest.fixture(scope="module")
def demo():
    with imported(SCRIPT) as module:
        yield module


def write_checkpoint(directory, **config):
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(b"")
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda d: d / "missing", "is not a directory", id="no-directory"),
        pytest.param(lambda d: d, "has no config.json", id="empty-directory"),
        pytest.param(
            lambda d: write_checkpoint(d, architectures=["LlamaForCausalLM"], model_type="llama"),
            r"architectures are \['LlamaForCausalLM'\] \(model_type 'llama'\)",
            id="another-architecture",
        ),
        pytest.param(lambda d: write_checkpoint(d), r"architectures are \[\]", id="no-architecture"),
    ],
)
def test_not_a_v4_checkpoint(demo, tmp_path, capsys, make, message):
    directory = make(tmp_path)
    with pytest.raises(demo.DemoError, match=message):
        demo.read_config(directory)
    assert demo.main([str(directory)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_config_that_is_not_json(demo, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(demo.DemoError, match=r"config\.json is not JSON"):
        demo.read_config(tmp_path)


def test_checkpoint_without_weights(demo, tmp_path):
    (tmp_path / "config.json").write_text((TOY / "config.json").read_text())
    with pytest.raises(demo.DemoError, match="no weights to load"):
        demo.read_config(tmp_path)


def test_impossible_config_value_names_the_field(demo, tmp_path, capsys):
    config = json.loads((TOY / "config.json").read_text()) | {"compress_ratios": [0, 4, 5, 4, 4, 4, 0]}
    assert demo.main([str(write_checkpoint(tmp_path, **config))]) == 2
    assert "compress_ratios[2]" in capsys.readouterr().err


def test_number_of_questions_must_be_positive(demo, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.main(["--num-questions", "0"])
    assert caught.value.code == 2
    assert "--num-questions is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", ("", "42")),
        ("4+2 carry 0</think>42", ("4+2 carry 0", "42")),
        ("a</think>b</think> 42\n", ("a</think>b", "42")),
        ("unfinished thought", ("", "unfinished thought")),
        ("thought</think>", ("thought", "")),
    ],
)
def test_split_reply(demo, text, expected):
    assert demo.split_reply(text) == expected


def test_layers_of_the_toy(demo):
    config = DeepseekV4Config.from_json_file(TOY / "config.json")
    lines = demo.describe_layers(config).split("\n")
    assert lines[0] == "6 layers = 1 window + 4 CSA + 1 HCA"
    assert lines[1].strip() == "(0 window, 1 CSA, 2 HCA, 3-5 CSA)"


def test_cache_cost_separates_what_grows(demo):
    specs = [
        SimpleNamespace(page_size_bytes=64 * 584, block_size=256, sliding_window=None),
        SimpleNamespace(page_size_bytes=64 * 132, block_size=256),
        SimpleNamespace(page_size_bytes=64 * 584, block_size=64, sliding_window=128),
    ]
    assert demo.cache_cost(specs) == ((584 + 132) / 4, 128 * 584)


def test_specs_of_uniform_and_mixed_groups(demo):
    uniform = SimpleNamespace(layer_names=["0.window", "1.window"], kv_cache_spec=SimpleNamespace(kind="window"))
    specs = {"1.entries": "entries", "1.index_entries": "index"}
    mixed = SimpleNamespace(layer_names=list(specs), kv_cache_spec=SimpleNamespace(kv_cache_specs=specs))
    runner = SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=[uniform, mixed]))
    found = demo.layer_cache_specs(SimpleNamespace(model_runner=runner))
    assert found == [uniform.kv_cache_spec, uniform.kv_cache_spec, "entries", "index"]


def test_eval_file_agrees_with_its_own_tokens(demo):
    """The recorded tokens, decoded and scored as the demo scores a reply, give the recorded verdicts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))
    questions = demo.load_questions(TOY, None)
    rows = [json.loads(line) for line in (TOY / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(questions) == len(rows) == 200
    texts = [tokenizer.decode(question.greedy_token_ids) for question in questions]
    verdicts = [demo.split_reply(text)[1] == q.answer for text, q in zip(texts, questions, strict=True)]
    assert verdicts == [row["greedy_correct"] for row in rows]
    assert 0 < sum(verdicts) < 200, "both verdicts occur"


def make_question(demo, task="add", thinking=False, answer="42", tokens=(61, 59, 1)):
    return demo.Question(task, thinking, "40+2?", answer, "<prompt>", list(tokens))


def test_score_counts_right_and_identical_apart(demo):
    questions = [make_question(demo), make_question(demo), make_question(demo, task="recall", thinking=True)]
    replies = [("42", (61, 59, 1)), ("41", (61, 59, 1)), ("so</think>42", [61, 59, 6, 1])]
    table = demo.score(questions, replies)
    assert list(table) == ["add, no thinking", "recall, thinking", "all"]
    assert table["add, no thinking"] == {"asked": 2, "right": 1, "identical": 2}
    assert table["recall, thinking"] == {"asked": 1, "right": 1, "identical": 0}
    assert table["all"] == {"asked": 3, "right": 2, "identical": 2}


def test_score_needs_a_reply_for_every_question(demo):
    with pytest.raises(ValueError, match="shorter"):
        demo.score([make_question(demo), make_question(demo)], [("42", [1])])


def test_one_question_is_shown_for_each_task_and_mode(demo):
    questions = demo.load_questions(TOY, None)
    shown = [questions[index] for index in demo.pick_shown(questions)]
    assert len(shown) == 8
    assert {(q.task, q.thinking) for q in shown} == {(q.task, q.thinking) for q in questions}


class StubEngine:
    """Answers each prompt with the recorded tokens of the eval line it came from, or with one fixed text."""

    def __init__(self, questions=()):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(TOY / "tokenizer.json"))
        self.by_prompt = {q.prompt: q.greedy_token_ids for q in questions}
        self.sampling: Any = None

    def get_tokenizer(self):
        def encode(text, add_special_tokens):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

        return SimpleNamespace(encode=encode)

    def generate(self, prompts, sampling, use_tqdm):
        self.sampling = sampling
        return [self._output(prompt["prompt_token_ids"]) for prompt in prompts]

    def _output(self, prompt_token_ids):
        prompt = self.tokenizer.decode(prompt_token_ids, skip_special_tokens=False)
        token_ids = self.by_prompt[prompt]
        completion = SimpleNamespace(text=self.tokenizer.decode(token_ids), token_ids=token_ids)
        return SimpleNamespace(prompt_token_ids=prompt_token_ids, outputs=[completion])

    def chat(self, conversations, sampling, use_tqdm):
        self.sampling = sampling
        completion = SimpleNamespace(text="hm</think>yes", token_ids=[1, 2, 3])
        return [SimpleNamespace(prompt_token_ids=[0, 3], outputs=[completion]) for _ in conversations]


def test_eval_run_prints_questions_scores_and_speed(demo, capsys):
    pytest.importorskip("vllm")
    questions = demo.load_questions(TOY, None)
    engine = StubEngine(questions)
    demo.run_eval(engine, questions)
    printed = capsys.readouterr().out
    assert "  Q: Mia=736 Vic=669" in printed
    assert "186/200   200/200" in printed
    assert "200 prompts at once" in printed
    assert engine.sampling.temperature == 0.0
    assert engine.sampling.max_tokens > max(len(q.greedy_token_ids) for q in questions)


def test_chat_run_asks_as_many_as_wanted(demo, capsys):
    pytest.importorskip("vllm")
    demo.run_chat(StubEngine(), 3)
    printed = capsys.readouterr().out
    assert printed.count("  Q: ") == 3
    assert "     thinks: hm\n  A: yes" in printed
    assert "(9 tokens, after 6 prompt tokens)" in printed


@pytest.mark.parametrize(
    ("options", "dtype", "rows", "least_identical"),
    [
        # As the int4 run, which differs in the experts' weights only.
        pytest.param(["--dtype", "float32"], "float32", "float32 rows", 24, id="float32", marks=pytest.mark.slow),
        # bfloat16 and fp8 rows round: of all 200 questions one reply differs, so of 24 two may.
        pytest.param([], "bfloat16", "fp8 rows", 22, id="as-saved"),
        # Its own eval.jsonl holds transformers' tokens with the dequantised weights.
        pytest.param([f"{TOY}-int4", "--dtype", "float32"], "float32", "float32 rows", 24, id="int4"),
    ],
)
def test_demo_on_the_toy_agrees_with_transformers(options, dtype, rows, least_identical):
    command = [sys.executable, str(SCRIPT), "--num-questions", "24", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"vllm_deepseek_v4flash.integration.registered_model.DeepseekV4ForCausalLM, {dtype}\n" in done.stdout
    assert "6 layers = 1 window + 4 CSA + 1 HCA" in done.stdout
    assert rows in done.stdout
    scores = [line for line in done.stdout.splitlines() if line.startswith("all ")]
    assert len(scores) == 1
    identical, asked = scores[0].rsplit(maxsplit=1)[1].split("/")
    assert asked == "24"
    assert int(identical) >= least_identical, done.stdout
