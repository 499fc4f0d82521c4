"""The pages of docs/ that say how to do something: their code runs, in order, as printed."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted(DOCS.glob("*.md"))
    if path.read_text(encoding="utf-8").startswith("<!-- run -->\n")
}


def test_there_are_pages():
    assert {"compress-a-prompt.md", "decode-with-nnx.md"} <= PAGES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_code_of_the_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    assert blocks
    namespace = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (DOCS / target).exists(), f"{path.name} links to {target}"
