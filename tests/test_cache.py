"""An edited rule or lowering is never served from Inductor's disk cache, an unedited one is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.buckets import STEP_OPS
from torch import Tensor

import bnb_compile
from bnb_compile.lowering.cache_key import operator_hash
from bnb_compile.ops.operator import StepOp
from bnb_compile.rules.rule import Rule

PROGRAM = """
import json, torch
from torch._dynamo.utils import counters
from bnb_compile.lowering.cpp.launch import Launcher
from bnb_compile.ops.operator import Arguments
from bnb_compile.ops.step import step_op
from bnb_compile.rules import ADAM

op = step_op(ADAM, "float32")

def arguments():
    hyper = torch.tensor([[0.5, 0.5, 0.5, 0.0, 1.0]], dtype=torch.float64)
    states, step = torch.zeros(2, 16), torch.zeros(1, dtype=torch.int64)
    return [torch.ones(3)], [torch.full((3,), 2.0)], states, step, hyper

through_inductor, through_launch = arguments(), arguments()
torch.compile(lambda *args: op.in_place(*args), fullgraph=True)(*through_inductor)
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]

Launcher(op, Arguments.of(through_launch, {}))(through_launch[1], torch.float32)
results = [[round(a[0][0][0].item(), 4), a[3].item()] for a in (through_inductor, through_launch)]
print(json.dumps(dict(results=results, hits=hits, file=op.rule.direction.__code__.co_filename)))
"""


def run(folder: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["file"].startswith(str(folder))
    return result


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file} has changed: edit something else"
    file.write_text(text.replace(old, new))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package."""
    copy = tmp_path / "bnb_compile"
    return Path(
        shutil.copytree(Path(bnb_compile.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    )


def test_only_what_was_not_edited_comes_from_the_cache(package: Path) -> None:
    run(package.parent)
    again = run(package.parent)
    assert again["results"] == [[0.0, 1]] * 2  # keep 0.5, minus lr 0.5
    assert again["hits"] >= 1

    edit(package / "rules" / "adam.py", "keep=1 - h.lr", "keep=1 + h.lr")
    assert run(package.parent)["results"] == [[1.0, 1]] * 2


def test_every_source_that_a_kernel_is_made_from_is_in_the_cache_key(package: Path) -> None:
    from bnb_compile.lowering.cache_key import source_hash

    assert f"bnb_compile-{source_hash()[:16]}" in torch.compiler.config.cache_key_tag
    files = [file for file in package.rglob("*.*") if file.suffix in (".py", ".h")]
    assert len(files) > 10
    found = {source_hash(package)}
    for file in files:
        file.write_text(file.read_text() + "\n")
        found.add(source_hash(package))
    assert len(found) == 1 + len(files), "an edit left the hash as it was"


class Scalars(NamedTuple):
    step_size: Tensor
    keep: Tensor
    unit: Tensor


class Hyper(NamedTuple):
    lr: Tensor


def rule(factor: float) -> Rule:
    """A user's rule, of which only a constant is known by no name."""

    def scalars(hyper: Hyper, step: Tensor) -> Scalars:
        return Scalars(hyper.lr, torch.ones_like(hyper.lr), hyper.lr)

    def direction(param: Tensor, grad: Tensor, scalars: Scalars) -> tuple[Tensor]:
        return (grad * factor,)

    return Rule("of_a_user", Hyper, (), scalars, direction)


def test_a_rule_of_a_user_is_in_the_cache_key() -> None:
    hashes = [operator_hash(StepOp(rule(factor), ())) for factor in (0.5, 0.5, 0.25)]
    assert hashes[0] and hashes[0] == hashes[1] != hashes[2]
    assert all(operator_hash(op) is None for op in STEP_OPS.values())
