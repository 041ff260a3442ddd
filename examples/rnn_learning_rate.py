"""An LSTM with and without layer norm over growing learning rates, on English text.

    python -m examples.rnn_learning_rate [--output rnn_learning_rate.png] [--small]

Both read Python's manual letter by letter and say which letter comes next. The gates of the layer-normalised one see
projections of a fixed size, however far a step of the optimizer has carried the weights.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import layernorm_cuda as lnc

from .data import VOCABULARY, text, windows

RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
LSTMS = {"LSTM": nn.LSTM, "LSTM with layer norm": lnc.LayerNormLSTM}
WIDTH, LENGTH, BATCH = 64, 24, 16


class Reader(nn.Module):
    """Letters int64 [batch, length] to logits [batch, length, VOCABULARY] of the letter that follows each."""

    def __init__(self, lstm):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = lstm(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, letters):
        return self.head(self.lstm(self.embed(letters))[0])


def loss_of(model, codes, count, generator):
    letters, following = windows(codes, count, LENGTH, generator)
    return F.cross_entropy(model(letters).flatten(0, 1), following.flatten())


def train(lstm, rate: float, steps: int, data) -> tuple[list[float], float]:
    """(training loss by step, test loss at the end), in bits per letter."""
    torch.manual_seed(0)
    model, generator = Reader(lstm), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    curve = []
    for _ in range(steps):
        loss = loss_of(model, data[0], BATCH, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item() / math.log(2))
    with torch.no_grad():
        return curve, loss_of(model, data[1], 256, generator).item() / math.log(2)


def unigram(data) -> float:
    """The test loss, in bits per letter, of knowing nothing but how frequent each letter is."""
    share = (torch.bincount(data[0], minlength=VOCABULARY) + 1).double()
    return -(share / share.sum()).log2()[data[1]].mean().item()


def draw(results, floor: float, output: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (name, by_rate), style in zip(results.items(), ("C3s-", "C0o-"), strict=True):
        left.plot(list(by_rate), [test for _, test in by_rate.values()], style, label=name)
        for k, (rate, (curve, _)) in enumerate(by_rate.items()):
            smooth = torch.tensor(curve).unfold(0, min(10, len(curve)), 1).mean(1)
            right.plot(smooth, style[:2], alpha=(k + 2) / (len(by_rate) + 1), label=f"{name}, {rate:g}")
    left.axhline(floor, color="C7", ls=":", label="letter frequencies alone")
    top = 1.6 * floor
    for axes in (left, right):
        axes.set_ylim(top=min(top, axes.get_ylim()[1]))
        axes.grid(alpha=0.3)
    left.legend()
    right.legend(fontsize=6, ncols=2)
    left.set_xscale("log")
    left.set_xlabel("learning rate (Adam)")
    left.set_ylabel("test loss, bits per letter")
    left.set_title("After the last step")
    right.set_xlabel("step")
    right.set_ylabel("training loss, bits per letter (mean of 10 steps)")
    right.set_title("On the way; darker is a larger learning rate")
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("rnn_learning_rate.png"))
    parser.add_argument("--small", action="store_true", help="fewer rates and steps, for a quick look")
    options = parser.parse_args()
    rates, steps = ([0.003, 0.1], 25) if options.small else (RATES, 150)
    torch.set_num_threads(1)  # such small layers gain nothing from more
    data = text()
    results = {name: {rate: train(lstm, rate, steps, data) for rate in rates} for name, lstm in LSTMS.items()}
    floor = unigram(data)
    draw(results, floor, options.output)

    tests = {name: {rate: test for rate, (_, test) in by_rate.items()} for name, by_rate in results.items()}
    plain, normed = tests.values()
    print(
        f"{len(data[0])} letters of English to train on, {len(data[1])} to test; {steps} steps of {BATCH} x {LENGTH}."
    )
    print(f"Letter frequencies alone cost {floor:.2f} bits per letter.")
    print("Learning rate: test loss without, with layer norm")
    for rate in rates:
        print(f"  {rate:<6g} {plain[rate]:.2f}  {normed[rate]:.2f}")
    for name, losses in tests.items():
        best = min(losses, key=losses.get)
        usable = [rate for rate, loss in losses.items() if loss < losses[best] + 0.5]
        span = f"{min(usable):g} to {max(usable):g}"
        print(f"{name}: best {losses[best]:.2f} at {best:g}; within half a bit of that from {span}.")
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    main()
