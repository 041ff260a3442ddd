"""The CUDA kernels, executed on the CPU."""

import ctypes
import json
import os
import subprocess
from dataclasses import dataclass

from .build import unsupported

__all__ = ["Library", "Report", "unsupported"]


@dataclass(frozen=True)
class Report:
    """One fault: what kind, a sentence, where in the grid and where in the source."""

    kind: str
    message: str
    block: tuple
    thread: tuple
    where: str

    def __str__(self):
        return (
            f"{self.kind}: {self.message} [block {self.block}, thread {self.thread}{self.where and ', ' + self.where}]"
        )


class Library:
    """A library with the machine in it, and what the machine saw."""

    def __init__(self, path, lazy=False):
        """lazy: functions that are missing are noticed when called."""
        self.path = path
        self.calls = ctypes.CDLL(str(path), mode=os.RTLD_LAZY if lazy else ctypes.DEFAULT_MODE)
        self.calls.lnc_host_report.restype = ctypes.c_char_p
        self.calls.lnc_host_array.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_char]
        self.calls.lnc_host_device.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]

    def reset(self):
        """Forgets reports, counts and arrays."""
        self.calls.lnc_host_reset()

    def device(self, arch=90, sm_count=4, seed=0, room=2**31 - 1):
        """The pretended device; a seed other than 0 shuffles the order of blocks, warps and lanes; room: for so many
        blocks that have to run together."""
        self.calls.lnc_host_device(arch, sm_count, seed, room)

    def check(self, races=True, distinct=True):
        """Which checks are made; off, large problems take less memory."""
        self.calls.lnc_host_check(races, distinct)

    def array(self, name, address, size, access):
        """Memory that kernels may touch: access "r" (read only), "w" (written before it is read) or "b" (both)."""
        self.calls.lnc_host_array(name.encode(), address, size, access.encode())

    def result(self):
        """(reports, launches) since the last reset; each launch a dictionary with counts for every array."""
        data = json.loads(self.calls.lnc_host_report())
        return [self._report(r) for r in data["reports"]], data["launches"]

    def _report(self, r):
        where = ""
        if r["address"]:
            # The address is where the check returns to: the access is just before it.
            line = ["addr2line", "-e", str(self.path), hex(r["address"] - 1)]
            where = subprocess.run(line, capture_output=True, text=True).stdout.strip().rpartition("/")[2]
        return Report(r["kind"], r["message"], tuple(r["block"]), tuple(r["thread"]), where)
