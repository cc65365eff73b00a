"""One page for each method, from its file, its recipes, the shipped results and what `methods.yaml` says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import docstrings
import options
import yaml
from markdown.extensions.toc import slugify

from stepdistill.methods import find_method, needs
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.shipped import content_folder, method_names, module_summaries, recipe_files
from stepdistill.testing.contract import build

FACTS = Path(__file__).with_name("methods.yaml")
PLACE = re.compile(r"\{([a-z][\w-]*) (\w+)\}")
"""A run and its number of steps, or ``minutes``, in ``methods.yaml``: where a number stands."""
HEAD = (
    "| run | steps | gap closed | FD-emoji | FD-judge | CLIP-emoji | training, min |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def facts() -> dict[str, dict[str, Any]]:
    """What methods.yaml says, by method."""
    read: dict[str, dict[str, Any]] = yaml.safe_load(filled(FACTS.read_text("utf-8"), reports()))
    return read


def filled(text: str, found: list[dict[str, Any]]) -> str:
    """The text with the numbers of reports in their places.

    Raises:
        ValueError: a place for a number that no report has.
    """
    known = {report["name"]: report for report in found}

    def number(place: re.Match[str]) -> str:
        run, key = place.groups()
        report = known.get(run, {"gap_closed": {}})
        if key == "minutes" and "train_seconds" in report:
            return f"{report['train_seconds'] / 60:.1f}"
        if key not in report["gap_closed"]:
            raise ValueError(f"{FACTS.name}: train/results has no {key} of {run}")
        return f"{report['gap_closed'][key]:.3f}"

    return PLACE.sub(number, text)


def reports() -> list[dict[str, Any]]:
    """The shipped reports, of runs on the embedded teachers."""
    files = sorted((content_folder("train") / "results").glob("*.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


def best(method: str, found: list[dict[str, Any]]) -> tuple[float, str, str] | None:
    """The largest gap that a method closed on the first embedded teacher: gap, steps, run."""
    gaps = [
        (gap, steps, report["name"])
        for report in found
        if report["method"] == method and report["teacher_name"] == "emoji"
        for steps, gap in report["gap_closed"].items()
    ]
    return max(gaps, default=None)


def pages(root: Path) -> dict[str, str]:
    """The pages of all methods and the one that lists them."""
    found, told = reports(), facts()
    log = log_entries((root / "LOG.md").read_text("utf-8"))
    made = {f"methods/{name}.md": page(name, told[name], found, log) for name in method_names()}
    return {"methods/index.md": index(found, told)} | made


def index(found: list[dict[str, Any]], told: dict[str, dict[str, Any]]) -> str:
    """The list of all methods."""
    lines = [
        "# Methods",
        "",
        "Which to take: [Choosing a method](../guides/choose.md). The gap is the best one measured on the embedded "
        "teacher `emoji`; what it means: [Words](../start/words.md#gap-closed).",
        "",
        "| method | what it does | steps | needs | best gap |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, summary in module_summaries("methods").items():
        gap = best(name, found)
        measured = f"{gap[0]:.3f} at {gap[1]}" if gap else "not measured"
        text = docstrings.plain(summary.partition(": ")[2] or summary)
        lines.append(
            f"| [`{name}`]({name}.md) | {text} | {told[name]['steps']} | {needs(name)} | {measured} |"
        )
    return "\n".join(lines) + "\n"


def page(
    name: str, told: dict[str, Any], found: list[dict[str, Any]], log: dict[str, list[tuple[str, str]]]
) -> str:
    """One method's page."""
    kind = find_method(name)
    module = __import__(kind.__module__, fromlist=["__doc__"])
    summary, _, text = (module.__doc__ or "").partition("\n")
    built = build(name)
    networks = ["the teacher", *(f"`{role}`" for role in built.roles.names)]
    alone = (
        "merged alone"
        if built.student.two_times or built.student.experts
        else "merged, and as a file of its own"
    )
    lora = "none: its network is a new one" if kind.own_network else alone
    shipped = {recipe: path for recipe, path in recipe_files().items() if load_recipe(recipe).method == name}
    first = next((recipe for recipe in (f"{name}_emoji", *shipped) if recipe in shipped), None)
    lines = [
        f"# {name}",
        "",
        docstrings.plain(summary),
        "",
        "| | |",
        "| --- | --- |",
        f"| take it for | {told['take']} |",
        f"| not for | {told['avoid']} |",
        f"| steps | {told['steps']} |",
        f"| needs | {needs(name)} |",
        f"| networks in memory | {len(networks)}: {', '.join(networks)}"
        f"{'' if kind.own_network else '. As LoRA: one, and an adapter for each of the others'} |",
        f"| LoRA | {lora} |",
        f"| file | [`stepdistill/methods/{name}.py`](../../stepdistill/methods/{name}.py) |",
        "",
        "## Idea and equations",
        "",
        docstrings.paragraphs(text.strip()),
        "## Run it",
        "",
    ]
    if first:
        lines += [f"```sh\nstepdistill train {first}\n```", "", "| recipe | what it is |", "| --- | --- |"]
        lines += [
            f"| [`{recipe}`](../../train/recipes/{recipe}.yaml) | {_head(path)} |"
            for recipe, path in shipped.items()
        ]
    lines += ["", "## Results on the embedded teachers", "", *results(name, found)]
    lines += ["", "## Options", "", "Keys of `options:` in a recipe, or `--set options.KEY=VALUE`.", ""]
    lines += options.tables(kind.Options)
    if log.get(name):
        lines += ["", "## In the log", ""]
        lines += [f"- [{title}](../../LOG.md#{anchor})" for title, anchor in log[name]]
    return "\n".join(lines) + "\n"


