"""Five optimizers that the package does not have, each a rule of its own; --train compares them.

A rule is plain tensor code: `scalars` once for each parameter, in float64, and `direction` (or `update`) for
each element, in float32. `bnb_compile.optimizer` makes a class of it, which has 8-bit, 4-bit and 32-bit
states, one kernel for all parameters, schedules, clipping, checkpoints and export as the package's own.
"""

import argparse
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bnb_compile
from bnb_compile import Rule, State

# -- Tiger: https://kexue.fm/archives/9512 ------------------------------------------------------------------


class TigerHyper(NamedTuple):
    """Tiger's hyperparameters."""

    lr: float = 1e-3
    beta: float = 0.965
    weight_decay: float = 0.01


class TigerScalars(NamedTuple):
    """What the elements of a parameter share."""

    keep: Tensor
    step_size: Tensor
    beta: Tensor
    rest: Tensor


def tiger_scalars(h: Any, step: Tensor) -> TigerScalars:
    return TigerScalars(1 - h.lr * h.weight_decay, h.lr, h.beta, 1 - h.beta)


def tiger(param: Tensor, grad: Tensor, exp_avg: Tensor, s: TigerScalars) -> tuple[Tensor, Tensor]:
    exp_avg = s.beta * exp_avg + s.rest * grad
    return exp_avg.sign(), exp_avg


Tiger = bnb_compile.optimizer(Rule("tiger", TigerHyper, (State("exp_avg"),), tiger_scalars, tiger))

# -- Cautious Lion: https://arxiv.org/abs/2411.16085, without the division by the mask's mean ----------------


class CautiousHyper(NamedTuple):
    """Cautious Lion's hyperparameters."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0


class CautiousScalars(NamedTuple):
    """What the elements of a parameter share."""

    keep: Tensor
    step_size: Tensor
    beta1: Tensor
    rest1: Tensor
    beta2: Tensor
    rest2: Tensor


def cautious_scalars(h: Any, step: Tensor) -> CautiousScalars:
    return CautiousScalars(1 - h.lr * h.weight_decay, h.lr, h.beta1, 1 - h.beta1, h.beta2, 1 - h.beta2)


def cautious_lion(param: Tensor, grad: Tensor, exp_avg: Tensor, s: CautiousScalars) -> tuple[Tensor, Tensor]:
    sign = (s.beta1 * exp_avg + s.rest1 * grad).sign()
    return torch.where(sign * grad > 0, sign, 0.0), s.beta2 * exp_avg + s.rest2 * grad


CautiousLion = bnb_compile.optimizer(
    Rule("cautious_lion", CautiousHyper, (State("exp_avg"),), cautious_scalars, cautious_lion)
)

# -- Grams: https://arxiv.org/abs/2412.17107 ---------------------------------------------------------------


class AdamHyper(NamedTuple):
    """Hyperparameters of those that are like AdamW."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


class AdamScalars(NamedTuple):
    """What the elements of a parameter share."""

    keep: Tensor
    step_size: Tensor
    beta1: Tensor
    rest1: Tensor
    beta2: Tensor
    rest2: Tensor
    eps: Tensor


def adam_scalars(h: Any, step: Tensor) -> AdamScalars:
    root = (1 - h.beta2**step).sqrt()
    size = h.lr * root / (1 - h.beta1**step)
    keep = 1 - h.lr * h.weight_decay
    return AdamScalars(keep, size, h.beta1, 1 - h.beta1, h.beta2, 1 - h.beta2, h.eps * root)


def grams(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: AdamScalars) -> tuple:
    exp_avg = s.beta1 * exp_avg + s.rest1 * grad
    exp_avg_sq = s.beta2 * exp_avg_sq + s.rest2 * grad * grad
    size = exp_avg.abs() / (exp_avg_sq.sqrt() + s.eps)
    return size * grad.sign(), exp_avg, exp_avg_sq


MOMENTS = (
    State("exp_avg", over="exp_avg_sq", decays=("beta1", "beta2")),
    State("exp_avg_sq", nonnegative=True),
)
Grams = bnb_compile.optimizer(Rule("grams", AdamHyper, MOMENTS, adam_scalars, grams))

# -- ADOPT: https://arxiv.org/abs/2411.02853, algorithm 2 --------------------------------------------------


