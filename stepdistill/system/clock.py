"""Time that nobody sets: since this machine was started. The time of day is for people; it may be put back a day, and
two machines need not agree on it."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@cache
def boot() -> str:
    """What this start of the machine is called; empty where the system has no name for it."""
    try:
        return _BOOT.read_text().strip()
    except OSError:  # not Linux
        return ""


def uptime() -> float:
    """Seconds since this start of the machine, those that it slept among them; 0 where that is not told."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if boot() else 0.0


def uptime_at_start(pid: int) -> float | None:
    """Of a process of this machine, on the clock of ``uptime``; None where there is none of that number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None
