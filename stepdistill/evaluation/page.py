"""report.html of an evaluation (one file, nothing fetched): numbers, pictures, and the real images nearest to them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from PIL import Image
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.evaluation.gallery import Gallery, Ranked, load_galleries
from stepdistill.evaluation.nearest_real import Neighbours, between_real, nearest, real_images
from stepdistill.evaluation.reference_files import Reference, read_reference
from stepdistill.evaluation.scores import Report
from stepdistill.evaluation.suite import Suite, load_suite
from stepdistill.pages.html import document, scrolled, table, tile
from stepdistill.pages.metric_names import DIRECTIONS, conflict_sentence, marked, name_of
from stepdistill.pages.numbers import with_error
from stepdistill.pages.plots import Scale, Series, line_plot
from stepdistill.system.files import written_whole

NEIGHBOURS = 3
"""Real images beside a drawn one."""
LOOKED_UP = 16
"""Drawn images of each step count whose neighbours are shown."""
TILE = 72
"""Width of a picture on the page, CSS pixels."""

_STYLE = (
    ".cards{display:flex;flex-wrap:wrap;gap:14px}.card{font-size:13px;line-height:1.3;max-width:100%}"
    ".card img{image-rendering:pixelated;display:block;outline:1px solid var(--line)}"
    ".row{display:flex;gap:5px;margin-bottom:3px;overflow-x:auto}"
    ".row figure{text-align:center;color:var(--muted)}.row figure.drawn{margin-right:8px;color:var(--ink)}"
    ".close,.row figure.close{color:var(--bad);font-weight:bold}"
)


def write_page(report: Report, folder: Path, suite: Suite | None = None) -> Path:
    """Write ``folder/report.html``; gives back its path.

    Args:
        report: of an evaluation.
        folder: where the page goes, and the gallery lies that the evaluation left there.
        suite: the protocol, for the real images; None takes the shipped suite of the report's name.
    """
    page = html_page(report, load_galleries(folder), suite)
    file = folder / "report.html"
    with written_whole(file) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return file


def html_page(report: Report, galleries: Mapping[int, Gallery], suite: Suite | None = None) -> str:
    """The page's text; see :func:`write_page`."""
    facts = report.to_dict()
    galleries = {steps: galleries[steps] for steps in sorted(galleries) if steps in report.scores}
    drawn = f", guidance {report.guidance:g}" if report.guidance is not None else ""
    body = [
        f"<h1>{html.escape(report.pipeline)}</h1>",
        f"<p>Suite {html.escape(report.suite)}, {report.n:,} images"
        f"{' at each number of steps' if len(report.scores) > 1 else ''}{drawn}.</p>",
        _warnings(facts),
        "<h2>Numbers</h2>",
        _numbers(facts),
        _conflicts(facts),
        _not_computed(facts),
        _plots(facts),
        _samples(galleries),
        _real_neighbours(report, galleries, suite),
        *(_extremes(_name("clip_score", facts), steps, gallery) for steps, gallery in galleries.items()),
        "<h2>What was measured, and how</h2>",
        _protocol(facts),
    ]
    return document(f"{report.pipeline}: {report.suite}", _STYLE, body)


def _warnings(facts: Mapping[str, Any]) -> str:
    return "".join(f"<p class=warning>{html.escape(text)}</p>" for text in _lines(facts.get("warnings")))


def _conflicts(facts: Mapping[str, Any]) -> str:
    said = conflict_sentence(facts.get("conflicts") or {}, facts.get("metrics") or {})
    return f"<p class=warning>{html.escape(said)}</p>" if said else ""


def _not_computed(facts: Mapping[str, Any]) -> str:
    said = facts.get("not_computed") or {}
    lines = _lines(
        {_name(key, facts): why for key, why in said.items()} if isinstance(said, Mapping) else said
    )
    items = "".join(f"<li>{html.escape(text)}</li>" for text in lines)
    return f"<p>Not computed:</p><ul>{items}</ul>" if items else ""


def _lines(said: Any) -> list[str]:
    """Sentences, from a list of them or a table of subjects."""
    if isinstance(said, Mapping):
        return [f"{key}: {text}" for key, value in said.items() for text in _lines(value)]
    if isinstance(said, str):
        return [said]
    return [str(text) for text in said or ()]


