"""Puts finished runs into the tables of train/README.md: python train/results.py RUN...

Each run's report.json and samples.png are kept as train/results/NAME.* (earlier ones of the same name are replaced),
and the tables between the two markers of train/README.md, one for each teacher, are written anew from all of them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_report import RunReport, read_report

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def rows(report: RunReport) -> list[str]:
    """One row for each step count of a report."""
    teacher, student = report.teacher, report.student
    steps_full = max(teacher["fd"], key=int)
    written = []
    for steps in student["fd"]:
        clip, full_clip = student["clip_score"][steps], teacher["clip_score"][steps_full]
        few = teacher["fd"].get(steps)
        recall, share = (
            student.get("recall", {}).get(steps),
            report.recall_of_teachers.get(steps),
        )
        cells = [
            report.name,
            report.method,
            steps,
            f"**{report.gap_closed[steps]:.3f}**",
            f"{student['fd'][steps]:.2f}",
            "" if few is None else f"{few:.2f}",
            f"{clip:.3f} ({clip / full_clip:.1%})",
            "" if recall is None or share is None else f"{recall:.3f} ({share:.1%})",
            f"{report.train_seconds / 60:.1f} ({report.wall_seconds / 60:.1f})",
            f"{report.peak_memory_bytes / 2**30:.1f}",
            (report.commit or "")[:8] + "+" * (report.commit or "").endswith("+"),
        ]
        written.append(f"| {' | '.join(cells)} |")
    return written


def table(reports: list[RunReport]) -> str:
    """One teacher's table, with the commands and machines under it."""
    teacher = reports[0].teacher
    full = max(teacher["fd"], key=int)
    lines = [
        f"Suite {reports[0].suite}, {reports[0].n} images; teacher `{reports[0].teacher_name}`, "
        f"guidance {reports[0].guidance:g}: "
        f"FD-emoji {teacher['fd']['1']:.2f} at 1 step (at its better guidance), {teacher['fd'][full]:.2f} at {full}; "
        f"CLIP-emoji {teacher['clip_score'][full]:.3f} at {full}.",
        "",
        "| run | method | steps | gap closed | FD-emoji | teacher's at these steps | CLIP-emoji (of the teacher's) "
        "| recall (of the teacher's) | training (whole run), min | memory, GiB | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for report in reports:
        lines += rows(report)
    lines += ["", "| run | command | hardware |", "| --- | --- | --- |"]
    lines += [f"| {report.name} | `{report.command}` | {report.hardware} |" for report in reports]
    return "\n".join(lines)


def tables(reports: list[RunReport]) -> str:
    """A table for each teacher, that of ``emoji`` first."""
    teachers = sorted({report.teacher_name for report in reports}, key=lambda name: (name != "emoji", name))
    return "\n\n".join(
        table([report for report in reports if report.teacher_name == teacher]) for teacher in teachers
    )


def report_of(run: str | Path) -> RunReport:
    """The report of an evaluated run."""
    report = read_report(run)
    if not isinstance(report, RunReport) or not report.student["fd"]:
        raise SystemExit(f"{run} is no run that was evaluated")
    return report


def put(runs: list[str], folder: Path) -> None:
    """Keeps the runs' reports in ``folder/results`` and writes the tables of ``folder/README.md`` anew."""
    store = folder / "results"
    store.mkdir(exist_ok=True)
    for run in runs:
        report = report_of(run)
        shutil.copy(Path(run) / "report.json", store / f"{report.name}.json")
        shutil.copy(RunFolder(Path(run)).samples, store / f"{report.name}.png")
    reports = [report_of(file) for file in sorted(store.glob("*.json"))]
    page = folder / "README.md"
    text = page.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{tables(reports)}\n{END}{after}")


if __name__ == "__main__":
    put(sys.argv[1:], Path(__file__).parent)
