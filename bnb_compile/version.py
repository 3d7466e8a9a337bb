"""The version of this package, and the oldest of what it needs; pyproject.toml says the same."""

VERSION = "0.3.0"
LEAST_TORCH = "2.11"
LEAST_TRITON = "3.6"