def _numbers(facts: Mapping[str, Any]) -> str:
    """A row a score, a column a step count; the whole number is the cell's title."""
    scores: Mapping[str, Mapping[str, Any]] = facts["scores"]
    columns = sorted(scores, key=int)
    keys = dict.fromkeys(key for score in scores.values() for key in score)
    lines = []
    for key in keys:
        found = [scores[steps].get(key) for steps in columns]
        if key == "n" or (key.endswith("_se") and key[:-3] in keys) or not any(map(_is_number, found)):
            continue
        if columns == ["0"] and key in ("seconds_per_image", "network_evaluations"):
            continue  # nothing was drawn
        errors = [scores[steps].get(f"{key}_se") for steps in columns]
        cells = [_cell(key, value, error) for value, error in zip(found, errors, strict=True)]
        own = facts.get("better", {}).get(key)
        direction = DIRECTIONS.get(key) or (f"{own} is better" if own not in (None, "neither") else None)
        mark = marked(key, facts.get("conflicts") or {})
        name = f"{_name(key, facts)}{mark}{f' ({direction})' if direction else ''}"
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th scope=col>{_steps(int(steps))}</th>" for steps in columns)
    whole = f"<table class=numbers><tr><th>score</th>{head}</tr>{''.join(lines)}</table>"
    return f"{scrolled(whole, 'numbers')}<p class=note>± is one standard error.</p>"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _name(key: str, facts: Mapping[str, Any]) -> str:
    return name_of(key, facts.get("metrics") or {})


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}" if count else "images"


def _cell(key: str, value: Any, error: Any) -> str:
    if not _is_number(value):
        return "<td>-</td>"
    exact = repr(value) if not _is_number(error) else f"{value!r} ± {error!r}"
    text = f"{value / 2**20:,.0f} MiB" if key.endswith("_bytes") else with_error(value, error)
    return f'<td title="{html.escape(exact)}">{html.escape(text)}</td>'


def _plots(facts: Mapping[str, Any]) -> str:
    """The distance and the CLIP score against steps, where several step counts were asked."""
    scores = facts["scores"]
    counts = sorted(int(steps) for steps in scores)
    if len(counts) < 2:
        return ""
    parts = []
    for key in ("fd", "clip_score"):
        found = [(n, scores[str(n)]) for n in counts if _is_number(scores[str(n)].get(key))]
        points = [(float(n), float(score[key])) for n, score in found]
        errors = [float(score.get(f"{key}_se") or 0) for _, score in found]
        name = _name(key, facts)
        series = Series(Path(str(facts["pipeline"])).name, points, errors=errors if any(errors) else ())
        title = f"{name} against steps ({DIRECTIONS[key]})"
        zero: Scale = "zero" if key == "fd" else "linear"
        parts.append(line_plot([series], "steps", name, counts, title=title, y_scale=zero))
    return f"<div class=charts>{''.join(parts)}</div>"


def _cards(cards: Sequence[str], width: int) -> str:
    """Cards of HTML in rows, each ``width`` CSS pixels wide."""
    items = "".join(f'<div class=card style="width:{width}px">{card}</div>' for card in cards)
    return f"<div class=cards>{items}</div>"


def _figure(picture: str, text: str, mark: str = "") -> str:
    return f'<figure class="{mark}">{picture}{html.escape(text)}</figure>'


def _caption(prompt: str) -> str:
    """A prompt under its picture, the whole of which is in the picture's ``alt``."""
    return html.escape(shorten(prompt, 140, placeholder=" ..."))


def _picture(pixels: Tensor, alt: str) -> str:
    """uint8 [3, H, W] as an ``<img>``."""
    return tile(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), alt, TILE)


def _samples(galleries: Mapping[int, Gallery]) -> str:
    """The first images: for each prompt its picture at every number of steps."""
    if not galleries:
        return ""
    one = next(iter(galleries.values()))
    count = min(len(gallery.pixels) for gallery in galleries.values())
    cards = []
    for i in range(count):
        prompt = one.prompts[i] if one.prompts else f"image {i}"
        figures = [
            _figure(_picture(gallery.pixels[i], f"{prompt}, {_steps(steps)}"), "")
            for steps, gallery in galleries.items()
        ]
        cards.append(f"<div class=row>{''.join(figures)}</div>{_caption(prompt)}")
    if len(galleries) == 1:
        return f"<h2>The first images</h2>{_cards(cards, TILE + 24)}"
    order = ", ".join(str(steps) for steps in galleries)
    return f"<h2>The same prompts and seeds</h2><p>From left to right: {order} steps.</p>" + _cards(
        cards, len(galleries) * (TILE + 5)
    )


