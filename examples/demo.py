"""Trains a small GPT-2 twice from one seed, with nn.LayerNorm and with ours swapped in, and puts both side by side.

    python -m examples.demo [--steps 150] [--device auto|cpu|cuda] [--output demo.png] [--small]

The model is transformers' own GPT-2 with random weights, the text the Python standard library's source: nothing is
downloaded. Both models take every step in turn on the same batch, so that noise of the machine meets both. The exit
status is 0 only if the losses agree within the tolerances below.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

import layernorm_cuda as lnc

# Two right implementations round differently; training then lets the last bits grow from step to step.
FIRST_STEP_TOLERANCE = 1e-5
TOLERANCE = 5e-3

SIZES = {  # layers, width, heads, context, batch
    "small": (2, 64, 2, 64, 4),
    "cpu": (4, 192, 4, 128, 8),
    "cuda": (8, 768, 12, 256, 16),
}


def text(limit: int) -> torch.Tensor:
    """The standard library's source as bytes, int64 [limit or fewer]."""
    data = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        data += path.read_bytes()
        if len(data) >= limit:
            break
    return torch.frombuffer(data[:limit], dtype=torch.uint8).long()


def build_model(size: tuple[int, ...], device: str, seed: int) -> GPT2LMHeadModel:
    layers, width, heads, context, _ = size
    config = GPT2Config(
        vocab_size=256, n_layer=layers, n_embd=width, n_head=heads, n_positions=context,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config).to(device).train()


class Trainee:
    """A model, its optimizer, and what it has shown so far."""

    def __init__(self, name: str, model: GPT2LMHeadModel, warmup: int = 10):
        self.name, self.model = name, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1, (step + 1) / warmup))
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.norm_seconds: list[float] = []

    def step(self, batch: torch.Tensor) -> None:
        start = time.perf_counter()
        logits = self.model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())  # waits for the GPU
        self.seconds.append(time.perf_counter() - start)

    def time_norms(self, x: torch.Tensor, dy: torch.Tensor) -> None:
        """All layer norms of the model by themselves, forward and backward, on activations of their shape."""
        start = time.perf_counter()
        for norm in self.norms:
            torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), dy)
        if x.is_cuda:
            torch.cuda.synchronize()
        self.norm_seconds.append(time.perf_counter() - start)

    @property
    def norms(self) -> list[torch.nn.LayerNorm]:
        return [module for module in self.model.modules() if isinstance(module, torch.nn.LayerNorm)]


def quartiles(seconds: list[float]) -> list[float]:
    """In milliseconds, without the first steps, which fill caches and memory pools."""
    return [1e3 * q for q in statistics.quantiles(seconds[min(5, len(seconds) - 2) :], n=4)]


def train(trainees: list[Trainee], data: torch.Tensor, steps: int, size: tuple[int, ...], seed: int, console: Console):
    _, width, _, context, batch_size = size
    device = trainees[0].model.device
    x = torch.randn(batch_size, context, width, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context + 1)
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(steps):
            starts = torch.randint(len(data) - context - 1, (batch_size, 1), generator=generator)
            batch = data[starts + offsets].to(device)
            for trainee in trainees if step % 2 == 0 else trainees[::-1]:
                trainee.step(batch)
                trainee.time_norms(x, dy)
            losses = " and ".join(f"{trainee.losses[-1]:.4f}" for trainee in trainees)
            progress.update(task, advance=1, description=f"losses {losses}")


