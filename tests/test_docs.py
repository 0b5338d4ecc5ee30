"""Citations of docs/model.md and links between documents lead somewhere."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("vllm_deepseek_v4flash", "csrc", "testing", "checks", "benchmarks", "tests", "examples", "scripts", "docs")
SUFFIXES = {".py", ".cu", ".cuh", ".h", ".md"}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

CITATION = re.compile(r'docs/model\.md, ("[^"]+"(?:(?:, | and )"[^"]+")*)')
# In two pieces, so that this file does not contain them.
FORBIDDEN = re.compile("spec" + r"(?:ification)?('s)?,? sections? \d" + "|" + r"\.\./" + "shared", re.IGNORECASE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def source_files() -> list[Path]:
    found = [path for name in SOURCES for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES]
    return sorted([*found, *ROOT.glob("*.md"), *ROOT.glob("*.py")])


def one_line(text: str) -> str:
    """The text without line breaks and comment marks, as a citation may be wrapped."""
    return re.sub(r"\s*\n\s*(?:(?:#|//|\*) )?", " ", text)


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def headings(document: Path) -> list[str]:
    return HEADING.findall(prose(document))


def anchors(document: Path) -> set[str]:
    """GitHub's: lower case, without punctuation, hyphens for spaces, numbered where a heading repeats."""
    seen: dict[str, int] = {}
    result = set()
    for heading in headings(document):
        anchor = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        count = seen.get(anchor, 0)
        seen[anchor] = count + 1
        result.add(f"{anchor}-{count}" if count else anchor)
    return result


def links(document: Path) -> Iterator[str]:
    for match in LINK.finditer(prose(document)):
        target = match[1] or match[2]
        if not re.match(r"[a-z]+:", target):
            yield target


def test_cited_headings_exist() -> None:
    known = set(headings(ROOT / "docs/model.md"))
    cited = [
        (str(path.relative_to(ROOT)), heading)
        for path in source_files()
        for match in CITATION.finditer(one_line(path.read_text(encoding="utf-8")))
        for heading in re.findall(r'"([^"]+)"', match[1])
    ]
    assert len(cited) > 30, "the pattern finds no citations any more"
    assert [(path, heading) for path, heading in cited if heading not in known] == []


def test_only_documents_of_the_repository_are_cited() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in source_files()
        for match in FORBIDDEN.finditer(one_line(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    broken = []
    for link in links(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        exists = target.exists() and target.is_relative_to(ROOT)
        if not exists or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", ["rooms", "layers"])
def test_a_diagram_is_what_its_source_says(name: str) -> None:
    """Every edge and every line of text; `make diagrams` after a change of the source."""
    source = (ROOT / "docs" / "diagrams" / f"{name}.dot").read_text(encoding="utf-8")
    picture = html.unescape((ROOT / "docs" / "diagrams" / f"{name}.svg").read_text(encoding="utf-8"))
    drawn = {" ".join(text.split()) for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture)}
    labels = re.findall(r'label="([^"]*)"', source) + re.findall(r"label=<(.*?)>(?=\]|;|, \w+=)", source)
    lines = {" ".join(line.split()) for label in labels for line in re.split(r"<[^>]*>|\\n", label)} - {""}
    assert len(lines) > 10
    assert {line for line in lines if line not in drawn} == set()
    shown = [line.partition("//")[0] for line in source.splitlines() if "style=invis" not in line]
    assert picture.count('class="edge"') == sum(line.count("->") for line in shown)


def test_the_diagram_of_the_rooms_has_every_room() -> None:
    package = ROOT / "vllm_deepseek_v4flash"
    source = (ROOT / "docs" / "diagrams" / "rooms.dot").read_text(encoding="utf-8")
    rooms = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").is_file()}
    rooms |= {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert {room for room in rooms if room not in source} == set()
