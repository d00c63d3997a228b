"""Wall time and peak resident memory of a block."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType


def _reset_peak() -> bool:
    """Ask Linux to forget the process's high-water mark; False where that cannot be done."""
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")
    except OSError:
        return False
    return True


def _linux_peak() -> int | None:
    try:
        with open("/proc/self/status") as stream:
            marks = [line.split()[1] for line in stream if line.startswith("VmHWM:")]
    except OSError:
        return None
    return int(marks[0]) * 1024 if marks else None


def _peak() -> int | None:
    """High-water mark of resident memory in bytes (since the last reset, where resets work)."""
    found = _linux_peak()
    if found is None and sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


@dataclass
class Meter:
    """``with Meter() as m: ...`` then ``m.seconds`` and ``m.peak_bytes`` (None where the system does not tell).

    ``memory=False``: the time only.
    """

    memory: bool = True
    seconds: float = 0.0
    peak_bytes: int | None = None
    _start: float = field(default=0.0, repr=False)

    def __enter__(self) -> Meter:
        if self.memory:
            _reset_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._start
        if self.memory:
            self.peak_bytes = _peak()
