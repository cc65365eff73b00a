"""The folder of a run: what lies where in it, and what it says of itself while it goes. Imports no torch.

report.html report.json recipe.yaml log.txt stats.jsonl status.json
method.py family.py           where the method or the family was a file of your own
pictures/samples.png          the teacher, the teacher at few steps, the student
pictures/000500.png           previews, by update
pictures/samples.webp ...     the same of some videos, moving
student/                      the pipeline
work/pairs/ work/checkpoints/ may be deleted when the run is done
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from stepdistill.errors import UserError
from stepdistill.system.clock import boot, uptime, uptime_at_start
from stepdistill.system.files import remove_left_over, written_whole
from stepdistill.system.lock import locked
from stepdistill.system.log import utc_now
from stepdistill.system.parsing import LARGEST, parse_json

LATEST = "latest"
"""In a folder called ``runs``: a link to the newest run."""
ABOUT_WORK = (
    "What this run works with: pairs of the teacher, and checkpoints. It needs them while it trains. When it is done\n"
    "this folder may be deleted; `stepdistill export` and `--resume` then have nothing to start from.\n"
)
CLOCKS_DIFFER = 60.0
"""Seconds by which the clocks of two machines may differ without a word."""
_OLD = ("checkpoints", "pairs", "sheets", "samples.png")

State = Literal["preparing", "training", "finishing", "done", "stopped"]


def moving(pictures: Path) -> Path:
    """Where some of the videos lie whose single frames a file of samples or of a preview shows."""
    return pictures.with_suffix(".webp")


@dataclass(frozen=True)
class RunFolder:
    """The places in a run's folder.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def page(self) -> Path:
        """What the run came to, for people."""
        return self.root / "report.html"

    @property
    def report(self) -> Path:
        """The same, for programs."""
        return self.root / "report.json"

    @property
    def recipe(self) -> Path:
        """The recipe with every default written out."""
        return self.root / "recipe.yaml"

    @property
    def log(self) -> Path:
        """All that was said on stderr."""
        return self.root / "log.txt"

    @property
    def lock(self) -> Path:
        """There while a process trains in the folder."""
        return self.root / ".lock"

    @property
    def status(self) -> Path:
        """Where the run is, see :class:`Status`."""
        return self.root / "status.json"

    @property
    def student(self) -> Path:
        """The student's diffusers folder."""
        return self.root / "student"

    @property
    def pictures(self) -> Path:
        """Samples and previews."""
        return self.root / "pictures"

    @property
    def samples(self) -> Path:
        """The teacher's pictures and the student's, made at the end."""
        return self.pictures / "samples.png"

    def preview(self, update: int) -> Path:
        """The pictures after so many updates."""
        return self.pictures / f"{update:06d}.png"

    def previews(self) -> dict[int, Path]:
        """The previews that are there, by update."""
        found = {int(file.stem): file for file in self.pictures.glob("*.png") if file.stem.isdecimal()}
        return dict(sorted(found.items()))

    @property
    def work(self) -> Path:
        """What the run works with; may be deleted when it is done."""
        return self.root / "work"

    @property
    def pairs(self) -> Path:
        """Noises and the teacher's samples of them, where the recipe gives no other place."""
        return self.work / "pairs"

    @property
    def checkpoints(self) -> Path:
        """What a run goes on from."""
        return self.work / "checkpoints"

    def begin(self) -> None:
        """Makes what every run has, and in a folder called ``runs`` the link to the newest."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        (self.work / "README.txt").write_text(ABOUT_WORK, encoding="utf-8")
        runs = self.root.absolute().parent
        link = runs / LATEST
        if runs.name == "runs" and (link.is_symlink() or not link.exists()):
            with contextlib.suppress(OSError):  # some file systems have no links
                beside = runs / f".{LATEST}.{os.getpid()}"
                beside.symlink_to(self.root.name)
                beside.replace(link)

    def check_layout(self) -> None:
        """It is not the folder of a run of an earlier version, whose files lay elsewhere.

        Raises:
            UserError: it is.
        """
        found = next((name for name in _OLD if (self.root / name).exists()), None)
        if self.recipe.is_file() and found is not None and not self.work.exists():
            raise UserError(
                f"{self.root} is a run of an earlier version ({found} lies at its top, and not in work/ or pictures/): "
                "finish it with that version, or train into another --output; its student/ and report.json are still "
                "read by sample, eval, verify and compare"
            )


@dataclass(frozen=True)
class Status:
    """status.json: where a run is.

    Attributes:
        state: what it does.
        phase: the same in words; of a run that stopped, why.
        update, updates: optimiser updates done, and of the whole run.
        eta_seconds: until training ends; None where it is not known.
        health: of the last preview; None before it.
        pid, host: the process, and its machine.
        written: when this was, UTC, ISO 8601, as that machine's clock said.
        boot, uptime: the same as nobody can set it: which start of the machine, and seconds since then; empty and 0
            where the system does not tell them.
    """

    state: State
    phase: str
    update: int
    updates: int
    eta_seconds: float | None = None
    health: str | None = None
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=platform.node)
    written: str = field(default_factory=utc_now)
    boot: str = field(default_factory=boot)
    uptime: float = field(default_factory=uptime)

    @property
    def going(self) -> bool:
        """Whether it says that the run goes on, which one that was killed says for ever."""
        return self.state not in ("done", "stopped")

    @property
    def killed(self) -> bool:
        """Whether it says that the run goes on, of a process of this machine that is gone."""
        return self.going and self.host == platform.node() and not self._alive

    @property
    def under_way(self) -> bool:
        """Whether its process is here, and at it."""
        return self.going and self.host == platform.node() and self._alive

    @property
    def silent_seconds(self) -> float | None:
        """Since this was written; None where the time of day is all there is to go by, and is an earlier one than this
        was written at: clocks were set, or those of two machines differ."""
        if self.boot and self.boot == boot():
            return max(0.0, uptime() - self.uptime)
        passed = (datetime.now(UTC) - datetime.fromisoformat(self.written)).total_seconds()
        return None if passed < -CLOCKS_DIFFER else max(0.0, passed)

    @property
    def _alive(self) -> bool:
        """Whether its process is there: one of that number which began later is another."""
        if self.boot:
            began = uptime_at_start(self.pid) if self.boot == boot() else None
            return began is not None and began <= self.uptime + 1  # clocks of hundredths
        import psutil

        try:
            began = float(psutil.Process(self.pid).create_time())
        except psutil.Error:
            return False
        return began <= datetime.fromisoformat(self.written).timestamp() + 2  # clocks of seconds


def read_status(folder: Path) -> Status | None:
    """Of a run's folder; None where there is none, or what is there is not what a run writes."""
    if not RunFolder(folder).status.is_file():
        return None
    try:
        found = parse_json(RunFolder(folder).status.read_text(encoding="utf-8"))
        # Those of earlier versions know no uptime.
        told = {"boot": "", "uptime": 0.0, **found}
        status = Status(**{name: told[name] for name in Status.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return status if _is_whole(status) else None


def _is_whole(status: Status) -> bool:
    """Whether all values are of the kind that a run writes."""
    try:
        dated = datetime.fromisoformat(status.written).tzinfo is not None
    except (ValueError, TypeError):
        return False
    texts = (status.phase, status.host, status.boot, status.health or "")
    counts, times = (status.update, status.updates), (status.uptime, status.eta_seconds or 0.0)
    return (
        dated
        and status.state in get_args(State)
        and all(isinstance(text, str) and text.isprintable() for text in texts)
        and all(type(count) is int and 0 <= count < LARGEST for count in counts)
        and type(status.pid) is int
        and 0 < status.pid < 1 << 31
        and all(type(each) in (int, float) and 0 <= each < LARGEST for each in times)
    )


class RunStatus:
    """Keeps status.json, which is replaced whole at each change.

    Args:
        folder: of the run.
        updates: of the whole run.
        budget_seconds: of training; 0 sets no limit.
    """

    SECONDS = 1.0
    """Between two times that the update is written down."""

    def __init__(self, folder: Path, updates: int, budget_seconds: float = 0.0) -> None:
        self._file, self._budget, self._last = RunFolder(folder).status, budget_seconds, 0.0
        self.now = Status("preparing", "starting", 0, updates)

    def tell(self, state: State, phase: str, *, health: str | None = None) -> None:
        """What the run does from now on.

        Args:
            state, phase: see :class:`Status`.
            health: where there is something new to say of it.
        """
        self.now = replace(
            self.now, state=state, phase=phase, health=health or self.now.health, eta_seconds=None
        )
        self._write()

    def trained(self, update: int, seconds: float, health: str | None = None) -> None:
        """So many updates are done.

        Args:
            update: how many.
            seconds: the time that they took.
            health: where there is something new to say of it.
        """
        left = (self.now.updates - update) * seconds / max(update, 1)
        left = min(left, self._budget - seconds) if self._budget else left
        self.now = replace(
            self.now,
            state="training",
            phase="training",
            update=update,
            eta_seconds=round(max(left, 0.0), 1),
            health=health or self.now.health,
        )
        if health or time.monotonic() - self._last >= self.SECONDS:
            self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        self.now = replace(self.now, written=utc_now(), uptime=uptime())
        with written_whole(self._file) as temporary:
            temporary.write_text(json.dumps(asdict(self.now), indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside it the folder is there, and this process's alone; what processes that were killed have left half written
    is gone. Where it ends with a UserError before the run has a recipe, the run's log and status go, and the folders
    that were not there before: a mistake leaves nothing behind.

    Raises:
        UserError: another process trains there.
    """
    place = RunFolder(folder)
    made = [each for each in (folder, *folder.absolute().parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(place.lock, str(folder)):
            for each in (folder, place.pictures, place.checkpoints):
                remove_left_over(each)
            try:
                yield
            except UserError:
                if not place.recipe.exists():
                    place.log.unlink(missing_ok=True)
                    place.status.unlink(missing_ok=True)
                raise
    except UserError:
        for each in made:
            with contextlib.suppress(
                OSError
            ):  # another run may be in it by now, or this one has something to keep
                each.rmdir()
        raise
