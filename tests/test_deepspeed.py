"""ZeRO with and without offload, with the real DeepSpeed and accelerate, on one process of a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import tempfile

import torch
from torch import nn

import deepspeed
from bnb_compile import backends
from bnb_compile.optim import AdamW8bit

torch.set_num_threads(1)  # bitwise equal only where sums have one order


def model_of(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def groups_of(model):
    # The first layer has 32-bit states, which torch's AdamW does not know of.
    return [dict(params=model[0].parameters(), optim_bits=32), dict(params=model[2].parameters())]


def config_of(stage, offload):
    zero = {"stage": stage, "sub_group_size": 10000}  # stage 3 steps so many elements at a time
    return {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": zero | ({"offload_optimizer": {"device": "cpu"}} if offload else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def loss_of(model, step):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
    return (model(x) - x).float().square().mean()


def check(optimizer, before):
    assert backends.counts["kernel"] - before >= 30 and not backends.counts["fallback"]
    found = {state["state1"].dtype for state in optimizer.state.values() if state}
    assert found == {torch.float32, torch.uint8}, found
"""

INITIALIZE = """
def made(optimizer, stage, offload, seed=0, **options):
    model = model_of(seed)
    optimizer = optimizer(groups_of(model), lr=1e-2, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(stage, offload))
    return engine, optimizer


def train(engine, steps):
    losses = []
    for step in steps:
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


for stage in (1, 2, 3):
    for offload in (False, True):
        expected = train(made(torch.optim.AdamW, stage, offload)[0], range(30))[-1]
        before = backends.counts["kernel"]
        engine, optimizer = made(AdamW8bit, stage, offload, min_8bit_size=1024)
        losses = train(engine, range(20))
        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder)
            losses += train(engine, range(20, 30))
            check(optimizer, before)
            assert abs(losses[-1] / expected - 1) < 0.01, (stage, offload, losses, expected)
            resumed, _ = made(AdamW8bit, stage, offload, seed=1, min_8bit_size=1024)
            resumed.load_checkpoint(folder)
        assert train(resumed, range(20, 30)) == losses[20:], (stage, offload)
print("all trained")
"""

ACCELERATE = """
from accelerate import Accelerator, DeepSpeedPlugin

config = config_of(2, offload=True) | {"gradient_accumulation_steps": 1}
del config["zero_allow_untested_optimizer"]  # accelerate writes it itself
accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
model = model_of(0)
ours = AdamW8bit(groups_of(model), lr=1e-2, min_8bit_size=1024)
model, optimizer = accelerator.prepare(model, ours)
assert optimizer.optimizer.optimizer is ours  # accelerate's wrapper, ZeRO's, ours
losses = []
for step in range(30):
    loss = loss_of(model, step)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
check(ours, 0)
assert losses[-1] < losses[0] - 0.1, losses
print("all trained")
"""

TRAINER = """
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bnb_compile.hf import optimizer_cls_and_kwargs


def run(resume=None):
    args = TrainingArguments(
        "out",
        deepspeed=config_of(2, offload=True)
        | {"bf16": {"enabled": False}, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1},
        optim="adamw_8bit",
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        use_cpu=True,
    )
    torch.manual_seed(1)
    config = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=False, **config))
    rows = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(32)[:, None] + torch.arange(16)) % 64]
    made = optimizer_cls_and_kwargs(args, min_8bit_size=1024)
    trainer = Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=made)
    trainer.train(resume_from_checkpoint=resume)
    ours = trainer.optimizer.optimizer.optimizer  # of accelerate's wrapper and ZeRO's
    assert type(ours) is AdamW8bit
    found = {param.numel(): state["state1"].dtype for param, state in ours.state.items()}
    # One flat tensor of all matrices, embeddings too, and one of the norms.
    assert found == {49152: torch.uint8, 192: torch.float32}, found
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


losses = run()
assert backends.counts["kernel"] == 16 and not backends.counts["fallback"]
assert losses[-1] < losses[0] - 1, losses
assert run("out/checkpoint-4") == losses
print("all trained")
"""


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not importlib.util.find_spec("deepspeed"),
        reason="deepspeed is not installed: pip install -e .[offload]",
    ),
]


def run(script: str, folder: Path, **variables: str) -> None:
    alone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29531")
    env = {**os.environ, **alone, "DS_ACCELERATOR": "cpu", **variables}
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + script]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert "all trained" in done.stdout, done.stderr[-3000:]


def test_zero_trains_and_resumes_exactly_with_a_class_of_ours(tmp_path: Path) -> None:
    run(INITIALIZE, tmp_path)


needs_integrations = pytest.mark.skipif(
    not (importlib.util.find_spec("accelerate") and importlib.util.find_spec("transformers")),
    reason="transformers or accelerate is not installed: pip install -e .[integrations] -c constraints.txt",
)


@needs_integrations
def test_accelerate_gives_zero_the_class_of_ours(tmp_path: Path) -> None:
    run(ACCELERATE, tmp_path, ACCELERATE_USE_DEEPSPEED="true")


@needs_integrations
def test_trainer_with_zero_trains_and_resumes_exactly(tmp_path: Path) -> None:
    run(TRAINER, tmp_path, ACCELERATE_USE_DEEPSPEED="true")
