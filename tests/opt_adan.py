from helpers.formulas import OptTest, Reference

from bnb_compile import optim


class Adan(Reference):
    """Algorithm 1 of https://arxiv.org/abs/2208.06677 with the bias corrections of the authors' code."""

    def __init__(self, params, lr, betas, eps, weight_decay=0.0, **options) -> None:
        super().__init__(params, lr, weight_decay, True, [0.0] * 4, **options)
        self.betas, self.eps = betas, eps

    def rate(self, t):
        # Dividing by 1 + lr * weight_decay is a smaller rate, and as much of the parameter taken away.
        return self.lr / (1 + self.lr * self.weight_decay)

    def update(self, g, t, m, v, d, previous):
        beta1, beta2, beta3 = self.betas
        diff = g - previous if t > 1 else 0 * g
        m = beta1 * m + (1 - beta1) * g
        d = beta2 * d + (1 - beta2) * diff
        v = beta3 * v + (1 - beta3) * (g + beta2 * diff) ** 2
        c1, c2, c3 = (1 - beta**t for beta in self.betas)
        return (m / c1 + beta2 * d / c2) / ((v / c3).sqrt() + self.eps), m, v, d, g


TEST = OptTest(
    name="adan",
    cls=optim.Adan,
    classes=(optim.Adan, optim.Adan8bit, optim.Adan32bit),
    plain=Adan,
    variants=(
        dict(lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0),
        dict(lr=1e-2, betas=(0.9, 0.8, 0.95), eps=1e-6, weight_decay=0.01),
    ),
    relative_error_8bit=0.042,
    relative_error_32bit=3e-6,
    compiled_error_8bit=2e-3,
    invalid=((dict(betas=(0.9, 0.9)), "0.9, 0.9"),),
)
