"""The recipes of docs/recipes.md that no other file tests, with the real packages, where they are installed.

Models are tiny and randomly initialised, nothing is downloaded. Steps run the compiled kernel.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import processes
from torch import nn
from torch.distributed.fsdp import fully_shard

from bnb_compile import backends, hf, optim

# These packages warn while they are imported and used; what this package warns of is still an error.
pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("one_thread"),  # bitwise equal only where sums have one order
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::bnb_compile"),
]

MIN_8BIT_SIZE = 1024


def package(name, extra="recipes"):
    reason = f"{name} is not installed, or not for this torch: pip install -e .[{extra}] -c constraints.txt"
    return pytest.importorskip(name, reason=reason, exc_type=ImportError)


@contextlib.contextmanager
def kernels(at_least):
    """Kernels run that often, and nothing else does."""
    before = backends.counts.copy()
    yield
    ran = backends.counts - before
    assert ran["kernel"] >= at_least and not ran["fallback"], ran


def formats(optimizer):
    """Dtypes of the first state, by the number of elements."""
    return {param.numel(): entry["state1"].dtype for param, entry in optimizer.state.items() if entry}


def assert_8bit(optimizer):
    found = formats(optimizer)
    assert {numel for numel, dtype in found.items() if dtype == torch.uint8} == {
        numel for numel in found if numel >= MIN_8BIT_SIZE
    }
    assert torch.uint8 in found.values()


def same(a, b):
    """Whether two state dicts are equal, bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def falls(history, by):
    assert history[-1] < history[0] - by, history


def perceptron():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32))


def train(model, optimizer, steps):
    """Reproduce random rows; `steps` says which."""
    history = []
    for step in steps:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


# -- TRL --------------------------------------------------------------------------------------------


def words():
    """A tokenizer that is made here."""
    tokenizers, transformers = package("tokenizers"), package("transformers")
    known = ["<pad>", "<eos>", "?", *(f"w{i}" for i in range(61))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="?"
    )


def llama():
    transformers = package("transformers")
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )


@pytest.mark.parametrize("with_lora", [False, True])
def test_trl_fine_tunes_and_resumes_exactly(with_lora, tmp_path):
    package("datasets")
    trl = package("trl")
    texts = [{"text": " ".join(f"w{(i + k) % 61}" for k in range(16))} for i in range(32)]

    def run(resume=None):
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="steps",
            save_steps=4,
            logging_steps=1,
            per_device_train_batch_size=8,
            max_steps=8,
            learning_rate=1e-2,
            optim="adamw_8bit",
            max_length=32,
        )
        adapters = package("peft").LoraConfig(r=32, target_modules="all-linear") if with_lora else None
        made = trl.SFTTrainer(
            llama(),
            args,
            train_dataset=package("datasets").Dataset.from_list(texts),
            processing_class=words(),
            peft_config=adapters,
            optimizer_cls_and_kwargs=hf.optimizer_cls_and_kwargs(args, min_8bit_size=MIN_8BIT_SIZE),
        )
        made.train(resume_from_checkpoint=resume)
        return made

    with kernels(8):
        whole = run()
    optimizer = whole.optimizer.optimizer
    assert type(optimizer) is optim.AdamW8bit
    for name, param in whole.model.named_parameters():
        if param in optimizer.state:
            wide = "embed_tokens" in name or param.numel() < MIN_8BIT_SIZE
            assert optimizer.state[param]["state1"].dtype == (torch.float32 if wide else torch.uint8), name
    assert torch.uint8 in formats(optimizer).values()
    history = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    falls(history, by=0.1 if with_lora else 1)
    resumed = run(str(tmp_path / "checkpoint-4"))
    same(resumed.model.state_dict(), whole.model.state_dict())
    same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


# -- torchtitan -------------------------------------------------------------------------------------


def titan_optimizers(implementation="fused"):
    """As in docs/recipes.md: a container that knows our classes, and a config of two groups."""
    titan = package("torchtitan.components.optimizer")

    class Optimizers(titan.OptimizersContainer):
        @dataclass(kw_only=True, slots=True)
        class Config(titan.OptimizersContainer.Config):
            pass

        @staticmethod
        def _resolve_optimizer_factory(name):
            if name.endswith("8bit"):
                return getattr(optim, name)
            return titan.OptimizersContainer._resolve_optimizer_factory(name)

    def group(pattern, **kwargs):
        return titan.ParamGroupConfig(
            pattern=pattern, optimizer_name="AdamW8bit", optimizer_kwargs={"lr": 1e-2, **kwargs}
        )

    return Optimizers.Config(
        param_groups=[group(r"bias$|^2\.", weight_decay=0.0), group(r".*", weight_decay=0.1)],
        implementation=implementation,
        optimizer_factory_kwargs_by_name={"AdamW8bit": dict(min_8bit_size=MIN_8BIT_SIZE)},
    )


