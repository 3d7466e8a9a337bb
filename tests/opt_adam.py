import torch
from reference import AdamW, OptTest

from bnb_compile import optim

TEST = OptTest(
    name="adam",
    general=optim.AdamW,
    classes={
        optim.Adam: (None, dict(weight_decay=0)),
        optim.Adam8bit: (8, dict(weight_decay=0)),
        optim.Adam32bit: (32, dict(weight_decay=0)),
        optim.AdamW: (None, dict(weight_decay=1e-2)),
        optim.AdamW8bit: (8, dict(weight_decay=1e-2)),
        optim.AdamW32bit: (32, dict(weight_decay=1e-2)),
    },
    reference=AdamW,
    torch_class=torch.optim.AdamW,
    variants=(
        dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1),
        dict(lr=3e-4, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.01),
    ),
    states=2,
    invalid=(
        (dict(lr=-0.5), "Invalid learning rate: -0.5"),
        (dict(lr=float("nan")), "Invalid learning rate: nan"),
        (dict(lr="fast"), "Invalid learning rate: .*fast"),
        (dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
        (dict(betas=(1.0, 0.999)), "Invalid beta parameter at index 0: 1.0"),
        (dict(betas=(0.9, -0.1)), "Invalid beta parameter at index 1: -0.1"),
        (dict(betas=(0.9,)), "0.9"),
        (dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
        (dict(optim_bits=4), "4"),
    ),
    unsupported=(
        dict(amsgrad=True),
        dict(percentile_clipping=5),
        dict(block_wise=False),
        dict(is_paged=True),
        dict(max_unorm=1.0),
        dict(skip_zeros=True),
        dict(nesterov=True),
    ),
    relative_error_8bit=0.025,
    step_error_8bit={
        torch.float32: (6e-5, 6e-4),
        torch.float16: (6e-5, 6e-4),
        torch.bfloat16: (1.7e-4, 1.6e-3),
    },
)
