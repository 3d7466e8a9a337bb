from helpers.formulas import LAMB, OptTest

from bnb_compile import optim

TEST = OptTest(
    name="lamb",
    cls=optim.LAMB,
    classes=(optim.LAMB, optim.LAMB8bit, optim.LAMB32bit),
    plain=LAMB,
    variants=(
        dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, max_unorm=0.5),
        dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, adam_w_mode=False),
        dict(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, bias_correction=False, max_unorm=0.0),
        dict(lr=1e-2, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.1, amsgrad=True),
    ),
    relative_error_8bit=0.025,
    invalid=(
        (dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
        (dict(betas=(0.9, 1.0)), "Invalid beta parameter at index 1: 1.0"),
        (dict(bias_correction="maybe"), "Invalid bias_correction: 'maybe'"),
        (dict(adam_w_mode=None), "Invalid adam_w_mode: None"),
    ),
)
