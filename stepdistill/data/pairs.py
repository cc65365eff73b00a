"""(noise, teacher sample) pairs, made once in a sharded cache that knows what it was made with.

A pair is stored as its clean end, and where asked for with some states of its trajectory; its noise and its prompt
follow from the seed and its number. The cache is keyed by the teacher, solver, steps, guidance, prompts, seed and
random generator, and refused when any of them differs; shards that are there already are kept, so an interrupted run
goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from stepdistill.data.shards import Shards, grouped
from stepdistill.data.sizes import DTYPES, Wanted, pairs_size
from stepdistill.data.texts import lines_sha256
from stepdistill.diffusion.draws import generator_for, normal_of
from stepdistill.diffusion.path import FlowPath, Prediction
from stepdistill.diffusion.philox import NAME
from stepdistill.diffusion.solvers import trajectory
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.families.size import STATES_AT_ONCE, at_once
from stepdistill.losses.contract import PairOptions
from stepdistill.networks.passes import Passes
from stepdistill.networks.sampler import schedule_times
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.files import written_whole
from stepdistill.system.parsing import parse_json
from stepdistill.system.processes import ALONE, Processes

SHARD = 256
"""Pairs in one file."""


class PairCache:
    """Pairs in a folder.

    Args:
        folder: the cache; made when missing.
        teacher: who draws the clean ends.
        prompts: pair i belongs to prompt ``prompt_index[i]``.
        options: how many, solver, steps, guidance.
        seed: the pairs' noises and prompts follow from it.
        times: times inside (0, 1) at which the trajectory's states are kept too.
        dtype: one of DTYPES, in which they are kept; they are made, and read, in float32.
        remake: whether damaged shards are made again.

    Raises:
        UserError: when ``times`` are not among the solver's, or when the folder holds pairs made with anything else.
    """

    def __init__(
        self,
        folder: Path,
        teacher: PipelineTeacher,
        prompts: Sequence[str],
        options: PairOptions,
        seed: int,
        times: Sequence[float] = (),
        dtype: str = "float32",
        remake: bool = False,
    ) -> None:
        self.folder, self.teacher, self.options, self.seed = folder, teacher, options, seed
        self.count = options.pairs
        self.grid = _grid(teacher, options)
        wanted = [_position(self.grid, time) for time in times]
        self.made, self.kept = self._claim(
            {
                "teacher": teacher.fingerprint(),
                "solver": options.pair_solver,
                "steps": options.pair_steps,
                "guidance": options.guidance,
                "interval": list(teacher.guidance_interval),
                "guidance_2": teacher.guidance_2,
                "rescale": teacher.guidance_rescale,
                "shift": teacher.path.shift if isinstance(teacher.path, FlowPath) else 1.0,
                "prompts": lines_sha256(prompts),
                "seed": seed,
                "shape": list(teacher.codec.shape),
                "generator": NAME,
                "dtype": dtype,
            },
            wanted,
        )
        self.columns = [self.kept.index(position) for position in wanted]
        rounds = [
            torch.randperm(len(prompts), generator=generator_for(seed, "pair prompts", i))
            for i in range(-(-self.made // len(prompts)))
        ]
        self.prompt_index = torch.cat(rounds)[: self.made]
        self.dtype, self._shards = DTYPES[dtype], Shards(folder, "pairs", remake)
        self.size = pairs_size(self.count, teacher.codec.shape, len(self.kept), dtype)

    def _claim(self, key: dict[str, object], wanted: list[int]) -> tuple[int, list[int]]:
        """How many pairs the cache is of and the positions of the states it keeps; written down when it is new. A run
        may take the first pairs of a larger cache, and some of the states it keeps."""
        manifest = self.folder / "manifest.json"
        if manifest.is_file():
            old = {"interval": [0.0, 1.0], "rescale": 0.0, "shift": 1.0, "generator": "mt19937"}
            old |= {"guidance_2": None, "dtype": "float32"}
            found = {**old, **parse_json(manifest.read_text())}
            for name, value in key.items():
                if found.get(name) != value:
                    self._refuse(name, found.get(name), value)
            kept = [_position(self.grid, time) for time in found["states"]]
            if self.count > found["pairs"]:
                self._refuse("pairs", found["pairs"], self.count)
            if not set(wanted) <= set(kept):
                self._refuse("states", found["states"], [round(self.grid[i], 6) for i in wanted])
            return int(found["pairs"]), kept
        self.folder.mkdir(parents=True, exist_ok=True)
        key = {**key, "pairs": self.count, "states": [round(self.grid[i], 6) for i in wanted]}
        with written_whole(manifest) as temporary:  # processes of one run may write it at once
            temporary.write_text(json.dumps(key, indent=1))
        return self.count, wanted

    def _refuse(self, name: str, found: object, wanted: object) -> NoReturn:
        raise UserError(
            f"the pairs in {self.folder} were made with another {name} ({found}, this run has {wanted}): delete the "
            "folder or name another one in data.pairs"
        )

    def noise(self, index: Tensor) -> Tensor:
        """The noises [B, ...] that the pairs ``index`` [B] start from, on the teacher's device."""
        return normal_of(self.seed, "pair noise", index, self.teacher.codec.shape, self.teacher.device)

    def make(
        self,
        condition: Callable[[Tensor], Condition],
        processes: Processes = ALONE,
        progress: Callable[[int], None] = lambda made: None,
    ) -> None:
        """Draws the pairs that are missing, each process its own shards of them.

        Args:
            condition: prompt indices [B] -> Condition.
            processes: who share the work.
            progress: told how many pairs each finished shard has, also of those that were there.

        Raises:
            UserError: a shard is damaged.
        """
        missing = self._shards.missing(self._numbers, processes)
        for number in self._numbers[processes.rank :: processes.count]:
            rows = torch.arange(number * SHARD, min((number + 1) * SHARD, self.made))
            if number in missing:
                drawn = self._draw(rows, condition(self.prompt_index[rows]))
                self._shards.write(number, {name: value.to(self.dtype) for name, value in drawn.items()})
            progress(min(len(rows), self.count - number * SHARD))

    def wanted(self) -> Wanted:
        """What is to be written."""
        return Wanted(self.size, self.folder, min(self.count, SHARD * self._shards.there(self._numbers)))

    @property
    def _numbers(self) -> range:
        return range(-(-self.count // SHARD))

    def _draw(self, rows: Tensor, cond: Condition) -> dict[str, Tensor]:
        device, parts = self.teacher.device, []
        most = at_once(self.teacher.codec.shape, STATES_AT_ONCE, 64)
        for chunk in torch.arange(len(rows)).split(most):
            noise, own = self.noise(rows[chunk]), cond.rows(chunk.to(device))
            parts.append(_trajectory(self.teacher, noise, own, self.options))
        drawn = {"x0": torch.cat([states[-1] for states in parts])}
        if self.kept:
            # State i + 1 of the grid is the i-th of the trajectory, which leaves out the noise it starts from.
            drawn["states"] = torch.cat(
                [torch.stack([states[i - 1] for i in self.kept], 1) for states in parts]
            )
        return drawn

    def clean(self, index: Tensor) -> Tensor:
        """The clean ends [B, ...] of the pairs ``index`` [B]."""
        return self._read("x0", index)

    def states(self, index: Tensor) -> Tensor | None:
        """The states [B, K, ...] of those pairs at the K ``times``; None where none were asked for."""
        return self._read("states", index)[:, self.columns] if self.columns else None

    def _read(self, name: str, index: Tensor) -> Tensor:
        rows, found = index.tolist(), dict[int, Tensor]()
        for number, places in grouped([row // SHARD for row in rows]).items():
            own = self._shards.rows(number, name, [rows[place] % SHARD for place in places]).float()
            found.update(zip(places, own, strict=True))
        return torch.stack([found[place] for place in range(len(rows))])


def passes_of_pairs(teacher: PipelineTeacher, cond: Condition, options: PairOptions) -> Passes:
    """The network passes that drawing all of the pairs takes: one is drawn and counted, as each takes as many.

    Args:
        teacher: who draws them.
        cond: any condition (B = 1).
        options: how many, solver, steps, guidance.
    """
    one, found = Passes(), Passes()
    with teacher.denoiser.counter.counting(one):
        _trajectory(teacher, torch.zeros(1, *teacher.codec.shape, device=teacher.device), cond, options)
    found.add(one, options.pairs)
    return found


def _grid(teacher: PipelineTeacher, options: PairOptions) -> tuple[float, ...]:
    return (*schedule_times(teacher.path, options.pair_steps), 0.0)


def _trajectory(
    teacher: PipelineTeacher, noise: Tensor, cond: Condition, options: PairOptions
) -> list[Tensor]:
    """The teacher's states on the grid after the noise [B, ...]."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return teacher.predict(x, t, cond, guidance=options.guidance)

    return list(trajectory(predict, noise, _grid(teacher, options), options.pair_solver))


def _position(grid: Sequence[float], time: float) -> int:
    """Where ``time`` is in the solver's grid."""
    nearest = min(range(1, len(grid) - 1), key=lambda i: abs(grid[i] - time), default=0)
    if not nearest or abs(grid[nearest] - time) > 1.5e-3:
        raise UserError(
            f"student.times has {time:g}, which is not among the {len(grid) - 1} steps of the pairs' trajectories "
            f"(the nearest is {grid[nearest]:g}): leave student.times to the teacher's schedule, and make "
            "options.pair_steps a multiple of their number"
        )
    return nearest
