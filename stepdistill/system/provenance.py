"""Where a number comes from: versions, command, hardware, commit and memory, as every report states them."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """``versions``, ``command``, ``hardware`` and ``commit`` of a report."""
    names = ("stepdistill", "torch", "diffusers", "transformers", "accelerate", "peft")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    kind = torch.device(device)
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)} of {os.cpu_count()} cores"
    hardware = torch.cuda.get_device_name(kind) if kind.type == "cuda" else f"{_processor()}, {threads}"
    return {
        "versions": versions,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": hardware,
        "commit": _commit(),
    }


def _processor() -> str:
    """The processor's model name where the system tells it, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _commit() -> str | None:
    """The commit of the checkout the package runs from, with ``+`` where files differ from it; None in a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    outputs = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        outputs.append(done.stdout.strip())
    return outputs[0] + "+" * bool(outputs[1])
