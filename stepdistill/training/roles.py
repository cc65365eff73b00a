"""Who starts as what: the networks that a recipe's method is given, in the output kind that they start with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from stepdistill.diffusion.path import Output, TablePath
from stepdistill.errors import UserError
from stepdistill.families import known_family
from stepdistill.families.base import Family
from stepdistill.losses.contract import Method, MethodOptions
from stepdistill.networks.denoiser import in_bfloat16, matrices
from stepdistill.networks.quantized import check_quantized, quantized
from stepdistill.networks.roles import Adapters, Copies, Roles
from stepdistill.networks.switched import network_of
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import Recipe
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.system.log import bar, say
from stepdistill.system.shipped import cache_folder
from stepdistill.training.arithmetic import autocast
from stepdistill.training.output_matching import Matched, Matching, match_output, output_of
from stepdistill.training.student_start import started_student


def roles_for(
    recipe: Recipe,
    kind: type[Method],
    options: MethodOptions,
    teacher: PipelineTeacher,
    prompts: Sequence[str],
    times: tuple[float, ...],
    accelerator: Accelerator | None,
) -> Roles:
    """Teacher and student: copies, or with ``student.lora_rank`` adapters on the teacher's network.

    Args:
        recipe: its student, and the precision of its run.
        kind, options: of the method.
        teacher: as it was loaded. That of the roles is another one where they are adapters.
        prompts: of the samples on which the network is turned into ``student.output``, where it is.
        times: where the student is called.
        accelerator: where it runs; None where nothing is trained and nothing said.

    Raises:
        UserError: an output that a student of this teacher cannot have.
    """
    own, student = teacher.denoiser.output, recipe.student
    if student.start is not None:
        begun = started_student(recipe, options, teacher, told=_tells(accelerator))
        return _ready(Copies(teacher, begun), recipe, kind, times, accelerator)
    output = output_of(student, own, times)
    if kind.own_network and student.output == "auto":
        output = own
    exact = held_for_adapters(teacher, recipe.train, student.base) if student.lora_rank else None
    found: Matched | None = None
    if output != own:
        assert accelerator is not None
        found = _matched(recipe, options, teacher, prompts, output, accelerator)
    roles: Roles
    if student.lora_rank:
        start = found.adapter if found else None
        roles = Adapters(
            teacher, student.lora_rank, student.lora_alpha, output=output, start=start, exact=exact
        )
    else:
        if found:
            teacher.start = found.denoiser
        roles = _ready(Copies(teacher), recipe, kind, times, accelerator)
    roles.turned = found is not None
    return roles


def _ready(
    roles: Copies, recipe: Recipe, kind: type[Method], times: tuple[float, ...], accelerator: Accelerator
) -> Copies:
    """The roles with what a student of its own weights trains of its network."""
    if kind.starts_below:  # a generator, called at its own times alone
        roles.student.keep_serving(times)
    if recipe.student.freeze:
        freeze(roles, recipe.student.freeze, kind, accelerator)
    return roles


def _tells(accelerator: Accelerator | None) -> bool:
    return accelerator is not None and accelerator.is_main_process


def freeze(roles: Copies, wanted: Sequence[str], kind: type[Method], accelerator: Accelerator | None) -> None:
    """Keeps a part of the student's network as it starts.

    Raises:
        UserError: it has no such part, or a method gives it another network.
    """
    if kind.own_network:
        raise UserError(
            f"student.freeze is {list(wanted)}, but {kind.__name__} gives the student a network of its own, with "
            "weights that must be trained: leave it out"
        )
    share = roles.freeze(wanted)
    if _tells(accelerator):
        say(f"student.freeze: {share:.0%} of its weights stay as they are")


def teacher_type(train: TrainOptions) -> torch.dtype:
    """What the teacher computes in."""
    return torch.bfloat16 if (train.teacher_precision or train.precision) == "bf16" else torch.float32


def round_on_host(pipe: Any, family: Family | None, recipe: Recipe) -> dict[str, Tensor] | None:
    """Rounds the network that adapters will share to bfloat16 where it was loaded, before its pipeline goes to a GPU,
    and is quantised there if it is to be: in float32 a large one would not fit there. Nothing happens where it is held
    in float32, or how the pipeline calls it is yet to be recorded.

    Args:
        pipe: nobody else's.
        family: of the user's own, or None.
        recipe: its student, and the precision of its run.

    Returns:
        What ``PipelineTeacher.exact`` is.
    """
    family = family or known_family(type(pipe).__name__)
    if family is None or not recipe.student.lora_rank or not base_in_bfloat16(recipe.train):
        return None
    net = network_of(family, pipe)
    exact = exact_state(net) if loses_by_rounding(net) else None
    in_bfloat16(net, in_place=True)
    if recipe.student.base in ("int8", "nf4") and exact is None:
        exact = exact_state(net)
    return exact


def base_in_bfloat16(train: TrainOptions) -> bool:
    """Whether the network that adapters share is held in bfloat16, as all compute in it."""
    return teacher_type(train) == torch.bfloat16 and train.precision == "bf16"


def held_for_adapters(
    teacher: PipelineTeacher, train: TrainOptions, base: Literal["auto", "bf16", "int8", "nf4"] = "auto"
) -> Mapping[str, Tensor] | None:
    """Readies the teacher's network for those who share it: in bfloat16 where all compute in it, in float32 elsewhere,
    its adapted layers as ``student.base`` says. One that the teacher owns is changed itself. What is exported was never
    rounded: where rounding loses something, the state before that, on the CPU."""
    low, exact = base_in_bfloat16(train), teacher.exact
    if base == "int8" or base == "nf4":
        check_quantized(base, teacher.device)
        exact = exact or exact_state(teacher.denoiser.net)
    elif low and exact is None and loses_by_rounding(teacher.denoiser.net):
        exact = exact_state(teacher.denoiser.net)
    teacher.compute_in(torch.bfloat16 if low else torch.float32, in_place=teacher.owned)
    if base == "int8" or base == "nf4":
        teacher.hold(quantized(teacher.denoiser.net, base, teacher.family.lora_targets))
    teacher.denoiser.compute = teacher_type(train)
    return exact


def loses_by_rounding(net: nn.Module) -> bool:
    """Whether the weights that bfloat16 rounds are others in it: those of a checkpoint that was saved in it are not.
    Of a plan's, which are without numbers, it is taken so."""
    wide = (v for m in matrices(net) for v in m.parameters() if v.dtype != torch.bfloat16)
    return any(is_fake(value) or not torch.equal(value.bfloat16().to(value.dtype), value) for value in wide)


