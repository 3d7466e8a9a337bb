"""ZeRO with and without offload, with the real DeepSpeed, on one process of a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from torch import nn

import deepspeed
from bnb_compile import backends
from bnb_compile.optim import AdamW8bit


def train(optimizer, stage, offload, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    optimizer = optimizer(model.parameters(), lr=1e-2, **options)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        x = torch.randn(4, 64, generator=generator).bfloat16()
        loss = (engine(x) - x).float().square().mean()
        engine.backward(loss)
        engine.step()
    return loss.item(), optimizer


for stage in (1, 2, 3):
    for offload in (False, True):
        expected, _ = train(torch.optim.AdamW, stage, offload)
        before = backends.counts["kernel"]
        loss, optimizer = train(AdamW8bit, stage, offload, min_8bit_size=1024)
        assert backends.counts["kernel"] - before >= 30 and not backends.counts["fallback"]
        states = [state for state in optimizer.state.values() if state]
        assert states and all(state["state1"].dtype == torch.uint8 for state in states), states
        assert abs(loss / expected - 1) < 0.01, (stage, offload, loss, expected)
print("all trained")
"""


@pytest.mark.long
@pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"),
    reason="deepspeed is not installed: pip install -e .[offload]",
)
def test_zero_trains_with_a_class_of_ours(tmp_path: Path) -> None:
    alone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29531")
    env = {**os.environ, **alone, "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert "all trained" in run.stdout, run.stderr[-3000:]
