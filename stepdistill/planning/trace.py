"""A recipe's networks, optimisers and updates on fake tensors, by the code that a run has: what is in memory when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from stepdistill.attention.kernels import why_not
from stepdistill.errors import UserError, first_line
from stepdistill.families import family_in
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Turn
from stepdistill.losses.fake_score import denoising_loss
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, Roles
from stepdistill.networks.tiles import switch_on
from stepdistill.planning.fake import ArithmeticOfCuda, derivatives_uncompared, fake_tensors
from stepdistill.planning.from_configs import pipeline_of
from stepdistill.planning.live_bytes import LiveBytes, Peak
from stepdistill.planning.quantized_layers import quantised_in_plan
from stepdistill.planning.traced import Trace, Update
from stepdistill.planning.unit import Unit, unit_of
from stepdistill.recipes.recipe import Recipe
from stepdistill.training import roles
from stepdistill.training.arithmetic import autocast
from stepdistill.training.identity import resolve
from stepdistill.training.parallel import take_turn
from stepdistill.training.roles import exact_state
from stepdistill.training.run import Run
from stepdistill.training.update import update

Device = Literal["cuda", "cpu"]

CPU = torch.device("cpu")

SHARED_OUT = tuple(
    f"{name} {kind}"
    for name in ("teacher", "student", "fake", "target")
    for kind in ("weights", "gradients", "optimiser")
)
"""Kinds of which a GPU holds a part with ``train.parallel: sharded``."""


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
    exits: dict[str, int] = {}
    live = LiveBytes(512 if device == "cuda" else 64)
    with fake_tensors(exits, live) as mode, ArithmeticOfCuda() if device == "cuda" else nullcontext():
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
        self.device, self.mode, self.live, self.exits = device, mode, live, exits
        self.notes: list[str] = []
        whole = recipe.train
        share, left = divmod(whole.batch, gpus * whole.accumulate)
        if left or not share:
            raise UserError(
                f"train.batch is {whole.batch}, which does not split over {gpus} GPUs times train.accumulate="
                f"{whole.accumulate}: make it a multiple of {gpus * whole.accumulate}"
            )
        # One part is looked at; of several, one that finds the gradients of those before it.
        self.parts = whole.accumulate
        self.kernel = "auto" if why_not(whole.attention, CPU) is not None else whole.attention
        changed = {"batch": share, "accumulate": 1, "attention": self.kernel}
        self.recipe = recipe.model_copy(update={"train": whole.model_copy(update=changed)})
        self._note(recipe)
        self.scale: dict[str, float] = {"batch": self.parts}
        if whole.parallel == "sharded" and gpus > 1:
            self.scale |= dict.fromkeys(SHARED_OUT, 1 / gpus)
            self.notes.append("sharded networks count in equal parts, without the blocks that a call gathers")

    def _note(self, recipe: Recipe) -> None:
        train, terms = recipe.train, recipe.terms
        said = {
            f"train.attention={train.attention} is planned as torch's own": self.kernel != train.attention,
            f"train.compile={train.compile} is planned as plain networks": train.compile != "none",
            "student.start counts as large as the teacher's network": recipe.student.start is not None,
            "the word's way through the text encoders is left out, and so are decoder and image networks": (
                "concept" in resolve(recipe).options.needs
            ),
            "terms.perceptual_weight and terms.reward_weight are left out: their networks are read from files": (
                bool(terms.perceptual_weight or terms.reward_weight)
            ),
        }
        self.notes += [note for note, told in said.items() if told]

    def run(self, fine_tune: bool) -> Trace:
        with self.live:
            family = family_in(self.recipe.family) if self.recipe.family else None
            planned = pipeline_of(self.recipe.teacher, self.mode, family)
            source, family, pipe = planned.source, planned.family, [planned.pipe]
            if self.recipe.data.tiling:
                switch_on(pipe[0])
            encoders = 0 if self.device == "cpu" else 4 * planned.encoders
            del planned  # a run does not hold the network as it was loaded, either
            with patch.object(roles, "exact_state", self._exact_state), quantised_in_plan():
                exact = roles.round_on_host(pipe[0], family, self.recipe)
                if self.device != "cpu":
                    self.live.begin()  # so far it was in the host's memory
                unit = unit_of(self.recipe, pipe.pop(), family, CPU, self.mode, exact)
            del exact
        setup = self.live.peak(self.scale).beside("text encoders", encoders)
        with self.mode, self.live:
            run = unit.run()
            self._mark(run, unit)
            batch = unit.batch()
            self.live.mark(_given(batch), "batch")
            with unit.training(self.kernel), derivatives_uncompared():
                updates = [self._update(run, turn, share, batch) for turn, share in unit.turns()]
                held = self.live.held(self.scale)
                picture = self._picture(unit)
                call = self._teacher_call(unit, batch)
                usual = self._fine_tune(run, batch) if fine_tune and self.recipe.student.lora_rank else 0
        net, method = unit.method.student.net, unit.method
        own = sum(4 * value.numel() for key, value in net.state_dict().items() if ".lora_" not in key)
        return Trace(
            setup=setup,
            held=held,
            picture=picture,
            updates=updates,
            parameters=_parameters(method.roles),
            trained={name: sum(p.numel() for p in own) for name, own in run.trained.items()},
            student=own,
            exported=own * max(1, len(method.student.experts)),
            checkpoint=sum(_bytes(part.state().values()) for part in run.parts.values()),
            condition=_bytes(unit.condition.tensors.values()),
            state=4 * int(torch.Size(unit.teacher.codec.shape).numel()),
            components=sum(_bytes(part.state_dict().values()) for part in unit.others().values()),
            pair_states=len(method.pair_times()) if "states" in unit.needs else 0,
            needs=unit.needs,
            source=source,
            size=unit.teacher.size,
            step_counts=method.sampler().step_counts,
            teacher_call=call,
            fine_tune=usual,
            notes=self.notes,
        )

    def _exact_state(self, net: nn.Module) -> dict[str, Tensor]:
        """As ``roles.exact_state``, and of a network on a GPU it counts nowhere."""
        if self.device == "cpu":
            return exact_state(net)
        found = {}
        for name, value in net.state_dict().items():
            found[name] = value.clone()
            self.live.release([found[name]])
        return found

    def _mark(self, run: Run, unit: Unit) -> None:
        """Says what everything is that was made so far."""
        live, roles = self.live, run.roles
        for name in roles.names:
            live.mark(roles.parameters(name), f"{name} weights")
        for name, net in roles.stored().items():
            live.mark_network(net, f"{name} weights")
        for name, part in unit.others().items():
            text = name.startswith("text_encoder")
            if text and self.device == "cuda":  # every prompt is encoded before training starts
                live.release((*part.parameters(), *part.buffers()))
            else:
                live.mark_network(part, "text encoders" if text else "VAE")
        for name, optimizer in run.optimizers.items():
            live.mark(_tensors(optimizer.state), f"{name} optimiser")
            masters = run.weights[name].state()
            live.mark(masters.values(), f"{name} optimiser")
        if run.ema:
            live.mark(run.ema.shadow.values(), "average")
        for part in (run.objective.method, run.objective.terms):
            live.mark(part.parameters(), "heads")

    def _update(self, run: Run, turn: Turn, share: float, batch: Batch) -> Update:
        """One update; of a rollout its mean length counts."""
        method, live = run.objective.method, self.live
        weights = run.weights[turn.network]
        step = weights.step

        def marked(number: int) -> None:
            gradients = [p.grad for p in run.trained[turn.network] if p.grad is not None]
            live.mark(gradients, f"{turn.network} gradients")
            step(number)

        self._earlier_parts(run, turn.network)
        self.exits.clear()
        flops = live.flops
        live.begin()
        with _counted(method.roles) as passes, patch.object(weights, "step", marked):
            update(run, turn, batch, 1e-4)
        peak, done = live.peak(self.scale), float(live.flops - flops)
        samples = len(batch.prompt)
        passes = {name: value / samples for name, value in passes.items()}
        if (exits := self.exits.get("exit", 1)) > 1:
            before, extra = live.flops, (exits - 1) / 2
            with torch.no_grad():
                method.student.predict(batch.noise, torch.full((samples,), 0.5), batch.cond)
            done += extra * (live.flops - before)
            passes["student"] = passes.get("student", 0.0) + extra
        return Update(turn.network, share, peak, done * self.parts, passes)

    def _picture(self, unit: Unit) -> Peak | None:
        """What decoding takes of previews and samples, which are decoded one by one."""
        codec = unit.teacher.codec
        self.live.begin()
        try:
            with torch.no_grad():
                codec.to_frames(torch.zeros(1, *codec.shape))
        except (RuntimeError, ValueError) as error:  # also what fake tensors cannot do
            self.notes.append(f"decoding a picture is left out ({type(error).__name__}: {first_line(error)})")
            return None
        return self.live.peak(self.scale)

    def _teacher_call(self, unit: Unit, batch: Batch) -> float:
        """What it does for each sample of a batch."""
        before, half = self.live.flops, torch.full((len(batch.prompt),), 0.5)
        with torch.no_grad(), autocast(self.recipe.train.precision, CPU):
            guidance = unit.method.options.guidance
            unit.method.teacher.predict(batch.noise, half, batch.cond, guidance=guidance)
        return float(self.live.flops - before) / len(batch.prompt)

    def _earlier_parts(self, run: Run, network: str) -> None:
        """Of several parts of a batch, those before the last have left gradients."""
        if self.parts > 1:
            for parameter in run.trained[network]:
                parameter.grad = torch.zeros_like(parameter)

    def _fine_tune(self, run: Run, batch: Batch) -> int:
        """The most that an ordinary update of the student's adapter holds, without other adapters and optimisers."""
        roles, name = run.roles, run.objective.averaged
        others = {
            kind: 0.0
            for kind in self.live.held()
            if kind.endswith(("weights", "optimiser"))
            and kind.rsplit(" ", 1)[0] not in ("student", name, TEACHER)
        }
        take_turn(run.trained, name)
        self._earlier_parts(run, name)
        self.live.begin()
        with autocast(self.recipe.train.precision, CPU):
            loss = denoising_loss(roles.student, batch.noise, batch, "output")
        loss.backward()
        del loss
        run.weights[name].step(0)
        return self.live.peak({**self.scale, **others}).total


def _tensors(state: Any) -> list[Tensor]:
    return [
        value for value in tree_leaves([dict(own) for own in state.values()]) if isinstance(value, Tensor)
    ]


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


def _given(batch: Batch) -> Iterator[Tensor]:
    """All tensors of a batch that are there before it is used."""
    yield from batch.cond.tensors.values()
    for own in (batch.images, batch.pairs):
        if own is not None:
            yield from own.cond.tensors.values()
            yield from (value for value in (own.x0, own.noise, own.states) if value is not None)


def _parameters(roles: Roles) -> dict[str, int]:
    """Of every role, the teacher's network first; of an adapter its own."""
    net = roles.stored()[TEACHER]
    found = {TEACHER: sum(v.numel() for k, v in net.named_parameters() if ".lora_" not in k)}
    return found | {name: sum(p.numel() for p in roles.parameters(name)) for name in roles.names}


def _bytes(values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
