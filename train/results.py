"""Puts finished runs into the tables of docs/evidence/results.md: python train/results.py RUN...

Each run's report.json and samples.png are kept as train/results/NAME.* (earlier ones of the same name are replaced),
and what stands between the two markers of that page is written anew from all of them: for each teacher the best row of
each method, then all rows, and the commands. The `# Gave:` line of each run's recipe is written, too.
"""

from __future__ import annotations

import re
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
            f"{report.train_seconds / 60:.1f}",
            # Shorter than its training where a run went on from the checkpoint of another.
            f"{report.wall_seconds / 60:.1f}" if report.wall_seconds >= report.train_seconds else "went on",
            f"{report.peak_memory_bytes / 2**30:.1f}",
            (report.commit or "")[:8] + "+" * (report.commit or "").endswith("+"),
        ]
        written.append(f"| {' | '.join(cells)} |")
    return written


def best(reports: list[RunReport]) -> list[str]:
    """The best row of each method, the largest gap first."""
    found: dict[str, tuple[float, str, RunReport]] = {}
    for report in reports:
        for steps, gap in report.gap_closed.items():
            found[report.method] = max(
                found.get(report.method, (gap, steps, report)), (gap, steps, report), key=_gap
            )
    lines = [
        "| method | gap closed | steps | FD-emoji | training, min | command |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for method, (gap, steps, report) in sorted(found.items(), key=lambda item: -item[1][0]):
        lines.append(
            f"| {method} | **{gap:.3f}** | {steps} | {report.student['fd'][steps]:.2f} "
            f"| {report.train_seconds / 60:.1f} | `stepdistill train {report.name}` |"
        )
    return lines


def _gap(row: tuple[float, str, RunReport]) -> float:
    return row[0]


def table(reports: list[RunReport]) -> str:
    """One teacher's part: the best rows, all rows, and the commands and machines."""
    teacher = reports[0].teacher
    full = max(teacher["fd"], key=int)
    lines = [
        f"## Teacher {reports[0].teacher_name}",
        "",
        f"Suite {reports[0].suite}, {reports[0].n} images, guidance {reports[0].guidance:g}. The teacher: "
        f"FD-emoji {teacher['fd']['1']:.2f} at 1 step (at its better guidance), {teacher['fd'][full]:.2f} at {full}; "
        f"CLIP-emoji {teacher['clip_score'][full]:.3f} at {full}.",
        "",
        *best(reports),
        "",
        '<details markdown="1"><summary>All step counts</summary>',
        "",
        "| run | method | steps | gap closed | FD-emoji | teacher's at these steps | CLIP-emoji (of the teacher's) "
        "| recall (of the teacher's) | training, min | whole run, min | memory, GiB | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for report in reports:
        lines += rows(report)
    lines += [
        "",
        "</details>",
        "",
        '<details markdown="1"><summary>Commands as they were given</summary>',
        "",
    ]
    lines += ["| run | command | hardware |", "| --- | --- | --- |"]
    lines += [f"| {report.name} | `{report.command}` | {report.hardware} |" for report in reports]
    return "\n".join([*lines, "", "</details>"])


def tables(reports: list[RunReport]) -> str:
    """A part for each teacher, that of ``emoji`` first."""
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


def gave(report: RunReport) -> str:
    """What the head of a recipe says that it gave: its best step count."""
    gap, steps = max((gap, steps) for steps, gap in report.gap_closed.items())
    return (
        f"# Gave: gap closed {gap:.3f} at {steps} step{'s' * (steps != '1')} "
        f"(FD-emoji {report.student['fd'][steps]:.2f}), {report.train_seconds / 60:.1f} minutes of training "
        f"({(report.commit or '')[:8]})."
    )


def put(runs: list[str], folder: Path, page: Path) -> None:
    """Keeps the runs' reports in ``folder/results`` and writes the tables of ``page`` anew."""
    store = folder / "results"
    store.mkdir(exist_ok=True)
    for run in runs:
        report = report_of(run)
        shutil.copy(Path(run) / "report.json", store / f"{report.name}.json")
        shutil.copy(RunFolder(Path(run)).samples, store / f"{report.name}.png")
    reports = [report_of(file) for file in sorted(store.glob("*.json"))]
    for report in reports:
        recipe = folder / "recipes" / f"{report.name}.yaml"
        if recipe.is_file():
            recipe.write_text(
                re.sub(r"^# Gave: .*$", gave(report), recipe.read_text(), count=1, flags=re.MULTILINE)
            )
    text = page.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{tables(reports)}\n{END}{after}")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    put(sys.argv[1:], here, here.parent / "docs" / "evidence" / "results.md")
