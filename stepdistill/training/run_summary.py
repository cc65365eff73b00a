"""The top of a run's page: where it is, and in a few cards what it came to."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from stepdistill.pages.numbers import duration
from stepdistill.system.files import size_text
from stepdistill.training.run_record import RunRecord

STYLE = (
    ".state{display:inline-block;padding:.1em .7em;border-radius:1em;background:var(--soft);font-weight:600}"
    ".state.finished{background:var(--good-soft);color:var(--good)}.state.bad{background:var(--bad-soft);"
    "color:var(--bad)}.facts{display:flex;flex-wrap:wrap;gap:1px;"
    "background:var(--line);border:1px solid var(--line);border-radius:8px;overflow:hidden;margin:1em 0}"
    ".facts div{flex:1 1 200px;background:var(--paper);padding:.7em 1em}.facts dt{color:var(--muted);font-size:13px}"
    ".facts dd{margin:0}.facts b{font-size:1.25rem;display:block}.facts .bad b{color:var(--bad)}"
    ".facts .good b{color:var(--good)}progress{width:100%;height:.8em;accent-color:var(--c0)}"
)


def head(run: RunRecord) -> str:
    """Name and state, and where a run is that goes on or was stopped."""
    kind = {"finished": "finished", "killed": "bad", "stopped": "bad", "silent": "bad"}.get(run.state, "")
    method = run.report.get("method") or run.recipe.get("method") or ""
    teacher = run.report.get("teacher_name") or run.recipe.get("teacher") or ""
    about = f"{method}, a student of {teacher}. " if method and teacher else ""
    lines = [
        f"<h1>{html.escape(run.name)}</h1>",
        f'<p><span class="state {kind}">{html.escape(run.state)}</span> {html.escape(about)}'
        f"{html.escape(str(run.report.get('summary') or ''))}</p>",
    ]
    if run.about_state:
        lines.append(f"<p>{html.escape(run.about_state)}</p>")
    status = run.status
    if status is not None and not run.done and status.updates:
        lines.append(
            f'<progress aria-label="updates" max={status.updates} value={status.update}>{status.update}</progress>'
        )
    if run.unread:
        lines.append(f"<p class=warning>{html.escape(run.unread)}</p>")
    return "".join(lines)


def summary(run: RunRecord) -> str:
    """Cards: the result with its meaning, health, cost, the proof of the student's folder."""
    cards = [card for card in (*_results(run), _health(run), *_costs(run), _proof(run)) if card]
    return f"<dl class=facts>{''.join(cards)}</dl>" if cards else ""


def _card(name: str, value: str, text: str, kind: str = "") -> str:
    name, value, text = map(html.escape, (name, value, text))
    return f'<div class="{kind}"><dt>{name}</dt><dd><b>{value}</b>{text}</dd></div>'


def _results(run: RunRecord) -> list[str]:
    """How near the student came, in one number and its meaning."""
    report = run.report
    if not run.done:
        return []
    gaps: Mapping[str, float] = report.get("gap_closed") or {}
    scores: Mapping[str, float | None] = (report.get("student") or {}).get("fd") or {}
    full = max((report.get("teacher") or {}).get("fd") or {"": None}, key=lambda steps: int(steps or 0))
    against = f" Measured against {report['against']}." if report.get("against") else ""
    if gaps:
        return [
            _card(
                f"gap closed, {_steps(steps)}",
                f"{value:.3f}",
                f"0 is the teacher with one step, 1 the teacher with {full}.{against}",
            )
            for steps, value in gaps.items()
        ]
    name = (report.get("metrics") or {}).get("fd") or "FD"
    found = [
        _card(f"{name}, {_steps(steps)}", f"{value:.3f}", f"Lower is better.{against}")
        for steps, value in scores.items()
        if value is not None
    ]
    return found or [_card("score", "not measured", "`stepdistill eval` measures it: see below.")]


def _health(run: RunRecord) -> str:
    health = run.report.get("health") if run.done else None
    if health:
        verdict = str(health.get("verdict") or "")
        return _card("health", verdict, _health_text(health), "good" if verdict == "healthy" else "bad")
    said = run.status.health if run.status else None
    if not said:
        return ""
    last = next((row for row in reversed(run.stats) if "diversity" in row), None)
    text = f"At update {last['update'] + 1:,}." if last else ""
    return _card("health", said, text, "good" if said == "healthy" else "bad")


def _health_text(health: Mapping[str, Any]) -> str:
    """The student's numbers beside the teacher's, what is wrong, and what was on the way."""
    numbers = (
        f"Diversity {health['diversity']:.2f} (teacher {health['teacher_diversity']:.2f}), saturation "
        f"{health['saturation']:.0%} (teacher {health['teacher_saturation']:.0%})."
    )
    wrong = "" if health.get("verdict") == "healthy" else f" {health.get('sentence') or ''}"
    count, skipped = len(health.get("worries") or ()), health.get("skipped_files") or 0
    warned = f" {count} warning{'s' * (count > 1)} while it trained, see below." if count else ""
    return f"{numbers}{wrong}{warned}{f' {skipped} files could not be read.' if skipped else ''}"


def _costs(run: RunRecord) -> list[str]:
    report, found = run.report, []
    if run.done and report.get("wall_seconds"):
        updates, planned = report.get("updates"), report.get("updates_planned")
        of = f" of {planned:,}" if planned and planned != updates else ""
        whole, training = duration(report["wall_seconds"]), duration(report.get("train_seconds") or 0)
        done = f", {updates:,}{of} updates" if updates else ""
        if report.get("resumes"):  # then the whole is of the part after the last one
            found.append(
                _card("training time", training, f"In all{done}. The last part of the run took {whole}.")
            )
        else:
            found.append(_card("time", whole, f"{training} of it training{done}."))
        if report.get("passes"):
            found.append(_passes(report["passes"]))
        if report.get("peak_memory_bytes"):
            found.append(
                _card(
                    "memory",
                    size_text(report["peak_memory_bytes"]),
                    f"At the peak. {report.get('hardware') or ''}",
                )
            )
    elif run.stats:
        seconds = run.stats[-1].get("seconds")
        if isinstance(seconds, (int, float)):
            each = seconds / max(1, run.stats[-1]["update"] + 1)
            found.append(_card("training time", duration(seconds), f"{duration(each)} an update."))
    return found


def _passes(passes: Mapping[str, Mapping[str, int]]) -> str:
    """How often the networks were called, by the sample, and who."""
    graph, plain = (sum(each[kind] for each in passes.values()) for kind in ("with_graph", "without_graph"))
    each = (f"{who} {sum(own.values()):,}" for who, own in passes.items())
    text = f"{graph / (graph + plain):.0%} of them with a graph. {', '.join(each)}."
    return _card("network passes", f"{graph + plain:,}", text)


def _proof(run: RunRecord) -> str:
    said = str(run.report.get("verification") or "") if run.done else ""
    verdict, _, rest = said.partition(":")
    if not said:
        return ""
    return _card("student folder", verdict, f"{rest.strip()[:1].upper()}{rest.strip()[1:]}.")


def _steps(count: str) -> str:
    return f"{count} step{'s' * (count != '1')}"
