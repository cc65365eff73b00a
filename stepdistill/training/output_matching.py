"""Another output kind for the teacher's network: a short stage in which a copy learns to say v, or x0, instead of eps.

At pure noise an eps network tells x0 only through a division by alpha, which on Stable Diffusion's table makes an error
of eps one of x0 14.6 times as large, and a step of the weights a leap. A network that says v = alpha eps - sigma x0
(Salimans and Ho 2022, 2202.00512, section 4) has neither trouble. So what is called near t = 1, the student and the
network that follows its samples, may start as the teacher in that kind.

Data-free: the teacher draws guided samples once, and at random times on noised ones the copy is regressed on what the
teacher says there without guidance, in the new kind. (States of trajectories that walk along beside the updates are so
alike from one update to the next that the same number of updates ends at twice the error; LOG.md.)
The result is kept in a cache under a key of all that it depends on; a stage that was cut off goes on from its last
sample and checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill.data.batches import Data
from stepdistill.data.pairs import PairCache
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import Output, Prediction
from stepdistill.diffusion.philox import NAME
from stepdistill.families.condition import Condition
from stepdistill.losses.contract import PairOptions
from stepdistill.losses.regression import annealed
from stepdistill.networks.checkpointing import checkpointed
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.lora import Adapter, SharedNetwork
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.sections import StudentOptions
from stepdistill.training.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    save_checkpoint,
)
from stepdistill.training.health import require_finite

START = "start"
"""The name of the adapter that is trained where a network's own weights are not."""

SAMPLE_STEPS = 16
"""Of dpm++2m, in which the teacher draws the samples; it is asked about them noised, so they need no last finish."""

EVERY = 100
"""Updates between checkpoints."""

WARMUP = 20
"""Updates over which the rate rises from 0."""

NEAR_NOISE = 0.9
"""A student whose first call is at this time or above is called near pure noise."""

PROBES = 4
"""Batches in which the error in each of BANDS is measured."""

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


class NoisedSamples:
    """States of the teacher's own guided samples, noised to random times.

    Args:
        matching: whose, for what and by what guidance.
        folder: of the samples; those that are missing are drawn now.
        progress: told how many samples there are.

    Raises:
        UserError: an unwritable folder, or one of other samples.
    """

    def __init__(self, matching: Matching, folder: Path, progress: Callable[[int], None]) -> None:
        self.matching, teacher = matching, matching.teacher
        options = PairOptions(
            guidance=matching.guidance,
            pairs=matching.options.output_samples,
            pair_steps=SAMPLE_STEPS,
            pair_solver="dpm++2m",
        )
        self.samples = PairCache(folder, teacher, matching.prompts, options, matching.seed)
        # It encodes each prompt once, where all of them fit in memory.
        self.data = Data(teacher, matching.prompts, matching.seed)
        self.samples.make(self.data.condition, progress=progress)

    def at(
        self, step: int, stream: str, low: float = 0.0, high: float = 1.0
    ) -> tuple[Tensor, Tensor, Condition]:
        """States x_t [B, C, H, W] with their times [B], spread evenly over (low, high], and conditions."""
        teacher, count = self.matching.teacher, self.matching.batch
        draws = Draws(self.matching.seed, step, 0, count, teacher.device)
        picked = draws.integers(f"{stream} sample", self.samples.count).cpu()
        part = (torch.arange(1, count + 1, device=teacher.device) - draws.uniform(f"{stream} time")) / count
        t = low + (high - low) * part
        x0 = self.samples.clean(picked).to(teacher.device)
        x = teacher.path.noised(x0, draws.normal(f"{stream} noise", teacher.codec.shape), t)
        return x, t, self.data.condition(self.samples.prompt_index[picked])

    @torch.no_grad()
    def errors(self, denoiser: Denoiser) -> list[float]:
        """The root mean square, in each of BANDS, of v as the network says it less v as the teacher does."""
        teacher, found = self.matching.teacher, []
        for low, high in BANDS:
            squares = []
            for step in range(PROBES):
                x, t, cond = self.at(step, "match probe", low, high)
                said, wanted = denoiser.predict(x, t, cond), self.matching.wanted(x, t, cond)
                v = [teacher.path.target(each.x0, each.eps, t, "v") for each in (said, wanted)]
                squares.append(float((v[0] - v[1]).square().mean()))
            found.append(math.sqrt(sum(squares) / PROBES))
        return found


