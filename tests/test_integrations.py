"""Training with the real Transformers, PEFT, Accelerate and Lightning, as far as they are installed.

Models are tiny and randomly initialised, nothing is downloaded. All but one of the tests run the eager step,
which needs no compiler: what frameworks do to an optimizer does not depend on its kernel.
"""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from bnb_compile import hf, optim

# These packages warn while they are imported and used; what this package warns of is still an error.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),  # bitwise equal only where sums have one order
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::bnb_compile"),
    pytest.mark.filterwarnings("ignore:paged optimizer states"),
]

MIN_8BIT_SIZE = 1024  # all matrices of the models here have as many elements, embeddings too
EAGER = dict(compile=False, min_8bit_size=MIN_8BIT_SIZE)


def package(name):
    reason = f"{name} is not installed: pip install -e .[integrations] -c constraints.txt"
    return pytest.importorskip(name, reason=reason)


@pytest.fixture(autouse=True)
def no_overrides_remain():
    yield
    optim.GlobalOptimManager.get_instance().initialize()
    if theirs := sys.modules.get("bitsandbytes"):
        theirs.optim.GlobalOptimManager.get_instance().initialize()


def gpt2():
    config = package("transformers").GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    torch.manual_seed(1)
    return package("transformers").GPT2LMHeadModel(config)


def llama():
    config = package("transformers").LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    return package("transformers").LlamaForCausalLM(config)


def sequences():
    """Tokens that count upwards from a random one: easy to learn."""
    start = torch.randint(64, (32, 1), generator=torch.Generator().manual_seed(2))
    return (start + torch.arange(16)) % 64


def state_bits(model, optimizer):
    """Bits of each parameter's states, by name, for those that have some."""
    return {
        name: 8 * optimizer.state[param]["state1"].element_size()
        for name, param in model.named_parameters()
        if param in optimizer.state
    }


