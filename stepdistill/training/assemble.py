"""What a recipe comes to: teacher, student, method and sampler, fitting together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator
from torch import Tensor

from stepdistill.attention.kernels import check_attention, fit_attention, told
from stepdistill.data.held_out import hold_out
from stepdistill.data.partition import parts_of, place_of
from stepdistill.data.prompts import open_prompts
from stepdistill.errors import UserError
from stepdistill.evaluation.drawing import cut_prompts
from stepdistill.export.adapters import check_options
from stepdistill.export.checks import teacher_check
from stepdistill.export.schedulers import check_sampler, clipping_remark, on_stock_grid
from stepdistill.export.student_folder import check_export
from stepdistill.families import family_in
from stepdistill.families.kinds import LabelFamily
from stepdistill.families.recorded import Recorded
from stepdistill.families.size import Size
from stepdistill.losses.contract import Method, MethodOptions
from stepdistill.losses.objective import Objective
from stepdistill.networks.checkpointing import check_checkpointing
from stepdistill.networks.codec import Codec, Encoded
from stepdistill.networks.compiled import check_compile, compiled_parts
from stepdistill.networks.derivative import takes_exact
from stepdistill.networks.distilled import why_of_few_steps
from stepdistill.networks.find import find_teacher
from stepdistill.networks.loading import load_teacher, taken_as
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.scheduler_path import PREDICTION_TYPES
from stepdistill.networks.shared_tokens import check_shared_tokens, check_split
from stepdistill.networks.student import Student
from stepdistill.networks.switched import SwitchedNetworks
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.networks.tiles import switch_on
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.emoji import embedded_teachers, emoji_captions
from stepdistill.system.log import say
from stepdistill.system.provenance import provenance
from stepdistill.training.buckets import buckets_for, check_calls, check_heads
from stepdistill.training.chosen_terms import chosen_looks, chosen_rewards, chosen_terms
from stepdistill.training.further_teachers import check_several, further_teachers, route_of
from stepdistill.training.guidance import with_guidance_of
from stepdistill.training.identity import ResolvedRecipe
from stepdistill.training.memory_needed import warn_of_memory
from stepdistill.training.new_word import check_word, new_word
from stepdistill.training.optimizers import check_optimizer
from stepdistill.training.parallel import check_shared_heads
from stepdistill.training.roles import roles_for, round_on_host, teacher_type
from stepdistill.training.weights import check_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Assembled:
    """A recipe's teacher, student, method and sampler, loaded and checked against each other.

    Attributes:
        recipe: what to do.
        options: of its method, checked; guidance 1 where the teacher has no unconditional mode.
        needs: what the method asks of the data, see ``losses.contract.NEEDS``.
        accelerator: where it runs.
        source: the teacher as it was given: the place of a folder, or the pipeline itself.
        teacher, student, method: as they are trained.
        objective: the method with the recipe's terms.
        sampler: how the student draws, on the exported scheduler's grid.
        prompts: all that it learns from; of a file, read where they lie.
        held_out: prompts of that file that it does not learn from; empty where they are too few.
        part: numbers of the prompts that the student of a part trains on; None of one that learns all.
        buckets: the sizes that images are brought to, the teacher's own first; None brings all to that.
        changes: what was changed in the teacher when it was taken.
        embedded: whether the teacher ships with the package.
        origin: code, versions and machine at the start: files may change while a long run is under way.
        began: seconds of ``time.perf_counter`` at the start.
    """

    recipe: Recipe
    options: MethodOptions
    needs: frozenset[str]
    accelerator: Accelerator
    source: Any
    teacher: PipelineTeacher
    student: Student
    method: Method
    objective: Objective
    sampler: Sampler
    prompts: Sequence[str]
    held_out: list[str]
    part: Tensor | None
    buckets: list[Size] | None
    changes: list[str]
    embedded: bool
    origin: dict[str, Any]
    began: float

    def shown(self, count: int) -> list[str]:
        """Prompts spread over all that it learns, for pictures; a caption with the word that it learns is the first."""
        if (concept := self.method.roles.concept) is not None:
            others = (self.prompts[i * len(self.prompts) // count] for i in range(1, count))
            return [concept.captions[0], *others]
        if self.part is not None:
            return [self.prompts[int(self.part[i * len(self.part) // count])] for i in range(count)]
        return [self.prompts[i * len(self.prompts) // count] for i in range(count)]

    def encoded(self, prompts: Sequence[str]) -> Codec:
        """The teacher's codec with these prompts encoded for good, but where the text encoders learn."""
        codec = self.teacher.codec
        return codec if self.method.roles.concept is not None else Encoded.of(codec, prompts)