def test_torchtitan_probes_schedules_saves_and_loads(tmp_path):
    titan = package("torchtitan.components.optimizer")

    def made():
        model = perceptron()
        optimizers = titan_optimizers().build(model_parts=[model])
        schedules = titan.LRSchedulersContainer.Config(warmup_steps=3)
        return model, optimizers, schedules.build(optimizers=optimizers, training_steps=20)

    def on(model, optimizers, schedules, steps):
        history = []
        for step in steps:
            history += train(model, optimizers, [step])
            schedules.step()
        return history

    def state(model, optimizers, schedules):
        return {
            "model": model.state_dict(),
            "optimizer": optimizers.state_dict(),
            "schedule": schedules.state_dict(),
        }

    model, optimizers, schedules = made()
    (optimizer,) = optimizers.optimizers
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.bias", "2.weight", "2.bias", "3.bias"],
        ["0.weight", "3.weight"],
    ]
    # A state dict before any step: it takes one without a learning rate.
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rates = [group["lr"] for group in optimizer.param_groups]
    probed = optimizers.state_dict()
    same(model.state_dict(), before)
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert probed["state.0.weight.state1"].dtype == torch.uint8
    assert not probed["state.0.weight.absmax1"].any()
    assert probed["param_groups.0.weight.weight_decay"] == 0.1

    with kernels(16):
        history = on(model, optimizers, schedules, range(8))
    assert_8bit(optimizer)
    dcp.save(state(model, optimizers, schedules), checkpoint_id=tmp_path)
    history += on(model, optimizers, schedules, range(8, 16))
    falls(history, by=0.3)

    other = made()
    loaded = state(*other)
    dcp.load(loaded, checkpoint_id=tmp_path)
    for part, key in zip(other, loaded):
        part.load_state_dict(loaded[key])
    assert on(*other, range(8, 16)) == history[8:]
    same(state(*other), state(model, optimizers, schedules))


def titan_on_fsdp2(folder):
    def made():
        model = perceptron()
        fully_shard(model)
        return model, titan_optimizers().build(model_parts=[model])

    def state(model, optimizers):
        return {"model": model.state_dict(), "optimizer": optimizers.state_dict()}

    model, optimizers = made()
    history = train(model, optimizers, range(8))
    dcp.save(state(model, optimizers), checkpoint_id=folder)
    history += train(model, optimizers, range(8, 16))
    other = made()
    loaded = state(*other)
    dcp.load(loaded, checkpoint_id=folder)
    for part, key in zip(other, loaded):
        part.load_state_dict(loaded[key])
    resumed = train(*other, range(8, 16))
    saved = optimizers.state_dict()["state.0.weight.state1"]
    return history, resumed, (type(saved).__name__, saved.dtype)


def test_torchtitan_saves_and_loads_what_fsdp2_sharded(tmp_path):
    package("torchtitan.components.optimizer")
    for history, resumed, kind in processes.run(2, titan_on_fsdp2, tmp_path):
        falls(history, by=0.3)
        assert resumed == history[8:]
        assert kind == ("DTensor", torch.uint8)


# -- torchtune --------------------------------------------------------------------------------------

SCHEDULE = """
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 3
"""


def tune_config():
    """What the page says, for a small model."""
    conf = package("omegaconf", "torchtune").OmegaConf
    page = Path(__file__).parent.parent / "docs" / "recipes.md"
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)
    found = conf.create(text + SCHEDULE)
    found.optimizer.lr, found.optimizer.min_8bit_size = 1e-2, MIN_8BIT_SIZE
    return found


def tune_model():
    torch.manual_seed(1)
    llama3 = package("torchtune.models.llama3", "torchtune").llama3
    return llama3(vocab_size=64, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=64, max_seq_len=32)


