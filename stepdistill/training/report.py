"""A run's report in its folder: report.json, and report.html (one file, nothing fetched)."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stepdistill.pages.html import document, embedded_picture, table
from stepdistill.system.run_folder import RunFolder
from stepdistill.training.run_report import RunReport

FACTS = {
    *("command", "train_seconds", "wall_seconds", "peak_memory_bytes", "hardware", "commit", "verification"),
}
"""What the page says of the run beside its scores."""


def write_report(folder: Path, report: RunReport, stats: Sequence[Mapping[str, Any]]) -> None:
    """Writes report.json and report.html into a run folder that holds pictures/samples.png and recipe.yaml."""
    (folder / "report.json").write_text(report.text(), encoding="utf-8")
    facts = report.model_dump(include=FACTS)
    body = [
        f"<h1>{html.escape(report.name)}</h1>",
        f"<p>{html.escape(report.summary or '')}</p>",
        embedded_picture(RunFolder(folder).samples.read_bytes(), "samples"),
        _html_table(score_table(report)),
        *(_curve(stats, turn) for turn in dict.fromkeys(str(row["network"]) for row in stats)),
        f"<h2>Run</h2><pre>{html.escape(yaml.safe_dump(facts, sort_keys=False, width=110))}</pre>",
        f"<h2>Recipe</h2><pre>{html.escape((folder / 'recipe.yaml').read_text(encoding='utf-8'))}</pre>",
    ]
    page = document(report.name, "td,th{text-align:left}", body)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _html_table(markdown: str) -> str:
    """A Markdown table with the text under it, as HTML."""
    lines = markdown.splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|") and "---" not in line
    ]
    rest = " ".join(html.escape(line) for line in lines if line and not line.startswith("|"))
    return f"{table(rows[0], rows[1:])}<p>{rest}</p>" if rows else "<p>Not evaluated.</p>"


def _curve(stats: Sequence[Mapping[str, Any]], turn: str, width: int = 520, height: int = 160) -> str:
    """The loss of one network over steps, as inline SVG."""
    rows = [
        (row["update"], row["loss"])
        for row in stats
        if row["network"] == turn and row.get("loss") is not None
    ]
    if len(rows) < 2:
        return ""
    bucket = max(1, len(rows) // 200)
    groups = [rows[i : i + bucket] for i in range(0, len(rows), bucket)]
    points = [(group[0][0], sum(loss for _, loss in group) / len(group)) for group in groups]
    low, high = min(y for _, y in points), max(y for _, y in points)
    span, last = (high - low) or 1.0, max(x for x, _ in points) or 1
    line = " ".join(f"{x / last * width:.1f},{height - (y - low) / span * height:.1f}" for x, y in points)
    return (
        f"<h2>Loss of {html.escape(turn)}: {low:.4g} to {high:.4g}</h2>"
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" style="background:#f4f4f4">'
        f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="1.5"/></svg>'
    )


def score_table(report: RunReport) -> str:
    """Teacher and student by step count, as a Markdown table; empty where nothing was evaluated."""
    if not report.student.get("fd"):
        return ""
    names = report.metrics
    rows = [
        f"| who | steps | {names['fd'] or 'FD'} | {names['clip_score'] or 'CLIP score'} | recall | gap closed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for who, scores in (("teacher", report.teacher), ("student", report.student)):
        for steps, fd in scores["fd"].items():
            clip, recall = (scores.get(name, {}).get(steps) for name in ("clip_score", "recall"))
            gap = report.gap_closed.get(steps) if who == "student" else None
            cells = ["" if number is None else f"{number:.3f}" for number in (fd, clip, recall, gap)]
            rows.append(f"| {who} | {steps} | {' | '.join(cells)} |")
    rows.append(f"\nSuite {report.suite}, {report.n} images.")
    rows.append("Gap closed: 0 is the teacher at one step, 1 at full steps.")
    return "\n".join(rows)
