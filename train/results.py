"""Puts finished runs into the tables of docs/evidence/results.md: python train/results.py RUN...

Each run's report.json and samples.png are kept as train/results/NAME.* (earlier ones of the same name are replaced).
From all that are kept are written anew: what stands between the two markers of that page, for each teacher the best row
of each method, all other rows, and the commands; the plot train/results/gap_by_time.png; and the line ``Gave:`` that
opens each recipe.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from stepdistill.pages.metric_names import marked
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_report import RunReport, read_report

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
PLOT = "gap_by_time.png"
NOT_MEASURED = "# Not measured."

SCORE_METHODS = "2026-11-22: the score methods stand on the same warm start"
IN_PARTS = "in parts"
BEHIND_REGRESSION = "2026-11-28: the new methods on emoji, and what their warm start has already"
LED_AWAY = "2026-11-28: what leads away from a warm start, and what a reward does to pictures by rule"
OF_WORDS = "2026-11-28: a word for a student of few steps, students of parts, and a domain of ten images"
ONE_COMPARISON = "2026-11-28: all methods in one comparison, and a flow that was kept at a bad moment"
MOMENTUM = (
    "2026-11-28: pipelines that nobody tried, a run killed at every call, and momentum for a regression alone"
)
FLOW_MAPS = (
    "2026-11-22: flow maps learn more from whole trajectories, and their objectives need a better map than the warm "
    "start's"
)
TRIED = {
    "anyflow": OF_WORDS,
    "asd": BEHIND_REGRESSION,
    "ayf": LED_AWAY,
    "consistency": "2026-11-22: consistency distillation wants levels at every time, and jumps neither long nor short",
    "crd": LED_AWAY,
    "diff_instruct": SCORE_METHODS,
    "disback": "2026-11-28: DisBack from a plain start, beside DMD",
    "dmf": LED_AWAY,
    "dmd": "2026-11-22: one-step DMD runs away from a plain start, and stands on a warm start",
    "dmd_emoji_4step": "2026-11-22: four-step DMD starts from states of the teacher's trajectories",
    "dmd_emoji_below_noise": "2026-11-27: bf16 and starts below pure noise",
    "f_distill": "2026-11-22: TSCD, f-distill, rf++",
    "flow_map": FLOW_MAPS,
    "freeflow": "2026-11-22: FreeFlow runs away after its warm start",
    "gdd": MOMENTUM,
    "gndm": BEHIND_REGRESSION,
    "gndmr": MOMENTUM,
    "internalise": BEHIND_REGRESSION,
    "rg_lcd_emoji": BEHIND_REGRESSION,
    "instaflow": MOMENTUM,
    "lcm": "2026-11-22: LCM needs longer skips and pure noise at the top",
    "lcm_lora_emoji": "2026-11-22: LCM as an adapter",
    "ladd": MOMENTUM,
    "lightning": LED_AWAY,
    "mdt_dist": LED_AWAY,
    "meanflow": "2026-11-22: MeanFlow learns slowly",
    "opd": LED_AWAY,
    "pcm": "2026-11-22: consistency methods on a pool of 12 steps",
    "phased_dmd": "2026-11-22: Phased DMD beats its teacher",
    "progressive": BEHIND_REGRESSION,
    "rcm": BEHIND_REGRESSION,
    "reflow": ONE_COMPARISON,
    "rfpp": "2026-11-22: rf++ with the clean distance over t spends its gradient where nothing is left to learn",
    "scm": "2026-11-22: twenty seconds of every method, and sCM was trained too long",
    "self_e": BEHIND_REGRESSION,
    "sid": SCORE_METHODS,
    "sim": SCORE_METHODS,
    "sim_emoji_below_noise": "2026-11-27: bf16 and starts below pure noise",
    "slimflow": "2026-11-22: SlimFlow with 15 % of the teacher's parameters",
    "tbcm": "2026-11-22: TBCM loses with steps",
    "tcd": "2026-11-22: consistency methods on a pool of 12 steps",
    "tscd": "2026-11-22: TSCD, f-distill, rf++",
    "twinflow": LED_AWAY,
    "vdot": BEHIND_REGRESSION,
    "emoji-flow": "2026-11-27: emoji-flow's recipes, and changes that no test noticed",
}
"""Headings of LOG.md, by run, else by teacher, else by method: what was tried on the way."""


@dataclass(frozen=True)
class Row:
    """A run at one number of steps."""

    report: RunReport
    steps: str

    @property
    def gap(self) -> float:
        return self.report.gap_closed[self.steps]


def tried(report: RunReport) -> str:
    """A link to the heading of LOG.md that tells of a run; empty where there is none."""
    known = (report.name, str(report.teacher_name), report.method)
    heading = next((TRIED[name] for name in known if name in TRIED), None)
    return f"[tried](../../LOG.md#{anchor(heading)})" if heading else ""


def anchor(heading: str) -> str:
    """Of a Markdown heading."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()))


