"""Documentation that runs: each Python block in README and docs is executed, each link leads somewhere.

A block opts out with ``<!-- not run: reason -->`` on the line before it; it must still compile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*?) *-->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)(?P<path>[^)#\s]+)")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    code: str
    reason: str | None

    def compile(self) -> CodeType:
        # as many empty lines as there are before it, so that a traceback points into the page
        return compile("\n" * (self.line - 1) + self.code, self.page, "exec")


def blocks_of(text: str, page: str) -> list[Block]:
    return [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["code"], match["reason"])
        for match in BLOCK.finditer(text)
    ]


ALL = [block for page in PAGES if page.exists() for block in blocks_of(page.read_text(), str(page.relative_to(ROOT)))]


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=f"{block.page}:{block.line}") for block in ALL if block.reason is None]
)
def test_block_runs(block: Block, demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_folder)
    exec(block.compile(), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=f"{block.page}:{block.line}") for block in ALL if block.reason is not None]
)
def test_block_that_opts_out_has_a_reason_and_compiles(block: Block) -> None:
    assert block.reason
    block.compile()


def test_the_readme_has_blocks() -> None:
    assert len([block for block in ALL if block.page == "README.md" and block.reason is None]) >= 3


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [match["path"] for match in LINK.finditer(page.read_text()) if not (page.parent / match["path"]).exists()]
    assert broken == []


def test_blocks_are_found_with_line_and_reason() -> None:
    text = "intro\n\n```python\na = 1\n```\n\n<!-- not run: needs two GPUs -->\n```python\nb = 1\n```\n```sh\nls\n```\n"
    assert [(block.line, block.code, block.reason) for block in blocks_of(text, "page")] == [
        (4, "a = 1\n", None),
        (9, "b = 1\n", "needs two GPUs"),
    ]