def assemble(
    resolved: ResolvedRecipe, accelerator: Accelerator, pipeline: DiffusionPipeline | None = None
) -> Assembled:
    """Loads what a recipe names and fits it together.

    Args:
        resolved: what to do.
        accelerator: where.
        pipeline: the teacher, where it is an object.

    Raises:
        UserError: where the parts do not fit, saying what to change.
    """
    device, main = accelerator.device, accelerator.is_main_process
    origin, began = provenance(device), time.perf_counter()
    recipe, kind, options = resolved.recipe, resolved.kind, resolved.options
    needs = options.needs | recipe.terms.needs
    train, kernel = recipe.train, recipe.train.attention
    check_several(recipe, kind)
    check_attention(kernel, device, train.precision)
    check_optimizer(train.optimizer, device)
    check_compile(train.compile, device, kernel, train.parallel)
    embedded = pipeline is None and recipe.teacher in embedded_teachers()
    if "images" in needs and recipe.data.images is None and not embedded:
        raise UserError(
            f"{recipe.method} with these options learns from images: give a folder in data.images"
        )
    if "rich" in needs and recipe.data.rich is None:
        raise UserError(
            f"{recipe.method} with these options learns from rich captions: give a file with a prompt and its rich "
            "caption in each row as data.rich, or teach by pictures with options.source=images"
        )
    if "group" in needs and train.group == 1:
        raise UserError(
            f"{recipe.method} compares samples of one prompt, and train.group is 1: set it to how many samples each "
            "prompt has in a batch, such as 8"
        )
    check_word(recipe, "concept" in needs)
    source: Any = pipeline if pipeline is not None else find_teacher(recipe.teacher)
    family = family_in(recipe.family) if recipe.family else None
    loaded = pipeline or load_teacher(recipe.teacher, family=family)
    exact = round_on_host(loaded, family, recipe) if pipeline is None else None
    if recipe.data.tiling:
        switch_on(loaded)
    warn_of_memory(recipe, loaded, family, accelerator)
    teacher = PipelineTeacher(
        loaded,
        device,
        family,
        guidance_interval=options.guidance_interval,
        shift=options.shift,
        guidance=options.guidance,
        guidance_rescale=options.guidance_rescale,
        size=Size(*recipe.data.size) if recipe.data.size else None,
        guidance_2=options.guidance_2,
        owned=pipeline is None,
        exact=exact,
    )
    few = why_of_few_steps(teacher, source)
    if kind.without_few_steps and few:
        raise UserError(
            f"{recipe.method} noises images and has the teacher denoise them, which {recipe.teacher}, a student of few "
            f"steps ({few}), cannot: {kind.without_few_steps}"
        )
    if kind.of_few_steps and not few and main:
        say(
            f"warning: {recipe.method} goes on from a student of few steps as its teacher, and nothing says that "
            f"{recipe.teacher} is one: it does not make steps fewer"
        )
    if train.parallel == "sharded" and isinstance(teacher.denoiser.net, SwitchedNetworks):
        raise UserError(
            "train.parallel is sharded, but this teacher calls one of its networks for some samples and another for "
            "others, and sharded ones are called by all processes together: set train.parallel=replicated"
        )
    fit_attention(kernel, teacher.denoiser.net, device)
    compiled_parts(teacher.denoiser.net, train.compile)  # refuses what has no blocks before anything slow
    if train.checkpointing:
        check_checkpointing(teacher.denoiser.net)
    changes = taken_as(source)
    for remark in (teacher.family.remark, clipping_remark(teacher.pipe.scheduler)) if main else ():
        if remark:
            say(remark)
    rewarded = bool(recipe.terms.reward_weight) or "reward" in needs
    if rewarded and isinstance(teacher.family, LabelFamily):
        weight = recipe.terms.reward_weight
        said = f"terms.reward_weight is {weight:g}" if weight else f"{recipe.method} asks for a reward"
        raise UserError(
            f"{said}, but {recipe.teacher} draws classes, and a reward reads prompts: do without it"
        )
    _check_examples(recipe, teacher, needs)
    options = with_guidance_of(options, recipe.teacher, teacher, source, told=main)
    held_out, prompts = _prompts(recipe, teacher, embedded)
    if main and held_out:
        say(
            f"data.prompts: {len(held_out)} of {len(held_out) + len(prompts)} are held out, to measure the student by"
        )
    part = _part(recipe, prompts)
    if main and part is not None:
        say(
            f"data.part {recipe.data.part}: {len(part)} of {len(prompts)} prompts, by {recipe.data.partition}"
        )
    buckets = buckets_for(recipe, options, teacher, needs) if recipe.data.buckets else None
    for remark in cut_prompts(teacher.pipe, prompts) if main else ():
        say(remark)
    if (
        main
        and isinstance(teacher.family, Recorded)
        and (apart := teacher_check(teacher, prompts[0], 2)) is not None
    ):
        say(f"teacher check: {apart:.0e} apart")
    times = _times(recipe, kind, teacher)
    lora, named = recipe.student.lora_rank > 0, pipeline is None
    left_out = check_options(recipe.export, teacher, lora=lora, named=named)
    if main and left_out:
        say(left_out)
    others = further_teachers(recipe, options, teacher, prompts)
    roles = roles_for(recipe, kind, options, teacher, prompts, times, accelerator)
    teacher = cast(PipelineTeacher, roles.teacher)
    roles.route = route_of(recipe, teacher, others, prompts)
    for net in (*roles.stored().values(), teacher.start.net):
        fit_attention(kernel, net, device)
    roles.concept = new_word(recipe, teacher) if "concept" in needs else None
    looks = chosen_looks(recipe, options, teacher) if "looks" in needs else None
    method: Method = kind(roles, times, options, looks).to(device)
    check_weights(train, recipe.student.base, method)
    if recipe.student.freeze and method.student.experts:
        raise UserError(
            f"student.freeze is {list(recipe.student.freeze)}, but {recipe.method} trains several networks here, which "
            "freezes none: set it to [], or take a student of one network (options.phases=1)"
        )
    if train.context_parallel > 1:
        check_shared_tokens(teacher.denoiser.net, train.context_parallel)
        check_split(teacher, train.context_parallel, buckets or [teacher.size], prompts[0])
    if main and kernel == "auto":
        say(told(kernel, device, takes_exact(method)))
    student, sampler = method.student, method.sampler()
    if student.output != teacher.denoiser.output:
        sampler = replace(sampler, prediction_type=PREDICTION_TYPES[student.output])
    sampler = on_stock_grid(sampler, student.path, teacher.pipe.scheduler, passes=teacher.family.passes)
    check_sampler(sampler, student.path, teacher.family)
    method.times = sampler.times
    rewards = chosen_rewards(recipe, teacher, prompts) if rewarded else None
    method.rewards = rewards if "reward" in needs else None
    objective = Objective(method, chosen_terms(recipe, teacher, prompts, rewards)).to(device)
    if train.context_parallel > 1:
        check_shared_heads(objective, train.context_parallel)
    if buckets:
        check_heads(objective)
        check_calls(teacher, buckets, prompts[0])
    if not recipe.student.lora_rank:  # only now: copies are float32, and exported is what was loaded
        teacher.compute_in(teacher_type(recipe.train))
    for net in roles.stored().values():
        compiled_parts(net, train.compile)  # a method's own network may be of another class
        if train.checkpointing:
            check_checkpointing(net)
    check_options(recipe.export, teacher, lora=lora, named=named, student=student)
    if main:
        check_export(student, sampler, teacher, prompts[0])
    return Assembled(
        recipe=recipe,
        options=options,
        needs=needs,
        accelerator=accelerator,
        source=source,
        teacher=teacher,
        student=student,
        method=method,
        objective=objective,
        sampler=sampler,
        prompts=prompts,
        held_out=held_out,
        part=part,
        buckets=buckets,
        changes=changes,
        embedded=embedded,
        origin=origin,
        began=began,
    )


