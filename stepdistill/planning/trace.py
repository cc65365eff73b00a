"""A recipe's networks, optimisers and updates on fake tensors, by the code that a run has: what is in memory when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stepdistill.attention.kernels import attention, why_not
from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.families import family_in
from stepdistill.families.condition import Condition
from stepdistill.families.kinds import LabelFamily
from stepdistill.families.size import Size
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Method, Turn
from stepdistill.losses.fake_score import denoising_loss
from stepdistill.losses.objective import Objective
from stepdistill.losses.terms import GanTerm, RegressionTerm, Term
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, Roles
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.planning.fake import ArithmeticOfCuda, fake_tensors
from stepdistill.planning.from_configs import Planned, fake_pipeline
from stepdistill.planning.live_bytes import LiveBytes, Peak
from stepdistill.recipes.recipe import Recipe
from stepdistill.training.identity import ResolvedRecipe, resolve
from stepdistill.training.roles import roles_for, teacher_type
from stepdistill.training.run import Run
from stepdistill.training.update import update

Device = Literal["cuda", "cpu"]

CPU = torch.device("cpu")

LONGEST = 100_000
"""Steps of a run in which its turns are looked at."""


@dataclass
class Update:
    """An update of one network.

    Attributes:
        network: what is trained.
        share: of all updates of the run.
        peak: the most that is held in it.
        flops: operations of it.
        passes: forward passes of a sample, by who is called; those with a graph after a star.
    """

    network: str
    share: float
    peak: Peak
    flops: float
    passes: dict[str, float]


@dataclass
class Trace:
    """What was seen.

    Attributes:
        setup: the most that is held until training starts.
        held: what is held between two updates, by kind.
        updates: of each network.
        parameters: of each role, and ``trained`` of each.
        student, checkpoint: bytes of the student's network in float32, and of a checkpoint.
        condition, state: bytes of a prompt's conditions, and of a state in float32.
        components: bytes of the pipeline's other networks.
        pair_states: states that are kept with each pair.
        needs: what the method asks of the data.
        fine_tune: the most that is held in an ordinary update of one adapter of the same network; 0 for full weights.
        notes: what was left out.
        source: where the configs are from.
        size: what is drawn.
    """

    setup: Peak
    held: dict[str, int]
    updates: list[Update]
    parameters: dict[str, int]
    trained: dict[str, int]
    student: int
    checkpoint: int
    condition: int
    state: int
    components: int
    pair_states: int
    needs: frozenset[str]
    source: str
    size: Size
    fine_tune: int = 0
    notes: list[str] = field(default_factory=list)


def trace(recipe: Recipe, device: Device, gpus: int = 1, fine_tune: bool = False) -> Trace:
    """Runs an update of every network of a recipe on fake tensors.

    Args:
        recipe: what is planned.
        device: where it would run.
        gpus: among how many a batch is split; with ``train.parallel: sharded`` the networks, too.
        fine_tune: whether an ordinary update of the student's adapter is looked at, too.

    Raises:
        UserError: the recipe does not fit its teacher, or cannot be planned, with the reason.
    """
    with fake_tensors(exits := {}) as mode:
        live = LiveBytes(512 if device == "cuda" else 64)
        with ArithmeticOfCuda() if device == "cuda" else nullcontext():
            return _Tracing(recipe, device, gpus, mode, live, exits).run(fine_tune)


class _Tracing:
    """One :func:`trace`."""

    def __init__(
        self,
        recipe: Recipe,
        device: Device,
        gpus: int,
        mode: FakeTensorMode,
        live: LiveBytes,
        exits: dict[str, int],
    ) -> None:
        self.device, self.gpus, self.mode, self.live, self.exits = device, gpus, mode, live, exits
        self.notes: list[str] = []
        whole = recipe.train
        share, left = divmod(whole.batch, gpus * whole.accumulate)
        if left or not share:
            raise UserError(
                f"train.batch is {whole.batch}, which does not split over {gpus} GPUs times train.accumulate="
                f"{whole.accumulate}: make it a multiple of {gpus * whole.accumulate}"
            )
        # A second part has all gradients beside it, and further ones are as it is.
        self.parts, self.micro = min(2, whole.accumulate), share
        self.repeats = whole.accumulate / self.parts
        train = whole.model_copy(update={"batch": share * self.parts, "accumulate": self.parts})
        # What a network says has no bearing on memory, and its turning trains one network before all others.
        student = recipe.student.model_copy(update={"output": "teacher"})
        self.recipe = recipe.model_copy(update={"train": train, "student": student})
        self.steps = whole.steps
        self.scale = self._scale()

    def _scale(self) -> dict[str, float]:
        """The share that a GPU holds, by kind."""
        return {}

    def run(self, fine_tune: bool) -> Trace:
        resolved = resolve(self.recipe)
        with self.live:
            family = family_in(self.recipe.family) if self.recipe.family else None
            planned = fake_pipeline(self.recipe.teacher, self.mode, family)
            source = planned.source
            teacher, condition = self._teacher(planned, resolved)
            del planned  # a run does not hold the network as it was loaded, either
            method, objective = self._method(resolved, teacher)
        setup = self._peak(0)
        run = self._optimisers(objective)
        self._mark(run, teacher)
        needs = resolved.options.needs | self.recipe.terms.needs
        batch = self._batch(method, teacher, condition, needs)
        with self.mode, self.live, self._conditions_of_training(method):
            updates = [self._update(run, turn, share, batch) for turn, share in self._turns(objective)]
            held = self.live.held()
            usual = self._fine_tune(run, batch) if fine_tune and self.recipe.student.lora_rank else 0
        net = method.student.net
        own = sum(4 * value.numel() for key, value in net.state_dict().items() if ".lora_" not in key)
        return Trace(
            setup=setup,
            held=held,
            updates=updates,
            parameters=_parameters(method.roles),
            trained={name: sum(p.numel() for p in own) for name, own in run.trained.items()},
            student=own,
            checkpoint=sum(_bytes(part.state().values()) for part in run.parts.values()),
            condition=_bytes(condition.tensors.values()),
            state=4 * int(torch.Size(teacher.codec.shape).numel()),
            components=sum(_bytes(part.state_dict().values()) for part in self._others(teacher).values()),
            pair_states=len(method.pair_times()) if "states" in needs else 0,
            needs=needs,
            source=source,
            size=teacher.size,
            fine_tune=usual,
            notes=self.notes,
        )

    def _teacher(
        self, planned: Planned, resolved: ResolvedRecipe
    ) -> tuple[PipelineTeacher, Condition]:
        """The teacher as a run takes it, and the condition of one prompt."""
        options, data = resolved.options, self.recipe.data
        teacher = PipelineTeacher(
            planned.pipe,
            CPU,
            planned.family,
            guidance_interval=options.guidance_interval,
            shift=options.shift,
            guidance=options.guidance,
            guidance_rescale=options.guidance_rescale,
            size=Size(*data.size) if data.size else None,
        )
        prompt = "a photograph of a cat" if teacher.family.has_prompts else "0"
        return teacher, teacher.codec.encode([prompt])

    def _method(self, resolved: ResolvedRecipe, teacher: PipelineTeacher) -> tuple[Method, Objective]:
        recipe, kind, options = self.recipe, resolved.kind, resolved.options
        if teacher.null is None and teacher.denoiser.guidance is None:
            options = options.model_copy(update={"guidance": 1.0})
        times = tuple(recipe.student.times or kind.default_times)
        if not recipe.student.times and kind.shifted_times:
            times = tuple(teacher.path.shifted(time) for time in times)
        with self.mode:
            none: Any = None  # is asked where the network's output is turned, which it is not here
            roles = roles_for(recipe, kind, options, teacher, [], times, none)
            held = cast(PipelineTeacher, roles.teacher)
            method: Method = kind(roles, times, options)
            objective = Objective(method, self._terms(held))
            if not recipe.student.lora_rank:
                held.compute_in(teacher_type(recipe.train))
        return method, objective

    def _terms(self, teacher: PipelineTeacher) -> list[Term]:
        options, terms = self.recipe.terms, list[Term]()
        if options.regression_weight:
            terms.append(RegressionTerm(options.regression_weight, options.regression))
        if options.gan_weight:
            terms.append(GanTerm(options.gan_weight, teacher.denoiser, options.gan_lr_ratio))
        if options.perceptual_weight or options.reward_weight:
            self.notes.append(
                "terms.perceptual_weight and terms.reward_weight are left out: their networks are read from files"
            )
        return terms

    def _optimisers(self, objective: Objective) -> Run:
        """The run's optimisers and averages, as they are after the first updates."""
        with self.mode, self.live:
            run = Run(objective, self.recipe, Path("plan"))
            for name, optimizer in run.optimizers.items():
                for parameter in run.trained[name]:
                    parameter.grad = torch.empty_like(parameter)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return run

    def _others(self, teacher: PipelineTeacher) -> dict[str, nn.Module]:
        """The networks of the pipeline beside its denoiser."""
        return {
            name: part
            for name, part in teacher.pipe.components.items()
            if isinstance(part, nn.Module) and name != teacher.family.network
        }

    def _mark(self, run: Run, teacher: PipelineTeacher) -> None:
        """Says what everything is that was made so far."""
        live, roles = self.live, run.roles
        for name in roles.names:
            live.mark(roles.parameters(name), f"{name} weights")
        for name, net in roles.stored().items():
            live.mark_network(net, f"{name} weights")
        for name, part in self._others(teacher).items():
            text = name.startswith("text_encoder")
            if text and self.device == "cuda":  # every prompt is encoded before training starts
                live.release((*part.parameters(), *part.buffers()))
            else:
                live.mark_network(part, "text encoders" if text else "VAE")
        if self.device == "cuda":
            for denoiser in (roles[name] for name in roles.names):
                if denoiser.adapter and denoiser.adapter.shared.exact:
                    live.release(denoiser.adapter.shared.exact.values())
        for name, optimizer in run.optimizers.items():
            state = [v for own in optimizer.state.values() for v in own.values() if isinstance(v, Tensor)]
            live.mark(state, f"{name} optimiser")
        if run.ema:
            live.mark(run.ema.shadow.values(), "average")
        live.mark(
            (value for part in (run.objective.method, run.objective.terms) for value in part.parameters()),
            "heads",
        )

    def _batch(
        self, method: Method, teacher: PipelineTeacher, one: Condition, needs: frozenset[str]
    ) -> Batch:
        """Samples that a process works through in an update."""
        count, shape = self.recipe.train.batch, teacher.codec.shape
        with self.mode, self.live:

            def condition() -> Condition:
                return Condition(
                    {k: torch.zeros(count, *v.shape[1:], dtype=v.dtype) for k, v in one.tensors.items()}
                )

            def zeros(*more: int) -> Tensor:
                return torch.zeros(count, *more, *shape)

            images = pairs = None
            if "images" in needs:
                images = Examples(zeros(), condition())
            if "pairs" in needs:
                states = zeros(len(method.pair_times())) if "states" in needs else None
                pairs = Examples(zeros(), condition(), zeros(), states)
            prompt = torch.zeros(count, dtype=torch.int64)
            made = Batch(Draws(0, 0, 0, count), shape, condition(), prompt, images, pairs)
        given = [made.cond.tensors.values()]
        for examples in filter(None, (images, pairs)):
            given.append(v for v in (examples.x0, examples.noise, examples.states) if v is not None)  # type: ignore[arg-type]
            given.append(examples.cond.tensors.values())
        for values in given:
            self.live.mark(values, "batch")
        return made

    @contextmanager
    def _conditions_of_training(self, method: Method) -> Iterator[None]:
        """As the loop has them around its updates."""
        train = self.recipe.train
        kernel = train.attention
        if why_not(kernel, CPU) is not None:
            self.notes.append(f"train.attention={kernel} is planned as torch's own")
            kernel = "auto"
        if train.compile != "none":
            self.notes.append(f"train.compile={train.compile} is planned as plain networks")
        with (
            attention(kernel, CPU),
            method.roles.checkpointed() if train.checkpointing else nullcontext(),
        ):
            yield

    def _turns(self, objective: Objective) -> list[tuple[Turn, float]]:
        """The last turn of each network in the run, after warm starts, and its share of the updates of the last
        thousand steps; followers first, as in a run."""
        last: dict[str, Turn] = {}
        count: dict[str, int] = {}
        steps = min(self.steps, LONGEST)
        for step in range(steps):
            turn = objective.turn(step)
            last[turn.network] = turn
            if step >= steps - 1000:
                count[turn.network] = count.get(turn.network, 0) + 1
        total = sum(count.values())
        order = sorted(last, key=lambda name: not objective.trained[name].follows)
        return [(last[name], count.get(name, 0) / total) for name in order]

    def _update(self, run: Run, turn: Turn, share: float, batch: Batch) -> Update:
        """One update; of a rollout its mean length counts."""
        method, live = run.objective.method, self.live
        optimizer = run.optimizers[turn.network]

        def mark(*_: Any) -> None:
            gradients = [p.grad for p in run.trained[turn.network] if p.grad is not None]
            live.mark(gradients, f"{turn.network} gradients")

        handle = optimizer.register_step_pre_hook(mark)
        self.exits.clear()
        begun, flops = live.now, live.flops
        with _counted(method.roles) as passes:
            update(run, turn, batch, 1e-4)
        handle.remove()
        peak, done = self._peak(begun), float(live.flops - flops)
        samples = len(batch.prompt)
        passes = {name: value / samples for name, value in passes.items()}
        if (exits := self.exits.get("exit", 1)) > 1:
            before, extra = live.flops, (exits - 1) / 2
            with torch.no_grad():
                part = batch.split(self.parts)[0]
                method.student.predict(part.noise, torch.zeros(len(part.prompt)), part.cond)
            done += extra * self.parts * (live.flops - before)
            passes["student"] = passes.get("student", 0.0) + extra
        return Update(turn.network, share, peak, done * self.repeats, passes)

    def _fine_tune(self, run: Run, batch: Batch) -> int:
        """The most that an ordinary update of the student's adapter holds, without other adapters and optimisers."""
        roles, name = run.roles, run.objective.averaged
        others = {
            kind: 0.0
            for kind in self.live.held()
            if kind.endswith(("weights", "optimiser"))
            and kind.rsplit(" ", 1)[0] not in ("student", name, TEACHER)
        }
        begun = self.live.now
        for trained, parameters in run.trained.items():
            for parameter in parameters:
                parameter.requires_grad_(trained == name)
        for part in batch.split(self.parts):
            loss = denoising_loss(roles.student, part.noise, part, "output")
            loss.backward()
            del loss
        run.optimizers[name].step()
        run.optimizers[name].zero_grad(set_to_none=True)
        return self.live.peak(begun, scale={**self.scale, **others}).total

    def _peak(self, since: int) -> Peak:
        return self.live.peak(since, scale=self.scale)


@contextmanager
def _counted(roles: Roles) -> Iterator[dict[str, float]]:
    """Counts samples that networks are called for, by role; with a graph after a star."""
    names = {id(roles[name]): name for name in roles.names} | {id(roles.teacher.denoiser): TEACHER}
    found: dict[str, float] = {}
    plain = Denoiser._called

    def called(self: Denoiser, x_t: Tensor, time: Tensor, cond: Condition) -> Tensor:
        who = names.get(id(self), "another") + ("*" if torch.is_grad_enabled() else "")
        found[who] = found.get(who, 0.0) + len(x_t)
        return plain(self, x_t, time, cond)

    with patch.object(Denoiser, "_called", called):
        yield found


def _parameters(roles: Roles) -> dict[str, int]:
    """Of every role, the teacher's network first; of an adapter its own."""
    net = roles.stored()[TEACHER]
    found = {TEACHER: sum(v.numel() for k, v in net.named_parameters() if ".lora_" not in k)}
    return found | {name: sum(p.numel() for p in roles.parameters(name)) for name in roles.names}


def _bytes(values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def is_class_conditional(teacher: PipelineTeacher) -> bool:
    return isinstance(teacher.family, LabelFamily)
