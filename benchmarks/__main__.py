"""Times layer norm against native PyTorch and against a copy of the same bytes: one table, one picture.

    python -m benchmarks                        everything, under ten minutes
    python -m benchmarks --quick                a few shapes, under one minute
    python -m benchmarks --direction backward --rows 512 --cols 768 1024 --dtypes bfloat16 --threads 1

On the CPU caches are warm, as they are behind the layer before; on a GPU the L2 cache is flushed before every call.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import providers, report, timing

ROWS, COLS = (1, 16, 512, 4096), (128, 768, 1024, 4096)
DTYPES = ("float32", "bfloat16", "float16", "float64")
GRID = [*itertools.product(ROWS, COLS), (64, 131072)]
SHAPES = {
    "forward": GRID,
    "backward": GRID,
    "step": [(1, 768), (16, 768)],
    "add": [(1, 768), (16, 768), (512, 768), (512, 4096), (4096, 768)],
}
GPU_SHAPES = [(8192, cols) for cols in (256, 1024, 2048, 4096, 8192, 16384)]
QUICK_SHAPES = [(1, 768), (512, 768)]
SECONDS, QUICK_SECONDS = 480, 30


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", help=f"default {ROWS}")
    parser.add_argument("--cols", type=int, nargs="+", help=f"default {COLS}, and 64 rows of 131072")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--direction", nargs="+", choices=providers.DIRECTIONS, default=providers.DIRECTIONS)
    parser.add_argument("--threads", type=int, nargs="+", help="CPU threads; default: one, and all")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too (compiles for every case)")
    parser.add_argument("--quick", action="store_true", help="few shapes, float32 and bfloat16, all threads")
    parser.add_argument("--seconds", type=float, help=f"for the whole run; default {SECONDS}")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the files")
    parser.add_argument("--cells", action="store_true", help="print every cell, not only the summary")
    parser.add_argument("--markdown", action="store_true", help="print the README's table too")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:  # before minutes of measuring, not after
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {arguments.output}: {error.strerror}")
    return arguments


def cases(arguments: argparse.Namespace) -> list[providers.Case]:
    threads = arguments.threads or ([1, torch.get_num_threads()] if not arguments.quick else [torch.get_num_threads()])
    if arguments.device == "cuda":
        threads = [1]
    dtypes = arguments.dtypes or (DTYPES[:2] if arguments.quick else DTYPES)

    def shapes(direction: str) -> list[tuple[int, int]]:
        if arguments.rows or arguments.cols:
            return list(itertools.product(arguments.rows or ROWS, arguments.cols or COLS))
        if arguments.quick:
            return QUICK_SHAPES
        large = GPU_SHAPES if arguments.device == "cuda" and direction in ("forward", "backward") else []
        return SHAPES[direction] + large

    return [
        providers.Case(direction, rows, cols, getattr(torch, dtype), arguments.device, count)
        for count in sorted(set(threads))
        for direction in arguments.direction
        for dtype in dtypes
        for rows, cols in shapes(direction)
    ]


def run(todo: list[providers.Case], seconds: float, compiled: bool, console: Console) -> list[report.Cell]:
    deadline = time.perf_counter() + seconds
    done = []
    columns = TextColumn("{task.description:<40}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(todo))
        for place, case in enumerate(todo):
            dtype = str(case.dtype).removeprefix("torch.")
            progress.update(task, description=f"{case.direction} {dtype} {case.rows}x{case.cols}, {case.threads} thr.")
            torch.set_num_threads(case.threads)
            with providers.mode(case):
                calls = providers.calls(case, compiled)
                share = (deadline - time.perf_counter()) / (len(todo) - place)
                done.append(report.Cell(case, timing.measure(calls, share, case.device)))
            progress.advance(task)
    return done


def main() -> None:
    arguments = parse()
    todo = cases(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    machine = report.environment(arguments.device)
    console.print(f"{machine['machine']}; torch {machine['torch']}; kernels: {machine['kernels']}; {len(todo)} cells")
    busy = (machine["load_at_start"] or [0])[0]
    if busy > 0.5:
        console.print(f"Other programs are running (load {busy} on {os.cpu_count()} cores): expect noise.")
    seconds = arguments.seconds or (QUICK_SECONDS if arguments.quick else SECONDS)
    start = time.perf_counter()
    cells = run(todo, seconds, arguments.compile, console)
    machine["seconds"] = round(time.perf_counter() - start)
    if arguments.cells:
        console.print(report.details(cells))
    console.print(report.summary(cells))
    if arguments.markdown:
        print(report.markdown(cells))
    for path in report.save(cells, machine, arguments.output):
        console.print(os.path.relpath(path), soft_wrap=True)


if __name__ == "__main__":
    main()
