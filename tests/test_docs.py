"""The code in README.md and docs/ runs as it stands there, page by page, and links lead somewhere.

A block begins with ```python, and runs, or with ```python no-run, and has a comment before it that says why:

    <!-- not run: needs two processes -->
    <!-- not run without: torchao -->          it does run where that module is installed

What the code of a page may use without making it is in `scope`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import bnb_compile

pytestmark = [
    pytest.mark.quick,
    pytest.mark.usefixtures("one_thread"),
    # of packages that a page shows a way from, and of torch's own
    pytest.mark.filterwarnings("ignore:::bitsandbytes"),
    pytest.mark.filterwarnings("ignore:::torchao"),
]
#: Frameworks warn while they are imported and used; what this package warns of is still an error.
OF_FRAMEWORKS = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::bnb_compile")]

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
API = sorted((DOCS / "api").glob("*.md"))
#: Pages of figures, and of what mkdocstrings makes of docstrings.
WITHOUT_CODE = {DOCS / "benchmarks.md"}
#: Pages whose kernels take seconds to compile.
LONG = {ROOT / "README.md", DOCS / "checkpoints.md", DOCS / "distributed.md", DOCS / "recipes.md"}


class Block(NamedTuple):
    """A fenced block of Python: whether it is to run, and what the comment before it says."""

    code: str
    runs: bool
    comment: str


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page; those in a list are indented."""
    found = re.findall(
        r"(?:^ *<!-- (not run[^>]*?) -->\n)?^( *)```python([^\n]*)\n(.*?)^\2```", text, re.M | re.S
    )
    blocks = []
    for comment, _, info, code in found:
        assert info in ("", " no-run"), f"```python{info}: the only word that may follow is no-run"
        assert bool(comment) == bool(info), f"a comment that says why, and no-run, go together: {code}"
        blocks.append(Block(textwrap.dedent(code), not info, comment))
    return blocks


def is_to_run(block: Block) -> bool:
    """Whether a block is run here; what is a session with >>> is compared with what is printed, below."""
    if block.code.startswith(">>>"):
        return False
    module = re.fullmatch(r"not run without: (\w+)", block.comment)
    return block.runs or bool(module and importlib.util.find_spec(module[1]))


def scope(name: str) -> dict[str, Any]:
    """What the pages take for granted: a small model, its loss, and three batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))

    def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(model(x), y)

    batches = [(torch.randn(8, 64), torch.randn(8, 64)) for _ in range(3)]
    found = {"model": model, "loss_of": loss_of, "batches": batches, "__name__": name}
    if name == "recipes" and importlib.util.find_spec("transformers"):
        found |= of_transformers()
    return found


def of_transformers() -> dict[str, Any]:
    """A small language model, its tokenizer, and a data set."""
    tokenizers, transformers = map(importlib.import_module, ("tokenizers", "transformers"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return {
        "language_model": transformers.LlamaForCausalLM(config),
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="?", eos_token="?", unk_token="?"
        ),
        "rows": [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, (32, 16))],
    }


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in; what the pages set for the whole process is set back."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    manager = bnb_compile.optim.GlobalOptimManager.get_instance()
    with torch._dynamo.config.patch(trace_autograd_ops=False):
        yield tmp_path
    manager.initialize()
    torch._dynamo.reset()
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def marks_of(page: Path) -> list[pytest.MarkDecorator]:
    return [pytest.mark.long] * (page in LONG) + OF_FRAMEWORKS * (page.stem == "recipes")


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem, marks=marks_of(page)) for page in PAGES])
def test_the_code_of_a_page_runs(page: Path, clean: Path) -> None:
    blocks = blocks_of(page.read_text())
    for block in blocks:
        if not block.code.startswith(">>>"):
            ast.parse(block.code)
    run = [block.code for block in blocks if is_to_run(block)]
    assert bool(run) != (page in WITHOUT_CODE) or page.stem == "recipes", page
    # A file, as the lines of a rule are read where it is wrong.
    file = clean / f"{page.stem.replace('-', '_')}.py"
    file.write_text("\n".join(run))
    exec(compile(file.read_text(), file, "exec"), scope(file.stem))


def test_a_block_is_only_left_out_with_a_reason() -> None:
    assert [b.code for b in blocks_of("```python\na\n```\n- b\n  ```python\n  c\n  ```\n")] == ["a\n", "c\n"]
    (block,) = blocks_of("<!-- not run: needs a GPU -->\n```python no-run\na\n```\n")
    assert not is_to_run(block)
    (block,) = blocks_of("<!-- not run without: torch -->\n```python no-run\na\n```\n")
    assert is_to_run(block)
    for wrong in (
        "```python no-run\na\n```\n",
        "<!-- not run: because -->\n```python\na\n```\n",
        "```python norun\na\n```\n",
    ):
        with pytest.raises(AssertionError):
            blocks_of(wrong)


def anchor(heading: str) -> str:
    """What GitHub and mkdocs make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def test_links_within_the_pages_lead_somewhere() -> None:
    for page in [*PAGES, *API, *ROOT.glob("*.md")]:
        for target, _, place in re.findall(r"\]\(([^)#:]*)(#([^):]*))?\)", page.read_text()):
            led = page.parent / target if target else page
            assert led.exists(), f"{page.name}: {target}"
            if place and led.suffix == ".md":
                headings = re.findall(r"^#+ (.*)", led.read_text(), re.M)
                assert place in map(anchor, headings), f"{page.name}: {target}#{place}"


def test_pictures_of_readme_are_there() -> None:
    found = re.findall(r'src(?:set)?="([^"]+)"', (ROOT / "README.md").read_text())
    assert found and all((ROOT / path).exists() for path in found), found


def test_every_page_is_in_the_index_of_the_site() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(
        str(page.relative_to(DOCS)) for page in [*PAGES, *API] if page.is_relative_to(DOCS)
    )


def test_what_is_public_has_a_page() -> None:
    described = {name for page in API for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)}
    public = {
        f"bnb_compile.{module}.{name}"
        for module in ("optim", "export", "rules", "formats", "functional", "convert", "hf", "explain")
        for name, value in vars(importlib.import_module(f"bnb_compile.{module}")).items()
        if inspect.isclass(value) or inspect.isfunction(value)
        if name[0] != "_" and value.__module__.startswith(f"bnb_compile.{module}")
    }
    assert public - described == set()


def test_what_is_explained_on_the_page_is_what_is_printed() -> None:
    (page,) = (page for page in PAGES if page.stem == "own-optimizer")
    (printed,) = re.findall(
        r">>> print\(bnb_compile\.explain\(opt\)\)\n(.*?)^```", page.read_text(), re.M | re.S
    )
    code = blocks_of(page.read_text())[0].code
    variables = {**scope("own_optimizer_page"), "__name__": "own_optimizer_page"}
    exec(code.replace('"signum"', '"explained"'), variables)
    assert str(bnb_compile.explain(variables["opt"])).replace("explained", "signum") == printed.rstrip()
