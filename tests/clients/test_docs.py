"""The how-to pages for users of other people's models run as they stand."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
PAGES = [
    page
    for page in sorted(DOCS.glob("*.md"))
    if page.read_text(encoding="utf-8").startswith("<!-- run: clients -->\n")
]


def test_there_is_a_page():
    assert PAGES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page):
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": page.stem}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        # Errors then name the line of the page.
        lines = "\n" * (text.count("\n", 0, block.start()) + 1)
        exec(compile(lines + block[1], str(page), "exec"), namespace)