@dataclass(frozen=True)
class Matching:
    """How a network is turned: everything that its result depends on.

    Attributes:
        teacher: whose network.
        output: the kind that it is to say.
        prompts: of the teacher's samples.
        guidance: of their drawing; what is matched is the prediction without it.
        options: samples, steps and rate of the stage. With ``lora_rank`` an adapter alone is trained: it ends further
            from the teacher, but its file then holds all there is.
        batch: states in one update.
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
        options, embedded = self.options, self.teacher.denoiser.guidance
        parts = {
            "teacher": self.teacher.fingerprint(),
            "interval": self.teacher.guidance_interval,
            "rescale": self.teacher.guidance_rescale,
            "output": self.output,
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            "guidance": self.guidance,
            "samples": options.output_samples,
            "steps": options.output_updates,
            "lr": options.output_lr,
            "lora": (options.lora_rank, options.lora_alpha, *([START] if options.lora_rank else [])),
            "batch": self.batch,
            "seed": self.seed,
            "draws": NAME,
            **({} if embedded is None else {"embedded": embedded}),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @torch.no_grad()
    def wanted(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """What the network is to say: what the teacher's own says, an embedded scale being the recipe's, as in its
        copies."""
        return self.teacher.denoiser.predict(x_t, t, cond)

    def network(self) -> tuple[Denoiser, dict[str, nn.Parameter]]:
        """The teacher's network as the stage starts with it, and which of its weights are trained."""
        own, rank = self.teacher.denoiser, self.options.lora_rank
        if not rank:
            net = own.trainable_net().eval()
            return Denoiser(net, own.path, self.output, own.family, own.shape), dict(net.named_parameters())
        shared = SharedNetwork(own.net, own.family.lora_targets)
        shared.add(START, rank, self.options.lora_alpha or float(rank))
        made = Denoiser(shared.net, own.path, self.output, own.family, own.shape)
        made.adapter, made.guidance, made.compute = Adapter(shared, START), own.guidance, shared.compute
        return made, shared.weights(START)


@dataclass(frozen=True)
class Matched:
    """A turned network.

    Attributes:
        denoiser: the network, frozen; one of its own lies on the CPU.
        adapter: the weights of the adapter that turned it, as ``SharedNetwork.weights`` names them; empty where the
            whole network was trained.
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
    checkpointing: bool = False,
    drawn: Callable[[int], None] = lambda samples: None,
    progress: Callable[[int], None] = lambda updates: None,
) -> Matched:
    """The teacher's network in another output kind, out of the cache or trained now.

    Args:
        matching: how.
        cache: the folder of all results.
        autocast: the precision of the network's arithmetic.
        checkpointing: whether the network is trained with the inputs of its blocks kept alone.
        drawn: told how many of the teacher's samples there are.
        progress: told how many updates were made.

    Raises:
        UserError: a damaged or unwritable cache.
        TrainingDiverged: the stage's loss is not finite.
    """
    folder, steps = cache / matching.key, matching.options.output_updates
    copy, trained = matching.network()
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    found = checkpoints_in(folder)
    tensors, state = load_checkpoint(found[-1]) if found else ({}, {"step": 0})
    if found:
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(tensors["network"][name])
    progress(state["step"])
    if state["step"] < steps:
        with autocast():
            states = NoisedSamples(matching, folder / "samples", drawn)
        if found:
            load_optimizer_state(optimizer, tensors["optimizer"])
        else:
            state["before"] = states.errors(copy)
        with _checkpointed(copy) if checkpointing else nullcontext():
            for step in range(state["step"], steps):
                x, t, cond = states.at(step, "match")
                with autocast():
                    wanted = matching.wanted(x, t, cond)
                    target = copy.path.target(wanted.x0, wanted.eps, t, copy.output)
                    loss = (copy.raw(x, t, cond) - target).square().mean()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                require_finite(
                    {"loss": float(loss.detach()), "grad_norm": float(norm)}, "output matching", step, None
                )
                for group in optimizer.param_groups:
                    group["lr"] = (
                        matching.options.output_lr * min(1.0, (step + 1) / WARMUP) * annealed(step / steps)
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress(1)
                last = step + 1 == steps
                if last or (step + 1) % EVERY == 0:
                    if last:
                        state["after"] = states.errors(copy)
                    groups = {"network": {name: value.detach() for name, value in trained.items()}}
                    if not last:
                        groups["optimizer"] = optimizer_state(optimizer)
                    save_checkpoint(folder, step + 1, groups, state, keep=1)
        shutil.rmtree(folder / "samples")  # whose use ends with the stage
    for value in trained.values():
        value.requires_grad_(False)
    adapter = {name: value.detach() for name, value in trained.items()} if matching.options.lora_rank else {}
    if not adapter:
        copy.net.cpu()
    return Matched(copy, adapter, state["before"], state["after"])


def _checkpointed(own: Denoiser) -> AbstractContextManager[None]:
    return checkpointed([own.net]) if own.adapter is None else own.adapter.shared.checkpointed()
