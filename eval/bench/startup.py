"""Seconds until `stepdistill --help` has answered: python eval/bench/startup.py"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def main() -> None:
    times = {"python -c pass": [], "stepdistill --help": []}  # type: dict[str, list[float]]
    commands = {"python -c pass": ["-c", "pass"], "stepdistill --help": ["-m", "stepdistill", "--help"]}
    for _ in range(11):
        for name, arguments in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - began)
    for name, values in times.items():
        print(f"{name}: {statistics.median(values):.3f} s (median of {len(values)})")


if __name__ == "__main__":
    main()
