"""What a run says of itself: report.json, report.html (one file, nothing fetched), and the student's model card."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stepdistill.web_page import document, embedded_picture, table

CARD = """---
library_name: diffusers
{base}pipeline_tag: {tag}
tags: [stepdistill, distillation, few-step, {method}]
---
# {title}

A student of `{teacher}` that draws in {steps} step(s), distilled with the method `{method}` of stepdistill.

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipe({call}).images[0]
```

It is made of stock diffusers classes alone. **Pass `num_inference_steps={steps}`**{guidance_note} The step grid is in
`scheduler/scheduler_config.json`.

| | |
| --- | --- |
| teacher | `{teacher}` |
| method | {summary} |
| teacher's guidance, now in the weights | {guidance} |
| network calls an image | {steps} |
| trained with | `{command}` |

{changes}{scores}

`verification/` holds pictures drawn by the trainer, their prompts and seeds, and the hash of every file;
`stepdistill verify` draws them again with plain diffusers.
"""


def model_card(
    *,
    teacher: str,
    method: str,
    summary: str,
    steps: int,
    guidance: float,
    call: Mapping[str, Any],
    command: str,
    changes: Sequence[str] = (),
    report: Mapping[str, Any] | None = None,
) -> str:
    """The Markdown of a student's README.md.

    Args:
        teacher: its name as the recipe gave it.
        method, summary: name and first line of the method.
        steps: network calls of the student.
        guidance: the teacher's guidance scale.
        call: arguments of the verification call.
        command: what made the student.
        changes: what was changed in the teacher when it was taken.
        report: report.json, for the scores; None before evaluation.
    """
    shown = {k: (v[0] if isinstance(v, list) and k == "prompt" else v) for k, v in call.items()}
    shown.pop("batch_size", None)
    if isinstance(shown.get("class_labels"), list):
        shown["class_labels"] = shown["class_labels"][:1]
    scale = call.get("guidance_scale")
    note = "."
    if scale == 0:
        note = " and **`guidance_scale=0`**: guidance is in the weights, diffusers' default would apply it twice."
    elif scale is not None:
        note = f" and the `guidance_scale` you want, such as {scale:g}: it is an input of the network."
    hub = teacher.count("/") == 1 and not Path(teacher).exists()
    return CARD.format(
        base=f"base_model: {teacher}\n" if hub else "",
        tag="text-to-image" if "prompt" in call else "unconditional-image-generation",
        method=method,
        title=f"{teacher} in {steps} step{'s' * (steps > 1)} ({method})",
        teacher=teacher,
        steps=steps,
        call=", ".join(f"{key}={value!r}" for key, value in shown.items()),
        guidance_note=note,
        guidance=f"{guidance:g}",
        summary=summary,
        command=command,
        changes=f"The teacher as it was taken: {' '.join(changes)}\n\n" if changes else "",
        scores=score_table(report) if report else "",
    )


def score_table(report: Mapping[str, Any]) -> str:
    """Teacher and student by step count, as a Markdown table; empty where nothing was evaluated."""
    if not report.get("student", {}).get("fd"):
        return ""
    names = report["metrics"]
    rows = [
        f"| who | steps | {names['fd'] or 'FD'} | {names['clip_score'] or 'CLIP score'} | recall | gap closed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for who in ("teacher", "student"):
        for steps, fd in report[who]["fd"].items():
            clip, recall = (report[who].get(name, {}).get(steps) for name in ("clip_score", "recall"))
            gap = report["gap_closed"].get(steps) if who == "student" else None
            cells = ["" if number is None else f"{number:.3f}" for number in (fd, clip, recall, gap)]
            rows.append(f"| {who} | {steps} | {' | '.join(cells)} |")
    rows.append(f"\nSuite {report['suite']}, {report['n']} images.")
    rows.append("Gap closed: 0 is the teacher at one step, 1 at full steps.")
    return "\n".join(rows)


def write_report(folder: Path, report: Mapping[str, Any], stats: Sequence[Mapping[str, Any]]) -> None:
    """Writes report.json and report.html into a run folder that holds samples.png and recipe.yaml."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    facts = {
        key: report[key]
        for key in (
            "command",
            "train_seconds",
            "wall_seconds",
            "peak_memory_bytes",
            "hardware",
            "commit",
            "verification",
        )
    }
    body = [
        f"<h1>{html.escape(report['name'])}</h1>",
        f"<p>{html.escape(report['summary'])}</p>",
        embedded_picture((folder / "samples.png").read_bytes(), "samples"),
        _html_table(score_table(report)),
        *(_curve(stats, turn) for turn in dict.fromkeys(str(row["turn"]) for row in stats)),
        f"<h2>Run</h2><pre>{html.escape(yaml.safe_dump(facts, sort_keys=False, width=110))}</pre>",
        f"<h2>Recipe</h2><pre>{html.escape((folder / 'recipe.yaml').read_text(encoding='utf-8'))}</pre>",
    ]
    page = document(str(report["name"]), "td,th{text-align:left}", body)
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
        (row["step"], row["loss"]) for row in stats if row["turn"] == turn and row.get("loss") is not None
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
