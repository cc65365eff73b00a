"""What a run minimises: a method's loss, the terms beside it, and between their turns those of the terms' critics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.losses.batch import Batch
from stepdistill.losses.contract import Loss, Method, Turn
from stepdistill.losses.terms import Shown, Term
from stepdistill.networks.sampler import Sampler


def shown_name(network: str) -> str:
    """What people call a network that is trained, by its name in ``trained``: for stats.jsonl, bars and messages."""
    if network == "term reward":
        return "latent reward"
    if network.startswith("term "):
        return f"{network.removeprefix('term ')} discriminator"
    return "fake score" if network == "fake" else network.replace("expert-", "expert ")


class Objective(nn.Module):
    """A method with terms beside it.

    Args:
        method: the method, its times as they will be sampled.
        terms: what is added to the loss of its student.

    Attributes:
        trained: what is trained, by name: the method's, and ``term <name>`` for each critic.

    Raises:
        UserError: a term of clean samples beside a network that draws none.
    """

    def __init__(self, method: Method, terms: Sequence[Term] = ()) -> None:
        super().__init__()
        self.method, self.terms = method, nn.ModuleDict({term.name: term for term in terms})
        self._terms = tuple(terms)
        own = method.trained()
        self._critics = {f"term {term.name}": term for term in terms if term.critic() is not None}
        critics = {name: critic for name, term in self._critics.items() if (critic := term.critic())}
        if clash := sorted(own.keys() & critics.keys()):
            raise ValueError(f"the method calls a network {clash[0]!r}, which is the name of a term's critic")
        self.trained = {**own, **critics}
        calls = len(method.times)
        early = [name for name, one in own.items() if not one.follows and not one.draws_the_end(calls)]
        if refused := [term for term in terms if term.of_samples and early]:
            term = refused[0]
            raise UserError(
                f"terms.{term.name}_weight is {term.weight:g}, but {early[0]} draws no clean sample for it: set "
                "it to 0, or take a student of one network (options.phases=1)"
            )
        for term in terms:
            if lacking := sorted(term.reads - method.shows):
                raise UserError(
                    f"terms.{term.name}_weight is {term.weight:g} with options that read each {lacking[0]} of the "
                    f"method's own loss, but {type(method).__name__} shows none: take lcm for predictions or dmd for "
                    f"samples, or leave terms.{term.name}_of and terms.{term.name}_bounded out"
                )

    @property
    def averaged(self) -> str:
        """What averages are of, by name in ``trained``: the network that draws the clean sample."""
        calls = len(self.method.times)
        return next(name for name, one in self.trained.items() if one.draws_the_end(calls))

    def weights(self, name: str) -> list[nn.Parameter]:
        """All that the optimiser of ``name`` updates."""
        return self.trained[name].parameters(self.method.roles)

    def turn(self, step: int) -> Turn:
        """Whose update the run's step is. In a cycle critics come first: the student never follows one that has not
        seen it."""
        own, place = divmod(step, len(self._critics) + 1)
        if place < len(self._critics):
            return Turn(list(self._critics)[place], own)
        return self.method.turn(own)

    def phase(self, step: int) -> str:
        """What the method calls the stretch of the run that the run's step is in."""
        return self.method.phase(step // (len(self._critics) + 1))

    def sampler_at(self, step: int) -> Sampler:
        """How the student can be sampled after the run's step."""
        return self.method.sampler_at(step // (len(self._critics) + 1))

    @property
    def judged_from(self) -> int:
        """The run's step from which the student's samples tell how training goes."""
        return self.method.options.judged_from * (len(self._critics) + 1)

    def lr_ratio(self, turn: Turn) -> float:
        """The learning rate of the turn over that of ``train``."""
        term = self._critics.get(turn.network)
        return self.method.lr_ratio(turn) if term is None else term.lr_ratio

    def loss(self, turn: Turn, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the network whose turn it is, a scalar, and what to log."""
        if turn.network in self._critics:
            critic = self._critics[turn.network]
            return critic.critic_loss(self._shown_to(critic, turn, batch)), {}
        found, whose = self.method.loss(turn, batch), self.trained[turn.network]
        value, logs = found.value, dict(found.logs)
        if not whose.follows:
            shown = Shown(self.method, batch, whose.span, found)
            for term in self._terms:
                if turn.step < term.after:
                    continue
                logs[f"term {term.name}"] = term.value(shown)
                value = value + term.weight * logs[f"term {term.name}"]
        return value, logs

    def _shown_to(self, critic: Term, turn: Turn, batch: Batch) -> Shown:
        """What a critic is shown in its turn: the method's own loss is asked for where the term reads its parts."""
        if not critic.reads:
            return Shown(self.method, batch, None, Loss(torch.zeros(())))
        with torch.no_grad():
            found = self.method.loss(Turn(self.averaged, turn.step), batch)
        return Shown(self.method, batch, None, found)

    def after_step(self, turn: Turn) -> None:
        """Called after the turn's update."""
        if turn.network not in self._critics:
            self.method.after_step(turn)

    def betas(self, turn: Turn) -> tuple[float, float] | None:
        """AdamW's betas in the turn; None for those of ``train``."""
        return None if turn.network in self._critics else self.method.betas(turn)

    def anew(self, turn: Turn) -> frozenset[str]:
        """What is trained, by name, whose optimiser starts anew after this turn."""
        return frozenset() if turn.network in self._critics else self.method.anew(turn)
