"""Pieces of work that write files: what must hold of them after a fault, and what starting them again leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from file_faults import Fault, calls_of, faulty
from run_toy import HERE
from tiny import tiny_pipeline, tiny_prompts, tiny_teacher

from stepdistill.data import pairs as pairs_module
from stepdistill.data import row_cache
from stepdistill.data.pairs import PairCache
from stepdistill.data.row_cache import RowCache
from stepdistill.data.shards import Shards
from stepdistill.errors import UserError
from stepdistill.evaluation import shards as evaluation_shards
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.suite import load_suite
from stepdistill.export.student_folder import export, hashes
from stepdistill.export.verify import check_unaltered
from stepdistill.losses.contract import PairOptions
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.own_call import VERIFICATION
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.emoji import teacher_folder
from stepdistill.system.files import disk_error, sha256_of
from stepdistill.system.log import read_stats
from stepdistill.training import finish, run_page
from stepdistill.training.checkpoint import checkpoints_in, load_checkpoint, save_checkpoint
from stepdistill.training.distil import run_recipe

STEPS, KEEP = 4, 2
TIMED = ("seconds", "memory_bytes")


@dataclass
class Work:
    """A piece of work.

    Attributes:
        name: what it is called in tables.
        do: does it under a folder; what is there already is gone on from.
        whole: asserts that what is there after a fault is whole, given the calls that were made.
        left: what it leaves, to be compared.
        before: makes what is there before it.
    """

    name: str
    do: Callable[[Path], object]
    whole: Callable[[Path, Sequence[str]], None]
    left: Callable[[Path], Any]
    before: Callable[[Path], object] = lambda root: None

    def calls(self, root: Path) -> list[str]:
        """Of the work that nothing goes wrong with."""
        root.mkdir()
        self.before(root)
        return calls_of(lambda: self.do(root), root)

    def survives(self, root: Path, calls: Sequence[str], at: int, fault: Fault, wanted: Any) -> None:
        """Asserts that a fault at a call loses nothing that was finished, and that the work started again leaves what
        is wanted."""
        root.mkdir()
        self.before(root)
        error = faulty(lambda: self.do(root), root, at, fault)
        said = f"{fault} at {at}, {calls[at]}: {error!r}"
        if error is not None:
            assert fault in ("full", "read-only"), said
            known = isinstance(error, UserError) or disk_error(error) is not None
            assert known, (said, getattr(error, "__notes__", ""))
        self.whole(root, calls[:at])
        self.do(root)
        assert self.left(root) == wanted, said


def files_in(folder: Path) -> dict[str, str]:
    """SHA-256 of all files of a folder by name, but of what is hidden."""
    found = {
        file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    return {name: sha256_of(file) for name, file in found.items() if "/." not in f"/{name}"}


def _tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"roles": {"w": torch.full((64,), float(step))}, "ema": {"w": torch.arange(64.0) * step}}


def checkpoints() -> Work:
    """Four checkpoints, of which two are kept."""

    def do(root: Path) -> None:
        there = checkpoints_in(root)
        done = load_checkpoint(there[-1])[1]["step"] if there else 0
        for step in range(done + 1, STEPS + 1):
            save_checkpoint(root, step, _tensors(step), {"seconds": step}, KEEP)

    def whole(root: Path, calls: Sequence[str]) -> None:
        made = sum(call.startswith("os.rename") and call.endswith(".part") for call in calls)
        steps = []
        for folder in checkpoints_in(root):
            tensors, state = load_checkpoint(folder)
            assert torch.equal(tensors["ema"]["w"], _tensors(state["step"])["ema"]["w"])
            steps.append(state["step"])
        assert (steps[-1] if steps else 0) >= made, (steps, made)  # what is lost is what was being written
        assert len(steps) >= min(made, KEEP)

    # One more than two is there where the last one was made and the fault hit the removal of the oldest.
    return Work(
        "checkpoints", do, whole, lambda root: [files_in(each) for each in checkpoints_in(root)[-KEEP:]]
    )


def cached_rows() -> Work:
    """Shards of a cache of rows, computed from their numbers."""

    def compute(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(rows, dtype=torch.float32)[:, None].expand(-1, 3).contiguous()}

    def do(root: Path) -> None:
        RowCache(40, compute, lambda: root / "rows").make()

    def whole(root: Path, calls: Sequence[str]) -> None:
        Shards(root / "rows", "rows").missing(range(5))  # an error where one is damaged

    return Work("cache shards", do, whole, lambda root: files_in(root / "rows"))


def pairs() -> Work:
    """Shards of pairs of a tiny teacher."""
    teacher, prompts = tiny_teacher("unet-ddim"), ["0", "1"]
    options = PairOptions(pairs=6, pair_steps=2)

    def do(root: Path) -> None:
        own = PairCache(root / "pairs", teacher, prompts, options, 0)
        encoded = teacher.codec.encode(prompts)
        own.make(lambda index: encoded.rows(index % 2))

    def whole(root: Path, calls: Sequence[str]) -> None:
        files = list((root / "pairs").glob("pairs-*.safetensors"))
        assert not files or (root / "pairs" / "manifest.json").is_file()
        Shards(root / "pairs", "pairs").missing(range(3))

    return Work("pair shards", do, whole, lambda root: files_in(root / "pairs"))


def evaluation() -> Work:
    """An evaluation of a few images in shards of five."""
    teacher = load_pipeline(teacher_folder("emoji"), "cpu")[0]
    suite = load_suite("emoji-quick").model_copy(update={"n": 12})

    def do(root: Path) -> None:
        evaluate(teacher, suite, steps=1, batch=5, progress=False, output=root / "out")

    def whole(root: Path, calls: Sequence[str]) -> None:
        folder = root / "out" / "steps_1"
        if (folder / "manifest.json").is_file():
            evaluation_shards.Shards(folder, 12).check()
        if (root / "out" / "report.json").is_file():
            json.loads((root / "out" / "report.json").read_text())

    def left(root: Path) -> Any:
        scores = json.loads((root / "out" / "report.json").read_text())["scores"]["1"]
        return scores["fd"], sorted(files_in(root / "out"))

    return Work("evaluation shards", do, whole, left)


def student_folder() -> Work:
    """A student's folder, where an earlier one is."""
    teacher, sampler = tiny_teacher("unet-ddim"), Sampler((1.0,), False)
    prompts = tiny_prompts("unet-ddim", 2)
    student = Copies(teacher).student

    def write(root: Path, card: str) -> None:
        export(student, sampler, teacher, root / "student", prompts, card, (0, 1))

    def card(root: Path) -> str:
        return (root / "student" / "README.md").read_text().splitlines()[0]

    def whole(root: Path, calls: Sequence[str]) -> None:
        told = json.loads((root / "student" / VERIFICATION / "manifest.json").read_text())["files"]
        assert hashes(root / "student") == told and card(root) in ("# Earlier", "# Later")

    return Work(
        "export",
        lambda root: write(root, "# Later\n"),
        whole,
        lambda root: (card(root), sorted(path.name for path in root.iterdir()), files_in(root / "student")),
        lambda root: write(root, "# Earlier\n"),
    )