def expected_bits(model):
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: 32 if id(param) in embeddings or param.numel() < MIN_8BIT_SIZE else 8
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def same_state(a, b):
    """Whether two state dicts are equal, bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# -- Transformers -----------------------------------------------------------------------------------


def arguments(folder, **kwargs):
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        per_device_train_batch_size=8,
        max_steps=8,
        learning_rate=1e-2,
        weight_decay=0.1,
        optim="adamw_8bit",
    )
    return package("transformers").TrainingArguments(**{**defaults, **kwargs})


def trainer(model, args, **kwargs):
    dataset = [{"input_ids": ids, "labels": ids} for ids in sequences()]
    return package("transformers").Trainer(model, args, train_dataset=dataset, **kwargs)


def ours(args):
    return dict(optimizer_cls_and_kwargs=hf.optimizer_cls_and_kwargs(args, **EAGER))


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", sorted(hf.CLASSES))
def test_trainer_makes_the_groups_that_it_makes_for_bitsandbytes(name, tmp_path):
    package("bitsandbytes")
    optim_args = "beta1=0.8,beta3=0.99,alpha=3.5,t_alpha=50" if "ademamix" in name else None
    args = arguments(tmp_path, optim=name, adam_beta2=0.95, adam_epsilon=1e-6, optim_args=optim_args)
    model = gpt2()
    theirs = trainer(model, args).create_optimizer()
    found = trainer(model, args, **ours(args)).create_optimizer()
    assert type(theirs).__module__.startswith("bitsandbytes")
    assert type(found) is hf.CLASSES[name]
    assert (found.args.optim_bits, found.is_paged) == (theirs.args.optim_bits, theirs.is_paged)
    assert len(found.param_groups) == len(theirs.param_groups)
    for group, reference in zip(found.param_groups, theirs.param_groups):
        assert [id(p) for p in group["params"]] == [id(p) for p in reference["params"]]
        shared = group.keys() & reference.keys() - {"params"}
        assert {"lr", "betas", "eps", "weight_decay"} <= shared
        for key in shared:
            # Lion has no eps; bitsandbytes keeps one all the same.
            assert group[key] == reference[key] or (key == "eps" and "lion" in name), key


@pytest.mark.parametrize(
    "name", ["adamw_8bit", "paged_adamw_8bit", "ademamix_8bit", "lion_8bit", "rmsprop_bnb_8bit"]
)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_trainer_learns_with_32_bit_states_for_embeddings_alone(name, make, tmp_path):
    args = arguments(tmp_path, optim=name, learning_rate=3e-3)
    trained = trainer(make(), args, **ours(args))
    trained.train()
    bits = state_bits(trained.model, trained.optimizer.optimizer)
    assert bits == expected_bits(trained.model)
    assert set(bits.values()) == {8, 32}
    assert losses(trained)[-1] < losses(trained)[0] - 0.3


def test_trainer_resumes_exactly_from_its_checkpoint(tmp_path):
    def run(resume=None):
        args = arguments(tmp_path, save_strategy="steps", save_steps=3)
        made = trainer(gpt2(), args, **ours(args))
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run()
    checkpoint = tmp_path / "checkpoint-3"
    resumed = run(str(checkpoint))
    same_state(resumed.model.state_dict(), whole.model.state_dict())
    same_state(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert losses(resumed) == losses(whole)
    (checkpoint / "optimizer.pt").unlink()
    cold = run(str(checkpoint))
    assert losses(cold)[3:] != losses(whole)[3:]


def test_trainer_continues_from_a_checkpoint_that_it_wrote_with_bitsandbytes(tmp_path):
    package("bitsandbytes")
    args = arguments(tmp_path, save_strategy="steps", save_steps=4)
    theirs = trainer(gpt2(), args)
    theirs.train()
    found = trainer(gpt2(), args, optimizer_cls_and_kwargs=hf.optimizer_cls_and_kwargs(args, compile=False))
    found.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert 8 in state_bits(found.model, found.optimizer.optimizer).values()
    torch.testing.assert_close(losses(found), losses(theirs), rtol=0, atol=1e-5)


def test_trainer_takes_an_optimizer_and_a_scheduler(tmp_path):
    def run(compiled):
        model = gpt2()
        optimizer = optim.AdamW8bit(
            model.parameters(), lr=1e-2, min_8bit_size=MIN_8BIT_SIZE, compile=compiled
        )
        schedule = LambdaLR(optimizer, lambda step: 0.9**step)
        trained = trainer(model, arguments(tmp_path), optimizers=(optimizer, schedule))
        trained.train()
        assert trained.optimizer.optimizer is optimizer
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**8)
        return losses(trained)

    compiled, eager = run(True), run(False)
    assert compiled[-1] < compiled[0] - 0.3
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)


def test_optim_args_and_options_reach_the_class(tmp_path):
    args = arguments(tmp_path, optim="rmsprop_bnb_8bit", optim_args="alpha=0.8, momentum=0.5,centered=True")
    factory, kwargs = hf.optimizer_cls_and_kwargs(args, lr=0.5, percentile_clipping=50)
    optimizer = factory()(gpt2(), **kwargs)
    decaying, rest = optimizer.param_groups
    assert (decaying["lr"], decaying["betas"], decaying["centered"]) == (0.5, (0.8, 0.5), True)
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert optimizer.args.percentile_clipping == 50


@pytest.mark.parametrize("optim_args", ["alpha", "alpha=", "=3", "alpha=3,x"])
def test_optim_args_that_cannot_be_read_raise(optim_args, tmp_path):
    with pytest.raises(ValueError, match=f"Invalid optim_args: '{optim_args}'"):
        hf.optimizer_cls_and_kwargs(arguments(tmp_path, optim_args=optim_args))


@pytest.mark.parametrize("optim_args", ["beta3=0.9", "momentum=0.9", "rank=4"])
def test_optim_args_that_the_class_does_not_have_raise(optim_args, tmp_path):
    factory, kwargs = hf.optimizer_cls_and_kwargs(arguments(tmp_path, optim_args=optim_args))
    with pytest.raises(TypeError, match=optim_args.partition("=")[0]):
        factory()(gpt2(), **kwargs)


def test_an_unknown_name_raises_with_the_known_ones(tmp_path):
    known = "must be one of .*'adamw_8bit'.*'rmsprop_bnb_8bit'"
    with pytest.raises(ValueError, match=f"Unsupported optimizer: 'adamw_torch', {known}"):
        hf.optimizer_cls_and_kwargs(arguments(tmp_path, optim="adamw_torch"))
    with pytest.raises(ValueError, match=f"Unsupported optimizer: 'muon', {known}"):
        hf.optimizer_cls_and_kwargs("muon", lr=1e-3)


# -- PEFT -------------------------------------------------------------------------------------------


def lora():
    """Adapters of rank 32, of which each matrix has MIN_8BIT_SIZE elements, and a copy of the embedding."""
    peft = package("peft")
    targets = ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=32, target_modules=targets, modules_to_save=["embed_tokens"])
    return peft.get_peft_model(llama(), config)


def test_lora_adapters_train_in_trainer(tmp_path):
    model = lora()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    args = arguments(tmp_path)
    trained = trainer(model, args, **ours(args))
    trained.train()
    bits = state_bits(model, trained.optimizer.optimizer)
    assert bits == expected_bits(model)
    # The copy that is trained is no module of the model that was given to PEFT.
    assert bits.pop("base_model.model.model.embed_tokens.modules_to_save.default.weight") == 32
    assert set(bits.values()) == {8} and len(bits) == 4
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert losses(trained)[-1] < losses(trained)[0] - 0.3


def test_loraplus_has_its_learning_rates_and_the_overrides_it_gives_to_bitsandbytes():
    package("bitsandbytes")  # which PEFT imports for any class of this name
    model = lora()
    create = package("peft.optimizers").create_loraplus_optimizer
    optimizer = create(
        model, optim.AdamW8bit, lr=4e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1, **EAGER
    )
    assert [group["lr"] for group in optimizer.param_groups] == [4e-3, 1e-6, 3.2e-2, 3.2e-2]
    ids = sequences()
    history = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    bits = state_bits(model, optimizer)
    assert bits == expected_bits(model)
    assert set(bits.values()) == {8, 32}
    assert history[-1] < history[0] - 0.3


# -- a plain loop, for what follows -----------------------------------------------------------------

CLIP = 0.1  # well below the norms of the gradients


def model_and_optimizer():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-2, **EAGER)
    return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))


def loader():
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(rows), batch_size=8)


def autoencode(model, x):
    return (model(x) - x).square().mean()


def plain_loop(epochs=1, accumulate=1):
    model, optimizer, schedule = model_and_optimizer()
    for _ in range(epochs):
        for i, (x,) in enumerate(loader(), 1):
            (autoencode(model, x) / accumulate).backward()
            if i % accumulate == 0:
                assert nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return model, optimizer, schedule


# -- Accelerate -------------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    module = package("accelerate")
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


def test_accelerate_accumulates_clips_and_steps_as_a_plain_loop_does(accelerate):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, schedule, batches = accelerator.prepare(*model_and_optimizer(), loader())
    for (x,) in batches:
        with accelerator.accumulate(model):
            accelerator.backward(autoencode(model, x))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    plain, expected, _ = plain_loop(accumulate=2)
    same_state(model.state_dict(), plain.state_dict())
    same_state(optimizer.state_dict(), expected.state_dict())


def test_accelerate_saves_and_loads_everything(accelerate, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared():
        return accelerator.prepare(*model_and_optimizer())

    def train(model, optimizer, schedule, xs):
        for x in xs:
            accelerator.backward(autoencode(model, x))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    xs = [x for (x,) in loader()]
    model, optimizer, schedule = prepared()
    train(model, optimizer, schedule, xs[:4])
    accelerator.save_state(str(tmp_path))
    train(model, optimizer, schedule, xs[4:])

    accelerator.free_memory()  # the objects of the first run are not loaded into
    resumed = prepared()
    accelerator.load_state(str(tmp_path))
    train(*resumed, xs[4:])
    same_state(resumed[0].state_dict(), model.state_dict())
    same_state(resumed[1].state_dict(), optimizer.state_dict())
    same_state(resumed[2].state_dict(), schedule.state_dict())


def test_accelerate_with_a_scaler_skips_a_step_that_overflowed(accelerate):
    accelerate.Accelerator(cpu=True)  # which the wrapper asks for the device
    model, optimizer, _ = model_and_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    plain, reference, _ = model_and_optimizer()

    def step(x):
        scaler.scale(autoencode(model, x)).backward()
        wrapped.step()
        wrapped.zero_grad()

    xs = [x for (x,) in loader()]
    for x in xs[:2]:
        step(x)
        assert not wrapped.step_was_skipped
        autoencode(plain, x).backward()
        reference.step()
        reference.zero_grad()
    before = copy.deepcopy([model.state_dict(), wrapped.state_dict()])
    step(torch.full((8, 32), float("inf")))
    assert wrapped.step_was_skipped
    same_state([model.state_dict(), wrapped.state_dict()], before)
    step(xs[2])
    assert not wrapped.step_was_skipped
    autoencode(plain, xs[2]).backward()
    reference.step()
    # Powers of two scale without an error, so the two runs are equal.
    same_state(model.state_dict(), plain.state_dict())
    same_state(wrapped.state_dict(), reference.state_dict())


# -- Lightning --------------------------------------------------------------------------------------


def test_lightning_clips_schedules_and_resumes_exactly(tmp_path):
    lightning = package("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer, self.schedule = model_and_optimizer()

        def training_step(self, batch, _):
            return autoencode(self.model, batch[0])

        def configure_optimizers(self):
            return [self.optimizer], [{"scheduler": self.schedule, "interval": "step"}]

    def fit(epochs, resume=None):
        module = Module()
        made = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            gradient_clip_val=CLIP,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        made.fit(module, loader(), ckpt_path=resume)
        return made, module

    plain, optimizer, _ = plain_loop(epochs=2)
    _, whole = fit(2)
    same_state(whole.model.state_dict(), plain.state_dict())
    same_state(whole.optimizer.state_dict()["state"], optimizer.state_dict()["state"])

    half, _ = fit(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(2, tmp_path / "half.ckpt")
    same_state(resumed.state_dict(), whole.state_dict())
    same_state(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_fabric_wraps_clips_saves_and_loads(tmp_path):
    fabric = package("lightning").Fabric(accelerator="cpu")

    def train(model, optimizer, schedule, xs):
        for x in xs:
            fabric.backward(autoencode(model, x))
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def made():
        model, optimizer, schedule = model_and_optimizer()
        return *fabric.setup(model, optimizer), schedule

    xs = [x for (x,) in loader()]
    model, optimizer, schedule = made()
    assert isinstance(optimizer, optim.AdamW8bit)
    train(model, optimizer, schedule, xs[:4])
    fabric.save(tmp_path / "state", {"model": model, "optimizer": optimizer, "schedule": schedule})
    train(model, optimizer, schedule, xs[4:])

    resumed = dict(zip(("model", "optimizer", "schedule"), made()))
    fabric.load(tmp_path / "state", resumed)
    train(*resumed.values(), xs[4:])
    same_state(resumed["model"].state_dict(), model.state_dict())
    same_state(resumed["optimizer"].state_dict(), optimizer.state_dict())


def test_the_example_fine_tunes_a_checkpoint(tmp_path, monkeypatch, capsys):
    """A tokenizer that is made here, as nothing is downloaded."""
    transformers, tokenizers = package("transformers"), package("tokenizers")
    package("matplotlib")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    gpt2().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a b " * 100)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    arguments = "--steps 3 --context 16 --lr 1e-3 --model model --data text.txt --out tuned"
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments.split()])
    monkeypatch.chdir(tmp_path)
    importlib.import_module("finetune").main()
    assert "together" in capsys.readouterr().out
    before, after = (transformers.GPT2LMHeadModel.from_pretrained(folder) for folder in ("model", "tuned"))
    assert not torch.equal(before.transformer.wte.weight.bfloat16(), after.transformer.wte.weight.bfloat16())
