"""That the benchmarks which wait for a GPU would run there: rehearsed on tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["device", "steps", "host", "train", "family", "variants"]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_what_a_gpu_must_show_is_rehearsed(part: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--rehearse", "--parts", part]
    subprocess.run([*command, "--out", str(out)], check=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and not [row for row in rows if "error" in row and "ours" in str(row)], rows
    assert not any(row.get("uncompiled") for row in rows), rows
    assert out.with_suffix(".md").read_text().startswith(f"\n## {part}\n")
