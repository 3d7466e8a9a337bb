import torch
from helpers.formulas import Adagrad, OptTest

from bnb_compile import optim

TEST = OptTest(
    name="adagrad",
    cls=optim.Adagrad,
    classes=(optim.Adagrad, optim.Adagrad8bit, optim.Adagrad32bit),
    plain=Adagrad,
    torch_class=torch.optim.Adagrad,
    variants=(
        dict(lr=1e-2, eps=1e-10, weight_decay=0.0),
        dict(lr=1e-2, eps=1e-8, weight_decay=0.1, lr_decay=0.01),
        dict(lr=1e-2, eps=1e-10, initial_accumulator_value=0.1),
    ),
    relative_error_8bit=0.012,
    invalid=(
        (dict(eps=-1e-10), "Invalid epsilon value: -1e-10"),
        (dict(lr_decay=-0.1), "Invalid lr_decay: -0.1"),
        (dict(initial_accumulator_value=-1.0), "Invalid initial_accumulator_value: -1.0"),
    ),
)
