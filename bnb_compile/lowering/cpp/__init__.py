"""Steps as vectorised C++."""
