"""Steps as Triton."""
