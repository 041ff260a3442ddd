"""Pre-norm against post-norm Transformers over growing depth, on English text.

    python -m examples.norm_position [--output norm_position.png] [--small]

Post-norm (Vaswani et al. 2017) normalises the residual stream after every addition; pre-norm (Xiong et al. 2020,
https://arxiv.org/abs/2002.04745) only what each layer reads of it, so that a path without norms leads from the loss to
every layer. Both are the same ``AddLayerNorm``: pre-norm passes its sum on, post-norm its output. No warm-up.
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

DEPTHS = [1, 2, 4, 8, 16]
WIDTH, HEADS, LENGTH, BATCH, RATE = 48, 4, 32, 8, 2e-3


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Letters int64 [batch, length] to logits [batch, length, VOCABULARY] of the letter that follows each.

    Each sublayer's norm comes with the addition before it (pre-norm) or after it (post-norm).
    """

    def __init__(self, depth: int, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.first = lnc.LayerNorm(WIDTH)
        self.sublayers, self.norms = nn.ModuleList(), nn.ModuleList()
        for _ in range(depth):
            feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
            self.sublayers += [Attention(), feed_forward]
            self.norms += [lnc.AddLayerNorm(WIDTH), lnc.AddLayerNorm(WIDTH)]
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, letters):
        stream = self.embed(letters) + self.place.weight
        hidden = self.first(stream)
        stream = stream if self.pre_norm else hidden
        for sublayer, norm in zip(self.sublayers, self.norms, strict=True):
            hidden, total = norm(sublayer(hidden), stream)
            stream = total if self.pre_norm else hidden
        return self.head(hidden)


def loss_of(model, codes, count, generator):
    letters, following = windows(codes, count, LENGTH, generator)
    return F.cross_entropy(model(letters).flatten(0, 1), following.flatten())


def train(depth: int, pre_norm: bool, steps: int, data) -> tuple[list[float], float]:
    """(norm of the gradient of each feed-forward layer's last weight before the first step, test loss in bits)."""
    torch.manual_seed(0)
    model, generator = Transformer(depth, pre_norm), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), RATE, betas=(0.9, 0.98), fused=True)
    first = []
    for step in range(steps):
        loss = loss_of(model, data[0], BATCH, generator)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            first = [sublayer[-1].weight.grad.norm().item() for sublayer in model.sublayers[1::2]]
        optimizer.step()
    with torch.no_grad():
        return first, loss_of(model, data[1], 256, generator).item() / math.log(2)


def draw(results, output: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (name, by_depth), style in zip(results.items(), ("C0o-", "C3s-"), strict=True):
        left.plot(list(by_depth), [test for _, test in by_depth.values()], style, label=name)
        gradients, _ = by_depth[max(by_depth)]
        right.plot(range(1, len(gradients) + 1), gradients, style, label=name)
    left.set_xscale("log", base=2)
    depths = list(next(iter(results.values())))
    left.set_xticks(depths, depths)
    left.set_xlabel("layers")
    left.set_ylabel("test loss, bits per letter")
    left.set_title(f"After training without warm-up, Adam at {RATE:g}")
    right.set_ylim(bottom=0, top=1.1 * max(max(gradients[max(gradients)][0]) for gradients in results.values()))
    right.set_xlabel(f"layer, of {max(depths)}")
    right.set_ylabel("norm of the gradient of its last weight")
    right.set_title("Before the first step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("norm_position.png"))
    parser.add_argument("--small", action="store_true", help="fewer depths and steps, for a quick look")
    options = parser.parse_args()
    depths, steps = ([1, 6], 25) if options.small else (DEPTHS, 150)
    torch.set_num_threads(1)  # such small layers gain nothing from more
    data = text()
    results = {
        name: {depth: train(depth, pre_norm, steps, data) for depth in depths}
        for name, pre_norm in (("pre-norm", True), ("post-norm", False))
    }
    draw(results, options.output)

    print(
        f"{len(data[0])} letters of English to train on, {len(data[1])} to test; {steps} steps of {BATCH} x {LENGTH}."
    )
    print("Layers: test loss in bits per letter, pre-norm, post-norm")
    for depth in depths:
        print(f"  {depth:<3} {results['pre-norm'][depth][1]:.2f}  {results['post-norm'][depth][1]:.2f}")
    for name, by_depth in results.items():
        gradients, _ = by_depth[max(depths)]
        ends = f"{gradients[0]:.2g} in the first layer, {gradients[-1]:.2g} in the last"
        print(f"{name}, {max(depths)} layers, gradient before the first step: {ends}.")
    change = {name: by_depth[max(depths)][1] - by_depth[min(depths)][1] for name, by_depth in results.items()}
    for name, bits in change.items():
        verb = "gains" if bits < 0 else "loses"
        print(f"From {min(depths)} to {max(depths)} layers {name} {verb} {abs(bits):.2f} bits.")
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    main()
