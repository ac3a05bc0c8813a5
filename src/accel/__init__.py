"""accel: a tracing JIT for unmodified PyTorch programs."""
