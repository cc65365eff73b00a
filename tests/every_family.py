"""Every family from its teacher to proven students, as a table: python tests/every_family.py [NAME ...] [--output FILE]

Each tiny pipeline (tests/toys/tiny*.py; Kolors where sentencepiece is there) is written as a folder and

- compared with its family: one picture on its own scheduler, and the times that its students' pipelines ask for,
- distilled: two updates of dmd, one of the student and one of the network that follows it, with all weights and with
  LoRA, and one update towards a student of four steps, by lcm where it can have fresh noise between its steps,
- each student exported, and its pictures drawn again by a process that has never imported stepdistill,
- resumed: the dmd run cut off after its first update and gone on with ends, to the bit, in the same checkpoint.

FILE keeps what was found; pipelines that passed there are not tried again. The exit status is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent / "toys"))

import torch
from accelerate import Accelerator
from fresh import FreshProcesses
from run_toy import HERE
from safetensors.torch import load_file
from tiny import EMBEDDED, GUIDED, PIPELINES, SIZES, tiny_pipeline, tiny_prompts
from tiny_from_picture import BUILDERS as FROM_PICTURE
from tiny_from_picture import SIZES as PICTURE_SIZES
from tiny_from_picture import pictured, tiny_from_picture
from tiny_hidream import tiny_hidream
from tiny_kolors import tiny_kolors

from stepdistill.cli.doctor import examine_teacher
from stepdistill.networks.averages import Ema
from stepdistill.recipes.recipe import Recipe, load_recipe
from stepdistill.training.assemble import assemble
from stepdistill.training.checkpoint import checkpoints_in
from stepdistill.training.distil import run_recipe
from stepdistill.training.health import Seen
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.training_data import training_data

MORE: dict[str, Callable[[Path], Any]] = {"hidream": lambda folder: tiny_hidream(), "kolors": tiny_kolors}
"""Pipelines beside those of tiny.py, from a folder for their files."""
HEADS = ("pipeline", "seconds", "teacher check", "grid check", "dmd", "dmd, LoRA", "four steps", "resumed")
FOUR = {"dit": "pcm", "sana-sprint": "scm"}
"""By what method the four-step student is trained where it is not lcm: DiT's pipeline takes no seed for fresh noise."""
FAILED = "FAILED: "


def sides_of(name: str) -> list[int]:
    """What is drawn, as in data.size; empty where it is the pipeline's own."""
    size = (SIZES | PICTURE_SIZES).get(name)
    return [] if size is None else [size.height, size.width, size.frames][: 3 if size.frames > 1 else 2]


def recipe_of(name: str, folder: Path, method: str, *more: str) -> Recipe:
    """A run of a few updates on the pipeline in ``folder / "teacher"``."""
    guided = name in (*GUIDED, *EMBEDDED, *MORE, *FROM_PICTURE)
    sets = [
        *("student.output=teacher", "train.batch=2", "train.lr=1e-3", "train.average=0.5", "evaluate=false"),
        *("train.checkpoint_every=1", "train.preview_every=0", f"options.guidance={2 if guided else 1}"),
        f"data.prompts={folder / 'prompts.txt'}",
        *([f"data.size={sides_of(name)}"] if sides_of(name) else []),
        *more,
    ]
    return load_recipe(HERE / "empty.yaml", method=method, teacher=str(folder / "teacher"), sets=sets)


def dmd_of(name: str, folder: Path, *more: str) -> Recipe:
    """Two updates, the second of the student."""
    return recipe_of(
        name, folder, "dmd", "train.updates=2", "options.fake_updates=1", "options.fake_warm_start=0", *more
    )


def four_steps_of(name: str, folder: Path) -> Recipe:
    """One update towards four steps."""
    more = ("train.updates=1", "options.pairs=2", "options.pair_steps=2")
    return recipe_of(name, folder, FOUR.get(name, "lcm"), "student.times=[1.0,0.75,0.5,0.25]", *more)


def proof_of(recipe: Recipe, output: Path) -> str:
    """The scheduler and the largest difference of the exported student's pictures."""
    report = run_recipe(recipe, output=output).report
    assert report is not None
    drawn = report.verification.partition("drawn in ")[2]
    scheduler = drawn.partition(" of ")[2].partition(" by ")[0].removesuffix("Scheduler")
    return f"{scheduler}, {drawn.partition('trainer' + chr(39) + 's by ')[2].partition(' at most')[0]}"


