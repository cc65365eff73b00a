"""Rows of a comparison as texts: the cells of a table, and a table for a terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.comparison.ranking import Group, Row, ranked_by, ranks
from stepdistill.pages.metric_names import marked
from stepdistill.pages.numbers import with_error
from stepdistill.system.parsing import printable

COLUMNS = (
    "run",
    "method",
    "steps",
    "rank",
    "suite",
    "trainings",
    "gap closed",
    "FD",
    "FD 2",
    "KID",
    "CLIP",
    "fit 2",
    "recall (of teacher's)",
    "density",
    "ms/image",
    "training",
    "passes",
    "updates",
    "memory",
)


def cells(row: Row, places: tuple[int, int] | None) -> tuple[str, ...]:
    """The row as text, in the order of COLUMNS and then of its own metrics.

    Args:
        row: one of a comparison.
        places: its ranks there.
    """
    share = "" if row.recall_of_teachers is None else f" ({row.recall_of_teachers:.0%})"
    cut = row.updates is not None and row.updates_planned is not None and row.updates < row.updates_planned
    return (
        row.name,
        row.method,
        str(row.steps) if row.steps else "-",
        "-" if places is None else "-".join(map(str, dict.fromkeys(places))),
        row.suite or "-",
        _number(row.seeds, "{:.0f}"),
        _score(row, "gap_closed", row.gap_closed, None, "{:.3f}"),
        _score(row, "fd", row.fd, row.fd_se, "{:.3f}"),
        _score(row, "second_fd", row.second_fd, row.second_fd_se, "{:.3f}"),
        _score(row, "kid", row.kid, row.kid_se, "{:.4f}"),
        _score(row, "clip_score", row.clip_score, row.clip_score_se, "{:.3f}"),
        _score(row, "second_fit", row.second_fit, row.second_fit_se, "{:.3f}"),
        _score(row, "recall", row.recall, None, "{:.3f}") + share,
        _score(row, "density", row.density, None, "{:.3f}"),
        _number(row.ms_per_image, "{:.1f}"),
        _number(row.train_seconds, "{:.0f} s"),
        _passes(row.passes),
        f"{row.updates} of {row.updates_planned}" if cut else _number(row.updates, "{:.0f}"),
        _number(row.peak_memory_bytes and row.peak_memory_bytes / 2**20, "{:.0f} MiB"),
        *(_score(row, name, value, error, "{:.4g}") for name, (value, error) in row.own.items()),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _passes(count: float | None) -> str:
    """In millions from a tenth of one up; a try has fewer."""
    return _number(count, "{:.0f}") if count is None or count < 1e5 else f"{count / 1e6:.2f} M"


def _score(row: Row, name: str, value: float | None, error: float | None, form: str) -> str:
    """A score with the evaluation's standard error; of several trainings with their deviation, that error in
    brackets."""
    if value is None:
        return "-"
    mark = marked("fd" if name == "gap_closed" else name, row.conflicts)
    if row.seeds is None:
        return with_error(value, error, form) + mark
    said = with_error(value, row.deviation.get(name), form)
    return (said if error is None else f"{said} (± {error:.2g})") + mark


def filled(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """COLUMNS, those of your own metrics, and the rows' cells, without the columns in which no row has anything."""
    places = [ranks(row, rows) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row.own)
    rows = [row.with_own(names) for row in rows]
    second = next((row.second_names for row in rows if row.second_fd is not None), ("FD 2", "fit 2"))
    titles = dict(zip(("FD 2", "fit 2"), second, strict=True))
    head = (*(titles.get(title, title) for title in COLUMNS), *(name.replace("_", " ") for name in names))
    lines = [head, *map(cells, rows, places)]
    kept = [i for i in range(len(head)) if i < 2 or any(line[i] != "-" for line in lines[1:])]
    if len({row.suite for row in rows}) < 2:  # it stands in the title
        kept = [i for i in kept if i != COLUMNS.index("suite")]
    return [tuple(line[i] for i in kept) for line in lines]


def text_table(rows: Sequence[Row]) -> str:
    """The rows as aligned columns for a terminal: names to the left, numbers to the right; below them what ranks and
    errors mean."""
    table = filled(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    return "\n".join([*lines, *notes(rows)])


def notes(rows: Sequence[Row]) -> list[str]:
    """How ranks and errors of a table are to be read, in sentences."""
    said = []
    if any(row.seeds for row in rows):
        said.append(SEEDS)
    elif any(row.fd_se is not None for row in rows):
        said.append("± is one standard error.")
    placed = [row for row in rows if ranks(row, rows) is not None]
    if any(len({*(ranks(row, rows) or ())}) > 1 for row in placed):
        said.append(RANKS)
    unknown = [row for row in placed if row.error_of(ranked_by(rows)) is None]
    if unknown:
        said.append(NO_ERRORS if len(unknown) == len(placed) else SOME_ERRORS)
    return said


RANKS = (
    "A rank such as 2-5: among the runs of as many steps it may be any of these, as a difference is sure where it is "
    "more than twice its standard error, the root of the two errors' squares."
)
NO_ERRORS = (
    "No standard errors are known, so no place is sure; the order is that of the distances. `intervals: true` in a "
    "suite computes them."
)
SOME_ERRORS = "Where no standard error is known no place is sure."
SEEDS = (
    "± is the standard deviation between training seeds; in brackets, one standard error of the evaluation."
)


def text_tables(groups: Sequence[Group]) -> str:
    """A table for each group, and between them why they are not compared."""
    parts = []
    for number, group in enumerate(groups, 1):
        title = f"{number}. {group.title}\n" if len(groups) > 1 else ""
        why = f"Not compared with 1, because {'; '.join(group.apart)}\n" if group.apart else ""
        parts.append("\n".join([title + why + text_table(group.rows), *group.notes]))
    whole = "\n\n".join(parts)
    return "\n".join(printable(line) for line in whole.split("\n"))
