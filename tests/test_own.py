"""Optimizers from rules that the package does not have: those of examples/, and wrong ones."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn

import bnb_compile as bnb
from bnb_compile import Rule, State, backends, export
from bnb_compile.rules import (
    ADAGRAD,
    ADAM,
    ALL,
    LION,
    cautious,
    clipped_update,
    coupled_weight_decay,
    decoupled_weight_decay,
    error_feedback,
    mars,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import own_optimizer as own

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def no_recompile_limits_across_tests() -> None:
    torch._dynamo.reset()


# -- the examples, beside their authors' formulas in float64


class Reference:
    """An optimizer of one tensor in float64; `take` is a step."""

    def __init__(self, param: Tensor, **hyper: float) -> None:
        self.p, self.h, self.t = param.double(), hyper, 0
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)
        self.z = self.p.clone()

    def take(self, g: Tensor) -> None:
        raise NotImplementedError


class Tiger(Reference):
    def take(self, g: Tensor) -> None:
        self.m = self.h["beta"] * self.m + (1 - self.h["beta"]) * g
        self.p = self.p - self.h["lr"] * (self.m.sign() + self.h["weight_decay"] * self.p)


class CautiousLion(Reference):
    def take(self, g: Tensor) -> None:
        update = torch.lerp(g, self.m, self.h["beta1"]).sign()
        update = update * (update * g > 0)
        self.p = self.p * (1 - self.h["lr"] * self.h["weight_decay"]) - self.h["lr"] * update
        self.m = torch.lerp(g, self.m, self.h["beta2"])


class Grams(Reference):
    def take(self, g: Tensor) -> None:
        self.t += 1
        b1, b2 = self.h["beta1"], self.h["beta2"]
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        adam = self.m / (1 - b1**self.t) / ((self.v / (1 - b2**self.t)).sqrt() + self.h["eps"])
        self.p = self.p * (1 - self.h["lr"] * self.h["weight_decay"]) - self.h["lr"] * adam.abs() * g.sign()


class ADOPT(Reference):
    def take(self, g: Tensor) -> None:
        if self.t == 0:
            self.v = g * g
        else:
            self.p = self.p * (1 - self.h["lr"] * self.h["weight_decay"])
            scaled = g / self.v.sqrt().clamp(min=self.h["eps"])
            limit = self.t**0.25
            self.m = torch.lerp(self.m, scaled.clamp(-limit, limit), 1 - self.h["beta1"])
            self.p = self.p - self.h["lr"] * self.m
            self.v = self.h["beta2"] * self.v + (1 - self.h["beta2"]) * g * g
        self.t += 1


class ScheduleFreeAdamW(Reference):
    """The authors' loop: y is interpolated towards z, then moved."""

    def take(self, g: Tensor) -> None:
        b1, b2, lr = self.h["beta1"], self.h["beta2"], self.h["lr"]
        self.v = b2 * self.v + (1 - b2) * g * g
        g = g / ((self.v / (1 - b2 ** (self.t + 1))).sqrt() + self.h["eps"]) + self.h["weight_decay"] * self.p
        weight = 1 / (self.t + 1)
        self.p = torch.lerp(self.p, self.z, weight)
        self.p = self.p + lr * (b1 * (1 - weight) - 1) * g
        self.z = self.z - lr * g
        self.t += 1


REFERENCES: dict[str, tuple[type[Reference], dict[str, float]]] = {
    "Tiger": (Tiger, dict(lr=1e-2, beta=0.9, weight_decay=0.1)),
    "CautiousLion": (CautiousLion, dict(lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1)),
    "Grams": (Grams, dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)),
    "ADOPT": (ADOPT, dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1)),
    "ScheduleFreeAdamW": (
        ScheduleFreeAdamW,
        dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1),
    ),
}
each = pytest.mark.parametrize("name", REFERENCES)


def gradients(steps: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3000, generator=generator) for _ in range(steps)]


def made(name: str, **options: Any) -> tuple[Any, nn.Parameter]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(3000))
    return getattr(own, name)([param], min_8bit_size=1, **REFERENCES[name][1], **options), param


