"""A run's folder as training leaves it, without training."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stepdistill.pages.sheets import png_of_rows
from stepdistill.system.run_folder import RunFolder

PROMPTS = ("a <red> apple", "a boat")
RECIPE = """# Other than the defaults: options.guidance, train.updates
teacher: emoji
method: dmd
options: {guidance: 2.5, warm_start: 4}
train: {updates: 12, lr: 0.0001}
"""


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Of stats.jsonl: four updates of a warm start, then two networks in turn; a preview every fourth."""
    found: list[dict[str, Any]] = []
    for i in range(count):
        network = "student" if i < 4 or i % 2 else "fake score"
        row = {
            "update": i,
            "network": network,
            "phase": "warm start" if i < 4 else "matching",
            **{"loss": 1.0 - 0.1 * i if i < 4 else 2.0, "grad_norm": 1.0 + i, "lr": 1e-4, "field": 0.5},
            "seconds": 0.5 * (i + 1) + 10.0 * (i // 4),
        }
        if i % 4 == 3:
            row |= {"diversity": 0.25, "teacher_diversity": 0.3, "saturation": 0.1, "teacher_saturation": 0.2}
            row |= {"worries": ["collapse: too <alike>"]} if i == 3 else {}
        found.append(row)
    return found


def sheet(*labels: str) -> bytes:
    """PNG of rows of two pictures, each row of another grey."""
    greys = [torch.full((2, 3, 8, 8), 40 * (i + 1), dtype=torch.uint8) for i in range(len(labels))]
    return png_of_rows(list(zip(labels, greys, strict=True)), PROMPTS)


def write_status(folder: Path, state: str, **changes: Any) -> None:
    """status.json of this process, now."""
    status = {
        **{"state": state, "phase": "training", "update": 8, "updates": 12, "eta_seconds": 90.0},
        **{"health": "healthy", "pid": os.getpid(), "host": platform.node()},
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / "status.json").write_text(json.dumps(status | changes))


def write_run(
    folder: Path, state: str | None = "training", *, stats: bool = True, report: bool = False
) -> Path:
    """A run's folder.

    Args:
        folder: where to.
        state: of status.json; None for none.
        stats: whether it has trained, and drawn previews.
        report: whether it is done.
    """
    place = RunFolder(folder)
    folder.mkdir(parents=True)
    place.begin()
    place.recipe.write_text(RECIPE)
    if state is not None:
        write_status(folder, state)
    if stats:
        (folder / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
        for update in (4, 8, 12):
            place.preview(update).write_bytes(sheet("teacher, 25 steps", f"student, after {update} updates"))
    if report:
        place.samples.write_bytes(sheet("teacher, 25 steps", "teacher, 1 step", "student, 1 step"))
        place.student.mkdir()
        place.report.write_text(json.dumps(REPORT | {"name": folder.name}))
    return folder


REPORT: dict[str, Any] = {
    "method": "dmd",
    "teacher_name": "emoji",
    "summary": "DMD2: <two> scores.",
    "suite": "emoji@1",
    "n": 2000,
    "against": "the teacher's pictures",
    "remarks": ["Read <KID>."],
    "metrics": {"fd": "FD-emoji"},
    "protocol": {"features": "emoji"},
    "teacher": {"fd": {"1": 5.0, "25": 1.0}, "kid": {"1": 0.5, "25": None}},
    "student": {"fd": {"1": 2.0}, "fd_se": {"1": 0.125}, "kid": {"1": 0.25}},
    "gap_closed": {"1": 0.75},
    "health": {
        **{
            "verdict": "healthy",
            "sentence": "As the teacher's.",
            "diversity": 0.25,
            "teacher_diversity": 0.3,
        },
        **{"saturation": 0.1, "teacher_saturation": 0.2},
        "worries": [{"update": 4, "what": "collapse: too <alike>"}],
    },
    "command": "stepdistill train dmd_emoji_quick",
    "commit": "0123abcd",
    "hardware": "a <machine>",
    "versions": {"torch": "2.15.0"},
    "verification": "verified: 14 files unaltered",
    "resumes": [{"command": "stepdistill train --resume", "update": 5}],
    "prompts": {"file": None, "count": 3781, "sha256": "ab" * 32},
    "updates": 12,
    "updates_planned": 12,
    "train_seconds": 60.0,
    "wall_seconds": 176.0,
    "peak_memory_bytes": 3 * 2**30,
}