def _check_examples(recipe: Recipe, teacher: PipelineTeacher, needs: frozenset[str]) -> None:
    """What learns from images, or from videos where the teacher draws those, can be given them."""
    data, draws = recipe.data, "pictures" if teacher.size.frames == 1 else "videos"
    if data.fps is not None and draws == "pictures":
        raise UserError(f"data.fps is {data.fps:g}, but {recipe.teacher} draws pictures: leave it out")
    if data.buckets and draws == "videos":
        raise UserError(
            f"data.buckets is true, but {recipe.teacher} draws videos, of one size: set it to false"
        )
    if "images" in needs and (reason := teacher.family.examples_refused(teacher.pipe)) is not None:
        raise UserError(reason)


def _prompts(recipe: Recipe, teacher: PipelineTeacher, embedded: bool) -> tuple[list[str], Sequence[str]]:
    """Those that are held out, and those to learn from."""
    if recipe.data.prompts is not None:
        prompts = open_prompts(Path(recipe.data.prompts))
        teacher.family.check_prompts(type(teacher.pipe).__name__, prompts)
        return ([], prompts) if embedded else hold_out(prompts)
    if embedded:
        return [], emoji_captions()
    if isinstance(teacher.family, LabelFamily):
        return [], [str(label) for label in range(max(1, teacher.family.classes(teacher.pipe)))]
    must = teacher.family.from_picture and not teacher.family.picture_optional
    file = "rows that name a picture each (input_image)" if must else "one a line"
    raise UserError(f"{recipe.teacher} draws from prompts: give a text file with {file} in data.prompts")


def _part(recipe: Recipe, prompts: Sequence[str]) -> Tensor | None:
    """The numbers of the prompts of ``data.part``."""
    if recipe.data.part is None:
        return None
    place, count = place_of(recipe.data.part)
    return (parts_of(prompts, recipe.data.partition, count) == place).nonzero()[:, 0]


def _times(recipe: Recipe, kind: type[Method], teacher: PipelineTeacher) -> tuple[float, ...]:
    """The recipe's times, or the method's, as the teacher's schedule spaces them."""
    times = tuple(recipe.student.times or kind.usual_times(recipe.student.steps))
    if not recipe.student.times and kind.shifted_times:
        times = tuple(teacher.path.shifted(time) for time in times)
    if times[0] < 1 and not kind.starts_below:
        raise UserError(
            f"student.times starts at {times[0]:g}, but {recipe.method} learns from what starts as pure noise: "
            "set 1.0, or take a method that matches distributions, such as dmd or sid"
        )
    return times
