"""Inductor's disk caches must know these sources: to them a lowering is not a part of the graph."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ..formats.trace import numbers_of, trace_code, trace_format
from ..ops.operator import StepOp
from ..rules import ALL
from ..rules.trace import trace_rule

_PACKAGE = Path(__file__).parents[1]


def source_hash(package: Path = _PACKAGE) -> str:
    """Hash of the package's sources: of all, because anything may decide what a lowering emits."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        if file.suffix in (".py", ".h"):
            digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()


def operator_hash(op: StepOp) -> str | None:
    """Hash of what an operator has from outside of this package; None if nothing."""
    package = __name__.partition(".")[0] + "."
    texts: list[str] = []
    if op.rule not in ALL:
        texts += map(str, (op.rule.hyper._fields, op.rule.states, *trace_rule(op.rule)))
    for stored in op.stored:
        if not type(stored.format).__module__.startswith(package):
            texts += map(str, (stored.state, stored.over, stored.format.parts, *trace_format(stored.format)))
        for part, table in stored.format.tables.items():
            if not type(table).__module__.startswith(package):
                texts += map(str, (part, numbers_of(table), trace_code(table)))
    return hashlib.sha256(repr(texts).encode()).hexdigest() if texts else None


def mark_caches(op: StepOp | None = None) -> None:
    """Make the hash a part of the cache key of everything that is compiled from now on.

    Args:
        op: Of the package's sources, or of an operator whose rule or format is a user's.
    """
    found = source_hash() if op is None else operator_hash(op)
    if found is None:
        return
    config = torch.compiler.config
    tag = f"bnb_compile-{found[:16]}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag}{tag}"
