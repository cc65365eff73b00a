"""The updates of a recipe's networks on given tensors: what a run has around them, without data and without files.

The same code makes them of fake tensors, to see what they need, and of real ones with random weights, to measure it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.attention.kernels import attention, fit_attention
from stepdistill.diffusion.draws import Draws
from stepdistill.families.base import Family
from stepdistill.families.condition import Condition
from stepdistill.families.size import Size
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Method, MethodOptions, Turn
from stepdistill.losses.looks import Eye, Looks
from stepdistill.losses.objective import Objective
from stepdistill.losses.rewards import Rewards
from stepdistill.losses.terms import GanTerm, RegressionTerm, Term
from stepdistill.networks.concept import Concept, text_encoders
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.processes import ALONE
from stepdistill.training.identity import resolve
from stepdistill.training.parallel import OneProcess
from stepdistill.training.roles import roles_for, teacher_type
from stepdistill.training.run import Run
from stepdistill.training.weights import check_weights

LONGEST = 100_000
"""Steps of a run in which its turns are looked at."""


@dataclass
class Unit:
    """A recipe's networks, ready for updates.

    Attributes:
        recipe: what is run.
        options: of its method.
        teacher: what is distilled.
        condition: of one prompt.
        objective: what is trained.
        device: where.
    """

    recipe: Recipe
    options: MethodOptions
    teacher: PipelineTeacher
    condition: Condition
    objective: Objective
    device: torch.device

    @property
    def method(self) -> Method:
        return self.objective.method

    @property
    def needs(self) -> frozenset[str]:
        """What it asks of the data."""
        return self.options.needs | self.recipe.terms.needs

    def others(self) -> dict[str, nn.Module]:
        """The networks of the pipeline beside its denoisers."""
        pipe, own = self.teacher.pipe, self.teacher.family.network
        parts: dict[str, Any] = pipe.components
        found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        return {name: part for name, part in found.items() if not name.startswith(own)}

    def run(self) -> Run:
        """Its optimisers and averages, as they are after the first updates."""
        run = Run(self.objective, self.recipe, Path("plan"), None, OneProcess(ALONE, self.device))
        for name, parameters in run.trained.items():
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            run.weights[name].step(0)
        return run

    def batch(self) -> Batch:
        """Samples that a process works through in an update: zeros, whose numbers nothing depends on."""
        count, shape, method = self.recipe.train.batch, self.teacher.codec.shape, self.method

        def condition() -> Condition:
            tensors = self.condition.tensors.items()
            return Condition(
                {k: torch.zeros(count, *v.shape[1:], dtype=v.dtype, device=self.device) for k, v in tensors}
            )

        def zeros(*more: int) -> Tensor:
            return torch.zeros(count, *more, *shape, device=self.device)

        prompt, group = torch.zeros(count, dtype=torch.int64), self.recipe.train.group
        images = Examples(zeros(), condition(), number=prompt) if "images" in self.needs else None
        pairs = None
        if "pairs" in self.needs:
            states = zeros(len(method.pair_times())) if "states" in self.needs else None
            pairs = Examples(zeros(), condition(), zeros(), states)
        draws = Draws(0, 0, 0, count, self.device)
        rich = condition() if "rich" in self.needs else None
        return Batch(draws, shape, condition(), prompt, images, pairs, group, rich)

    def turns(self) -> list[tuple[Turn, float]]:
        """The last turn of each network in the run, after warm starts, and its share of the updates of the last
        thousand steps; followers first, as in a run."""
        last: dict[str, Turn] = {}
        count: dict[str, int] = {}
        steps = min(self.recipe.train.updates, LONGEST)
        for step in range(steps):
            turn = self.objective.turn(step)
            last[turn.network] = turn
            if step >= steps - 1000:
                count[turn.network] = count.get(turn.network, 0) + 1
        order = sorted(last, key=lambda name: not self.objective.trained[name].follows)
        return [(last[name], count.get(name, 0) / sum(count.values())) for name in order]

    @contextmanager
    def training(self, kernel: str) -> Iterator[None]:
        """What the loop has around its updates.

        Args:
            kernel: of attention.
        """
        train = self.recipe.train
        with (
            attention(kernel, self.device, train.precision),
            self.method.roles.checkpointed() if train.checkpointing else nullcontext(),
        ):
            yield


def unit_of(
    recipe: Recipe,
    pipe: Any,
    family: Family | None,
    device: torch.device,
    within: AbstractContextManager[Any] | None = None,
    exact: Mapping[str, Tensor] | None = None,
) -> Unit:
    """A recipe's networks around a pipeline.

    Args:
        recipe: what is run. What its network says is the teacher's, as which it starts: neither changes a size.
        pipe, family: the teacher, and how it is called.
        device: where.
        within: in what all but the teacher and its conditions is made.
        exact: what was rounded before, see ``PipelineTeacher``.

    Raises:
        UserError: what does not go together.
    """
    student = recipe.student.model_copy(update={"output": "teacher", "start": None})
    resolved = resolve(recipe.model_copy(update={"student": student}))
    recipe, kind, options = resolved.recipe, resolved.kind, resolved.options
    teacher = PipelineTeacher(
        pipe,
        device,
        family,
        guidance_interval=options.guidance_interval,
        shift=options.shift,
        guidance=options.guidance,
        guidance_rescale=options.guidance_rescale,
        size=Size(*recipe.data.size) if recipe.data.size else None,
        guidance_2=options.guidance_2,
        owned=True,
        exact=exact,
    )
    prompt = "a photograph of a cat" if teacher.family.has_prompts else "0"
    condition = teacher.codec.encode([prompt])
    if teacher.null is None and teacher.denoiser.guidance is None:
        options = options.model_copy(update={"guidance": 1.0})
    times = tuple(recipe.student.times or kind.usual_times(recipe.student.steps))
    if not recipe.student.times and kind.shifted_times:
        times = tuple(teacher.path.shifted(time) for time in times)
    with within or nullcontext():
        roles = roles_for(recipe, kind, options, teacher, [], times, None)
        teacher = cast(PipelineTeacher, roles.teacher)
        roles.concept = _concept(teacher, condition) if "concept" in options.needs else None
        method: Method = kind(roles, times, options, LOOKS if "looks" in options.needs else None).to(device)
        if "reward" in options.needs:  # their networks are read from files: latents are judged themselves
            method.rewards = Rewards(lambda x0: x0, (lambda images, prompt: images.flatten(1).mean(1),))
        check_weights(recipe.train, recipe.student.base, method)
        for net in roles.stored().values():
            fit_attention(recipe.train.attention, net, device)
        objective = Objective(method, _terms(recipe, teacher)).to(device)
        if not recipe.student.lora_rank:
            teacher.compute_in(teacher_type(recipe.train))
    return Unit(recipe, options, teacher, condition, objective, device)


def _concept(teacher: PipelineTeacher, condition: Condition) -> Concept:
    """A word of one row in each text encoder, whose graph to the conditions goes through none."""
    encoders = [getattr(teacher.pipe, name) for name in text_encoders(teacher.pipe)]
    sizes = [part.get_input_embeddings().weight.shape[1] for part in encoders]
    rows = [nn.Parameter(torch.zeros(size, device=teacher.device)) for size in sizes]

    def encode(texts: list[str]) -> Condition:
        moved = torch.stack([row.mean() for row in rows]).sum()
        found = condition.repeat(len(texts)).tensors.items()
        return Condition({k: v + moved if v.is_floating_point() else v for k, v in found})

    return Concept(rows, [""], encode)


def _picture(x0: Tensor) -> Tensor:
    """A small picture [B, 3, 8, 8] of latents, in the place of what a decoder makes of them."""
    return F.adaptive_avg_pool1d(x0.flatten(1)[:, None], 64).view(-1, 1, 8, 8).expand(-1, 3, 8, 8)


LOOKS = Looks(_picture, {"planned": Eye(lambda pictures: pictures.mean((2, 3)), 3)})
"""In the place of image networks, which are read from files."""


def _terms(recipe: Recipe, teacher: PipelineTeacher) -> list[Term]:
    """The terms without networks of their own that are read from files."""
    options, terms = recipe.terms, list[Term]()
    if options.regression_weight:
        terms.append(RegressionTerm(options.regression_weight, options.regression))
    if options.gan_weight:
        terms.append(GanTerm(options.gan_weight, teacher.denoiser, options.gan_lr_ratio))
    return terms