def tune_loss(model, step):
    start = torch.randint(64, (8, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + torch.arange(16)) % 64
    return nn.functional.cross_entropy(model(ids)[:, :-1].reshape(-1, 64), ids[:, 1:].reshape(-1))


def test_torchtune_makes_the_optimizer_of_a_config():
    package("torchtune.training", "torchtune")
    config = package("torchtune.config", "torchtune")
    conf = tune_config()

    def made():
        model = tune_model()
        optimizer = config.instantiate(conf.optimizer, model.parameters())
        return model, optimizer, config.instantiate(conf.lr_scheduler, optimizer, num_training_steps=20)

    def on(model, optimizer, schedule, steps):
        history = []
        for step in steps:
            loss = tune_loss(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            history.append(loss.item())
        return history

    whole = made()
    assert type(whole[1]) is optim.AdamW8bit
    with kernels(20):
        history = on(*whole, range(10))
    assert_8bit(whole[1])
    saved = copy.deepcopy([part.state_dict() for part in whole])
    resumed = made()
    for part, state in zip(resumed, saved):
        part.load_state_dict(state)
    history += on(*whole, range(10, 20))
    falls(history, by=2)
    assert on(*resumed, range(10, 20)) == history[10:]


def test_torchtune_steps_in_the_backward_pass():
    """One optimizer for each parameter: `optimizer_in_bwd: True`."""
    training = package("torchtune.training", "torchtune")
    config = package("torchtune.config", "torchtune")
    conf = tune_config()

    def made():
        model = tune_model()
        optimizers = {param: config.instantiate(conf.optimizer, [param]) for param in model.parameters()}
        training.register_optim_in_bwd_hooks(model=model, optim_dict=optimizers)
        return model, training.create_optim_in_bwd_wrapper(model=model, optim_dict=optimizers)

    def on(model, steps):
        history = []
        for step in steps:
            loss = tune_loss(model, step)
            loss.backward()
            assert all(param.grad is None for param in model.parameters())
            history.append(loss.item())
        return history

    model, optimizers = made()
    with kernels(100):
        history = on(model, range(10))
    saved = copy.deepcopy([model.state_dict(), optimizers.state_dict()])
    other, others = made()
    other.load_state_dict(saved[0])
    others.load_state_dict(saved[1])
    history += on(model, range(10, 20))
    falls(history, by=2)
    assert on(other, range(10, 20)) == history[10:]


# -- timm -------------------------------------------------------------------------------------------


@pytest.fixture
def timm():
    module = package("timm")
    factory = importlib.import_module("timm.optim._optim_factory")
    info = factory.OptimInfo("adamw8bit", optim.AdamW8bit, has_betas=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory.default_registry, "_optimizers", {**factory.default_registry._optimizers})
        factory.default_registry.register(info)
        yield module


def vit(timm):
    torch.manual_seed(1)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=2,
        embed_dim=32,
        num_heads=2,
        num_classes=10,
    )


def pictures():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 10


@pytest.mark.parametrize("by_name", [True, False])
def test_timm_decays_by_layer_and_schedules(timm, by_name):
    x, y = pictures()

    def made():
        model = vit(timm)
        if by_name:
            optimizer = timm.optim.create_optimizer_v2(
                model, "adamw8bit", lr=3e-3, weight_decay=0.05, layer_decay=0.7, min_8bit_size=MIN_8BIT_SIZE
            )
        else:
            groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
            optimizer = optim.AdamW8bit(groups, lr=3e-3, weight_decay=0.0, min_8bit_size=MIN_8BIT_SIZE)
        schedule, _ = package("timm.scheduler").create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=3,
            warmup_epochs=1,
            warmup_lr=1e-4,
            step_on_epochs=False,
            updates_per_epoch=8,
        )
        return model, optimizer, schedule

    def on(model, optimizer, schedule, steps):
        history = []
        for step in steps:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step_update(step + 1)
            history.append(loss.item())
        return history

    whole = made()
    with kernels(24):
        history = on(*whole, range(12))
    optimizer = whole[1]
    assert_8bit(optimizer)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    rates = {group["lr"] / group["lr_scale"] for group in optimizer.param_groups}
    assert max(rates) == pytest.approx(min(rates))  # the layers' rates keep their proportions
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == 4
    saved = copy.deepcopy([part.state_dict() for part in whole])
    resumed = made()
    for part, state in zip(resumed, saved):
        part.load_state_dict(state)
    history += on(*whole, range(12, 24))
    falls(history, by=0.7)
    assert on(*resumed, range(12, 24)) == history[12:]


def test_timm_looks_ahead(timm):
    """The wrapper has a state of its own in ours."""
    x, y = pictures()

    def made():
        model = vit(timm)
        return model, timm.optim.create_optimizer_v2(
            model, "lookahead_adamw8bit", lr=3e-3, weight_decay=0.05, min_8bit_size=MIN_8BIT_SIZE
        )

    def on(model, optimizer, steps):
        history = []
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        return history

    model, optimizer = made()
    with kernels(20):
        history = on(model, optimizer, 10)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    assert "lookahead_slow_buff" in saved[1]["state"][0]
    assert torch.uint8 in [entry["state1"].dtype for entry in saved[1]["state"].values()]
    history += on(model, optimizer, 10)
    falls(history, by=0.5)
    resumed, other = made()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert on(resumed, other, 10) == history[10:]


# -- examples/vision.py -----------------------------------------------------------------------------


def test_the_example_of_vision_learns_with_both_optimizers(monkeypatch, capsys):
    package("sklearn", "peers")
    package("matplotlib", "examples")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    monkeypatch.setattr(sys, "argv", ["vision.py", "--epochs", "3", "--seeds", "1"])
    with kernels(60):
        importlib.import_module("vision").main()
    rows = re.findall(
        r"^(torch AdamW|AdamW8bit) +0 +[\d.]+ +([\d.]+)% +([\d.]+)", capsys.readouterr().out, re.M
    )
    (theirs, expected, bytes_of_theirs), (ours, found, bytes_of_ours) = rows
    assert (theirs, ours) == ("torch AdamW", "AdamW8bit")
    assert float(expected) > 95 and float(found) > float(expected) - 2
    assert float(bytes_of_theirs) == 8.0 and float(bytes_of_ours) < 2.5