def last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of it."""
    files = sorted(checkpoints_in(run / "work" / "checkpoints")[-1].glob("*.safetensors"))
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def resumed(name: str, folder: Path, whole: Path) -> str:
    """Cuts the run off after its first update, goes on, and compares the last checkpoint with that of ``whole``."""
    recipe, cut = dmd_of(name, folder, "train.preview_every=1"), folder / "cut"

    def go(resume: bool, last: int) -> None:
        accelerator = Accelerator(cpu=True)
        job = assemble(resolve(recipe), accelerator)

        def look(step: int, ema: Ema | None) -> Seen:
            if step > last:
                raise KeyboardInterrupt
            return Seen({}, [])

        train(
            job.objective,
            training_data(job, cut),
            job.recipe,
            cut,
            accelerator,
            resume=resume,
            preview=look,
        )

    cut.mkdir()
    with contextlib.suppress(KeyboardInterrupt):
        go(resume=False, last=1)
    began = last_checkpoint(cut)
    go(resume=True, last=2)
    ours, theirs = last_checkpoint(cut), last_checkpoint(whole)
    apart = [key for key in theirs if key not in ours or not torch.equal(ours[key], theirs[key])]
    if apart or ours.keys() != theirs.keys():
        raise RuntimeError(f"{len(apart)} of {len(theirs)} tensors differ, {apart[:1]} first")
    if all(key in began and torch.equal(began[key], value) for key, value in theirs.items()):
        raise RuntimeError("the second update changed nothing")
    return f"{len(theirs)} tensors equal"


def checks_of(name: str, teacher: Path) -> tuple[str, str]:
    """How far the teacher's picture is from its pipeline's, and the step counts whose times are asked for."""
    found = examine_teacher(str(teacher), ",".join(map(str, sides_of(name))) or None)
    broken = [each.text for each in found if each.state == "broken"]
    if broken:
        raise RuntimeError(broken[0])
    (apart,) = (each.text for each in found if each.subject == "teacher check")
    grids = [each.text.split()[0] for each in found if each.subject == "grid check" and each.state == "ok"]
    if not grids:
        raise RuntimeError(next(each.text for each in found if each.subject == "grid check"))
    return apart.partition(" apart")[0], ", ".join(grids)


def tried(ask: Callable[[], str]) -> str:
    """What it says, or in one line why it failed."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return ask()
    except Exception as error:
        return f"{FAILED}{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def tried_on(name: str, folder: Path) -> tuple[Any, list[str]]:
    """A pipeline, and two prompts."""
    if name in FROM_PICTURE:
        return tiny_from_picture(name), pictured(folder, 2, PICTURE_SIZES[name])
    if name in MORE:
        return MORE[name](folder), ["a red heart", "blue fish"]
    return tiny_pipeline(name), tiny_prompts(name, 2)


def row_of(name: str) -> dict[str, str]:
    """What was found of a pipeline, by the heads of the table."""
    began, row = time.perf_counter(), dict[str, str]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def build() -> str:
            pipe, prompts = tried_on(name, folder)
            pipe.save_pretrained(folder / "teacher")
            (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
            row["teacher check"], row["grid check"] = checks_of(name, folder / "teacher")
            return row["teacher check"]

        row["teacher check"] = tried(build)
        whole = folder / "dmd"
        row["dmd"] = tried(lambda: proof_of(dmd_of(name, folder), whole))
        row["dmd, LoRA"] = tried(
            lambda: proof_of(dmd_of(name, folder, "student.lora_rank=2"), folder / "lora")
        )
        row["four steps"] = tried(lambda: proof_of(four_steps_of(name, folder), folder / "four"))
        row["resumed"] = tried(lambda: resumed(name, folder, whole))
    return {"pipeline": name, "seconds": f"{time.perf_counter() - began:.0f}", **row}


def main(names: list[str], file: Path | None) -> int:
    """Prints the table; 1 where anything failed."""
    known: dict[str, dict[str, str]] = json.loads(file.read_text()) if file and file.is_file() else {}
    print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}")
    failed = False
    with tempfile.TemporaryDirectory() as place, contextlib.closing(FreshProcesses(Path(place))) as fresh:

        def run(program: str, arguments: list[str], folder: Path, timeout: float) -> Any:
            return fresh.run(program, arguments, folder)

        with mock.patch("stepdistill.export.verify.in_a_fresh_process", run):
            for name in names:
                row = known.get(name)
                if row is None or FAILED in str(row):
                    row = known[name] = row_of(name)
                    if file:
                        file.write_text(json.dumps(known, indent=1) + "\n")
                failed |= FAILED in str(row)
                print(f"| {' | '.join(row.get(head, '') for head in HEADS)} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    every = [*PIPELINES, *FROM_PICTURE, *MORE]
    if importlib.util.find_spec("sentencepiece") is None:
        every.remove("kolors")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(every))
    parser.add_argument("--output", type=Path, help="a JSON file that keeps what was found")
    given = parser.parse_args()
    if unknown := set(given.names) - set(every):
        parser.error(f"there is no pipeline {', '.join(sorted(unknown))}")
    sys.exit(main(given.names or every, given.output))
