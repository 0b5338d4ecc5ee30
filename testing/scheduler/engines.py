"""An engine that tests share, and the results of requests that had it to themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from testing.engine import make_llm, shutdown
from testing.scheduler.runner import Result, Runner


class Engines:
    """One engine at a time in this process, restarted when a test asks for other options than the last one did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._options: dict[str, Any] | None = None
        self._llm: Any = None
        self._runner: Runner | None = None

    def get(self, **options: Any) -> Runner:
        """A runner with an empty prefix cache on an engine with these `vllm.LLM` options."""
        if self._runner is None or options != self._options:
            self.close()
            self._llm = make_llm(self.path, **options)
            self._runner, self._options = Runner(self._llm), options
        self._runner.forget()
        return self._runner

    def close(self) -> None:
        if self._llm is not None:
            shutdown(self._llm)
        self._llm = self._runner = self._options = None


class References:
    """Results of requests that ran alone, unchunked and uncached. Each is computed once."""

    def __init__(self, engines: Engines, known: dict[tuple[Any, ...], Result]) -> None:
        self._engines = engines
        self._results = known

    def get(
        self,
        prompt: tuple[int, ...],
        tokens: int,
        runner: Runner | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Result:
        """At least `tokens` new tokens after `prompt`, from `runner` or an engine with these options.

        They are greedy ones or, with `seed`, sampled at temperature 1.

        The prefix cache of `runner` is emptied.
        """
        key = (prompt, seed, *sorted(options.items()))
        known = self._results.get(key)
        if known is None or len(known.tokens) < tokens:
            runner = runner or self._engines.get(**options)
            self._results[key] = runner.alone(prompt, tokens, seed)
        return self._results[key]