def run(opt: Any, param: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        param.grad = grad.clone()
        opt.step()


@each
def test_32_bits_are_the_formula(name: str) -> None:
    opt, param = made(name, optim_bits=32)
    reference = REFERENCES[name][0](param.detach(), **REFERENCES[name][1])
    for grad in gradients(60):
        reference.take(grad.double())
    run(opt, param, gradients(60))
    apart = (param.double() - reference.p).abs()
    # Signs of numbers that are nearly 0 may differ.
    assert (apart <= 2e-6 * reference.p.abs() + 1e-6).double().mean() > 0.999
    assert apart.max() < 0.1


@each
@pytest.mark.parametrize("states", ["dynamic8", "ratio8", "ratio4"])
def test_few_bits_are_near(name: str, states: str) -> None:
    opt, param = made(name, states=states)
    begin = param.detach().double()
    reference = REFERENCES[name][0](begin, **REFERENCES[name][1])
    for grad in gradients(30):
        reference.take(grad.double())
    run(opt, param, gradients(30))
    bound = 0.35 if states == "ratio4" else 0.2
    assert (param.double() - reference.p).norm() <= bound * (reference.p - begin).norm()


@torch._inductor.config.patch(fx_graph_cache=False)  # what is found there is captured by an earlier run
@torch._functorch.config.patch(enable_autograd_cache=False)
@each
@pytest.mark.parametrize("states", ["float32", "dynamic8"])
def test_eager_compiled_captured_and_exported_steps_are_one(name: str, states: str) -> None:
    found = {}
    for way in ("eager", "compiled", "captured", "exported"):
        opt, param = made(name, states=states, compile=way != "eager")
        run(opt, param, gradients(2))
        (grad,) = gradients(1, seed=1)
        before = dict(backends.counts)
        if way == "exported":
            module = export.OptimizerStep(opt)
            arguments = [param.detach().clone()], [grad], module.hyper()
            with torch.no_grad():
                torch.export.export(module, arguments).module()(*arguments)
            found[way] = arguments[0][0]
            continue
        param.grad = grad
        step = torch.compile(opt.step, fullgraph=True) if way == "captured" else opt.step
        step()
        ran = {key: backends.counts[key] - before.get(key, 0) for key in ("kernel", "captured")}
        assert ran == {"kernel": int(way == "compiled"), "captured": int(way == "captured")}
        found[way] = param.detach()
    for way, param in found.items():
        apart = (param - found["eager"]).abs() > 2e-6 * found["eager"].abs() + 1e-6
        assert apart.double().mean() < 2e-3, way


@each
def test_a_run_resumes_bitwise_and_copies_are_pickled(name: str) -> None:
    opt, param = made(name, optim_bits=8)
    run(opt, param, gradients(3))
    saved = copy.deepcopy(opt.state_dict())
    again, other = made(name, optim_bits=8)
    other.data.copy_(param.data)
    again.load_state_dict(saved)
    third = pickle.loads(pickle.dumps(opt))
    copied = third.param_groups[0]["params"][0]
    for one, p in ((opt, param), (again, other), (third, copied)):
        run(one, p, gradients(2, seed=1))
    assert torch.equal(param, other) and torch.equal(param, copied)
    assert type(third) is type(opt)


def test_hyperparameters_are_arguments_keys_and_data() -> None:
    params = [nn.Parameter(torch.zeros(4096)) for _ in range(2)]
    groups = [{"params": params[:1], "beta": 0.5}, {"params": params[1:], "lr": 0.25}]
    opt = own.Tiger(groups, lr="0.5", weight_decay=0.0)
    assert [group["beta"] for group in opt.param_groups] == [0.5, 0.965]
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for expected in (0.5, 0.25):
        for param in params:
            param.grad = torch.ones(4096)
        before = [param.detach().clone() for param in params]
        opt.step()
        assert (before[0] - params[0] == expected).all() and (before[1] - params[1] == expected / 2).all()
        schedule.step()
    with pytest.raises(TypeError, match="unexpected arguments.*'betas'"):
        own.Tiger(params, betas=(0.9, 0.99))
    with pytest.raises(ValueError, match="Invalid beta: 'x'"):
        own.Tiger(params, beta="x")


def test_everything_else_comes_along() -> None:
    """Overrides, clipping, trust ratios, stochastic rounding, AMP: of a rule that was written elsewhere."""
    small, large = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64, 128).bfloat16())
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.override_config(small, key_value_dict={"beta": 0.0, "lr": 0.5})
    opt = own.Tiger(
        [small, large],
        optim_bits=8,
        max_unorm=0.01,
        percentile_clipping=50,
        max_grad_norm=1.0,
        bf16_stochastic_round=True,
        amp_fused=True,
    )
    for _ in range(3):
        for param in (small, large):
            param.grad = torch.randn_like(param)
        opt.step()
    assert opt.precision_report()[1]["format"] == "dynamic8"
    assert large.isfinite().all() and (large != 1).any()
    text = str(bnb.explain(opt))
    assert "tiger_step_dynamic8" in text and "stochastic_round" in text
    assert "struct Rule" in bnb.explain(opt).source("cpp")
    assert "def update(" in bnb.explain(opt).source("triton")
    with pytest.raises(ValueError, match="language: 'rust', must be 'cpp' or 'triton'"):
        bnb.explain(opt).source("rust")
    with pytest.raises(ValueError, match="max_unorm=0.1, must be 0: rule schedule_free_adam_w has an update"):
        opt = own.ScheduleFreeAdamW([nn.Parameter(torch.ones(8))], max_unorm=0.1)
        opt.init_state()
    with pytest.raises(TypeError, match="explain\\(Adam\\): must be an optimizer of bnb_compile"):
        bnb.explain(torch.optim.Adam([small]))


