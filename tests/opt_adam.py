import torch
from helpers.formulas import Adam, OptTest

from bnb_compile import optim

TEST = OptTest(
    name="adam",
    cls=optim.AdamW,
    classes=(
        optim.Adam,
        optim.Adam8bit,
        optim.Adam32bit,
        optim.AdamW,
        optim.AdamW8bit,
        optim.AdamW32bit,
    ),
    plain=Adam,
    torch_class=torch.optim.AdamW,
    variants=(
        dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1),
        dict(lr=3e-4, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.01),
        dict(lr=1e-3, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1, amsgrad=True),
    ),
    relative_error_8bit=0.025,
    invalid=(
        (dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
        (dict(betas=(1.0, 0.999)), "Invalid beta parameter at index 0: 1.0"),
        (dict(betas=(0.9, -0.1)), "Invalid beta parameter at index 1: -0.1"),
        (dict(betas=(0.9,)), "0.9"),
        (dict(amsgrad=2), "Invalid amsgrad: 2"),
        (dict(nesterov=True), "nesterov"),
    ),
)
