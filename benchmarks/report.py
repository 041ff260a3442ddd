"""From timings to one table, one picture, and files that hold all of it."""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

import layernorm_cuda as lnc

from .providers import COPY, NATIVE, OURS, Case
from .timing import Timing


@dataclass(frozen=True)
class Cell:
    """One case with the timings of all its providers."""

    case: Case
    timings: dict[str, Timing]

    def speed(self, provider: str, against: str) -> float | None:
        """How many times as fast as `against` the provider is."""
        if provider not in self.timings or against not in self.timings:
            return None
        return self.timings[against].median / self.timings[provider].median

    @property
    def dtype(self) -> str:
        return str(self.case.dtype).removeprefix("torch.")

    @property
    def shape(self) -> str:
        return f"{self.case.rows}x{self.case.cols}"

    def rows(self) -> list[dict]:
        """One flat row a provider, as in the CSV."""
        case = self.case
        place = {name: getattr(case, name) for name in ("device", "direction", "threads", "rows", "cols")}
        return [
            {
                **place,
                "dtype": self.dtype,
                "provider": provider,
                "median_us": _digits(timing.median * 1e6),
                "low_quartile_us": _digits(timing.low * 1e6),
                "high_quartile_us": _digits(timing.high * 1e6),
                "rounds": timing.rounds,
                "calls_per_round": timing.calls,
                "host_us": _digits(timing.host * 1e6) if timing.host else "",
                "useful_gb_per_s": _digits(case.useful_bytes / timing.median / 1e9),
                "times_native_speed": _digits(self.speed(provider, NATIVE)),
                "share_of_copy_speed": _digits(self.speed(provider, COPY)),
            }
            for provider, timing in self.timings.items()
        ]


def _digits(value: float | None) -> float | str:
    return "" if value is None else float(f"{value:.4g}")


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def groups(cells: list[Cell]) -> dict[tuple[str, str, int], list[Cell]]:
    """Cells by direction, dtype and threads, in the order in which they came."""
    grouped: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.case.direction, cell.dtype, cell.case.threads), []).append(cell)
    return grouped


def _table(title: str, columns: tuple[str, ...], left: int) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < left else "right", no_wrap=True)
    return table


def summary(cells: list[Cell]) -> Table:
    """Ours against native and against the copy: geometric means, and the cells at both ends."""
    others = [p for p in dict.fromkeys(p for c in cells for p in c.timings) if p not in (NATIVE, OURS, COPY)]
    columns = "direction", "dtype", "thr.", "cells", "ours", "slowest", "fastest", *others, "ours", "native"
    above = ["", "", "", "", "native = 1", "", "", *[""] * len(others), "copy = 1", "copy = 1"]
    headers = tuple(f"{top}\n{name}" for top, name in zip(above, columns, strict=True))
    table = _table("Speed: geometric means of ratios of medians", headers, left=2)
    before = None
    for (direction, dtype, threads), members in groups(cells).items():
        if before not in (None, direction):
            table.add_section()
        ordered = sorted(members, key=lambda cell: cell.speed(OURS, NATIVE))
        ends = [f"{cell.speed(OURS, NATIVE):.2f} {cell.shape:>9}" for cell in (ordered[0], ordered[-1])]
        pairs = [(OURS, NATIVE), *((other, NATIVE) for other in others), (OURS, COPY), (NATIVE, COPY)]
        means = []
        for pair in pairs:
            speeds = [speed for cell in members if (speed := cell.speed(*pair)) is not None]
            means.append(f"{geometric_mean(speeds):.2f}" if speeds else "")
        table.add_row(
            direction if direction != before else "",
            dtype,
            str(threads),
            str(len(members)),
            means[0],
            *ends,
            *means[1:],
        )
        before = direction
    return table