def test_what_is_explained_is_what_there_is() -> None:
    param = nn.Parameter(torch.randn(256, 256))
    opt = bnb.optim.AdamW4bit([param])
    (report,) = bnb.explain(opt).buckets
    assert report.formats == {"exp_avg_sq": "log4", "exp_avg": "ratio4"} and report.compensated == (
        "exp_avg",
    )
    assert (report.elements, report.state_bytes, report.traffic) == (65536, 1.0625, 12 + 2 * 1.0625)
    assert report.milliseconds(1000) == pytest.approx(65536 * 14.125 / 1e9)
    assert bnb.explain(bnb.optim.LAMB([param], optim_bits=8)).buckets[0].compensated == ()


# -- rules that are wrong


class Hyper(NamedTuple):
    lr: float = 1e-3


class Scalars(NamedTuple):
    step_size: Tensor


def scalars(h: Any, step: Tensor) -> Scalars:
    return Scalars(h.lr)


def line_of(function: Callable, text: str) -> str:
    """Where a text stands in a function of this file."""
    lines = Path(__file__).read_text().splitlines()
    first = function.__code__.co_firstlineno
    return f"{__file__}:{next(k for k in range(first, len(lines) + 1) if text in lines[k - 1])}"


def sine(param: Tensor, grad: Tensor, exp_avg: Tensor, s: Scalars) -> tuple:
    half = 0.5 * grad
    return half.sin(), exp_avg


def branch(param: Tensor, grad: Tensor, exp_avg: Tensor, s: Scalars) -> tuple:
    if (grad > 0).all():
        return grad, exp_avg
    return -grad, exp_avg


def doubles(param: Tensor, grad: Tensor, exp_avg: Tensor, s: Scalars) -> tuple:
    return grad.double().sqrt().float(), exp_avg


OUTSIDE = torch.tensor(2.0)


def captured(param: Tensor, grad: Tensor, exp_avg: Tensor, s: Scalars) -> tuple:
    return grad * OUTSIDE, exp_avg


def forgets(param: Tensor, grad: Tensor, exp_avg: Tensor, s: Scalars) -> tuple:
    return (grad,)


def lacks(param: Tensor, grad: Tensor, exp_avg: Tensor, s: Any) -> tuple:
    return grad * s.beta, exp_avg


