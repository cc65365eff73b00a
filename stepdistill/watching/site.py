"""What is answered to which address of a watched folder: a run's page, the list of runs, and the files beside them."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import mimetypes
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote, unquote

from stepdistill.errors import UserError
from stepdistill.pages.html import document, scrolled
from stepdistill.pages.numbers import duration
from stepdistill.system.run_folder import RunFolder, read_status
from stepdistill.training.run_page import STYLE, run_body
from stepdistill.training.run_record import RunRecord, is_run, read_run
from stepdistill.watching.script import SCRIPT

SECONDS = 5
"""Between two looks of an open page; more where a page takes long to make, so that a training is not held up."""
_SHARE = 10
"""Between two of them lies so many times what one takes of a processor."""
_STYLE = "table.runs td,table.runs th{white-space:nowrap}"
_TEXTS = {".yaml", ".yml", ".jsonl", ".json", ".txt", ".md", ".py", ".log"}
_SCRIPT_SHA = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_SHA}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Answer:
    """To one request.

    Attributes:
        status: of HTTP.
        kind: of the content.
        text: the content, where it is not a file's.
        file: whose content it is.
        headers: further ones.
    """

    status: HTTPStatus
    kind: str = "text/plain; charset=utf-8"
    text: str = ""
    file: Path | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Body:
    """A page's inner part as it was made once."""

    title: str
    text: str
    tag: str
    stamp: tuple[object, ...]
    made: float
    seconds: int


class Site:
    """A watched folder: a run's, or one with runs in it.

    Args:
        root: the folder.

    Raises:
        UserError: it is neither.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(
                f"{root} is not a folder: give a run's, or one with runs in it, such as runs; `stepdistill train` "
                "makes one"
            )
        self.shown, self.root = root, root.resolve()
        self.one = is_run(self.root)
        if not self.one and not self.runs():
            raise UserError(
                f"{root} is no run and has none in it: a run has a status.json or a report.json; give one, or the "
                "folder where runs are"
            )
        self._bodies: dict[str, _Body] = {}
        self._lock = threading.Lock()

    def runs(self) -> list[Path]:
        """The runs in the folder, those that are under way here and then the latest first; links to them are left
        out."""
        found = [
            each for each in self.root.iterdir() if not each.is_symlink() and each.is_dir() and is_run(each)
        ]
        return sorted(found, key=lambda run: (_under_way(run), _written(run)), reverse=True)

    def answer(self, target: str, known: str = "") -> Answer:
        """To a request.

        Args:
            target: path and query, as the browser sent them.
            known: the tag of the page that it has.
        """
        path, _, query = target.partition("?")
        parts = unquote(path).split("/")[1:]
        if not path.startswith("/") or any(not _plain(part) for part in parts[:-1]):
            return _no()
        *folders, name = parts
        if self.one and not folders and not name:
            return self._page("", lambda: read_run(self.root, str(self.shown)), query, known)
        if not self.one and not folders and not name:
            return self._list(query, known)
        if not self.one:
            own = self.root / (folders or [name])[0]
            if not _plain(own.name) or own.is_symlink() or not is_run(own):
                return _no()
            if len(folders) == 1 and not name:
                return self._page(own.name, lambda: read_run(own, str(self.shown / own.name)), query, known)
        return self._file([*folders, name], path)

    def _file(self, parts: list[str], path: str) -> Answer:
        """A file or a folder's names; nothing hidden, no link, nothing above the folder."""
        names, place = (parts[:-1] if not parts[-1] else parts), self.root
        for part in names:
            place = place / part
            if not _plain(part) or place.is_symlink():
                return _no()
        try:
            mode = place.lstat().st_mode
        except (OSError, ValueError):
            return _no()
        if stat.S_ISDIR(mode):
            if parts[-1]:
                return Answer(
                    HTTPStatus.MOVED_PERMANENTLY, headers={"Location": f"{quote('/'.join(['', *names]))}/"}
                )
            return _html(_names(place, "/".join(names)))
        if not stat.S_ISREG(mode) or not parts[-1]:
            return _no()
        kind = mimetypes.guess_type(place.name)[0] or "application/octet-stream"
        if place.suffix in _TEXTS:
            kind = "text/plain; charset=utf-8"
        elif kind == "text/html":
            kind = "text/html; charset=utf-8"
        return Answer(HTTPStatus.OK, kind, file=place)

    def _page(self, name: str, read: Callable[[], RunRecord], query: str, known: str) -> Answer:
        root = self.root / name
        stamp = _stamp(root)

        def make() -> tuple[str, str]:
            run = read()
            back = "" if self.one else '<p><a href="../">all runs</a></p>'
            return f"{run.name}: {run.state}", back + run_body(run)

        return self._kept(name, stamp, make, query, known)

    def _list(self, query: str, known: str) -> Answer:
        runs = self.runs()
        stamp = tuple((run.name, *_stamp(run)) for run in runs)
        return self._kept(
            "/", stamp, lambda: (f"runs in {self.shown}", _table(runs, str(self.shown))), query, known
        )

    def _kept(
        self,
        name: str,
        stamp: tuple[object, ...],
        make: Callable[[], tuple[str, str]],
        query: str,
        known: str,
    ) -> Answer:
        """A page, made anew where its folder says something new, and not too often."""
        with self._lock:
            body, now, before = self._bodies.get(name), time.monotonic(), time.thread_time()
            if body is None or (body.stamp != stamp and now - body.made >= body.seconds - 1):
                title, text = make()
                took = time.thread_time() - before
                seconds = min(max(SECONDS, math.ceil(_SHARE * took)), 60)
                tag = f'"{hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]}"'
                body = self._bodies[name] = _Body(title, text, tag, stamp, time.monotonic(), seconds)
        headers = {
            "ETag": body.tag,
            "X-Title": quote(body.title, errors="replace"),
            "X-Seconds": str(body.seconds),
        }
        if query == "body":
            if known == body.tag:
                return Answer(HTTPStatus.NOT_MODIFIED, headers=headers)
            return Answer(HTTPStatus.OK, "text/html; charset=utf-8", body.text, headers=headers)
        page = document(body.title, STYLE + _STYLE, [body.text])
        live = "<p id=live class=note role=status></p><noscript><p>Reload to see what is new.</p></noscript>"
        page = page.replace("<style>", "<link rel=icon href='data:,'><style>", 1)  # else browsers ask for one
        page = page.replace("<body>", f"<body data-tag='{body.tag}' data-seconds={body.seconds}>{live}", 1)
        return _html(page.replace("</html>", f"<script>{SCRIPT}</script></html>"))


