from helpers.formulas import Lion, OptTest

from bnb_compile import optim

TEST = OptTest(
    name="lion",
    cls=optim.Lion,
    classes=(optim.Lion, optim.Lion8bit, optim.Lion32bit),
    plain=Lion,
    variants=(
        dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0),
        dict(lr=1e-3, betas=(0.95, 0.98), weight_decay=0.1),
    ),
    relative_error_8bit=0.07,
    invalid=(
        (dict(betas=(0.9, 1.0)), "Invalid beta parameter at index 1: 1.0"),
        (dict(nesterov=True), "nesterov"),
    ),
)
