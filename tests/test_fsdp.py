"""FSDP2 in all its forms, with the state dicts of torch.distributed.checkpoint.

Every rank is given the same batch, so that gradients are those of one process to the bit.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import processes
from torch import Tensor, nn

import bnb_compile as bnb

pytestmark = pytest.mark.long

AdamW4bit, AdamW8bit = bnb.optim.AdamW4bit, bnb.optim.AdamW8bit
LAMB32bit, SGD8bit = bnb.optim.LAMB32bit, bnb.optim.SGD8bit


class Net(nn.Module):
    """Rows that are blocks in the first layer, and others; 65 and 37 rows are uneven shards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(256, 100)
        self.second = nn.Linear(100, 65)
        self.third = nn.Linear(65, 37, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def shard(model: nn.Module, tensor_mesh: Any = None, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if tensor_mesh is not None:
        parallelize_module(model, tensor_mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})
    for layer in model.children():
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def batch(t: int) -> Tensor:
    torch.manual_seed(t)
    return torch.randn(8, 256)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        model(batch(t)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def forms() -> dict[str, Callable[[], dict[str, Any]]]:
    """Arguments of fully_shard."""

    def mixed() -> dict[str, Any]:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}

    def offload() -> dict[str, Any]:
        from torch.distributed.fsdp import CPUOffloadPolicy

        return {"offload_policy": CPUOffloadPolicy(pin_memory=False)}

    def hybrid() -> dict[str, Any]:
        from torch.distributed.device_mesh import init_device_mesh

        return {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))}

    def tensor() -> dict[str, Any]:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        return {"mesh": mesh["shard"], "tensor_mesh": mesh["tensor"]}

    def columns() -> dict[str, Any]:
        from torch.distributed.tensor import Shard

        def placed(param: nn.Parameter) -> Shard | None:
            return Shard(1) if param.shape[1:] in ((256,), (100,)) else None

        return {"shard_placement_fn": placed}

    def cpu() -> dict[str, Any]:
        from torch.distributed.device_mesh import init_device_mesh

        return {"mesh": init_device_mesh("cpu", (torch.distributed.get_world_size(),))}

    return {
        "plain": cpu,
        "mixed": lambda: {**cpu(), **mixed()},
        "offload": lambda: {**cpu(), **offload()},
        "kept": lambda: {**cpu(), "reshard_after_forward": False},
        "hybrid": hybrid,
        "tensor": tensor,
        "columns": lambda: {**cpu(), **columns()},
    }


CLASSES = {"AdamW8bit": AdamW8bit, "SGD8bit": SGD8bit, "LAMB32bit": LAMB32bit}
#: Those that are saved. Four bits tell gradients apart that were added up in another order.
SAVED = {**CLASSES, "AdamW4bit": AdamW4bit}


def make(name: str, model: nn.Module) -> Any:
    given: dict[str, Any] = {"momentum": 0.9} if name == "SGD8bit" else {}
    if name != "LAMB32bit":
        given["min_8bit_size"] = 0
    return SAVED[name](model.parameters(), lr=1e-2, **given)


def trained(form: str, name: str) -> list[Tensor]:
    model = shard(Net(), **forms()[form]())
    optimizer = make(name, model)
    train(model, optimizer, range(4))
    return whole(model)


def all_forms(chosen: list[str]) -> dict[tuple[str, str], list[Tensor]]:
    return {(form, name): trained(form, name) for form in chosen for name in CLASSES}


@pytest.fixture(scope="module")
def on_one() -> dict:
    return processes.run(1, all_forms, ["plain", "mixed", "offload", "kept"])[0]


@pytest.mark.parametrize("world", [2, 3])
def test_fully_shard_in_all_its_forms_computes_what_one_process_does(world: int, on_one: dict) -> None:
    for of_rank in processes.run(world, all_forms, ["plain", "mixed", "offload", "kept"]):
        for (form, name), params in of_rank.items():
            for k, (a, e) in enumerate(zip(params, on_one[form, name])):
                if world == 3:  # a mean of three is rounded
                    assert (a - e).abs().max() <= 2e-2, (form, name, k)
                elif name == "LAMB32bit":
                    torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(a, e), (form, name, k)


def test_hybrid_sharding_computes_what_one_process_does(on_one: dict) -> None:
    for of_rank in processes.run(4, all_forms, ["hybrid"]):
        for (_, name), params in of_rank.items():
            for a, e in zip(params, on_one["plain", name]):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world, form", [(4, "tensor"), (2, "columns")])
def test_sharded_columns_train_as_one_process_does(world: int, form: str, on_one: dict) -> None:
    begin = [p.detach() for p in Net().parameters()]
    for of_rank in processes.run(world, all_forms, [form]):
        for (_, name), params in of_rank.items():
            for a, e, b in zip(params, on_one["plain", name], begin):
                # Codes of blocks that columns cut differ; 32-bit states, but for the sums of norms, do not.
                bound = 1e-4 if name == "LAMB32bit" else 5e-2
                assert (a - e).norm() <= bound * (e - b).norm(), (name, a.shape)


