from helpers.formulas import LARS, OptTest

from bnb_compile import optim

TEST = OptTest(
    name="lars",
    cls=optim.LARS,
    classes=(optim.LARS, optim.LARS8bit, optim.LARS32bit),
    plain=LARS,
    variants=(
        dict(lr=1.0, momentum=0.9, weight_decay=0.0),
        dict(lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.1, max_unorm=0.1),
        dict(lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.01),
        dict(lr=0.5, momentum=0.0, weight_decay=0.1),
        dict(lr=0.1, momentum=0.9, weight_decay=0.1, max_unorm=0.0),
    ),
    relative_error_8bit=0.025,
    invalid=(
        (dict(momentum=1.0), "Invalid beta parameter at index 0: 1.0"),
        (dict(dampening=-0.5), "Invalid beta parameter at index 1: -0.5"),
        (dict(nesterov=True, dampening=0.1), "dampening=0.1"),
    ),
)