def run(updates: int = 4) -> Work:
    """A whole run of DMD, a checkpoint at every second update, its student and its report."""
    teacher = tiny_pipeline("unet-ddim")
    sets = [
        *(
            "student.output=teacher",
            f"train.updates={updates}",
            "train.batch=2",
            "train.lr=1e-3",
            "evaluate=false",
        ),
        *("train.average=0.5", "train.checkpoint_every=2", "train.preview_every=2", "options.fake_updates=1"),
    ]
    recipe = load_recipe(HERE / "empty.yaml", method="dmd", sets=sets)

    def do(root: Path) -> None:
        begun = bool(checkpoints_in(root / "run" / "work" / "checkpoints"))
        run_recipe(recipe, output=root / "run", resume=begun, command="a test", pipeline=teacher)

    def whole(root: Path, calls: Sequence[str]) -> None:
        made = sum(
            call.startswith("os.rename") and "/checkpoints/." in call and call.endswith(".part")
            for call in calls
        )
        steps = [
            load_checkpoint(folder)[1]["step"]
            for folder in checkpoints_in(root / "run" / "work" / "checkpoints")
        ]
        assert (steps[-1] if steps else 0) >= 2 * made, (steps, made)

    def left(root: Path) -> Any:
        place = root / "run"
        tensors, state = load_checkpoint(checkpoints_in(place / "work" / "checkpoints")[-1])
        rows = [{k: v for k, v in row.items() if k not in TIMED} for row in read_stats(place)]
        numbers = {(g, k): v.tolist() for g, group in tensors.items() for k, v in group.items()}
        done = json.loads((place / "report.json").read_text())["updates"]
        assert (place / "report.html").is_file() and done == updates
        hidden = [path.name for path in place.rglob(".*")]
        return state["step"], rows, numbers, hashes(place / "student"), hidden

    return Work("run", do, whole, left)


def small(set_: Callable[[Any, str, Any], object]) -> None:
    """Gives what is written in shards several of them, and leaves out the drawing of verify and of curves, which others
    test."""
    set_(finish, "verify", check_unaltered)
    set_(run_page, "_curves", lambda run: "")
    for module, name, value in (
        *((row_cache, "MEMORY_ROWS", 0), (row_cache, "SHARD", 8), (row_cache, "CHUNK", 8)),
        *((pairs_module, "SHARD", 2), (evaluation_shards, "SIZE", 5)),
    ):
        set_(module, name, value)


ALL: tuple[Callable[[], Work], ...] = (checkpoints, cached_rows, pairs, evaluation, student_folder, run)
