"""What an optimizer keeps between steps: buckets, arenas, tables and checkpoints, and where they lie."""
