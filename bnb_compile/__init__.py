"""8-bit optimizers for compiled PyTorch training."""