def exact_state(net: nn.Module) -> dict[str, Tensor]:
    """A network's state as it is, on the CPU."""
    return {name: value.cpu() for name, value in net.state_dict().items()}


def _matched(
    recipe: Recipe,
    options: MethodOptions,
    teacher: PipelineTeacher,
    prompts: Sequence[str],
    output: Output,
    accelerator: Accelerator,
) -> Matched:
    """The teacher's network turned into ``output``."""
    if not isinstance(teacher.path, TablePath):
        raise UserError(
            f"student.output is {output}, but a flow teacher's student says its velocity, which has no trouble at "
            "pure noise: set student.output=teacher"
        )
    train, own = recipe.train, teacher.denoiser.output
    matching = Matching(teacher, output, prompts, options.guidance, recipe.student, train.batch, train.seed)
    steps, main = recipe.student.output_updates, accelerator.is_main_process
    with accelerator.main_process_first():  # the others find it in the cache
        drawn = bar(recipe.student.output_samples, "samples", unit="sample", shown=main, lazy=True)
        shown = bar(steps, f"{own} to {output}", unit="update", shown=main, lazy=True)
        found = match_output(
            matching,
            cache_folder() / "outputs",
            autocast=lambda: autocast(train.precision, accelerator.device),
            checkpointing=train.checkpointing,
            drawn=drawn.update,
            progress=shown.update,
        )
        drawn.close()
        shown.close()
    if main:
        say(f"{own} to {output}, error of v at t up to " + found.summary)
    return found
