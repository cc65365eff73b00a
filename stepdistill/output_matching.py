"""Another output kind for the teacher's network: a short stage in which a copy learns to say v, or x0, instead of eps.

At pure noise an eps network tells x0 only through a division by alpha, which on Stable Diffusion's table makes an error
of eps one of x0 14.6 times as large, and a step of the weights a leap. A network that says v = alpha eps - sigma x0
(Salimans and Ho 2022, 2202.00512, section 4) has neither trouble. So what is called near t = 1, the student and the
network that follows its samples, may start as the teacher in that kind.

Data-free: a batch of the teacher's own guided trajectories walks from noise to data, one DDIM step of random length an
update, and at each of its states the copy is regressed on what the teacher says there without guidance, in the new
kind.
The result is kept in a cache under a key of all that it depends on; a stage that was cut off goes on from its last
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    save_checkpoint,
)
from stepdistill.draws import Draws
from stepdistill.health import require_finite
from stepdistill.path import Output, per_sample
from stepdistill.schedule import annealed
from stepdistill.sections import StudentOptions
from stepdistill.student import Denoiser, add_lora, merged_state
from stepdistill.teacher import PipelineTeacher
from stepdistill.types import Condition

WALK = 25
"""Mean number of steps in which a trajectory gets from noise to data."""

EVERY = 100
"""Updates between checkpoints."""

WARMUP = 20
"""Updates over which the rate rises from 0."""

NEAR_NOISE = 0.9
"""A student whose first call is at this time or above is called near pure noise."""

BANDS = ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.0))
"""The times in which the error is stated, each without its lower edge."""


def output_of(options: StudentOptions, own: Output, times: Sequence[float]) -> Output:
    """The output kind that ``student.output`` means for a teacher that says ``own`` and a student called at ``times``.

    ``auto`` is v where an eps network would be called near pure noise alone, and the teacher's anywhere else: with
    further steps, what the stage leaves unmatched at middle times costs more than v gives at the first (LOG.md).
    """
    if options.output == "auto":
        return "v" if own == "eps" and len(times) == 1 and times[0] >= NEAR_NOISE else own
    return own if options.output == "teacher" else options.output


class Walk:
    """Guided trajectories of the teacher on their way from noise to data; one that arrives starts anew.

    Args:
        teacher: whose trajectories.
        prompts: what they are drawn for, at random.
        count: how many.
        guidance: of the teacher's steps.
        seed, stream: all numbers follow from them.
    """

    def __init__(
        self,
        teacher: PipelineTeacher,
        prompts: Sequence[str],
        count: int,
        guidance: float,
        seed: int,
        stream: str,
    ) -> None:
        self.teacher, self.prompts, self.guidance = teacher, prompts, guidance
        self.seed, self.stream, self.steps = seed, stream, 0
        everyone = torch.arange(count, device=teacher.device)
        self.x, self.prompt = self._starts(everyone)  # [B, ...], [B]
        self.t = torch.ones(count, device=teacher.device)
        self.cond = self._encode(self.prompt)
        for i in range(WALK):  # to times spread over (0, 1]: number i goes the share i / B of the way
            self.step(everyone / count > i / WALK)

    def _starts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and prompts for new trajectories in these places."""
        draws = [Draws(self.seed, self.steps, int(row), 1, self.teacher.device) for row in rows]
        noise = torch.cat([each.normal(f"{self.stream} noise", self.teacher.shape) for each in draws])
        return noise, torch.cat([each.integers(f"{self.stream} prompt", len(self.prompts)) for each in draws])

    def _encode(self, prompt: Tensor) -> Condition:
        cond = self.teacher.encode([self.prompts[int(i)] for i in prompt])
        return Condition({name: value.clone() for name, value in cond.tensors.items()})  # written to in place

    def step(self, moving: Tensor | None = None) -> None:
        """One DDIM step of random length for all, or for those that are ``moving`` [B]."""
        self.steps += 1
        draws = Draws(self.seed, self.steps, 0, len(self.t), self.teacher.device)
        s = self.t - draws.uniform(f"{self.stream} length", 0.5, 1.5) / WALK
        going = s > 0 if moving is None else (s > 0) & moving
        arrived = s <= 0 if moving is None else (s <= 0) & moving
        x = self.teacher.predict(self.x, self.t, self.cond, guidance=self.guidance).at(s.clamp_min(0))
        self.x, self.t = torch.where(per_sample(going, x), x, self.x), torch.where(going, s, self.t)
        if arrived.any():
            rows = arrived.nonzero()[:, 0]
            self.x[rows], self.prompt[rows] = self._starts(rows)
            self.t[rows] = 1.0
            for name, value in self._encode(self.prompt[rows]).tensors.items():
                self.cond.tensors[name][rows] = value

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"x": self.x, "t": self.t, "prompt": self.prompt, "steps": torch.tensor(self.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a kept state."""
        device = self.teacher.device
        self.x, self.t, self.prompt = (state[name].to(device) for name in ("x", "t", "prompt"))
        self.steps, self.cond = int(state["steps"]), self._encode(self.prompt)


@torch.no_grad()
def errors(walk: Walk, denoiser: Denoiser) -> list[float]:
    """The root mean square, in each of BANDS, of v as the network says it less v as the teacher does."""
    squares, counts = [0.0] * len(BANDS), [0] * len(BANDS)
    for _ in range(WALK):
        x, t, cond = walk.x, walk.t, walk.cond
        said, wanted = denoiser.predict(x, t, cond), walk.teacher.predict(x, t, cond)
        v = [walk.teacher.path.target(each.x0, each.eps, t, "v") for each in (said, wanted)]
        square = (v[0] - v[1]).square().flatten(1).mean(1)  # [B]
        for i, (low, high) in enumerate(BANDS):
            inside = (t > low) & (t <= high)
            squares[i] += float(square[inside].sum())
            counts[i] += int(inside.sum())
        walk.step()
    return [math.sqrt(square / max(count, 1)) for square, count in zip(squares, counts, strict=True)]


@dataclass(frozen=True)
class Matching:
    """How a network is turned: everything that its result depends on.

    Attributes:
        teacher: whose network.
        output: the kind that it is to say.
        prompts: of the trajectories.
        guidance: of their steps; what is matched is the prediction without it.
        options: steps and rate of the stage. With ``lora_rank`` an adapter alone is trained: it ends further from the
            teacher, but its file then holds all there is.
        batch: trajectories walked side by side.
        seed: of the run.
    """

    teacher: PipelineTeacher
    output: Output
    prompts: Sequence[str]
    guidance: float
    options: StudentOptions
    batch: int
    seed: int

    @property
    def key(self) -> str:
        """A hash of all of it."""
        options = self.options
        parts = {
            "teacher": self.teacher.fingerprint(),
            "interval": self.teacher.guidance_interval,
            "output": self.output,
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            "guidance": self.guidance,
            "steps": options.output_steps,
            "lr": options.output_lr,
            "lora": (options.lora_rank, options.lora_alpha),
            "batch": self.batch,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def copy(self) -> Denoiser:
        """The teacher's network as the stage starts with it."""
        source, rank = self.teacher.denoiser.copy(), self.options.lora_rank
        if rank:
            source.net.requires_grad_(False)
            add_lora(source.net, source.family.lora_targets, rank, self.options.lora_alpha or float(rank))
        return Denoiser(source.net.eval(), source.path, self.output, source.family)

    def walk(self, stream: str) -> Walk:
        """New trajectories."""
        return Walk(self.teacher, self.prompts, self.batch, self.guidance, self.seed, stream)


@dataclass(frozen=True)
class Matched:
    """A turned network.

    Attributes:
        denoiser: the network without adapters, frozen, on the CPU.
        adapter: the weights of the adapter that turned it, by name; empty where the whole network was trained.
        before, after: its :func:`errors`.
    """

    denoiser: Denoiser
    adapter: dict[str, Tensor]
    before: list[float]
    after: list[float]

    @property
    def summary(self) -> str:
        """The errors in words: ``1.00: 14.2 before, 0.38 after; ...``."""
        bands = zip(BANDS, self.before, self.after, strict=True)
        return "; ".join(f"{high:.2f}: {was:.3g} before, {now:.3g} after" for (_, high), was, now in bands)


def match_output(
    matching: Matching,
    cache: Path,
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    progress: Callable[[int], None] = lambda updates: None,
) -> Matched:
    """The teacher's network in another output kind, out of the cache or trained now.

    Args:
        matching: how.
        cache: the folder of all results.
        autocast: the precision of the network's arithmetic.
        progress: told how many updates were made.

    Raises:
        UserError: a damaged or unwritable cache.
        TrainingDiverged: the stage's loss is not finite.
    """
    folder, copy, steps = cache / matching.key, matching.copy(), matching.options.output_steps
    trained = {name: value for name, value in copy.net.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    found = checkpoints_in(folder)
    tensors, state = load_checkpoint(found[-1]) if found else ({}, {"step": 0})
    if found:
        copy.net.load_state_dict(tensors["network"], strict=False)
    progress(state["step"])
    if state["step"] < steps:
        walk = matching.walk("match")
        if found:
            walk.load(tensors["walk"])
            load_optimizer_state(optimizer, tensors["optimizer"])
        else:
            state["before"] = errors(matching.walk("match probe"), copy)
        for step in range(state["step"], steps):
            x, t, cond = walk.x, walk.t, walk.cond
            with autocast():
                wanted = matching.teacher.predict(x, t, cond)
                target = copy.path.target(wanted.x0, wanted.eps, t, copy.output)
                loss = (copy.raw(x, t, cond) - target).square().mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            require_finite(
                {"loss": float(loss.detach()), "gradient": float(norm)}, "output matching", step, None
            )
            for group in optimizer.param_groups:
                group["lr"] = (
                    matching.options.output_lr * min(1.0, (step + 1) / WARMUP) * annealed(step / steps)
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress(1)
            last = step + 1 == steps
            if not last:
                with autocast():
                    walk.step()
            if last or (step + 1) % EVERY == 0:
                if last:
                    state["after"] = errors(matching.walk("match probe"), copy)
                groups = {"network": {name: value.detach() for name, value in trained.items()}}
                if not last:
                    groups |= {"optimizer": optimizer_state(optimizer), "walk": walk.state()}
                save_checkpoint(folder, step + 1, groups, state, keep=1)
    return Matched(*_frozen(matching, copy), state["before"], state["after"])


def _frozen(matching: Matching, copy: Denoiser) -> tuple[Denoiser, dict[str, Tensor]]:
    """The network without adapters, on the CPU, and the adapter's weights."""
    adapter: dict[str, Tensor] = {}
    if matching.options.lora_rank:
        adapter = {
            name: value.detach().cpu() for name, value in copy.net.named_parameters() if ".lora_" in name
        }
        merged = merged_state(copy.net)
        copy = matching.teacher.denoiser.copy()
        copy.net.load_state_dict(merged)
    net = copy.net.requires_grad_(False).eval().cpu()
    return Denoiser(net, copy.path, matching.output, copy.family), adapter