def _real_neighbours(report: Report, galleries: Mapping[int, Gallery], suite: Suite | None) -> str:
    """The real images nearest to the first drawn ones, or one line that says why they are not shown."""
    if not galleries:
        return ""
    title = "<h2>Nearest real images</h2>"
    try:
        reference, real = _reference_features(report, suite, galleries.values())
        found = {
            steps: nearest(gallery.features[:LOOKED_UP], real, NEIGHBOURS)
            for steps, gallery in galleries.items()
        }
    except UserError as error:
        return f"{title}<p>Not shown: {html.escape(str(error))}.</p>"
    try:
        places = {i for neighbours in found.values() for i in neighbours.indices.flatten().tolist()}
        pictures, missing = real_images(reference, places), ""
    except UserError as error:
        pictures, missing = {}, f"<p>Without the real pictures: {html.escape(str(error))}.</p>"
    usual = between_real(real)
    median = float(usual.median())
    low = max(float(usual.quantile(0.05)), 0.01 * median)  # 0 where real images are there twice
    about = (
        f"<p>In the space of the features, each of the first images beside its {NEIGHBOURS} nearest real images, with "
        "their distances. A copy of a real image is at a distance of about 0. The "
        f"distance of a real image to its nearest other real image has the median {median:.4g}; a distance below "
        f"{low:.4g}, as the closest 5% of those are, is <span class=close>marked</span>.</p>"
    )
    parts = [title, about, missing]
    for steps, gallery in galleries.items():
        closest = nearest(gallery.features, real, 1).distances.median()
        parts.append(
            f"{f'<h3>{_steps(steps)}</h3>' if steps else ''}<p>Median distance of the first {len(gallery.features)} "
            f"images to their nearest real image: <b>{float(closest):.4g}</b> (of real images: {median:.4g}).</p>"
        )
        parts.append(_neighbour_cards(gallery, found[steps], pictures, low))
    return "".join(parts)


def _neighbour_cards(gallery: Gallery, found: Neighbours, pictures: Mapping[int, Any], low: float) -> str:
    cards = []
    for i, (places, distances) in enumerate(
        zip(found.indices.tolist(), found.distances.tolist(), strict=True)
    ):
        prompt = gallery.prompts[i] if gallery.prompts else f"image {i}"
        figures = [_figure(_picture(gallery.pixels[i], prompt), "this image", "drawn")]
        for place, distance in zip(places, distances, strict=True):
            name = f"real image {place}"
            picture = tile(Image.fromarray(pictures[place]), name, TILE) if place in pictures else f"{name}, "
            figures.append(_figure(picture, f"{distance:.3f}", "close" * (distance < low)))
        cards.append(f"<div class=row>{''.join(figures)}</div>{_caption(prompt)}")
    return _cards(cards, (NEIGHBOURS + 1) * (TILE + 5) + 8)


def _reference_features(
    report: Report, suite: Suite | None, galleries: Iterable[Gallery]
) -> tuple[Reference, Tensor]:
    """The reference of the report and its features, with which those of the galleries can be compared."""
    if suite is None:
        suite = load_suite(report.suite.partition("@")[0])
    reference = read_reference(suite.reference_file(), suite.features.partition(":")[0])
    if reference.sha256 != report.protocol.get("reference_sha256"):
        raise UserError("the reference is another one now than the report's")
    if reference.features is None or len(reference.features) <= NEIGHBOURS:
        raise UserError("the reference holds no features of single images, only their moments")
    if any(gallery.features.shape[1] != reference.features.shape[1] for gallery in galleries):
        raise UserError("the features of the drawn images were not computed")
    return reference, reference.features


def _extremes(score: str, steps: int, gallery: Gallery) -> str:
    """The pictures that fit their prompts best and worst."""
    if not gallery.best:
        return ""
    parts = [f"<h2>{html.escape(score)} of single images{f', {_steps(steps)}' if steps else ''}</h2>"]
    for name, ranked in (("Best", gallery.best), ("Worst", gallery.worst)):
        parts.append(f"<h3>{name}</h3>{_cards([_ranked(one) for one in ranked], TILE + 24)}")
    return "".join(parts)


def _ranked(one: Ranked) -> str:
    picture = _picture(one.pixels, one.prompt)
    return f"{picture}<b>{one.score:.3f}</b> {_caption(one.prompt)} <small>(image {one.index})</small>"


def _protocol(facts: Mapping[str, Any]) -> str:
    rows = [("suite", str(facts["suite"])), ("images", f"{facts['n']}")]
    rows += [(key.replace("_", " "), str(value)) for key, value in facts["protocol"].items()]
    if facts["guidance"] is not None:
        rows.append(("guidance", f"{facts['guidance']:g}"))
    if facts["trailing"]:
        rows.append(("step grid", "trailing: n steps start at the noisiest timestep"))
    for key in ("command", "hardware", "commit"):
        if facts.get(key):
            rows.append((key, str(facts[key])))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())))
    account = facts.get("images") or {}
    rows += [(f"images: {key.replace('_', ' ')}", _brief(value)) for key, value in account.items() if value]
    return table([], rows)


def _brief(value: Any) -> str:
    """A value of the account of images, at most 20 files of a list."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_brief(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        more = f"; and {len(value) - 20} more" if len(value) > 20 else ""
        return "; ".join(_brief(inner) for inner in value[:20]) + more
    return str(value)
