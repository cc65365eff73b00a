"""Gives strange inputs to all that reads files of others, and prints what came of it.

    python tests/fuzz.py --output runs/fuzz                    10,000 recipes, and 2,000 of all else
    python tests/fuzz.py --output runs/fuzz --cases 300 --only images

A piece takes what it is given, or raises a UserError. Anything else counts as a crash, a case of more than --seconds
as a hang; an input that differs afterwards, a file written beside it, a process begun or a connection made as a breach.
Each is kept with its input's text in FOLDER/found.jsonl. Every target goes in rounds, each with a seed of its own; a
round that FOLDER/rounds.jsonl has is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent / "toys")]

import matplotlib  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from strange import TARGETS, Target, read_recipe, warm_run  # noqa: E402

from stepdistill.errors import UserError  # noqa: E402
from stepdistill.pages.plots import Series, line_plot  # noqa: E402

ROUND = 100
COUNTS = ("taken", "refused", "crash", "hang", "breach")


class Hang(BaseException):
    """A case took too long."""


class Watch:
    """What happens outside of a case's folder while it is read."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in (
            "os.system",
            "subprocess.Popen",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
            "os.fork",
        ):
            self.seen.append(f"{event} {arguments!r}"[:200])
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            place = os.fsdecode(arguments[0])
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not _allowed(place):
                self.seen.append(f"writes {place}")
        elif event in (
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
            "os.symlink",
            "os.link",
            "os.truncate",
        ):
            self.seen.append(f"{event} {arguments!r}"[:200])


def _allowed(place: str) -> bool:
    """Byte code of our own modules, and the note of what of a cache was checked already."""
    return place.endswith((".pyc", "-of-1")) or "__pycache__" in place or place.startswith("/dev/")


def _content(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "-checked-" not in file.name
    }


def outcome_of(target: Target, case: Any, watch: Watch, seconds: int) -> tuple[str, str]:
    """One of COUNTS, and what to say of it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    before: dict[str, bytes] = {}
    read, write = target.read, Path.write_bytes

    def kept(file: Path, content: Any) -> int:
        before[file.name] = bytes(content)
        watch.folder = None
        try:
            return write(file, content)
        finally:
            watch.folder = folder

    told = ("taken", "")
    watch.seen = []
    signal.alarm(seconds)
    try:
        Path.write_bytes = kept  # type: ignore[method-assign]
        watch.folder = folder
        read(folder, case)
    except UserError as error:
        told = ("refused", str(error)) if str(error).strip() else ("crash", "a UserError without a word")
    except Hang:
        told = ("hang", "")
    except Exception as error:
        places = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "/stepdistill/" in frame.filename
        ]
        where = f"{places[-1].filename.rpartition('/stepdistill/')[2]}:{places[-1].lineno}" if places else ""
        told = ("crash", f"{where} {type(error).__name__}: {error}"[:300])
    finally:
        signal.alarm(0)
        watch.folder = None
        Path.write_bytes = write  # type: ignore[method-assign]
    seen = [each for each in watch.seen if "mkdir" not in each or str(folder) not in each]
    if told[0] != "hang" and _content(folder) != before:
        seen.append("an input was changed or a file was written")
    if seen:
        told = ("breach", "; ".join(seen)[:300])
    shutil.rmtree(folder, ignore_errors=True)
    return told


def run_round(
    name: str, number: int, watch: Watch, seconds: int, cases: int = ROUND
) -> tuple[Counter[str], list[Any]]:
    """So many cases of a target, always the same for one number."""
    counts: Counter[str] = Counter()
    found: list[Any] = []

    @seed(number)
    @settings(max_examples=cases, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(TARGETS[name].inputs)
    def each(case: Any) -> None:
        kind, said = outcome_of(TARGETS[name], case, watch, seconds)
        counts[kind] += 1
        if kind not in ("taken", "refused"):
            found.append(
                {"target": name, "round": number, "kind": kind, "said": said, "case": repr(case)[:2000]}
            )

    each()
    return counts, found


def _hang(*_: object) -> None:
    raise Hang


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=2000, help="of each target; of recipes and assignments")
    parser.add_argument(
        "--recipes", type=int, default=5000, help="cases of recipes, and as many of assignments"
    )
    parser.add_argument("--seconds", type=int, default=20, help="a case of more is a hang")
    parser.add_argument("--only", action="append", choices=list(TARGETS))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _hang)
    rounds, found = (arguments.output / name for name in ("rounds.jsonl", "found.jsonl"))
    rows = [json.loads(line) for line in rounds.read_text().splitlines()] if rounds.is_file() else []
    done = {(row["target"], row["round"]): row for row in rows}
    with tempfile.TemporaryDirectory() as first:  # what is imported once is not a case's
        read_recipe(Path(first), b"method: dmd\nteacher: emoji\n")
        line_plot([Series("a", [(0, 1)])], "x", "y")
        matplotlib.get_configdir(), matplotlib.get_cachedir()
        if "warm starts" in (arguments.only or TARGETS):
            warm_run()
    watch = Watch()
    print(
        "| input | cases | " + " | ".join(COUNTS) + " | seconds |\n|" + " --- |" * (len(COUNTS) + 3),
        flush=True,
    )
    for name in arguments.only or TARGETS:
        total: Counter[str] = Counter()
        took = 0.0
        wanted = arguments.recipes if name in ("recipes", "assignments") else arguments.cases
        for number in range(-(-wanted // ROUND)):
            row = done.get((name, number))
            if row is None:
                began = time.monotonic()
                counts, odd = run_round(name, number, watch, arguments.seconds)
                row = {"target": name, "round": number, "counts": counts, "seconds": time.monotonic() - began}
                with rounds.open("a") as stream, found.open("a") as details:
                    stream.write(json.dumps(row) + "\n")
                    details.writelines(json.dumps(each) + "\n" for each in odd)
            total.update(row["counts"])
            took += row["seconds"]
        cells = [name, sum(total.values()), *(total[kind] for kind in COUNTS), f"{took:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
