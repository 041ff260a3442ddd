"""Interleaved timing: every provider in turn, round after round, so that noise of the machine meets all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

BATCH_SECONDS = 1e-3  # one timing on the CPU lasts at least this long: far above the clock's resolution
ENOUGH_ROUNDS = 25
FEWEST_ROUNDS = 5
STEADY = 0.01  # a cell is done early when the standard error of each of its medians is below this share


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles over the rounds; on CUDA also what the call costs the host."""

    median: float
    low: float
    high: float
    rounds: int
    calls: int
    host: float | None = None


class CpuClock:
    """Batches of calls in a tight loop, caches warm."""

    def __init__(self, calls: dict[str, Call]):
        self.batches = {name: self._batch(call) for name, call in calls.items()}

    @staticmethod
    def _seconds(call: Call, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    def _batch(self, call: Call) -> int:
        call()
        count = 1
        # The least of three: an interruption here would leave a cell with single calls, their caches cold.
        while (seconds := min(self._seconds(call, count) for _ in range(3))) * count < BATCH_SECONDS / 4:
            count *= 2
        return max(1, round(BATCH_SECONDS / seconds))

    def read(self, name: str, call: Call) -> float:
        return self._seconds(call, self.batches[name])


class CudaClock:
    """Single calls between events, the L2 cache flushed before each: the device's time without the launch's.

    The flush also lets the host run ahead, so that no launch is waited for.
    """

    CALLS = 10

    def __init__(self, calls: dict[str, Call]):
        self.batches = dict.fromkeys(calls, self.CALLS)
        l2 = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 64 << 20)
        self.flush = torch.empty(4 * l2, dtype=torch.uint8, device="cuda")
        self.events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.CALLS)]
        for call in calls.values():
            for _ in range(3):
                call()
        torch.cuda.synchronize()

    def read(self, name: str, call: Call) -> float:
        for start, end in self.events:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in self.events) * 1e-3

    @staticmethod
    def host(call: Call) -> float:
        """What issuing one call costs the host, the device's work not waited for."""
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                call()
            times.append((time.perf_counter() - start) / 10)
        torch.cuda.synchronize()
        return statistics.median(times)


def _steady(samples: list[float]) -> bool:
    low, median, high = statistics.quantiles(samples, n=4)
    return 0.93 * (high - low) <= STEADY * median * len(samples) ** 0.5  # standard error of a median, from quartiles


def measure(calls: dict[str, Call], seconds: float, device: str) -> dict[str, Timing]:
    """Times each call in at most about `seconds`, but never in fewer than FEWEST_ROUNDS rounds."""
    clock = CudaClock(calls) if device == "cuda" else CpuClock(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        order = list(calls)
        for round_ in range(10_000):
            for name in order:
                samples[name].append(clock.read(name, calls[name]))
            order = order[1:] + order[:1]
            if round_ + 1 < FEWEST_ROUNDS:
                continue
            steady = round_ + 1 >= ENOUGH_ROUNDS and all(map(_steady, samples.values()))
            if steady or time.perf_counter() > deadline:
                break
    finally:
        if collecting:
            gc.enable()
    timings = {}
    for name, times in samples.items():
        low, median, high = statistics.quantiles(times, n=4)
        host = CudaClock.host(calls[name]) if device == "cuda" else None
        timings[name] = Timing(median, low, high, len(times), clock.batches[name], host)
    return timings
