"""What `import bnb_compile` brings in, and what it can do without; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300)


def assert_runs(code: str) -> None:
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_import_does_not_import_inductor() -> None:
    assert_runs(
        "import sys, torch\n"
        "if 'torch._inductor' in sys.modules: sys.exit()  # nothing left to be careful about\n"
        "import bnb_compile, bnb_compile.optim, bnb_compile.functional\n"
        "found = [name for name in sys.modules if name.startswith(('torch._inductor', 'triton'))]\n"
        "assert not found, found\n"
    )


STEP = """
import torch, bnb_compile
params = [torch.ones(5000, requires_grad=True)]
optimizer = bnb_compile.optim.AdamW8bit(params, lr=0.1, compile={compile})
params[0].grad = torch.ones(5000)
optimizer.step()
assert (params[0] < 0.95).all(), params
"""


def test_eager_step_does_not_import_inductor() -> None:
    assert_runs(f"{STEP.format(compile=False)}\nimport sys; assert 'bnb_compile.lowering' not in sys.modules")


def test_works_without_triton_and_bitsandbytes() -> None:
    blocked = "import sys; sys.modules['triton'] = sys.modules['bitsandbytes'] = None"
    assert_runs(f"{blocked}\n{STEP.format(compile=True)}")


@pytest.mark.parametrize("name", ["ops", "lowering"])
def test_the_links_at_the_root_cannot_be_imported(name: str) -> None:
    if not (ROOT / name).exists():
        pytest.skip("not run from a checkout")
    for code in (f"import {name}", f"import bnb_compile; import {name}"):
        done = python(code, cwd=ROOT)
        assert done.returncode and f"ImportError: import this package as bnb_compile.{name}" in done.stderr


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_import_under_another_default_dtype_and_device(default: torch.dtype) -> None:
    from bnb_compile.ops.blockwise import quantize_op

    done = python(
        f"import torch; torch.set_default_dtype({default}); torch.set_default_device('meta')\n"
        "from bnb_compile.ops.blockwise import quantize_op\n"
        "x = torch.linspace(-1, 1, 99, device='cpu', dtype=torch.float32)\n"
        "print(quantize_op(x, None, 40)[0].tolist())"
    )
    expected = quantize_op(torch.linspace(-1, 1, 99, dtype=torch.float32), None, 40)[0]
    assert done.stdout.strip() == str(expected.tolist()), done.stderr
