"""What the examples learn from: real data that comes with Python and with scikit-learn. Nothing is downloaded."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY = 128


def text() -> tuple[Tensor, Tensor]:
    """English, from Python's own manual, as ASCII codes: int64 [length] to train on, and the last tenth to test."""
    letters = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    codes = torch.frombuffer(bytearray(letters), dtype=torch.uint8).long()
    cut = len(codes) * 9 // 10
    return codes[:cut], codes[cut:]


def windows(codes: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` random pieces of ``codes`` and the same one letter on: both int64 [count, length]."""
    starts = torch.randint(len(codes) - length - 1, (count, 1), generator=generator)
    pieces = codes[starts + torch.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 handwritten digits: inputs float32 [n, 64] and labels int64 [n] to train on, and a fifth to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels).long()[order]
    cut = len(y) * 4 // 5
    return x[:cut], y[:cut], x[cut:], y[cut:]
