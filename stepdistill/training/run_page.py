"""The page of a run: what it came to first, then how it went, what to do next and where its numbers come from. The same
page is report.html in the run's folder and what ``stepdistill watch`` shows. Imports no torch."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from stepdistill.pages.html import document, embedded_picture, scrolled, table
from stepdistill.pages.metric_names import DIRECTIONS, HIGHER, LOWER, conflict_sentence, marked, name_of
from stepdistill.pages.numbers import with_error
from stepdistill.pages.picture_rows import STYLE as ROWS
from stepdistill.pages.picture_rows import picture_rows
from stepdistill.pages.sheets import Row, Sheet
from stepdistill.training.run_curves import curves, further_curves, numbers_of_curves, phases_of
from stepdistill.training.run_record import RunRecord
from stepdistill.training.run_summary import STYLE as SUMMARY
from stepdistill.training.run_summary import head, summary

STRIP = 8
"""Previews in the strip, at most."""
STYLE = (
    ROWS
    + SUMMARY
    + (
        "ul.commands{list-style:none;padding:0}ul.commands li{margin:.7em 0}"
        "ul.commands code{display:block;background:var(--soft);padding:.5em .8em;border-radius:6px;"
        "white-space:pre-wrap;user-select:all}"
    )
)


def run_page(run: RunRecord) -> str:
    """The whole page of a run, finished or not."""
    return document(f"{run.name}: {run.state}", STYLE, [run_body(run)])


def run_body(run: RunRecord) -> str:
    """What stands between the page's head and its end."""
    parts = (
        head(run),
        summary(run),
        _picture(run),
        _curves(run),
        _strip(run),
        _scores(run),
        _recipe(run),
        _commands(run),
        _files(run),
        _provenance(run),
    )
    return "".join(parts)


def _picture(run: RunRecord) -> str:
    """The student's pictures beside the teacher's: the samples, before the end the last preview."""
    sheet, title = (run.samples() if run.done else None), "Student and teacher"
    if sheet is None:
        last = run.previews(1)
        if not last:
            return ""
        update, sheet = next(iter(last.items()))
        title = f"Student and teacher, after {update:,} updates"
    width = min(max(64, sheet.rows[0].pictures[0].width), 168)
    rows = picture_rows(sheet, name=title, width=width)
    said = "The same prompts and seeds in every row."
    if videos := run.videos():
        moving = embedded_picture(videos, "the first videos of each row, moving", kind="webp")
        rows = scrolled(moving, "videos") + rows
        said += " The first of them move; below, of each the first, the middle and the last frame."
    return f"<h2>{html.escape(title)}</h2><p class=note>{said}</p>{rows}"


def _curves(run: RunRecord) -> str:
    if not run.stats:
        return ""
    updates = run.status.updates if run.status and run.going else 0
    charts = curves(run.stats, updates)
    if not charts:
        return ""
    shaded = ""
    if phases := phases_of(run.stats, updates):
        named = "; ".join(f"{p.name}, updates {p.start:,.0f} to {p.end:,.0f}" for p in phases)
        shaded = f"<p class=note>Phases, every second one shaded: {html.escape(named)}.</p>"
    worries = _worries(run)
    head, rows = numbers_of_curves(run.stats)
    further = "".join(further_curves(run.stats, updates))
    return (
        f"<h2>Training</h2>{shaded}{worries}<div class=charts>{''.join(charts)}</div>"
        f"<details><summary>What else was logged</summary><div class=charts>{further}</div></details>"
        f"<details><summary>The curves as numbers</summary>{table(head, rows, 'numbers')}</details>"
    )


def _worries(run: RunRecord) -> str:
    found = (run.report.get("health") or {}).get("worries") if run.done else None
    if found is None:
        found = [
            {"update": row["update"] + 1, "what": what}
            for row in run.stats
            for what in row.get("worries") or ()
        ]
    said = [f"update {one.get('update', 0):,}: {one.get('what', '')}" for one in found[-20:]]
    lines = "".join(f"<li>{html.escape(text)}</li>" for text in said)
    return f"<div class=warning>Warnings of previews<ul>{lines}</ul></div>" if lines else ""


def _strip(run: RunRecord) -> str:
    """The student's row of several previews under each other, the teacher's last."""
    sheets = run.previews(STRIP)
    if len(sheets) < 2:
        return ""
    rows = [Row(f"after {update:,} updates", sheet.rows[-1].pictures) for update, sheet in sheets.items()]
    last = next(reversed(sheets.values()))
    if len(last.rows) > 1:
        rows.append(last.rows[0])
    strip = picture_rows(Sheet(tuple(rows), last.prompts), name="previews over time")
    return f"<h2>Previews</h2><p class=note>The same prompts and seeds as training went on.</p>{strip}"


