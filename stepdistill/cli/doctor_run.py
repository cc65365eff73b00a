"""``stepdistill doctor RUN``: what a run's folder says of the run, and what to do next. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.cli.findings import Finding, State
from stepdistill.errors import UserError
from stepdistill.system.files import size_text
from stepdistill.system.log import read_stats
from stepdistill.system.parsing import parse_json
from stepdistill.system.run_folder import RunFolder, Status, read_status
from stepdistill.training.run_report import Health, RunReport, read_report
from stepdistill.training.signs import PREFIX, SIGNS, plateau

FOUND = 6
"""Of what looks found, the last ones that are shown."""
SILENT = 300
"""Seconds after which a training of which nothing is heard is stuck: it says something at each update."""
LOOKS = 5
"""Previews that are shown, spread over the run."""


def examine_run(folder: Path) -> list[Finding]:
    """Looks at a run that is finished, under way, stopped or killed.

    Raises:
        UserError: the folder is of no run.
    """
    place = RunFolder(folder)
    if not place.recipe.is_file() and read_status(folder) is None:
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml{_runs_in(folder)}")
    place.check_layout()
    folder = place.root
    status, rows, saved = read_status(folder), read_stats(folder), _checkpoints(place)
    report = read_report(folder) if place.report.is_file() else None
    health = report.health if isinstance(report, RunReport) else None
    findings = [_state(status, report is not None, rows), _updates(status, rows), *_losses(rows)]
    findings += [*_health(rows, health), *_looks(rows)]
    others = (_skipped(place, health), _saved(saved), _student(place), _room(place, status))
    findings += [found for found in others if found]
    return [*findings, *_advice(place, status, saved, rows, health)]


def _runs_in(folder: Path) -> str:
    """The runs that a folder holds, as the end of a sentence."""
    runs = sorted(file.parent.name for file in folder.glob("*/recipe.yaml") if not file.parent.is_symlink())
    if not runs:
        return ""
    more = ", ..." if len(runs) > 5 else ""
    return f", but it holds {len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(runs[:5])}{more}"


def _state(status: Status | None, reported: bool, rows: Sequence[Mapping[str, Any]]) -> Finding:
    if status is None:
        kind: State = "ok" if reported else "note"
        return Finding(
            kind, "state", "done" if reported else "not known: it has no status.json that can be read"
        )
    if status.killed:
        text = (
            f"killed while {status.phase}: its process {status.pid} is gone; last heard of {status.written}"
        )
        return Finding("broken", "state", text)
    if status.state == "stopped":
        return Finding("broken", "state", f"stopped: {status.phase}")
    if status.state == "done":
        return Finding("ok", "state", f"done, {status.written}")
    where = f"process {status.pid} on {status.host}, last heard of {status.written}"
    if status.silent_seconds is None:
        where += " by a clock that is ahead of this machine's"
    if (silence := _silence(status, rows)) is not None:
        return Finding("broken", "state", f"stuck, it seems: {silence} ({where})")
    return Finding("ok", "state", f"{status.state}: {status.phase} ({where})")


def _silence(status: Status | None, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """That nothing has been heard of a training for long; None otherwise."""
    if status is None or status.state != "training":
        return None
    silent = status.silent_seconds
    each = _trained(rows) / (rows[-1]["update"] + 1) if rows else 0.0
    if silent is None or silent < max(SILENT, 50 * each):
        return None
    return f"nothing was heard of it for {silent / 60:.0f} minutes, and an update took {each:.2g} s"


def _trained(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that it has trained."""
    return next((row["seconds"] for row in reversed(rows) if row.get("seconds") is not None), 0.0)


