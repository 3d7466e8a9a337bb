import torch
from helpers.formulas import OptTest, RMSprop

from bnb_compile import optim

TEST = OptTest(
    name="rmsprop",
    cls=optim.RMSprop,
    classes=(optim.RMSprop, optim.RMSprop8bit, optim.RMSprop32bit),
    plain=RMSprop,
    torch_class=torch.optim.RMSprop,
    variants=(
        dict(lr=1e-2, alpha=0.9, eps=1e-8, weight_decay=0.0),
        dict(lr=1e-3, alpha=0.99, eps=1e-6, weight_decay=0.1, momentum=0.9),
        dict(lr=1e-3, alpha=0.95, eps=1e-8, weight_decay=0.01, centered=True),
        dict(lr=1e-3, alpha=0.99, eps=1e-8, momentum=0.5, centered=True),
    ),
    relative_error_8bit=0.028,
    invalid=(
        (dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
        (dict(alpha=1.0), "Invalid beta parameter at index 0: 1.0"),
        (dict(momentum=-0.5), "Invalid beta parameter at index 1: -0.5"),
        (dict(centered="no"), "Invalid centered: 'no'"),
    ),
)