def _scores(run: RunRecord) -> str:
    report = run.report
    teacher, student = report.get("teacher") or {}, report.get("student") or {}
    if not run.done or not (student.get("fd") or {}):
        return ""
    names = report.get("metrics") or {}
    keys = [key for key in student if not key.endswith("_se") and any((student[key] or {}).values())]
    rows = []
    for who, scores in (("teacher", teacher), ("student", student)):
        for steps in scores.get("fd") or {}:
            cells = [who, steps]
            for key in keys:
                value = (scores.get(key) or {}).get(steps)
                error = (scores.get(f"{key}_se") or {}).get(steps)
                cells.append("-" if value is None else with_error(value, error))
            gap = (report.get("gap_closed") or {}).get(steps) if who == "student" else None
            rows.append([*cells[:2], "-" if gap is None else f"{gap:.3f}", *cells[2:]])
    conflicts = report.get("conflicts") or {}
    head = ["who", "steps", f"gap closed{marked('fd', conflicts)}"]
    head += [name_of(key, names) + marked(key, conflicts) for key in keys]
    better = {
        **DIRECTIONS,
        **{key: f"{word} is better" for key, word in (report.get("better") or {}).items()},
    }
    sides = [
        f"{word[:1].upper()}{word[1:]}: {', '.join(name_of(key, names) for key in keys if better.get(key) == word)}."
        for word in (LOWER, HIGHER)
        if any(better.get(key) == word for key in keys)
    ]
    note = (
        f"Suite {report.get('suite')}, {report.get('n'):,} images; ± is one standard error. {' '.join(sides)} "
        "Gap closed: 0 is the teacher with one step, 1 with all of its steps."
    )
    remarks = "".join(f"<li>{html.escape(each)}</li>" for each in report.get("remarks") or ())
    read = f"<ul class=note>{remarks}</ul>" if remarks else ""
    if said := conflict_sentence(conflicts, names):
        read = f"<p class=warning>{html.escape(said)}</p>{read}"
    return f"<h2>Scores</h2>{table(head, rows, 'numbers')}<p class=note>{html.escape(note)}</p>{read}"


def _recipe(run: RunRecord) -> str:
    if not run.recipe:
        return ""
    rows = {key: _value(run.recipe, key) for key in ("teacher", "method", *run.changed)}
    whole = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True, width=100)
    changed = f"What is not at its default: {len(run.changed)} keys" if run.changed else "Teacher and method"
    return (
        f"<h2>Recipe</h2><details><summary>{changed}</summary>{table(['key', 'value'], rows.items())}</details>"
        f"<details><summary>Every key</summary><pre>{html.escape(whole)}</pre></details>"
    )


def _value(tree: Mapping[str, Any], path: str) -> str:
    value: Any = tree
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _commands(run: RunRecord) -> str:
    """What one would type next, each to be taken with one click."""
    place = run.quoted
    if run.done:
        sheet = run.samples()
        suite = "" if str(run.report.get("suite")).startswith("emoji") else " --suite my_suite.yaml"
        prompt = sheet.prompts[0] if sheet and sheet.prompts else "a red apple"
        wanted = [
            ("Draw with the student", f"stepdistill sample {place} {shlex.quote(prompt)}"),
            ("Draw in the browser, and compare by eye", f"stepdistill demo {place}"),
            ("Measure it", f"stepdistill eval {place}{suite} --output {place}/eval"),
            ("Set it beside another run", f"stepdistill compare {place} OTHER_RUN --output runs/compared"),
            ("Prove its folder again", f"stepdistill verify {place}/student"),
            ("Export it anew from its last checkpoint", f"stepdistill export {place}"),
            ("See what would be published", f"stepdistill push {place} --repo OWNER/NAME --dry-run"),
        ]
    else:
        kept = run.folder.checkpoints.is_dir() and any(run.folder.checkpoints.iterdir())
        wanted = [("Export what the last checkpoint has", f"stepdistill export {place}")] if kept else []
        if not run.going and kept:
            wanted.insert(0, ("Go on where it was stopped", f"stepdistill train --resume --output {place}"))
        elif not run.going and run.recipe:
            again = f"stepdistill train {place}/recipe.yaml --output {place}"
            wanted = [("Start anew, as it has no checkpoint", again)]
    if not wanted:
        return ""
    lines = "".join(f"<li>{html.escape(text)}<code>{html.escape(line)}</code></li>" for text, line in wanted)
    return f"<h2>Next</h2><p class=note>A click selects a whole command.</p><ul class=commands>{lines}</ul>"


FILES = (
    ("student/", "the student, a diffusers pipeline"),
    ("report.json", "the numbers of this page"),
    ("recipe.yaml", "the recipe, every key written out"),
    ("stats.jsonl", "a row an update"),
    ("log.txt", "what was said on the terminal"),
    ("method.py", "the method, a file of your own"),
    ("pictures/", "samples and previews"),
)


def _files(run: RunRecord) -> str:
    """Links to what lies beside the page."""
    root = run.folder.root
    lines = "".join(
        f'<li><a href="{name}">{name}</a> {text}</li>' for name, text in FILES if (root / name).exists()
    )
    return f"<h2>Files</h2><ul>{lines}</ul>" if lines else ""


def _provenance(run: RunRecord) -> str:
    report = run.report
    rows: list[tuple[str, str]] = []
    for key in ("command", "commit", "hardware", "verification"):
        if report.get(key):
            rows.append((key, str(report[key])))
    for start in report.get("resumes") or ():
        rows.append(("resumed", f"after {start['update']:,} updates by {start['command']}"))
    if prompts := report.get("prompts"):
        source = prompts.get("file") or "the teacher's own"
        rows.append(("prompts", f"{source}: {prompts['count']:,}, sha256 {prompts['sha256'][:16]}"))
    if versions := report.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    rows += [("teacher's changes", str(line)) for line in report.get("teacher_changes") or ()]
    protocol: Sequence[tuple[str, str]] = [
        (str(key).replace("_", " "), str(value)) for key, value in (report.get("protocol") or {}).items()
    ]
    if not rows:
        return ""
    more = (
        f"<details><summary>How it was measured</summary>{table([], protocol)}</details>" if protocol else ""
    )
    return f"<h2>Where the numbers come from</h2>{table([], rows)}{more}"