# -- state dicts ---------------------------------------------------------------------------------------------


def state_dicts() -> list[str]:
    """Every way to save and load goes on bitwise; returns what went wrong."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as dsd

    mistakes = []
    mesh = forms()["plain"]
    options = {
        "sharded": {},
        "full": dict(full_state_dict=True),
        "sharded on the cpu": dict(cpu_offload=True),
        "flat": dict(flatten_optimizer_state_dict=True),
        "from rank 0": dict(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
    }
    for name in SAVED:
        model = shard(Net(), **mesh())
        optimizer = make(name, model)
        train(model, optimizer, range(3))
        saved = {}
        for way, given in options.items():
            chosen = dsd.StateDictOptions(**given)
            saved[way] = (
                dsd.get_model_state_dict(model, options=chosen),
                dsd.get_optimizer_state_dict(model, optimizer, options=chosen),
            )
            if way != "from rank 0":
                saved[way] = copy.deepcopy(saved[way])
        own = copy.deepcopy(optimizer.state_dict())
        weights = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, range(3, 5))
        expected = whole(model)
        for way, given in options.items():
            chosen = dsd.StateDictOptions(**given)
            other = shard(Net(), **mesh())
            fresh = make(name, other)
            dsd.set_model_state_dict(other, saved[way][0], options=chosen)
            dsd.set_optimizer_state_dict(other, fresh, saved[way][1], options=chosen)
            train(other, fresh, range(3, 5))
            if not all(map(torch.equal, whole(other), expected)):
                mistakes.append(f"{name}: {way}")
        with tempfile.TemporaryDirectory() as folder:  # of the first rank, whatever the others have
            shared = [folder]
            torch.distributed.broadcast_object_list(shared)
            given = {"model": saved["sharded"][0], "optimizer": saved["sharded"][1]}
            checkpoint.async_save(given, checkpoint_id=f"{shared[0]}/saved").result()
            other = shard(Net(), **mesh())
            fresh = make(name, other)
            loaded = dict(zip(given, dsd.get_state_dict(other, fresh)))
            checkpoint.load(loaded, checkpoint_id=f"{shared[0]}/saved")
            dsd.set_state_dict(
                other, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
            )
            torch.distributed.barrier()
        train(other, fresh, range(3, 5))
        if not all(map(torch.equal, whole(other), expected)):
            mistakes.append(f"{name}: async_save")
        other = shard(Net(), **mesh())
        fresh = make(name, other)
        with torch.no_grad():
            for p, w in zip(other.parameters(), weights):
                p.copy_(w)
        buffer = io.BytesIO()
        torch.save(own, buffer)
        buffer.seek(0)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        train(other, fresh, range(3, 5))
        if not all(map(torch.equal, whole(other), expected)):
            mistakes.append(f"{name}: torch.save")
    return mistakes


def test_every_way_to_save_a_state_dict_goes_on_bitwise() -> None:
    assert processes.run(2, state_dicts) == [[], []]


def asked_before() -> list[str]:
    """The state of an optimizer that has taken no step is asked for; returns what that has changed."""
    from torch.distributed.checkpoint import state_dict as dsd

    mistakes = []
    for name in SAVED:
        ends = []
        for asks in (False, True):
            model = shard(Net(), **forms()["plain"]())
            optimizer = make(name, model)
            if asks:
                dsd.get_optimizer_state_dict(model, optimizer)
            train(model, optimizer, range(2))
            ends.append(whole(model))
        if not all(map(torch.equal, *ends)):
            mistakes.append(name)
    return mistakes


def test_asking_for_a_state_changes_nothing() -> None:
    assert processes.run(2, asked_before) == [[], []]


def to_plain() -> tuple[Any, list[Tensor], list[Tensor]]:
    """The full state dict of a sharded optimizer, its weights, and those after another step."""
    from torch.distributed.checkpoint import state_dict as dsd

    model = shard(Net(), **forms()["plain"]())
    optimizer = make("AdamW8bit", model)
    train(model, optimizer, range(3))
    full = dsd.get_optimizer_state_dict(
        model, optimizer, options=dsd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    weights = [w.clone() for w in whole(model)]
    train(model, optimizer, range(3, 4))
    return full, weights, whole(model)


def from_plain(saved: dict, weights: list[Tensor]) -> list[Tensor]:
    model = shard(Net(), **forms()["plain"]())
    optimizer = make("AdamW8bit", model)
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights):
            p.copy_(torch.distributed.tensor.distribute_tensor(w, p.device_mesh, p.placements))
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(3, 4))
    return whole(model)


def near(actual: list[Tensor], expected: list[Tensor], begin: list[Tensor]) -> None:
    for k, (a, e, w) in enumerate(zip(actual, expected, begin)):
        if k == 0:  # rows are blocks
            assert torch.equal(a, e)
        else:
            assert (a - e).norm() <= 5e-2 * (e - w).norm() + 1e-6, k


def test_a_plain_optimizer_goes_on_from_a_sharded_one_and_the_reverse() -> None:
    full, weights, expected = processes.run(2, to_plain)[0]
    model = Net()
    optimizer = make("AdamW8bit", model)
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights):
            p.copy_(w)
    names = [name for name, _ in model.named_parameters()]
    index = {name: k for k, name in enumerate(names)}
    groups = [{**g, "params": [index[n] for n in g["params"]]} for g in full["param_groups"]]
    optimizer.load_state_dict(
        {"state": {index[n]: s for n, s in full["state"].items()}, "param_groups": groups}
    )
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(3, 4))
    near(whole(model), expected, weights)
    near(processes.run(2, from_plain, saved, weights)[0], whole(model), weights)


def dcp_saved(folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """Save with DCP; returns the weights, and those after another step."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as dsd

    model = shard(Net(), **forms()["plain"]())
    optimizer = make("AdamW8bit", model)
    train(model, optimizer, range(3))
    model_state, optimizer_state = dsd.get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    weights = [w.clone() for w in whole(model)]
    train(model, optimizer, range(3, 4))
    return weights, whole(model)