def hardware_of(report: RunReport) -> str:
    """Of a report; older ones have "1 threads"."""
    return str(report.hardware).replace(" 1 threads ", " 1 thread ")


def whole_run(report: RunReport) -> str:
    """Minutes from start to report, or whose warm start the run took over."""
    if report.warm_start_of:
        return f"warm start of {Path(report.warm_start_of).name}"
    if report.resumes:
        return IN_PARTS
    return f"{report.wall_seconds / 60:.1f}"


def passes_of(report: RunReport) -> str:
    """Network passes in millions, pairs included, and the share with a graph; empty where they were not counted."""
    if report.all_passes is None:
        return ""
    graph = sum(each.with_graph for each in report.passes.values())
    return f"{report.all_passes / 1e6:.2f} ({graph / report.all_passes:.0%})"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def cells(row: Row, rank: str) -> str:
    """A row of the table."""
    report, steps = row.report, row.steps
    teacher, student = report.teacher, report.student
    clip, full_clip = student["clip_score"][steps], teacher["clip_score"][max(teacher["fd"], key=int)]
    few = teacher["fd"].get(steps)
    recall, share = student.get("recall", {}).get(steps), report.recall_of_teachers.get(steps)
    texts = [
        *([rank] if rank else []),
        f"`stepdistill train {report.name}`",
        steps,
        f"{row.gap:.3f}",
        f"{student['fd'][steps]:.2f}{marked('fd', report.conflicts)}",
        _or_dash((student.get("second_fd") or {}).get(steps)),
        "" if few is None else f"{few:.2f}",
        f"{clip:.3f} ({clip / full_clip:.1%})",
        "" if recall is None or share is None else f"{recall:.3f} ({share:.1%})",
        f"{report.train_seconds / 60:.1f}",
        whole_run(report),
        passes_of(report),
        f"{report.peak_memory_bytes / 2**30:.1f}",
        (report.commit or "")[:8] + "+" * (report.commit or "").endswith("+"),
        tried(report),
    ]
    return f"| {' | '.join(texts)} |"


HEAD = (
    "command | steps | gap closed | FD-emoji | FD-judge | teacher's at these steps | CLIP-emoji (of the teacher's) "
    "| recall (of the teacher's) | training, min | whole run, min | passes, M (with graph) | memory, GiB | commit "
    "| log |"
)


def best_of_each_method(reports: list[RunReport]) -> tuple[list[Row], list[Row]]:
    """The best row of each method, ranked, and the other rows, by name and steps: among them those of runs whose loss
    looked through the network of FD-emoji, which it therefore does not rank."""
    rows = [Row(report, steps) for report in reports for steps in report.student["fd"]]
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: -row.gap):
        if "fd" not in row.report.conflicts:
            best.setdefault(row.report.method, row)
    first = list(best.values())
    return first, [row for row in rows if row not in first]


def table(reports: list[RunReport]) -> str:
    """One teacher's table: the best row of each method, and the other rows folded."""
    teacher = reports[0].teacher
    full = max(teacher["fd"], key=int)
    first, others = best_of_each_method(reports)
    suites = ", ".join(sorted({str(report.suite) for report in reports}))
    lines = [
        f"## Teacher {reports[0].teacher_name}",
        "",
        f"Suite {suites}, {reports[0].n:,} images, guidance {reports[0].guidance:g}. The teacher: "
        f"FD-emoji {teacher['fd']['1']:.2f} at 1 step (at its better guidance) and {teacher['fd'][full]:.2f} at "
        f"{full}, CLIP-emoji {teacher['clip_score'][full]:.3f} at {full}. "
        f"Hardware: {'; '.join(sorted({hardware_of(report) for report in reports}))}.",
        "",
        f"| | {HEAD}",
        f"| --- {'| --- ' * HEAD.count('|')}|",
        *(cells(row, str(place)) for place, row in enumerate(first, 1)),
    ]
    if others:
        lines += [
            "",
            f'<details markdown="1"><summary>All other rows ({len(others)})</summary>',
            "",
            f"| {HEAD}",
            f"{'| --- ' * HEAD.count('|')}|",
            *(cells(row, "") for row in others),
            "",
            "</details>",
        ]
    lines += ["", '<details markdown="1"><summary>Commands as they were given</summary>', ""]
    lines += ["| run | command |", "| --- | --- |"]
    lines += [f"| {report.name} | `{report.command}` |" for report in reports]
    return "\n".join([*lines, "", "</details>"])