def shapes(param: Tensor, grad: Tensor, exp_avg: Tensor, s: Scalars) -> tuple:
    return grad[None], exp_avg


WRONG = {
    "an operation that no kernel has": (sine, NotImplementedError, "sin.*may use abs, add", "half.sin()"),
    "another dtype": (doubles, NotImplementedError, "may use abs, add", "grad.double()"),
    "a branch": (branch, ValueError, "branch with torch.where", "if (grad > 0)"),
    "a tensor from outside": (captured, ValueError, "uses a tensor from outside", "grad * OUTSIDE"),
    "a state that is not returned": (
        forgets,
        ValueError,
        r"must return \(direction, exp_avg\), got 1 results",
        "",
    ),
    "a scalar that is missing": (lacks, ValueError, "has no attribute 'beta'", "s.beta"),
    "another shape": (shapes, ValueError, "must return only tensors of the shape", "def shapes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_rule_is_refused_where_it_is_defined_with_its_line(what: str) -> None:
    function, error, message, text = WRONG[what]
    with pytest.raises(error, match=message) as raised:
        bnb.optimizer(Rule("wrong", Hyper, (State("exp_avg"),), scalars, function))
    assert line_of(function, text or "def forgets") in str(raised.value)


def plain(param: Tensor, grad: Tensor, s: Scalars) -> tuple:
    return (grad,)


def no_size(h: Any, step: Tensor) -> Any:
    return Scalars._make([h.lr])._asdict() and Other(h.lr)


class Other(NamedTuple):
    size: Tensor


class NoLr(NamedTuple):
    rate: float = 0.1


class NoDefault(NamedTuple):
    lr: float


class Taken(NamedTuple):
    lr: float = 0.1
    params: float = 0.1


def test_other_mistakes_say_what_is_allowed() -> None:
    def define(**changed: Any) -> None:
        given = dict(name="wrong", hyper=Hyper, states=(), scalars=scalars, direction=plain)
        bnb.optimizer(Rule(**{**given, **changed}))

    for changed, message in (
        (dict(scalars=no_size), "scalars has no 'step_size', only \\['size'\\]"),
        (dict(hyper=NoLr), "hyper has no 'lr', only \\['rate'\\]"),
        (dict(hyper=NoDefault), "lr must have a default"),
        (dict(hyper=Taken), "'params' cannot be a hyperparameter"),
        (dict(direction=None), "must have a direction or an update, and not both"),
        (dict(update=plain), "must have a direction or an update, and not both"),
        (dict(states=(State("grad"),), direction=forgets), "'grad' cannot be a name"),
        (
            dict(states=(State("m", over="v", decays=("a", "b")),), direction=forgets),
            "'v', which is no state",
        ),
        (dict(states=(State("m", format="int3"),), direction=forgets), "format='int3', must be one of"),
        (dict(name="adam"), "bnb_compile.rules.adam has a rule of this name"),
        (dict(name="momentum"), "bnb_compile has an algorithm of this name"),
        (dict(name="tiger"), "own_optimizer has a rule of this name"),
    ):
        with pytest.raises(ValueError, match=message):
            define(**changed)


def test_a_rule_that_is_defined_again_is_served_fresh() -> None:
    def define(factor: float) -> Any:
        def direction(param: Tensor, grad: Tensor, s: Scalars) -> tuple:
            return (factor * grad,)  # frozen into the rule

        return bnb.optimizer(Rule("again", Hyper, (), scalars, direction))

    def moved(cls: Any) -> float:
        param = nn.Parameter(torch.zeros(8))
        param.grad = torch.ones(8)
        cls([param], lr=1.0).step()
        return -param[0].item()

    first, second = define(2.0), define(3.0)
    assert (moved(first), moved(second), moved(first)) == (2.0, 3.0, 2.0)


def test_a_state_may_demand_its_format_and_where_it_begins() -> None:
    opt, param = made("ScheduleFreeAdamW", optim_bits=8)
    begin = param.detach().clone()
    opt.init_state()
    assert torch.equal(opt.state[param]["state1"], begin)
    assert (opt.state[param]["state1"].dtype, opt.state[param]["state2"].dtype) == (
        torch.float32,
        torch.uint8,
    )
    run(opt, param, gradients(2))
    del opt.state[param]
    run(opt, param, gradients(1, seed=1))
    assert int(opt.state[param]["step"]) == 1 and param.isfinite().all()


def test_rules_of_the_package_are_of_the_same_kind() -> None:
    for rule in ALL:
        assert not rule.has_update and rule.own_function is rule.direction
        shared = rule.shared(
            rule.hyper(*[torch.tensor(0.5).double()] * len(rule.hyper._fields)), torch.tensor(2.0)
        )
        assert {"keep", "step_size", "unit"} <= {*shared._fields} and math.isfinite(shared.keep)


# -- transforms ----------------------------------------------------------------------------------------------

CautiousTiger = bnb.optimizer(cautious(own.Tiger.rule), name="CautiousTiger")
CautiousAdamW = bnb.optimizer(cautious(ADAM), name="CautiousAdamW")
CautiousCoupled = bnb.optimizer(cautious(coupled_weight_decay(Rule("plain", Hyper, (), scalars, plain))))
Decoupled = bnb.optimizer(decoupled_weight_decay(Rule("plain", Hyper, (), scalars, plain)))


def stepped(cls: Any, grad: Tensor, **options: Any) -> Tensor:
    """How far a step moves a parameter of twos."""
    param = nn.Parameter(torch.full_like(grad, 2.0))
    param.grad = grad
    cls([param], **options).step()
    return 2.0 - param.detach()


def test_transforms_change_what_they_say() -> None:
    grad = torch.tensor([1.0, -0.5, 0.25, -4.0])
    assert torch.equal(stepped(Decoupled, grad, lr=0.5, weight_decay=0.125), 0.5 * (grad + 0.25))
    # The decay turns the second one round, so that it is not moved.
    expected = 0.5 * torch.where(torch.tensor([True, False, True, True]), grad + 0.75, 0.0)
    assert torch.equal(stepped(CautiousCoupled, grad, lr=0.5, weight_decay=0.375), expected)
    assert CautiousCoupled.rule.name == "cautious_coupled_plain"
    with pytest.raises(ValueError, match="adam has a weight_decay already"):
        decoupled_weight_decay(ADAM)
    with pytest.raises(ValueError, match="has an update, must have a direction to be made cautious"):
        cautious(own.ScheduleFreeAdamW.rule)


@pytest.mark.parametrize("states", ["float32", "ratio8"])
def test_a_cautious_optimizer_is_its_own_where_directions_agree(states: str) -> None:
    options = dict(lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1, states=states, min_8bit_size=1)
    params = [nn.Parameter(torch.ones(3000)) for _ in range(2)]
    careful = CautiousAdamW(params[:1], **options)
    usual = bnb.optim.AdamW(
        params[1:], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, states=states, min_8bit_size=1
    )
    grads = gradients(3)
    for grad in grads:
        before = [param.detach().clone() for param in params]
        for param, opt in zip(params, (careful, usual)):
            param.data.copy_(before[1])
            param.grad = grad.clone()
            opt.step()
        decayed = before[1] * (1 - 1e-3)
        agrees = (decayed - params[1]) * grad > 1e-5
        assert 0.5 < agrees.double().mean() < 1
        if states == "float32":
            torch.testing.assert_close(params[0][agrees], params[1][agrees], rtol=1e-6, atol=1e-7)
            against = (decayed - params[1]) * grad < -1e-5
            torch.testing.assert_close(params[0][against], decayed[against], rtol=1e-6, atol=1e-7)
    assert bnb.explain(careful).buckets[0].compensated == ()


def test_a_transformed_rule_of_a_user_is_a_part_of_the_disk_caches_key() -> None:
    from bnb_compile.lowering.cache_key import operator_hash

    op = CautiousTiger([nn.Parameter(torch.ones(8))])
    op.init_state()
    assert operator_hash(op.structure.buckets[0].op) is not None


# -- means over a parameter ----------------------------------------------------------------------------------


def new_mean(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Any) -> Tensor:
    """What has the sign of Adam's direction."""
    return s.beta1 * exp_avg + s.one_minus_beta1 * grad


NormalisedAdamW = bnb.optimizer(cautious(ADAM, normalised=True, sign=new_mean), name="NormalisedAdamW")
Clipped = bnb.optimizer(clipped_update(ADAM, limit=0.5), name="Clipped")
SHAPES = [(300,), (5, 7), (1,), (257,), (40, 33)]


def reference_of_means(kind: str, params: list[Tensor], grads: list[list[Tensor]], h: dict) -> list[Tensor]:
    """AdamW in float64; cautious as its authors have it, or with Adafactor's clip."""
    found = []
    for k, p in enumerate(params):
        p, m, v = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
        for t, of_step in enumerate(grads, 1):
            g = of_step[k].double()
            used = g.isfinite()
            g = torch.where(used, g, 0.0)
            m1, v1 = torch.lerp(m, g, 1 - h["beta1"]), torch.lerp(v, g * g, 1 - h["beta2"])
            root = (v1 / (1 - h["beta2"] ** t)).sqrt() + h["eps"]
            u = m1 / (1 - h["beta1"] ** t) / root
            if kind == "cautious":
                mask = (u * g > 0).double()
                u = u * mask / mask[used].mean().clamp(min=1e-3)
            else:
                u = u / (u[used].square().mean().sqrt() / 0.5).clamp(min=1.0)
            p = torch.where(used, p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * u, p)
            m, v = torch.where(used, m1, m), torch.where(used, v1, v)
        found.append(p)
    return found


@pytest.mark.parametrize("way", ["eager", "compiled", "captured"])
@pytest.mark.parametrize("kind, cls", [("cautious", NormalisedAdamW), ("clipped", Clipped)])
def test_means_are_those_of_a_parameter(kind: str, cls: Any, way: str) -> None:
    torch.manual_seed(0)
    h = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    begin = [torch.randn(shape) for shape in SHAPES]
    grads = [[torch.randn(shape) for shape in SHAPES] for _ in range(5)]
    grads[3][0][7:30] = math.nan  # which no mean counts
    expected = reference_of_means(kind, begin, grads, h)
    params = [nn.Parameter(x.clone()) for x in begin]
    opt = cls(params, **h, compile=way != "eager")
    step = torch.compile(opt.step, fullgraph=True) if way == "captured" else opt.step
    for of_step in grads:
        for param, grad in zip(params, of_step):
            param.grad = grad.clone()
        step()
    for param, exact in zip(params, expected):
        torch.testing.assert_close(param.double(), exact, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("states", ["dynamic8", "ratio4"])
def test_means_with_few_bits_are_the_same_eager_and_compiled(states: str) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(3000))
        opt = NormalisedAdamW([param], lr=1e-2, states=states, min_8bit_size=1, compile=compiled)
        run(opt, param, gradients(1))
        found.append(param.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


MARS = bnb.optimizer(mars(ADAM), name="MARS")
MarsLion = bnb.optimizer(mars(LION, clipped=False), name="MarsLion")


@pytest.mark.parametrize("way", ["eager", "compiled", "captured"])
@pytest.mark.parametrize("cls", [MARS, MarsLion])
def test_mars_is_its_authors_formula(cls: Any, way: str) -> None:
    torch.manual_seed(0)
    h = dict(lr=1e-2, beta1=0.95, beta2=0.99, weight_decay=0.1, gamma=0.025)
    begin = [torch.randn(shape) for shape in SHAPES]
    # The norms of some are above 1, of others below.
    grads = [[torch.randn(shape) * 0.05 for shape in SHAPES] for _ in range(5)]
    params = [nn.Parameter(x.clone()) for x in begin]
    opt = cls(params, **h, compile=way != "eager")
    step = torch.compile(opt.step, fullgraph=True) if way == "captured" else opt.step
    for of_step in grads:
        for param, grad in zip(params, of_step):
            param.grad = grad.clone()
        step()
    for k, (param, p) in enumerate(zip(params, begin)):
        p, m, v, last = p.double(), *torch.zeros(3, *p.shape).double()
        for t, of_step in enumerate(grads, 1):
            g = of_step[k].double()
            c, last = (g - last) * (h["gamma"] * h["beta1"] / (1 - h["beta1"])) + g, g
            if cls is MarsLion:  # which the authors clip, too
                u = torch.lerp(c, m, h["beta1"]).sign()
                m = torch.lerp(c, m, h["beta2"])
            else:
                c = c / c.norm().clamp(min=1)
                m, v = torch.lerp(c, m, h["beta1"]), torch.lerp(c * c, v, h["beta2"])
                u = m / (((v / (1 - h["beta2"] ** t)).sqrt() + 1e-8) * (1 - h["beta1"] ** t))
            p = p - h["lr"] * (h["weight_decay"] * p + u)
        torch.testing.assert_close(param.double(), p, rtol=5e-6, atol=2e-6)


EcoAdamW = bnb.optimizer(error_feedback(ADAM), name="EcoAdamW")
ECO_HYPER = dict(lr=1e-4, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)


def test_error_feedback_is_its_authors_formula() -> None:
    torch.manual_seed(0)
    h, begin = ECO_HYPER, torch.randn(3000).bfloat16()
    param = nn.Parameter(begin.clone())
    opt = EcoAdamW([param], **h, optim_bits=32)
    p, m, v = begin.double(), *torch.zeros(2, 3000).double()
    for t, grad in enumerate(gradients(5), 1):
        param.grad = grad.bfloat16()
        opt.step()
        g = param.grad.double()
        m, v = torch.lerp(g, m, h["beta1"]), torch.lerp(g * g, v, h["beta2"])
        root = (v / (1 - h["beta2"] ** t)).sqrt() + h["eps"]
        moved = p * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * m / (1 - h["beta1"] ** t) / root
        # Where float32 and float64 are on two sides of a half, both are right.
        p = torch.where(((moved - param) / param).abs() < 2**-8 + 1e-6, param.detach().double(), math.nan)
        unit = (1 - h["beta1"] ** t) * root / h["lr"]
        m = m + unit * (1 - 1 / h["beta1"]) * (moved - p)
    found = opt.state[param]
    torch.testing.assert_close(found["state1"].double(), m, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found["state2"].double(), v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("states", ["float32", "dynamic8", "ratio8"])
def test_error_feedback_moves_what_rounding_would_not(states: str) -> None:
    """Steps of 1e-3 are below half of the spacing of bfloat16 from 1 on, 2^-8."""
    torch.manual_seed(0)
    grads = [1 + 0.5 * torch.randn(4096) for _ in range(300)]
    moved: dict[Any, list[float]] = {bnb.optim.AdamW: [], EcoAdamW: []}
    for cls, found in moved.items():
        param = nn.Parameter(torch.full((4096,), 1.5, dtype=torch.bfloat16))
        opt = cls([param], lr=1e-3, weight_decay=0.0, states=states, min_8bit_size=1)
        for grad in grads:
            param.grad = grad.bfloat16()
            opt.step()
            found.append(1.5 - param.detach().float().mean().item())
    assert moved[bnb.optim.AdamW][-1] == 0
    # A step of AdamW is 1e-3 / sqrt(1.25). The momentum must grow before the first one.
    found = moved[EcoAdamW]
    assert found[-1] - found[149] == pytest.approx(150e-3 / math.sqrt(1.25), rel=0.05)


@pytest.mark.parametrize("states", ["float32", "ratio8"])
def test_error_feedback_is_the_same_eager_compiled_and_captured(states: str) -> None:
    found = []
    for way in ("eager", "compiled", "captured"):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(3000).bfloat16())
        opt = EcoAdamW([param], **ECO_HYPER, states=states, min_8bit_size=1, compile=way != "eager")
        step = torch.compile(opt.step, fullgraph=True) if way == "captured" else opt.step
        for grad in gradients(3):
            param.grad = grad.bfloat16()
            step()
        found.append((param.detach().float(), opt.state[param]["state1"]))
    assert torch.equal(found[1][0], found[2][0]) and torch.equal(found[1][1], found[2][1])
    near = (found[0][0] - found[1][0]).abs() <= 2**-8 * found[0][0].abs()
    assert near.all() and (found[0][0] == found[1][0]).double().mean() > 0.995


def test_error_feedback_is_for_bfloat16_only() -> None:
    with pytest.raises(ValueError, match="of torch.float32, must be of torch.bfloat16, to which rule error"):
        EcoAdamW([nn.Parameter(torch.ones(8))]).init_state()
    with pytest.raises(ValueError, match="lion: must have a state with an impulse"):
        error_feedback(LION)
    with pytest.raises(ValueError, match="adagrad: must have a hyperparameter beta1"):
        mars(ADAGRAD)


def test_what_cannot_go_with_means_raises() -> None:
    param = nn.Parameter(torch.ones(8192))
    for options in (dict(max_unorm=0.1), dict(block_wise=False, optim_bits=8)):
        with pytest.raises(
            ValueError, match="must be 0 and True, as rule normalised_cautious_adam takes means"
        ):
            NormalisedAdamW([param], **options).init_state()
    with pytest.raises(ValueError, match="takes the means \\['agreement'\\] already"):
        clipped_update(NormalisedAdamW.rule)
    assert cautious(Clipped.rule).means == Clipped.rule.means


def test_what_a_newcomer_found() -> None:
    def define(**changed: Any) -> Any:
        given = dict(name="newcomer", hyper=Hyper, states=(), scalars=scalars, direction=plain)
        return bnb.optimizer(Rule(**{**given, **changed}))

    def alone(param: Tensor, grad: Tensor, m: Tensor, s: Scalars) -> Tensor:
        return grad

    def short(param: Tensor, grad: Tensor) -> tuple:
        return (grad,)

    def between(param: Tensor, grad: Tensor, s: Scalars) -> tuple:
        return (grad.clamp(min=-s.step_size, max=0.5),)

    with pytest.raises(
        ValueError, match=r"test_own.py:\d+: alone must return \(direction, m\), got 1 results"
    ):
        define(direction=alone, states=(State("m"),))
    with pytest.raises(ValueError, match=r"test_own.py:\d+: short .*takes 2 positional arguments but 3"):
        define(direction=short)
    with pytest.raises(ValueError, match="rule 'new comer': must be a name of letters"):
        define(name="new comer")
    with pytest.raises(ValueError, match=r"test_own.py:\d+: between .*both limits must be numbers, or both"):
        define(direction=between)


def test_what_a_hostile_user_found() -> None:
    def define(**changed: Any) -> Any:
        given = dict(name="hostile", hyper=Hyper, states=(), scalars=scalars, direction=plain)
        return bnb.optimizer(Rule(**{**given, **changed}))

    def masks(param: Tensor, grad: Tensor, s: Scalars) -> tuple:
        return ((grad > 0) * grad,)

    class Option(NamedTuple):
        lr: float = 1.0
        max_grad_norm: float = 0.5

    with pytest.raises(NotImplementedError, match="mul.*may use abs, add"):
        define(direction=masks)
    with pytest.raises(ValueError, match="'max_grad_norm' cannot be a hyperparameter"):
        define(hyper=Option)
    for state in (
        State("m", initial=math.nan),
        State("m", initial="params"),
        State("m", nonnegative=True, initial=-1.0),
    ):
        with pytest.raises(ValueError, match="m has initial="):
            define(states=(state,), direction=forgets)


def test_a_copy_keeps_the_rule_that_it_was_made_of() -> None:
    def define(factor: float) -> Any:
        def direction(param: Tensor, grad: Tensor, s: Scalars) -> tuple:
            return (factor * grad,)

        return bnb.optimizer(Rule("copied", Hyper, (), scalars, direction))

    param = nn.Parameter(torch.zeros(8))
    opt = define(1.0)([param], lr=1.0)
    define(2.0)
    again, other = copy.deepcopy((opt, param))
    other.grad = torch.ones(8)
    again.step()
    assert (other == -1).all()