def _head(recipe: Path) -> str:
    """What a recipe's head says that it needs."""
    needed = re.search(r"^# Needs: ((?:.+\n)(?:# (?!\w+:).+\n)*)", recipe.read_text("utf-8"), re.MULTILINE)
    return docstrings.plain(" ".join(needed[1].replace("\n#", " ").split())) if needed else ""


def results(name: str, found: list[dict[str, Any]]) -> list[str]:
    """The measured runs of a method, by teacher, with the pictures of the best one."""
    lines: list[str] = []
    for teacher in ("emoji", "emoji-flow"):
        rows = [
            f"| {report['name']} | {steps} | **{gap:.3f}** | {report['student']['fd'][steps]:.2f} "
            f"| {_or_dash((report['student'].get('second_fd') or {}).get(steps))} "
            f"| {report['student']['clip_score'][steps]:.3f} | {report['train_seconds'] / 60:.1f} |"
            for report in found
            if report["method"] == name and report["teacher_name"] == teacher
            for steps, gap in report["gap_closed"].items()
        ]
        if rows:
            lines += [f"Teacher `{teacher}`:", "", HEAD, *rows, ""]
    if not lines:
        return ["Not measured."]
    gap = best(name, found)
    if gap:
        lines += [
            f"![Same prompts and seeds, drawn by teacher and student](../../train/results/{gap[2]}.png)",
            "",
            f"*`{gap[2]}`: the teacher with 25 steps, the teacher at the student's steps, the student.*",
            "",
        ]
    return [*lines, "Commands, hardware and commits: [Results](../evidence/results.md)."]


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def log_entries(text: str) -> dict[str, list[tuple[str, str]]]:
    """For each method the entries of the log that name it, or a recipe of it: title and anchor."""
    entries: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title = part.partition("\n")[0].strip()
        for name in method_names():
            if re.search(rf"`{name}`|\b{name}_emoji|train {name}\b|^[^\n]*\b{re.escape(name)}\b", part):
                entries.setdefault(name, []).append((title, slugify(title, "-")))
    return entries
