"""Batch norm against layer norm over batch sizes 1 to 128, on handwritten digits.

    python -m examples.batch_size [--output batch_size.png] [--small]

Batch norm normalises each feature over the batch: a small batch gives noisy statistics, a batch of one gives none,
and inference replaces them by averages that were collected on the way. Layer norm normalises each example over its
features: no statistics to share, and nothing that differs between training and inference.
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

from .data import digits

BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
NORMS = {"layer norm": lnc.LayerNorm, "batch norm": nn.BatchNorm1d, "no norm": lambda features: nn.Identity()}
WIDTH, LAYERS, LEAST_STEPS = 96, 4, 150


def network(norm) -> nn.Sequential:
    layers, size = [], 64
    for _ in range(LAYERS):
        layers += [nn.Linear(size, WIDTH), norm(WIDTH), nn.ReLU()]
        size = WIDTH
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int, epochs: int) -> None:
    # Large batches take more epochs and larger steps, so that every size has its chance.
    epochs = max(epochs, math.ceil(LEAST_STEPS / (len(x) // batch)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3 * (batch / 32) ** 0.5, fused=True)
    model.train()
    for _ in range(epochs):
        for piece in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(model(x[piece]), y[piece])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def accuracy(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int, training: bool
) -> tuple[float, torch.Tensor]:
    """(share of right answers, logits), with the statistics of training on batches of this size, or of inference."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(training)
    whole = len(x) // batch * batch
    logits = torch.cat([model(piece) for piece in x[:whole].split(batch)])
    model.load_state_dict(state)  # training mode moves batch norm's averages
    return (logits.argmax(1) == y[:whole]).float().mean().item(), logits


def run(name: str, batch: int, epochs: int, seeds: int, data) -> dict[str, float] | str:
    """Means over the seeds, or what PyTorch says where it refuses."""
    x, y, test_x, test_y = data
    totals = {"inference": 0.0, "training": 0.0, "gap": 0.0}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = network(NORMS[name])
        try:
            train(model, x, y, batch, epochs)
        except ValueError as error:
            return str(error)
        scores, logits = zip(*(accuracy(model, test_x, test_y, batch, mode) for mode in (False, True)), strict=True)
        totals["inference"] += scores[0] / seeds
        totals["training"] += scores[1] / seeds
        totals["gap"] += ((logits[0] - logits[1]).abs().mean() / logits[0].abs().mean()).item() / seeds
    return totals


def draw(results, output: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    lines = [
        ("layer norm", "inference", "layer norm", "C0o-"),
        ("batch norm", "inference", "batch norm, collected statistics (inference)", "C3s-"),
        ("batch norm", "training", "batch norm, the batch's own statistics", "C1^--"),
        ("no norm", "inference", "no norm", "C7.:"),
    ]
    for name, key, label, style in lines:
        points = [(b, 100 * r[key]) for b, r in results[name].items() if isinstance(r, dict)]
        left.plot(*zip(*points, strict=True), style, label=label)
    for name, style in (("layer norm", "C0o-"), ("batch norm", "C3s-")):
        points = [(b, 100 * r["gap"]) for b, r in results[name].items() if isinstance(r, dict)]
        right.plot(*zip(*points, strict=True), style, label=name)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(BATCH_SIZES, BATCH_SIZES)
        axes.set_xlabel("batch size")
        axes.grid(alpha=0.3)
        axes.legend()
        refused = [b for b, r in results["batch norm"].items() if isinstance(r, str)]
        for batch in refused:
            axes.axvspan(batch / 1.2, batch * 1.2, color="C3", alpha=0.12, lw=0)
            where = axes.get_xaxis_transform()
            axes.text(
                batch, 0.5, "batch norm refuses", rotation=90, ha="center", va="center", transform=where, color="C3"
            )
    left.set_ylabel("test accuracy, %")
    left.set_title("Digits: accuracy by batch size")
    right.set_ylabel("mean change of a logit, % of its mean size")
    right.set_title("Training mode against inference mode")
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("batch_size.png"))
    parser.add_argument("--small", action="store_true", help="fewer batch sizes, epochs and seeds, for a quick look")
    options = parser.parse_args()
    sizes, epochs, seeds = ([1, 4, 32], 1, 1) if options.small else (BATCH_SIZES, 2, 2)
    torch.set_num_threads(1)  # such small layers gain nothing from more
    data = digits()
    results = {name: {batch: run(name, batch, epochs, seeds, data) for batch in sizes} for name in NORMS}
    draw(results, options.output)

    layer, batch = results["layer norm"], results["batch norm"]
    refused = [b for b, r in batch.items() if isinstance(r, str)]
    tried = {b: r for b, r in batch.items() if isinstance(r, dict)}
    smallest, largest = min(tried), max(tried)
    accuracies = [r["inference"] for r in layer.values()]
    counts = f"{len(data[0])} digits to train on, {len(data[2])} to test, {LAYERS} hidden layers of {WIDTH}"
    print(f"{counts};")
    print(f"  epochs: {epochs}, or what {LEAST_STEPS} steps need; seeds: {seeds}.")
    print(f"Layer norm is right between {100 * min(accuracies):.1f}% and {100 * max(accuracies):.1f}% of the time.")
    for size in refused:
        print(f"Batch size {size}: layer norm {100 * layer[size]['inference']:.1f}%; batch norm cannot train:")
        print(f"  {batch[size]}")
    for size in (smallest, largest):
        ours, theirs = 100 * layer[size]["inference"], 100 * tried[size]["inference"]
        own = 100 * tried[size]["training"]
        print(f"Batch size {size}: layer norm {ours:.1f}%, batch norm {theirs:.1f}% with the statistics it collected,")
        print(f"  {own:.1f}% with those of each test batch.")
    gaps = (
        f"{100 * tried[smallest]['gap']:.0f}% at batch size {smallest}, {100 * tried[largest]['gap']:.0f}% at {largest}"
    )
    print(f"From training to inference a logit changes with batch norm by {gaps};")
    print(f"  with layer norm by {100 * max(r['gap'] for r in layer.values()):.0f}%, for there is nothing to switch.")
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    main()
