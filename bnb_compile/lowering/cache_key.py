"""Inductor's disk caches must know these sources: to them a lowering is not a part of the graph."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parents[1]


def source_hash(package: Path = _PACKAGE) -> str:
    """Hash of the package's sources: of all, because anything may decide what a lowering emits."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        if file.suffix in (".py", ".h"):
            digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()


def mark_caches() -> None:
    """Make the hash a part of the cache key of everything that is compiled from now on."""
    config = torch.compiler.config
    tag = f"bnb_compile-{source_hash()[:16]}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag}{tag}"