def test_a_plain_optimizer_goes_on_from_a_sharded_checkpoint(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import format_utils
    from torch.distributed.checkpoint import state_dict as dsd

    weights, expected = processes.run(2, dcp_saved, str(tmp_path / "sharded"))[0]
    format_utils.dcp_to_torch_save(tmp_path / "sharded", tmp_path / "whole.pt")
    saved = torch.load(tmp_path / "whole.pt", weights_only=True)
    model = Net()
    optimizer = make("AdamW8bit", model)
    states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    dsd.set_state_dict(model, optimizer, **states, options=dsd.StateDictOptions(full_state_dict=True))
    assert all(map(torch.equal, whole(model), weights))
    train(model, optimizer, range(3, 4))
    near(whole(model), expected, weights)


def converted(bits: int) -> list[str]:
    """A run of torch's AdamW goes on here, and there again; returns what went wrong."""
    mistakes = []
    plain = shard(Net(), **forms()["plain"]())
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=1e-2)
    train(plain, theirs, range(2))
    ours = bnb.optim.AdamW(plain.parameters(), lr=1e-2, optim_bits=bits, min_8bit_size=0)
    bnb.convert.from_torch(ours, theirs.state_dict())
    back = bnb.convert.to_torch(ours)["state"]
    for k, param in enumerate(plain.parameters()):
        for name in ("exp_avg", "exp_avg_sq"):
            expected, actual = theirs.state[param][name], back[k][name]
            if (actual.shape, actual.placements) != (expected.shape, expected.placements):
                mistakes.append(f"{name} of {k} is placed {actual.placements}")
            x, y = actual.to_local(), expected.to_local()
            near = torch.equal(x, y) if bits == 32 else (x - y).norm() <= 0.05 * y.norm() + 1e-9
            if not near:
                mistakes.append(f"{name} of {k} differs")
    theirs.load_state_dict(bnb.convert.to_torch(ours))
    train(plain, theirs, range(2, 3))
    return mistakes


@pytest.mark.parametrize("bits", [8, 32])
def test_a_run_of_torch_goes_on_here_and_back(bits: int) -> None:
    assert processes.run(2, converted, bits) == [[], []]


# -- FSDP1 ---------------------------------------------------------------------------------------------------


def with_fsdp1(original: bool) -> list[str]:
    """Elementwise steps are right in pieces; what needs whole parameters raises."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    mistakes = []
    plain = Net()
    reference = bnb.optim.AdamW32bit(plain.parameters(), lr=1e-2)
    train(plain, reference, range(3))
    model = FSDP(Net(), device_id=torch.device("cpu"), use_orig_params=original)
    optimizer = bnb.optim.AdamW32bit(model.parameters(), lr=1e-2)
    train(model, optimizer, range(3))
    with FSDP.summon_full_params(model):
        for a, e in zip(model.parameters(), plain.parameters()):
            if not torch.allclose(a.view(-1)[: e.numel()], e.view(-1), atol=1e-6) and original:
                mistakes.append(f"{tuple(e.shape)} differs")
    for make_one in (
        lambda p: LAMB32bit(p, lr=1e-2),
        lambda p: AdamW8bit(p, lr=1e-2, max_grad_norm=1.0),
        lambda p: AdamW8bit(p, lr=1e-2, percentile_clipping=5, min_8bit_size=0),
        lambda p: AdamW8bit(p, lr=1e-2, block_wise=False, min_8bit_size=0),
    ):
        try:
            train(model, make_one(model.parameters()), range(1))
            mistakes.append("nothing was raised")
        except ValueError as error:
            if "use torch.distributed.fsdp.fully_shard" not in str(error):
                mistakes.append(str(error))
    return mistakes


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_steps_what_is_elementwise_and_refuses_the_rest(original: bool) -> None:
    assert processes.run(2, with_fsdp1, original) == [[], []]
