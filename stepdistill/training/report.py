"""A run's report in its folder: report.json, and report.html (one file, nothing fetched)."""

from __future__ import annotations

from pathlib import Path

from stepdistill.pages.metric_names import conflict_sentence, marked, name_of
from stepdistill.system.files import written_whole
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_page import run_page
from stepdistill.training.run_record import read_run
from stepdistill.training.run_report import RunReport


def write_report(folder: Path, report: RunReport) -> None:
    """Writes report.json and report.html into the folder of a run that has all the rest."""
    place = RunFolder(folder)
    with written_whole(place.report) as temporary:
        temporary.write_text(report.text(), encoding="utf-8")
    with written_whole(place.page) as temporary:
        temporary.write_text(run_page(read_run(folder)), encoding="utf-8", errors="replace")


def score_table(report: RunReport) -> str:
    """Teacher and student by step count, as a Markdown table, and how it is to be read; empty where nothing was
    evaluated."""
    if not report.student.get("fd"):
        return ""
    asked = ("fd", "second_fd", "kid", "clip_score", "second_fit", "recall", *report.better)
    shown = [key for key in asked if key == "fd" or any((report.student.get(key) or {}).values())]
    conflicts = report.conflicts
    heads = ["who", "steps", *(name_of(key, report.metrics) + marked(key, conflicts) for key in shown)]
    heads.append(f"gap closed{marked('fd', conflicts)}")
    rows = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for who, scores in (("teacher", report.teacher), ("student", report.student)):
        for steps in scores["fd"]:
            numbers = [(scores.get(key) or {}).get(steps) for key in shown]
            numbers.append(report.gap_closed.get(steps) if who == "student" else None)
            cells = ["" if number is None else f"{number:.3f}" for number in numbers]
            rows.append(f"| {who} | {steps} | {' | '.join(cells)} |")
    rows.append(f"\nSuite {report.suite}, {report.n} images, against {report.against or 'real images'}.")
    rows.append("Gap closed: 0 is the teacher at one step, 1 at full steps.")
    if conflicts:
        rows.append(conflict_sentence(conflicts, report.metrics).replace("*", r"\*", 1))
    return "\n".join([*rows, *([""] if report.remarks else []), *(f"- {each}" for each in report.remarks)])