def report(native: Trainee, ours: Trainee, differences: list[float], console: Console) -> None:
    steps = [quartiles(trainee.seconds) for trainee in (native, ours)]
    norms = [quartiles(trainee.norm_seconds)[1] for trainee in (native, ours)]
    medians = [step[1] for step in steps]
    table = Table(title="GPT-2, the same seed and the same batches")
    table.add_column("", no_wrap=True)
    for column in (native.name, ours.name, "native / ours"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("loss, first step", f"{native.losses[0]:.5f}", f"{ours.losses[0]:.5f}")
    table.add_row("loss, last step", f"{native.losses[-1]:.5f}", f"{ours.losses[-1]:.5f}")
    table.add_row("largest difference", "", f"{max(differences):.1e}")
    table.add_section()
    table.add_row("step, median", *(f"{t:.1f} ms" for t in medians), f"{medians[0] / medians[1]:.3f}")
    table.add_row("step, middle half", *(f"{low:.1f} - {high:.1f} ms" for low, _, high in steps))
    table.add_row(f"{len(ours.norms)} norms alone", *(f"{t:.2f} ms" for t in norms), f"{norms[0] / norms[1]:.3f}")
    table.add_row("their share of a step", *(f"{t / s:.1%}" for t, s in zip(norms, medians, strict=True)))
    console.print(table)
    if any(high > 1.3 * low for low, _, high in steps):
        console.print("The steps' times vary too much to compare: other programs are running, or too few steps.")
    else:
        console.print(
            f"The rest of a step is the same code in both: norms that cost nothing at all would make it "
            f"{1 / (1 - norms[0] / medians[0]):.2f} times as fast as native's, and no more than that."
        )


def plot(native: Trainee, ours: Trainee, differences: list[float], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {native.name: "#4c72b0", ours.name: "#dd8452"}
    figure, (losses, gap, times) = pyplot.subplots(1, 3, figsize=(14, 4.2), width_ratios=(1.5, 1.2, 0.9))
    losses.plot(native.losses, color=colours[native.name], linewidth=3.5, alpha=0.5, label=native.name)
    losses.plot(ours.losses, color=colours[ours.name], linewidth=1.2, label=ours.name)
    losses.set(xlabel="step", ylabel="loss (nats per byte)", title="Loss")
    losses.legend(frameon=False)
    gap.semilogy([max(d, 1e-8) for d in differences], color="0.25", linewidth=1)
    gap.axhline(TOLERANCE, color="#c44e52", linestyle="--", linewidth=1)
    gap.annotate(f"allowed: {TOLERANCE}", (0, TOLERANCE), xytext=(2, 3), textcoords="offset points", color="#c44e52")
    gap.set(xlabel="step", title="|difference of the losses| (zero: at the bottom)", ylim=(1e-8, 0.2))
    for place, trainee in enumerate((native, ours)):
        low, step, high = quartiles(trainee.seconds)
        colour = colours[trainee.name]
        times.bar(place, step, 0.6, color=colour, alpha=0.5, yerr=[[step - low], [high - step]], capsize=4)
        times.bar(place, quartiles(trainee.norm_seconds)[1], 0.6, color=colour)
        times.annotate(f"{step:.1f} ms", (place, high), xytext=(0, 4), textcoords="offset points", ha="center")
    times.set_xticks([0, 1], [native.name, ours.name])
    times.set(ylabel="milliseconds", title="Time per step, its norms alone dark")
    times.margins(y=0.15)
    for axes in (losses, gap, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, color="0.35")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def kernels(device: str) -> str:
    info = lnc.build_info()
    if device == "cpu":
        return info["cpu_instruction_set"]
    return f"CUDA {info['cuda']}" if info["cuda"] else "PyTorch's own (no CUDA in this build)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps (200; with --small 10)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where the picture goes")
    parser.add_argument("--small", action="store_true", help="a tiny model and few steps, for a quick check")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps = arguments.steps or (10 if arguments.small else 200)
    if steps < 2:
        parser.error("--steps must be at least 2")
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES["small" if arguments.small else device]

    console = Console()
    data = text(4_000_000)
    native = Trainee("nn.LayerNorm", build_model(size, device, arguments.seed))
    model = build_model(size, device, arguments.seed)
    replaced = lnc.replace_norms(model)
    ours = Trainee("layernorm_cuda", model)

    parameters = sum(p.numel() for p in model.parameters())
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = (
        f"GPT-2: {size[0]} layers, width {size[1]}, {parameters / 1e6:.1f} M parameters; {size[4]} x {size[3]} bytes a "
        f"step\n{machine}; torch {torch.__version__}; kernels: {kernels(device)}"
    )
    console.print(title)
    console.print(f"text: {len(data):,} bytes of the Python standard library; {len(replaced)} norms replaced")

    start = time.perf_counter()
    train([native, ours], data, steps, size, arguments.seed, console)
    differences = [abs(a - b) for a, b in zip(native.losses, ours.losses, strict=True)]
    report(native, ours, differences, console)
    plot(native, ours, differences, title, arguments.output)
    console.print(f"picture: {arguments.output}; {time.perf_counter() - start:.0f} s")

    agree = differences[0] <= FIRST_STEP_TOLERANCE and max(differences) <= TOLERANCE
    verdict = "agree" if agree else "DO NOT AGREE"
    console.print(
        f"The losses {verdict}: {differences[0]:.1e} apart at the first step (allowed {FIRST_STEP_TOLERANCE:.0e}), "
        f"at most {max(differences):.1e} later (allowed {TOLERANCE})."
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
