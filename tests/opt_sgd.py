import torch
from helpers.formulas import SGD, OptTest

from bnb_compile import optim

TEST = OptTest(
    name="sgd",
    cls=optim.SGD,
    classes=(optim.SGD, optim.SGD8bit, optim.SGD32bit),
    plain=SGD,
    torch_class=torch.optim.SGD,
    variants=(
        dict(lr=1e-2, momentum=0.9, weight_decay=0.0),
        dict(lr=1e-1, momentum=0.8, dampening=0.3, weight_decay=0.1),
        dict(lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.01),
        dict(lr=1e-1, momentum=0.0, weight_decay=0.1),
    ),
    relative_error_8bit=0.025,
    invalid=(
        (dict(momentum=1.0), "Invalid beta parameter at index 0: 1.0"),
        (dict(dampening=-0.5), "Invalid beta parameter at index 1: -0.5"),
        (dict(nesterov=True, momentum=0.0), "momentum=0.0"),
        (dict(nesterov=True, dampening=0.1), "dampening=0.1"),
    ),
)