class AdoptHyper(NamedTuple):
    """ADOPT's hyperparameters."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.9999
    eps: float = 1e-6
    weight_decay: float = 0.0


class AdoptScalars(NamedTuple):
    """What the elements of a parameter share."""

    keep: Tensor
    step_size: Tensor
    beta1: Tensor
    rest1: Tensor
    beta2: Tensor
    rest2: Tensor
    eps: Tensor
    limit: Tensor


def adopt_scalars(h: Any, step: Tensor) -> AdoptScalars:
    first = step == 1  # which only begins the second moment
    size = torch.where(first, 0.0, h.lr)
    keep = torch.where(first, 1.0, 1 - h.lr * h.weight_decay)
    rest1, beta2 = torch.where(first, 0.0, 1 - h.beta1), torch.where(first, 0.0, h.beta2)
    limit = (step - 1).clamp(min=1) ** 0.25
    return AdoptScalars(keep, size, h.beta1, rest1, beta2, 1 - beta2, h.eps, limit)


def adopt(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: AdoptScalars) -> tuple:
    scaled = grad / torch.maximum(exp_avg_sq.sqrt(), s.eps)
    exp_avg = s.beta1 * exp_avg + s.rest1 * torch.minimum(torch.maximum(scaled, -s.limit), s.limit)
    return exp_avg, exp_avg, s.beta2 * exp_avg_sq + s.rest2 * grad * grad


ADOPT = bnb_compile.optimizer(
    Rule(
        "adopt", AdoptHyper, (State("exp_avg"), State("exp_avg_sq", nonnegative=True)), adopt_scalars, adopt
    ),
    name="ADOPT",
)

# -- Schedule-Free AdamW: https://arxiv.org/abs/2405.15682, without warm-up ----------------------------------


class FreeScalars(NamedTuple):
    """What the elements of a parameter share."""

    lr: Tensor
    weight_decay: Tensor
    beta1: Tensor
    beta2: Tensor
    rest2: Tensor
    correction: Tensor
    eps: Tensor
    weight: Tensor


def free_scalars(h: Any, step: Tensor) -> FreeScalars:
    root = (1 - h.beta2**step).sqrt()
    return FreeScalars(h.lr, h.weight_decay, h.beta1, h.beta2, 1 - h.beta2, root, h.eps, 1 / step)


def schedule_free(param: Tensor, grad: Tensor, z: Tensor, exp_avg_sq: Tensor, s: FreeScalars) -> tuple:
    """`param` is y, where gradients are taken; x, the average that is evaluated, is ``(y - (1-b) z) / b``."""
    exp_avg_sq = s.beta2 * exp_avg_sq + s.rest2 * grad * grad
    moved = s.lr * (grad / (exp_avg_sq.sqrt() / s.correction + s.eps) + s.weight_decay * param)
    x = (param - (1 - s.beta1) * z) / s.beta1
    z = z - moved
    x = (1 - s.weight) * x + s.weight * z
    return s.beta1 * x + (1 - s.beta1) * z, z, exp_avg_sq


ScheduleFreeAdamW = bnb_compile.optimizer(
    Rule(
        "schedule_free_adam_w",
        AdamHyper,
        (State("z", format="float32", initial="param"), State("exp_avg_sq", nonnegative=True)),
        free_scalars,
        update=schedule_free,
    ),
    name="ScheduleFreeAdamW",
)

OPTIMIZERS = {
    "AdamW8bit": bnb_compile.optim.AdamW8bit,
    "Tiger": partial(Tiger, lr=3e-4, optim_bits=8),
    "CautiousLion": partial(CautiousLion, lr=3e-4, optim_bits=8),
    "Grams": partial(Grams, states="ratio8"),
    "ADOPT": partial(ADOPT, optim_bits=8),
    "ScheduleFreeAdamW": partial(ScheduleFreeAdamW, lr=3e-3, optim_bits=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--train", action="store_true", help="train a small GPT with each, and draw the curves"
    )
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if not args.train:
        param = torch.nn.Parameter(torch.randn(1 << 16))
        for name, make in OPTIMIZERS.items():
            opt = make([param])
            param.grad = torch.randn_like(param)
            opt.step()
            (report,) = opt.precision_report()
            print(f"{name:18} {report['bytes_per_param']:.2f} bytes a parameter")
        return
    import matplotlib
    from gpt import GPT, Size, loss_of
    from text import read_text, windows

    matplotlib.use("agg")
    from matplotlib import pyplot

    training, _ = read_text(None, 10_000)
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(0)
        model, losses = GPT(Size(layers=2, width=128, context=64)), []
        opt = make(model.parameters())
        for _ in range(args.steps):
            x, y = windows(training, torch.randint(len(training) - 64, (16,)), 64)
            loss = loss_of(model, x, y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
        pyplot.plot(torch.tensor(losses).unfold(0, 10, 10).mean(1), label=name)
        print(f"{name:18} loss of the last 20 steps {sum(losses[-20:]) / 20:.4f}", flush=True)
    pyplot.legend()
    pyplot.savefig("own_optimizer.png", dpi=110)


if __name__ == "__main__":
    main()
