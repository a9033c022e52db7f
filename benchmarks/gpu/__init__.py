"""One run that proves and measures everything on a GPU: python -m benchmarks.gpu.check, or make gpu-check."""
