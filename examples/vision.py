"""Train a small convolutional network on pictures of digits, with torch's AdamW and with AdamW8bit.

    make vision
    python examples/vision.py --seeds 5

The pictures are the 1,797 of 8 x 8 pixels that scikit-learn ships; nothing is downloaded. Both optimizers
start from the same weights and see the same batches, once for each seed. `train` is an ordinary loop: the
class of its optimizer is all that differs.
"""

import argparse
import time

import torch
from memory import state_bytes
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bnb_compile.optim import AdamW8bit

BATCH = 64
TRAINING = 1400  # pictures, of which the rest are tested on
LR = 3e-3
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "torch AdamW": torch.optim.AdamW,
    "AdamW8bit": AdamW8bit,
}


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(convolution(width, width), nn.ReLU(), convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Of a batch of feature maps."""
        return torch.relu(x + self.inner(x))


def convolution(width: int, to: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, to, 3, padding=1, bias=False), nn.BatchNorm2d(to))


def make_model(width: int = 24) -> nn.Module:
    """A residual network of 63 thousand parameters."""
    return nn.Sequential(
        convolution(1, width),
        nn.ReLU(),
        Residual(width),
        nn.MaxPool2d(2),
        convolution(width, 2 * width),
        nn.ReLU(),
        Residual(2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def read_digits() -> tuple[Tensor, Tensor]:
    """Pictures with values from 0 to 1, in an order that is always the same, and the digits."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(digits.target)[order]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    epochs: int,
    generator: torch.Generator,
) -> float:
    """Train on all pictures so many times; returns the mean loss of the last time."""
    model.train()
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * steps)
    for _ in range(epochs):
        losses = []
        for batch in torch.randperm(len(x), generator=generator)[: steps * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the pictures whose digit is found."""
    model.eval()
    return (model(x).argmax(1) == y).float().mean().item()


def run(name: str, seed: int, epochs: int, x: Tensor, y: Tensor) -> dict[str, float]:
    """Train with one optimizer, and test."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=LR, weight_decay=0.05)
    begin = time.perf_counter()
    loss = train(model, optimizer, x[:TRAINING], y[:TRAINING], epochs, torch.Generator().manual_seed(seed))
    return {
        "loss": loss,
        "accuracy": accuracy(model, x[TRAINING:], y[TRAINING:]),
        "bytes": state_bytes(optimizer) / sum(param.numel() for param in model.parameters()),
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    """Read the arguments, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each optimizer")
    args = parser.parse_args()
    torch.set_num_threads(1)  # such small pictures are no work for more
    x, y = read_digits()
    numel = sum(param.numel() for param in make_model().parameters())
    print(f"{numel:,} parameters, {TRAINING:,} pictures to train on, {len(x) - TRAINING} to test on\n")
    print(f"{'':12} {'seed':>4} {'loss':>7} {'accuracy':>9} {'states, bytes/param':>20} {'seconds':>8}")
    for seed in range(args.seeds):
        for name in OPTIMIZERS:
            row = run(name, seed, args.epochs, x, y)
            print(
                f"{name:12} {seed:4} {row['loss']:7.4f} {row['accuracy']:9.2%} {row['bytes']:20.2f}"
                f" {row['seconds']:8.1f}",
                flush=True,
            )
    print(
        "\n(AdamW8bit has 32-bit states for parameters of fewer than 4,096 elements; its first run compiles)"
    )


if __name__ == "__main__":
    main()
