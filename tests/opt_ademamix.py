from helpers.formulas import AdEMAMix, OptTest

from bnb_compile import optim

TEST = OptTest(
    name="ademamix",
    cls=optim.AdEMAMix,
    classes=(optim.AdEMAMix, optim.AdEMAMix8bit, optim.AdEMAMix32bit),
    plain=AdEMAMix,
    variants=(
        dict(lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, eps=1e-8, weight_decay=0.0),
        dict(lr=1e-2, betas=(0.8, 0.95, 0.999), alpha=3.0, eps=1e-6, weight_decay=0.1, t_alpha=40),
        dict(lr=1e-3, betas=(0.9, 0.99, 0.999), alpha=8.0, eps=1e-8, t_beta3=60),
        dict(lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, eps=1e-8, t_alpha=1000, t_beta3=1000),
    ),
    relative_error_8bit=0.055,
    invalid=(
        (dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
        (dict(betas=(0.9, 0.999)), "Invalid betas: .*must be 3"),
        (dict(betas=(0.9, 0.999, 1.0)), "Invalid beta parameter at index 2: 1.0"),
        (dict(alpha=-1.0), "Invalid alpha: -1.0"),
        (dict(t_alpha=-5), "Invalid t_alpha: -5"),
        (dict(t_beta3=100, betas=(0.0, 0.999, 0.9999)), "t_beta3=100"),
    ),
)
