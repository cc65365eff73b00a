"""Kills what writes files, fills its disk and flips its bits, and prints what became of it: python tests/kills.py WHAT

    calls     each piece of work of tests/toys/faulty_work.py at each call with which it changes files: killed there,
              killed with half a file, a full disk, a read-only one; then started again
    random    a run that is killed again and again at random times, until it is done
    disk      a run on a disk that is too small, which is then made larger, from size to size (Linux, as root)
    flips     a byte of each file of a run is changed, and the run gone on with, its student proven, its folder read

What is asserted is that nothing that was finished is lost, that the work started again comes to the same end as if
nothing had happened, bit for bit, and that every error is one line of ours.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "toys")]
warnings.simplefilter("ignore", DeprecationWarning)  # of forks of a process with threads

from faulty_work import ALL, run, small  # noqa: E402
from file_faults import FAULTS, Fault, faulty  # noqa: E402

from stepdistill.cli.doctor_run import examine_run  # noqa: E402
from stepdistill.comparison.collect import collect  # noqa: E402
from stepdistill.errors import UserError  # noqa: E402
from stepdistill.export.verify import check_unaltered  # noqa: E402
from stepdistill.system.files import disk_error  # noqa: E402
from stepdistill.system.run_folder import read_status  # noqa: E402


def calls(folder: Path, only: list[str] | None, faults: list[Fault], every: int) -> None:
    """The table of faults at each call, or at each so manieth: of another fault at another one."""
    print("| work | calls | " + " | ".join(faults) + " |\n| --- |" + " --- |" * (len(faults) + 1))
    for make in ALL:
        work = make()
        if only and work.name not in only:
            continue
        place = folder / work.name
        place.mkdir()
        found = work.calls(place / "whole")
        wanted = work.left(place / "whole")
        went, tried, lost = Counter[str](), Counter[str](), list[str]()
        for at in range(len(found)):
            for number, fault in enumerate(faults):
                if at % every != number % every:
                    continue
                root = place / f"{fault}-{at}"
                tried[fault] += 1
                said = "survived"
                try:
                    work.survives(root, found, at, fault, wanted)
                    went[fault] += 1
                except (AssertionError, UserError) as error:
                    lost.append(said := str(error).splitlines()[0])
                shutil.rmtree(root)
                print(f"{work.name}: {fault} at {at} of {len(found)}: {said}", file=sys.stderr, flush=True)
        cells = [work.name, str(len(found)), *(f"{went[each]} of {tried[each]} survived" for each in faults)]
        print(f"| {' | '.join(cells)} |", *lost, sep="\n", flush=True)
        assert not lost


def _child(job: Callable[[], object]) -> int:
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        status = 0
        try:
            job()
        except UserError:
            status = 2
        except BaseException:
            status = 1
        os._exit(status)
    return child


def kills(folder: Path, count: int, updates: int, longest: float, seed: int) -> None:
    """Kills a run at random times until it was killed so often and is done."""
    work, clock = run(updates), random.Random(seed)
    work.do(folder / "whole")
    wanted = work.left(folder / "whole")
    phases: Counter[str] = Counter()
    killed, rounds, lost, saved = 0, 0, 0, 0
    while killed < count:
        root = folder / f"round-{rounds}"
        root.mkdir()
        rounds, saved = rounds + 1, 0
        while True:
            child = _child(lambda root=root: work.do(root))  # type: ignore[misc]
            deadline, status = time.monotonic() + clock.uniform(0.0, longest), 0
            while time.monotonic() < deadline:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                time.sleep(0.005)
            else:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                told = read_status(root / "run")
                phases[told.phase if told else "before its first word"] += 1
                killed += 1
                work.whole(root, [])
                names = sorted(path.name for path in (root / "run" / "work" / "checkpoints").glob("step-*"))
                now = int(names[-1][5:]) if names else 0
                assert now >= saved, f"the checkpoint of update {saved} is gone"
                saved = now
                continue
            assert status == 0, f"round {rounds}: it ended with {os.waitstatus_to_exitcode(status)}"
            break
        lost += work.left(root) != wanted
        shutil.rmtree(root)
    for phase, times in phases.most_common():
        print(f"{times:5} kills while {phase}")
    same = f"{rounds - lost} of which ended as the unbroken one did"
    print(f"{killed} kills in {rounds} runs of {updates} updates, {same}")
    assert not lost


def disk(folder: Path, updates: int) -> None:
    """A run on a disk of more and more KiB."""
    work = run(updates)
    work.do(folder / "whole")
    wanted = work.left(folder / "whole")
    small_disk = folder / "disk"
    small_disk.mkdir()
    size, said = 16, Counter[str]()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(small_disk)]
    subprocess.run(mount, check=True)
    try:
        while True:
            error = faulty(lambda: work.do(small_disk), small_disk, 10**9, "full")
            if error is None:
                break
            assert isinstance(error, UserError) or disk_error(error), getattr(error, "__notes__", error)
            line = str(error) if isinstance(error, UserError) else disk_error(error) or ""
            said[line.replace(str(small_disk), "DISK")[:110]] += 1
            work.whole(small_disk, [])
            size = round(size * 1.15) + 1
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(small_disk)], check=True)
        same = work.left(small_disk) == wanted
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)
    for line, times in said.most_common():
        print(f"{times:5} times: {line}")
    print(f"done with {size} KiB after {sum(said.values())} full disks; as on a large one: {same}")
    assert same


def flips(folder: Path, each: int, seed: int) -> None:
    """Changes a byte of each file of a run."""
    work, chance = run(), random.Random(seed)
    work.do(folder / "whole")
    wanted = work.left(folder / "whole")
    readers: dict[str, Callable[[Path], object]] = {
        "train --resume": work.do,
        "verify": lambda root: check_unaltered(root / "run" / "student"),
        "doctor": lambda root: examine_run(root / "run"),
        "compare": lambda root: collect([str(root / "run")], ""),
    }
    files = sorted(file for file in (folder / "whole").rglob("*") if file.is_file() and file.stat().st_size)
    print("| file | " + " | ".join(readers) + " |\n| --- |" + " --- |" * len(readers))
    for file in files:
        name = file.relative_to(folder / "whole" / "run").as_posix()
        cells = []
        for reader, read in readers.items():
            came: Counter[str] = Counter()
            for _ in range(each):
                root = folder / "flipped"
                shutil.copytree(folder / "whole", root)
                altered = root / "run" / name
                content = bytearray(altered.read_bytes())
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                altered.write_bytes(content)
                if reader == "train --resume":
                    shutil.rmtree(root / "run" / "student") if not name.startswith("student") else None
                error = faulty(lambda read=read, root=root: read(root), root, 10**9, "full")  # type: ignore[misc]
                if error is None:
                    same = reader != "train --resume" or work.left(root) == wanted
                    came[
                        "goes on"
                        if same
                        else "goes on as altered"
                        if name == "stats.jsonl"
                        else "ANOTHER RESULT"
                    ] += 1
                else:
                    came["said" if isinstance(error, UserError) else f"CRASH {error!r}"[:90]] += 1
                shutil.rmtree(root)
            cells.append(", ".join(f"{what} {times}" for what, times in came.items()))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("calls", "random", "disk", "flips"))
    parser.add_argument("--only", action="append", help="calls: a piece of work")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="calls: one of the four")
    parser.add_argument("--every", type=int, default=1, help="calls: each so manieth alone")
    parser.add_argument("--kills", type=int, default=100, help="random: how many")
    parser.add_argument("--updates", type=int, default=40, help="random, disk: of the run")
    parser.add_argument("--longest", type=float, default=4.0, help="random: seconds before a kill, at most")
    parser.add_argument("--each", type=int, default=4, help="flips: bytes of each file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    small(setattr)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if arguments.what == "calls":
            calls(folder, arguments.only, arguments.fault or list(FAULTS), arguments.every)
        elif arguments.what == "random":
            kills(folder, arguments.kills, arguments.updates, arguments.longest, arguments.seed)
        elif arguments.what == "disk":
            disk(folder, arguments.updates)
        else:
            flips(folder, arguments.each, arguments.seed)


if __name__ == "__main__":
    main()
