"""The code in docs/ runs as it stands there, page by page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import nn

pytestmark = pytest.mark.quick

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    blocks = [
        block for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if block[:3] != ">>>"
    ]
    assert blocks, page
    # A file, as the lines of a rule are read where it is wrong.
    file = tmp_path / f"{page.stem.replace('-', '_')}.py"
    file.write_text("\n".join(blocks))
    scope = {"model": nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), "__name__": file.stem}
    exec(compile(file.read_text(), file, "exec"), scope)


def test_links_within_the_pages_lead_somewhere() -> None:
    for page in [*PAGES, PAGES[0].parents[1] / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_is_explained_on_the_page_is_what_is_printed() -> None:
    import bnb_compile

    (page,) = (page for page in PAGES if page.stem == "own-optimizer")
    (printed,) = re.findall(
        r">>> print\(bnb_compile\.explain\(opt\)\)\n(.*?)^```", page.read_text(), re.M | re.S
    )
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)[0]
    scope = {"model": nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), "__name__": "own_optimizer_page"}
    exec(code.replace('"signum"', '"explained"'), scope)
    assert str(bnb_compile.explain(scope["opt"])).replace("explained", "signum") == printed.rstrip()