def _plain(part: str) -> bool:
    """Whether a part of a path names something in its folder that is not hidden."""
    return bool(part) and not part.startswith(".") and not set(part) & set("/\\\0")


def _no() -> Answer:
    return Answer(HTTPStatus.NOT_FOUND, text="There is no such file here.\n")


def _html(page: str) -> Answer:
    return Answer(HTTPStatus.OK, "text/html; charset=utf-8", page)


def _stamp(folder: Path) -> tuple[object, ...]:
    """Changes when the run's page does."""
    place, found = RunFolder(folder), []
    for file in (
        place.status,
        folder / "stats.jsonl",
        place.report,
        place.recipe,
        place.samples,
        place.pictures,
    ):
        try:
            about = file.stat()
            found.append((about.st_mtime_ns, about.st_size))
        except OSError:
            found.append((0, 0))
    return (*found, int(time.time() // 60) if not place.report.exists() else 0)


def _written(folder: Path) -> float:
    place = RunFolder(folder)
    return max(
        (file.stat().st_mtime for file in (place.status, place.report, place.recipe) if file.is_file()),
        default=0.0,
    )


def _under_way(folder: Path) -> bool:
    status = read_status(folder)
    return status is not None and status.under_way


def _last_word(run: RunRecord) -> str:
    """How long ago a run said something; by its files where it does not say itself when."""
    silent = run.status.silent_seconds if run.status else max(0.0, time.time() - _written(run.folder.root))
    return f"{duration(silent)} ago" if silent is not None else "not known"


def _table(runs: list[Path], shown: str) -> str:
    """The list of runs."""
    head = "".join(
        f"<th scope=col>{text}</th>" for text in ("run", "state", "updates", "result", "health", "last word")
    )
    lines = []
    for folder in runs:
        run = read_run(folder, with_rows=False)
        status, report = run.status, run.report if run.done else {}
        updates = f"{status.update:,} of {status.updates:,}" if status else str(report.get("updates") or "")
        gaps = ", ".join(
            f"{gap:.3f} at {steps} step{'s' * (steps != '1')}"
            for steps, gap in (report.get("gap_closed") or {}).items()
        )
        health = (report.get("health") or {}).get("verdict") or (status.health if status else "") or ""
        cells = (run.state, updates, f"gap closed {gaps}" if gaps else "", health, _last_word(run))
        name = html.escape(folder.name)
        link = f'<a href="{quote(folder.name)}/">{name}</a>'
        lines.append(
            f"<tr><td>{link}</td>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in cells)}</tr>"
        )
    whole = f"<table class=runs><tr>{head}</tr>{''.join(lines)}</table>"
    return f"<h1>Runs in {html.escape(shown)}</h1>{scrolled(whole, 'runs')}"


def _names(folder: Path, name: str) -> str:
    """What is in a folder of a run."""
    found = sorted(each for each in folder.iterdir() if _plain(each.name) and not each.is_symlink())
    items = "".join(
        f'<li><a href="{quote(each.name)}{"/" * each.is_dir()}">{html.escape(each.name)}{"/" * each.is_dir()}</a></li>'
        for each in found
    )
    return document(name, "", [f"<h1>{html.escape(name)}</h1><p><a href='../'>up</a></p><ul>{items}</ul>"])