def markdown(cells: list[Cell]) -> str:
    """The summary as it stands in the README: geometric mean, and the slowest cell, by number of threads."""
    grouped = groups(cells)
    counts = sorted({threads for _, _, threads in grouped})
    titles = ["", "", *(f"{count} thread{'s' if count > 1 else ''}" for count in counts)]
    lines = [titles, ["---", "---", *["---:"] * len(counts)]]
    for direction, dtype in dict.fromkeys(key[:2] for key in grouped):
        texts = []
        for count in counts:
            members = grouped[direction, dtype, count]
            slowest = min(members, key=lambda cell: cell.speed(OURS, NATIVE))
            mean = geometric_mean([cell.speed(OURS, NATIVE) for cell in members])
            texts.append(f"{mean:.2f} (slowest {slowest.speed(OURS, NATIVE):.2f}, {slowest.shape})")
        lines.append([direction, dtype, *texts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def details(cells: list[Cell]) -> Table:
    """Every cell: each provider's median in microseconds, and half the distance of its quartiles in percent."""
    providers = list(dict.fromkeys(p for cell in cells for p in cell.timings))
    columns = "direction", "dtype", "thr.", "shape", *providers, "GB/s", "speed"
    table = _table(
        "Microseconds: median, half the distance of the quartiles; GB/s of ours; speed, native = 1", columns, 2
    )
    for cell in cells:
        times = [
            f"{t.median * 1e6:.1f} ±{(t.high - t.low) / t.median / 2:4.0%}" if (t := cell.timings.get(p)) else ""
            for p in providers
        ]
        place = cell.case.direction, cell.dtype, str(cell.case.threads), cell.shape
        useful = cell.case.useful_bytes / cell.timings[OURS].median / 1e9
        table.add_row(*place, *times, f"{useful:.3g}", f"{cell.speed(OURS, NATIVE):.2f}")
    return table


def environment(device: str) -> dict:
    """What the numbers were measured on."""
    info = lnc.build_info()
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()}, {os.cpu_count()} cores",
        "device": device,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "layernorm_cuda": info["version"],
        "kernels": info["cpu_instruction_set"] if device == "cpu" else info["cuda"],
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_at_start": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def cpu_model() -> str:
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*args: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../layernorm_cuda", ".")
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def save(cells: list[Cell], machine: dict, folder: Path) -> list[Path]:
    """Writes <machine>-<date>: .csv what was measured, .json on what, .png the picture; returns their paths."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine["machine"].lower()).strip("-")
    stem = folder / f"{slug}-{machine['date'][:10]}"
    table, record, image = (stem.with_name(f"{stem.name}.{kind}") for kind in ("csv", "json", "png"))
    rows = [row for cell in cells for row in cell.rows()]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    threads = sorted({cell.case.threads for cell in cells})
    record.write_text(json.dumps({**machine, "threads": threads, "cells": len(cells)}, indent=2) + "\n")
    picture(cells, machine, image)
    return [table, record, image]


def picture(cells: list[Cell], machine: dict, path: Path) -> None:
    """One panel a direction and thread count; a row a dtype, a column a shape; colour and number: native = 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colors, pyplot

    panels: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        panels.setdefault((cell.case.direction, cell.case.threads), []).append(cell)
    shapes = {key: list(dict.fromkeys(cell.shape for cell in members)) for key, members in panels.items()}
    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))

    # Panels stand beside each other as long as they fit.
    gap, width = 1, max(17, *map(len, shapes.values()))
    lines: list[list[tuple[tuple[str, int], int]]] = []
    column = width
    for key in sorted(panels, key=lambda key: (-len(shapes[key]), key[1])):
        if column + len(shapes[key]) > width:
            lines.append([])
            column = 0
        lines[-1].append((key, column))
        column += gap + len(shapes[key])

    cells_high, between = 0.42 * len(dtypes), 0.85
    size = 0.62 * width + 0.9, (cells_high + between) * len(lines) + 0.8
    figure = pyplot.figure(figsize=size)
    grid = figure.add_gridspec(
        len(lines), width, left=0.8 / size[0], right=1 - 0.1 / size[0], top=1 - 0.8 / size[1], bottom=0.65 / size[1],
        hspace=between / cells_high, wspace=0,
    )  # fmt: skip
    norm = colors.LogNorm(1 / 4, 4)
    for line, members in enumerate(lines):
        for key, start in members:
            axes = figure.add_subplot(grid[line, start : start + len(shapes[key])])
            values = [[math.nan] * len(shapes[key]) for _ in dtypes]
            for cell in panels[key]:
                row, column = dtypes.index(cell.dtype), shapes[key].index(cell.shape)
                values[row][column] = speed = cell.speed(OURS, NATIVE)
                of_copy = cell.speed(OURS, COPY)
                style = dict(ha="center", va="center", color="black" if 1 / 2.5 < speed < 2.5 else "white")
                axes.text(column, row - (0.12 if of_copy else 0), f"{speed:.2f}", fontsize=8, **style)
                if of_copy:
                    axes.text(column, row + 0.27, f"{of_copy:.0%}", fontsize=5.5, **style)
            axes.imshow(values, cmap="PuOr", norm=norm, aspect="auto")
            axes.set_xticks(range(len(shapes[key])), shapes[key], rotation=30, ha="right", fontsize=7)
            axes.set_yticks(range(len(dtypes)), dtypes if start == 0 else [""] * len(dtypes), fontsize=8)
            axes.tick_params(length=0, pad=1)
            axes.spines[:].set_visible(False)
            name = f"{key[0]}, {key[1]} thread{'s' if key[1] > 1 else ''}" if machine["device"] == "cpu" else key[0]
            axes.set_title(name, fontsize=9, loc="left", pad=3)
    figure.suptitle(
        "How many times as fast as native (above 1: faster); small: share of a copy's speed\n"
        f"{machine['machine']}; torch {machine['torch']}; kernels: {machine['kernels']}; {machine['date'][:10]}",
        fontsize=9,
        y=1 - 0.1 / size[1],
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
