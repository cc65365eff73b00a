"""plan(): what a recipe will need, whether that fits, and the one change with which it would."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stepdistill.data.prompts import open_prompts
from stepdistill.data.row_cache import MEMORY_BYTES, MEMORY_ROWS
from stepdistill.data.sizes import CacheSize, latents_size, pairs_size
from stepdistill.data.training_videos import examples_of
from stepdistill.diffusion.solvers import calls_of
from stepdistill.errors import UserError
from stepdistill.evaluation.against_teacher import default_count
from stepdistill.losses.contract import PairOptions
from stepdistill.planning.trace import Device, trace
from stepdistill.planning.traced import Trace
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.emoji import embedded_teachers
from stepdistill.training.identity import resolve

RESERVE = 2**30
"""Bytes of a GPU beside what torch allocates: CUDA's context, workspaces of its libraries, gaps between blocks."""

MFU = 0.35
"""The share of a GPU's peak that training is assumed to reach."""

GPUS = {"a100": 312e12, "l40s": 362e12, "4090": 165e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""Dense bf16 operations a second, as data sheets have them; float32 with TF32 is half of it."""


@dataclass(frozen=True)
class Change:
    """A change with which a recipe fits.

    Attributes:
        sets: what is set.
        peak: bytes it then needs on a GPU.
    """

    sets: tuple[str, ...]
    gpus: int
    peak: int

    @property
    def text(self) -> str:
        more = f"--gpus {self.gpus} " if self.gpus > 1 else ""
        return more + " ".join(f"--set {each}" for each in self.sets)


@dataclass(frozen=True)
class Plan:
    """What a recipe will need.

    Attributes:
        recipe: what is planned, in words.
        trace: what was seen of its updates.
        gpus: that share a batch.
        memory: bytes of one of them; 0 is not said.
        peak: bytes that the whole run needs on one.
        disk: bytes, by what they are for.
        flops: of a mean update, all GPUs together.
        hours: of the updates, by GPU.
        pairs: of the teacher's that are made before them; 0 where the method has none.
        pair_hours: of these, by GPU; empty without.
        pictures: of the teacher's, of each kind, by which the student is measured; 0 where it is not by such.
        picture_hours: of these, by GPU; empty without.
        fits: whether it fits in ``memory``; None where that is not said.
        change: with which it would; None where it fits, or nothing tried does.
        ratio: of the peak of an update over that of an ordinary one of the same adapter; 0 for full weights.
    """

    recipe: dict[str, Any]
    trace: Trace
    gpus: int
    memory: int
    peak: int
    disk: dict[str, int]
    flops: float
    hours: dict[str, float]
    pairs: int
    pair_hours: dict[str, float]
    pictures: int
    picture_hours: dict[str, float]
    fits: bool | None
    ratio: float
    change: Change | None = None
    tried: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it as tables, lists, texts and numbers."""
        found = asdict(self)
        found["trace"]["size"] = str(self.trace.size)
        found["trace"]["needs"] = sorted(self.trace.needs)
        return found


def plan(
    recipe: Recipe,
    *,
    device: Device = "cuda",
    gpus: int = 1,
    memory: int = 0,
    gpu: str | None = None,
    changes: bool = True,
) -> Plan:
    """Plans a recipe, without weights and without a GPU.

    Args:
        recipe: what would run.
        device: where.
        gpus: how many share it.
        memory: bytes of one; 0 says nothing of it.
        gpu: of GPUS, for which hours are said; None says those of all.
        changes: whether, where it does not fit, single changes are tried.

    Raises:
        UserError: the recipe cannot run, or cannot be planned.
    """
    found = _planned(recipe, device, gpus, memory, gpu, usual=True)
    if found.fits is not False or not changes:
        return found
    tried: list[str] = []
    for sets, count in _candidates(recipe, gpus):
        try:
            changed = _changed(recipe, sets)
            peak = _planned(changed, device, count, memory, gpu, usual=False).peak
        except UserError:
            continue
        change = Change(tuple(f"{key}={value}" for key, value in sets.items()), count, peak)
        if peak + _reserve(device) <= memory:
            return replace(found, change=change, tried=tried)
        tried.append(f"{change.text}: {peak / 2**30:.1f} GiB")
    return replace(found, tried=tried)


def _reserve(device: Device) -> int:
    return RESERVE if device == "cuda" else 0


def _planned(recipe: Recipe, device: Device, gpus: int, memory: int, gpu: str | None, usual: bool) -> Plan:
    seen = _trace(recipe, device, gpus, usual)
    train = recipe.train
    update = max(each.peak.total for each in seen.updates)
    peak = max(update, seen.setup.total, 0 if seen.picture is None else seen.picture.total)
    flops = gpus // train.context_parallel * sum(each.share * each.flops for each in seen.updates)
    speeds = {name: speed for name, speed in GPUS.items() if gpu in (None, name)}
    slower = 1.0 if train.precision == "bf16" else 2.0
    pairs, pair_flops = _pairs(recipe, seen)
    pictures, picture_flops = _pictures(recipe, seen)

    def hours(done: float) -> dict[str, float]:
        return {name: done * slower / (speed * MFU * gpus) / 3600 for name, speed in speeds.items()}

    said = {
        "teacher": recipe.teacher,
        "method": recipe.method,
        "lora_rank": recipe.student.lora_rank,
        "batch": train.batch,
        "accumulate": train.accumulate,
        "precision": train.precision,
        "weights": train.weights,
        "optimizer": train.optimizer,
        "checkpointing": train.checkpointing,
        "updates": train.updates,
        "size": str(seen.size),
    }
    return Plan(
        recipe=said,
        trace=seen,
        gpus=gpus,
        memory=memory,
        peak=peak,
        disk=_disk(recipe, seen),
        flops=flops,
        hours=hours(train.updates * flops),
        pairs=pairs,
        pair_hours=hours(pair_flops) if pairs else {},
        pictures=pictures,
        picture_hours=hours(picture_flops) if pictures else {},
        fits=peak + _reserve(device) <= memory if memory else None,
        ratio=update / seen.fine_tune if seen.fine_tune else 0.0,
    )


def _trace(recipe: Recipe, device: Device, gpus: int, usual: bool) -> Trace:
    """The trace; what fake tensors cannot do is said in a line."""
    share, notes = recipe.train.context_parallel, list[str]()
    if gpus % share:
        raise UserError(
            f"train.context_parallel is {share}, which does not divide {gpus} GPUs: set it to a divisor"
        )
    if share > 1:
        notes.append(
            f"train.context_parallel={share}: activations are counted of all tokens, a GPU holds fewer"
        )
    try:
        found = trace(recipe, device, gpus // share, usual)
        return replace(found, notes=[*found.notes, *notes])
    except UserError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{recipe.method} with these options cannot be planned for {recipe.teacher}: it asks for numbers that "
            f"tensors without any have not ({type(error).__name__}: {reason})"
        ) from error


def _pairs(recipe: Recipe, seen: Trace) -> tuple[int, float]:
    """How many pairs are made, and the operations that it takes; those that are there already count, too."""
    if "pairs" not in seen.needs:
        return 0, 0.0
    options = resolve(recipe).options
    drawn = options if isinstance(options, PairOptions) else PairOptions()
    return drawn.pairs, drawn.pairs * calls_of(drawn.pair_solver, drawn.pair_steps) * seen.teacher_call


def _pictures(recipe: Recipe, seen: Trace) -> tuple[int, float]:
    """How many pictures of the teacher's the student is measured by, and the operations that the teacher's calls for
    them take in full and in few steps; those that are there already count, too."""
    if recipe.evaluate is not True or recipe.teacher in embedded_teachers():
        return 0, 0.0
    options = recipe.against_teacher
    count = options.pictures or default_count(seen.size)
    calls = options.steps + sum({1, *seen.step_counts} - {options.steps})
    return count, count * calls * seen.teacher_call


def _disk(recipe: Recipe, seen: Trace) -> dict[str, int]:
    """Bytes of what a run writes; small caches stay in memory."""
    state, data = (seen.state // 4,), recipe.data
    found = {f"checkpoints ({recipe.train.keep} kept)": seen.checkpoint * recipe.train.keep}
    found["student"] = seen.student + seen.components
    rows, pairs = [CacheSize("prompts' conditions", _count(recipe), seen.condition)], list[CacheSize]()
    if "pairs" in seen.needs:
        count, _ = _pairs(recipe, seen)
        pairs.append(pairs_size(count, state, seen.pair_states, data.pairs_dtype))
    if "images" in seen.needs and data.images is not None and Path(data.images).exists():
        images = examples_of(Path(data.images), seen.size.frames, data.fps)
        rows.append(latents_size(len(images.captions), state))
    large = [each for each in rows if each.count > MEMORY_ROWS or each.bytes > MEMORY_BYTES]
    return found | {f"{each.count:,} {each.what}": each.bytes for each in (*large, *pairs)}


def _count(recipe: Recipe) -> int:
    """Prompts of a recipe; 1,000 where their file is not here."""
    if recipe.data.prompts is not None and Path(recipe.data.prompts).is_file():
        return len(open_prompts(Path(recipe.data.prompts)))
    return 1000


def _candidates(recipe: Recipe, gpus: int) -> list[tuple[dict[str, Any], int]]:
    """Single changes in the order in which they cost: what is set, and the number of GPUs."""
    train, found = recipe.train, list[tuple[dict[str, Any], int]]()
    smallest = train.batch // gpus
    if smallest > train.accumulate and train.batch % smallest == 0:
        found.append(({"train.accumulate": smallest}, gpus))
    if not train.checkpointing and train.compile == "none":
        found.append(({"train.checkpointing": True}, gpus))
    if train.precision != "bf16":
        found.append(({"train.precision": "bf16"}, gpus))
    if recipe.student.lora_rank and recipe.student.base not in ("int8", "nf4"):
        found += [({"student.base": base}, gpus) for base in ("int8", "nf4")]
    if not recipe.student.lora_rank:
        if train.precision == "bf16" and train.weights == "float32" and train.parallel != "sharded":
            found.append(({"train.weights": "bf16"}, gpus))
        if train.optimizer == "adamw" and train.parallel != "sharded":
            found.append(({"train.optimizer": "adafactor"}, gpus))
        found.append(({"student.lora_rank": 64}, gpus))
    if train.parallel != "sharded" and train.optimizer == "adamw" and train.weights == "float32":
        more = [count for count in (2, 4, 8, 16) if count > gpus and train.batch % count == 0]
        found += [({"train.parallel": "sharded"}, count) for count in more]
    return found


def _changed(recipe: Recipe, sets: dict[str, Any]) -> Recipe:
    tree = recipe.model_dump()
    for key, value in sets.items():
        section, name = key.split(".")
        tree[section][name] = value
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(str(error)) from None