def _updates(status: Status | None, rows: Sequence[Mapping[str, Any]]) -> Finding:
    done = rows[-1]["update"] + 1 if rows else 0
    planned = f" of {status.updates}" if status else ""
    text = f"{done}{planned}"
    if rows:
        text += f" in {_trained(rows):.0f} s"
    if status and status.eta_seconds is not None and status.going and not status.killed:
        text += f", {status.eta_seconds:.0f} s to go"
    return Finding("ok", "updates", text)


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """The loss of every network, at the start and at the end, as the mean of a tenth of its updates."""
    findings = []
    for network in dict.fromkeys(str(row["network"]) for row in rows):
        own = [row for row in rows if row["network"] == network]
        lost = next((row for row in own if row.get("loss") is None or row.get("grad_norm", 0) is None), None)
        if lost is not None:
            text = f"not finite at update {lost['update'] + 1}"
            findings.append(Finding("broken", f"loss of {network}", text))
            continue
        part = max(1, len(own) // 10)
        first, last = (sum(row["loss"] for row in some) / part for some in (own[:part], own[-part:]))
        findings.append(
            Finding("ok", f"loss of {network}", f"{first:.4g} at the start, {last:.4g} at the end")
        )
    return findings


def _health(rows: Sequence[Mapping[str, Any]], health: Health | None) -> list[Finding]:
    """Previews, spread over the run, and the end."""
    looked = [row for row in rows if "diversity" in row]
    if len(looked) > LOOKS:
        looked = [looked[i * (len(looked) - 1) // (LOOKS - 1)] for i in range(LOOKS)]
    findings = [
        Finding(
            "note" if row.get("worries") else "ok",
            f"update {row['update'] + 1}",
            "; ".join(row.get("worries", ()))
            or f"diversity {_shown(row, 'diversity', '.2f')}, saturation {_shown(row, 'saturation', '.0%')}",
        )
        for row in looked
    ]
    if health is not None:
        findings.append(Finding("ok" if health.verdict == "healthy" else "note", "health", health.line()))
    elif not looked:
        findings.append(Finding("note", "health", "not known: no preview was drawn"))
    return findings


def _shown(row: Mapping[str, Any], key: str, form: str) -> str:
    """A number of a preview and the teacher's."""
    own, teachers = (
        "not finite" if row.get(name) is None else format(row[name], form) for name in (key, f"teacher_{key}")
    )
    return f"{own} (teacher {teachers})"


def _looks(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the last look at the run saw, what was found on the way, and whether the loss still falls."""
    findings = []
    looked = [row for row in rows if f"{PREFIX}latent_deviation" in row]
    if looked:
        last = looked[-1]
        shown = (
            "lag",
            "towards",
            "diversity_of_prompts",
            "diversity_of_noises",
            "latent_mean",
            "latent_deviation",
        )
        said = [
            f"{key.replace('_', ' ')} {last[PREFIX + key]:.2f}"
            for key in (*shown, "extremes", "high_frequencies", "motion")
            if isinstance(last.get(PREFIX + key), (int, float))
        ]
        findings.append(Finding("ok", f"look at {last['update'] + 1}", ", ".join(said)))
    told = [
        (row["update"] + 1, what) for row in rows for what in row.get("worries", ()) if _sign(what) in SIGNS
    ]
    told = [
        (at, what) for at, what in told if ": pictures differ" not in what and "black or white" not in what
    ]
    for at, what in told[-FOUND:]:
        findings.append(Finding("note", f"found at {at}", what))
    if (since := plateau(rows)) is not None:
        text = (
            f"the student's loss has not fallen since update {since + 1}: more of the same rate adds little"
        )
        findings.append(Finding("ok", "plateau", text))
    return findings


def _early_signs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What looks found in the last quarter of the rows: of a run that ended badly, perhaps why."""
    late = rows[len(rows) * 3 // 4 :]
    return list(dict.fromkeys(_sign(what) for row in late for what in row.get("worries", ())))


def _sign(sentence: str) -> str:
    return sentence.partition(":")[0]


def _skipped(place: RunFolder, health: Health | None) -> Finding | None:
    if health is not None and health.skipped_files:
        return Finding("note", "images", f"{health.skipped_files} were skipped: log.txt names them")
    text = place.log.read_text(encoding="utf-8", errors="replace") if place.log.is_file() else ""
    said = [line.partition("data.images: ")[2] for line in text.splitlines() if " files skipped: " in line]
    return Finding("note", "images", said[-1]) if said else None


def _checkpoints(place: RunFolder) -> list[int]:
    """Updates of the checkpoints that can be gone on from."""
    found = []
    for file in sorted(place.checkpoints.glob("step-*/state.json")):
        try:
            found.append(int(parse_json(file.read_text(encoding="utf-8"))["step"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError):  # a checkpoint that is none
            continue
    return found


def _saved(saved: Sequence[int]) -> Finding:
    text = f"of update {', '.join(map(str, saved))}" if saved else "none"
    return Finding("ok" if saved else "note", "checkpoints", text)


def _student(place: RunFolder) -> Finding:
    there = (place.student / "verification" / "manifest.json").is_file()
    text = str(place.student) if there else "not exported yet"
    return Finding("ok" if there else "note", "student", text)


def _room(place: RunFolder, status: Status | None) -> Finding | None:
    size = sum(file.stat().st_size for file in place.work.rglob("*") if file.is_file())
    free = "; it may be deleted" if status and status.state == "done" else ""
    return Finding("ok", "work", f"{size_text(size)} in {place.work}{free}") if size else None


def _advice(
    place: RunFolder,
    status: Status | None,
    saved: Sequence[int],
    rows: Sequence[Mapping[str, Any]],
    health: Health | None,
) -> list[Finding]:
    """What to do, most urgent first."""
    found: list[str] = []
    worried = str((health.verdict if health else status and status.health) or "healthy")
    ended = status is None or not status.going or status.killed
    if ended and not place.report.is_file():
        if worried == "diverged":
            found.append(
                "lower train.lr or train.clip, or set train.precision=float32, and train into another --output"
            )
        if saved:
            found.append(f"stepdistill train --resume --output {place.root} goes on from update {saved[-1]}")
            found.append(f"stepdistill export {place.root} writes the student of update {saved[-1]}")
        elif worried != "diverged":
            found.append("there is no checkpoint to go on from: give the same command again")
    named = [part for part in worried.split(", ") if part in SIGNS]
    stopped = _sign(str(status.phase).partition(": ")[2]) if status and status.state == "stopped" else ""
    if stopped in SIGNS and stopped not in named:
        named.insert(0, stopped)
    named += [sign for sign in _early_signs(rows) if sign not in named and ended and worried != "healthy"]
    for name, sign in SIGNS.items():
        if name in named:
            found.append(f"{name}: {sign.cure}")
    if place.page.is_file():
        found.append(f"open {place.page}")
    elif status is not None and not ended and _silence(status, rows) is not None:
        resumed = f"stepdistill train --resume --output {place.root}"
        found.append(f"end process {status.pid} on {status.host} (kill -9, if it has to be), then {resumed}")
    elif not ended:
        found.append(f"look at {place.pictures} for previews" if rows else "wait: it has not begun to train")
    return [Finding("note", "to do", text) for text in found]