def tables(reports: list[RunReport]) -> str:
    """A part for each teacher, that of ``emoji`` first."""
    teachers = sorted({report.teacher_name for report in reports}, key=lambda name: (name != "emoji", name))
    return "\n\n".join(
        table([report for report in reports if report.teacher_name == teacher]) for teacher in teachers
    )


def plot(reports: list[RunReport], file: Path) -> None:
    """Gap closed against training time: the best row of each method on ``emoji``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, _ = best_of_each_method([report for report in reports if report.teacher_name == "emoji"])
    figure = Figure(figsize=(9, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for steps, colour in (("1", "#0b62a4"), ("2", "#2e8b57"), ("4", "#b86e00"), ("8", "#6a4c93")):
        points = [(row.report.train_seconds / 60, row.gap) for row in rows if row.steps == steps]
        if points:
            name = f"{steps} step{'s' * (steps != '1')}"
            axes.plot(*zip(*points, strict=True), "o", color=colour, label=name, markeredgecolor="white")
    axes.axhline(1, color="#57606a", linewidth=1, linestyle="--")
    axes.set_xlabel("training on one CPU thread, minutes")
    axes.set_ylabel("gap closed (1: the teacher with 25 steps)")
    axes.set_xlim(0, max(row.report.train_seconds for row in rows) / 60 + 4)
    axes.set_ylim(min(row.gap for row in rows) - 0.03, max(row.gap for row in rows) + 0.02)
    axes.grid(color="#d5dbe1")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    high, wide = (end - start for start, end in (axes.get_ylim(), axes.get_xlim()))
    taken: list[tuple[float, float, float]] = []
    for row in rows:  # names beside their points, moved down where others are
        x, name = row.report.train_seconds / 60, row.report.method
        left, right, y = x + 0.008 * wide, x + (0.02 + 0.0105 * len(name)) * wide, row.gap
        while any(start < right and left < end and abs(y - at) < 0.036 * high for start, end, at in taken):
            y -= 0.006 * high
        taken.append((left, right, y))
        axes.annotate(name, (x, row.gap), (left, y), fontsize=9, va="center",
                      arrowprops={"arrowstyle": "-", "color": "#a3adb8", "shrinkA": 0, "shrinkB": 3})  # fmt: skip
    figure.savefig(file, metadata={"Software": None})


def gave(report: RunReport | None) -> str:
    """The line of a recipe's header that says what it gave."""
    if report is None:
        return NOT_MEASURED
    steps = max(report.gap_closed, key=lambda count: report.gap_closed[count])
    at = f"{report.gap_closed[steps]:.3f} at {steps} step{'s' * (steps != '1')}"
    return f"# Gave: gap closed {at}, {report.train_seconds / 60:.1f} min ({(report.commit or '')[:8]})."


def write_headers(recipes: Path, reports: list[RunReport]) -> None:
    """The line of every recipe's header; of one that was not measured what follows ``Not measured.`` stays."""
    known = {report.name: report for report in reports}
    for file in sorted(recipes.glob("*.yaml")):
        text, line = file.read_text(encoding="utf-8"), gave(known.get(file.stem))
        if file.stem not in known and f"\n{NOT_MEASURED}" in text:
            continue
        said, count = re.subn(r"^# (Gave:|Not measured\.).*$", line, text, count=1, flags=re.MULTILINE)
        if not count:
            raise SystemExit(f"{file} has no line Gave: in its header")
        if said != text:
            file.write_text(said, encoding="utf-8")


def report_of(run: str | Path) -> RunReport:
    """The report of an evaluated run."""
    report = read_report(run)
    if not isinstance(report, RunReport) or not report.student["fd"]:
        raise SystemExit(f"{run} is no run that was evaluated")
    return report


def put(runs: list[str], folder: Path, page: Path) -> None:
    """Keeps the runs' reports in ``folder/results`` and writes the tables of ``page`` and the recipes' headers anew."""
    store = folder / "results"
    store.mkdir(exist_ok=True)
    for run in runs:
        report, place = report_of(run), RunFolder(Path(run))
        shutil.copy(place.report, store / f"{report.name}.json")
        shutil.copy(place.samples, store / f"{report.name}.png")
    reports = [report_of(file) for file in sorted(store.glob("*.json"))]
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{tables(reports)}\n{END}{after}", encoding="utf-8")
    write_headers(folder / "recipes", reports)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    put(sys.argv[1:], here, here.parent / "docs" / "evidence" / "results.md")
    plot([report_of(file) for file in sorted((here / "results").glob("*.json"))], here / "results" / PLOT)
