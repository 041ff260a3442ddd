"""Speed and accuracy against native PyTorch: ``python -m benchmarks`` and ``python -m benchmarks.accuracy``."""
