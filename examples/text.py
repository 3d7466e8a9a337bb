"""Text as bytes: the source code of Python's standard library, or the user's own."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor


def find_files(path: Path | None) -> list[Path]:
    """The file itself, a folder's files, or with None the standard library's modules; sorted."""
    if path is not None and not path.is_dir():
        return [path]
    root, pattern = (path, "*") if path is not None else (Path(sysconfig.get_paths()["stdlib"]), "*.py")
    skipped = {"site-packages", "dist-packages", "test", "tests"} if path is None else set()
    found = []
    for file in sorted(root.rglob(pattern)):
        parts = file.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and not skipped & set(parts) and file.is_file():
            found.append(file)
    return found


def read_text(path: Path | None, least: int) -> tuple[Tensor, Tensor]:
    """Training and validation text, uint8, always split the same way.

    Of ten files or more every tenth is for validation; of fewer, the last tenth of their text.

    Args:
        path: See `find_files`.
        least: Number of bytes that either part must have.

    Raises:
        ValueError: If there are fewer.
        OSError: If a file cannot be read.
    """
    texts = [file.read_bytes() for file in find_files(path)]
    if len(texts) >= 10:
        validation = b"".join(texts[9::10])
        del texts[9::10]
        training = b"".join(texts)
    else:
        whole = b"".join(texts)
        cut = len(whole) * 9 // 10
        training, validation = whole[:cut], whole[cut:]
    for name, part in (("train", training), ("validate", validation)):
        if len(part) < least:
            raise ValueError(
                f"too little text in {path}: {len(part)} bytes to {name} on, must be {least} or more"
            )
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (training, validation))


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets from these places of a text, ``(len(starts), length)`` int64 each."""
    tokens = text[starts[:, None] + torch.arange(length + 1)].long()
    return tokens[:, :-1], tokens[:, 1:]
