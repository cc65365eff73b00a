"""How trained weights are held between updates, and what an update does to them: ``train.weights``.

- ``float32``: as they are. Autocast makes a bfloat16 copy of every matrix for each pass.
- ``master``: what is computed with is bfloat16, and so are gradients; beside it stands a float32 weight, which is what
  is updated, averaged and exported (Micikevicius et al. 2018, 1710.03740, section 3.1).
- ``bf16``: there is no such master. A weight is widened for its update, and the sum is rounded stochastically: up with
  the probability of how far it lies above the number below (Gupta et al. 2015, 1502.02551; for bfloat16 Zamirai et al.
  2020, 2010.06192). Rounding to nearest would lose every update of less than 1/512 of its weight.

Held in bfloat16 are linear layers and convolutions of what takes turns; norms, tables and heads stay float32. Moments
are float32 in all three: a second moment in bfloat16 would never fall again. Bytes of such a weight, with its gradient
and AdamW's moments: 4 + 4 + 8 in float32, 2 + 2 + 4 + 8 with a master, 2 + 2 + 8 in bf16; an update needs 8 more for
the few weights that it is made of at a time.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from stepdistill.diffusion.draws import Draws
from stepdistill.errors import UserError
from stepdistill.losses.contract import Method
from stepdistill.losses.objective import Objective
from stepdistill.networks.denoiser import matrices
from stepdistill.networks.derivative import differentiates
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.training.gradient_means import in_buckets
from stepdistill.training.optimizers import optimizer_of


def check_weights(options: TrainOptions, base: str, method: Method) -> None:
    """Refuses weights in bfloat16, or adapters on a ``base`` that is rounded, where what is learnt is a derivative.

    Raises:
        UserError: saying what to set.
    """
    if not differentiates(method):
        return
    takes = f"but {type(method).__name__} takes derivatives of its network"
    if options.weights != "float32":
        raise UserError(
            f"train.weights is {options.weights}, {takes}, which are noise in bfloat16: set train.weights=float32"
        )
    if options.context_parallel > 1:
        raise UserError(
            f"train.context_parallel is {options.context_parallel}, {takes}, which shared calls have not: set it to 1"
        )
    if base in ("int8", "nf4"):
        raise UserError(
            f"student.base is {base}, {takes}, which quantised layers have not: set student.base=auto"
        )
    if method.student.compute == torch.bfloat16:
        raise UserError(
            f"train.precision is {options.precision} and what the adapters lie on bfloat16, {takes}, which are noise "
            "there: set train.teacher_precision=float32 and student.base=auto, which hold it in float32"
        )


def rounded(value: Tensor, draws: Draws, stream: str) -> Tensor:
    """float32 to bfloat16, one of the two nearest numbers at random, so that the mean over draws is the value.

    Args:
        value: of any shape, finite.
        draws: of as many samples as there are elements.
        stream: of its random numbers.
    """
    # bfloat16 is float32 without the last 16 bits: what they carry into the 17th is the number further from zero.
    noise = draws.integers(stream, 1 << 16).to(torch.int32).view(value.shape)
    return ((value.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class Weights:
    """All that one turn trains, with its optimiser.

    Args:
        name: of the turn.
        options: how it is trained.
        parameters: of any type; float32 where they are in ``low``.
        low: those that are held in bfloat16 from here on.

    Attributes:
        optimizer: of the float32 weights: those of ``low`` are stood in for.
    """

    def __init__(
        self,
        name: str,
        options: TrainOptions,
        parameters: list[nn.Parameter],
        low: Collection[nn.Parameter] = (),
    ) -> None:
        self.name, self.seed, self.keeps = name, options.seed, options.weights == "master"
        rounded_ones = {id(each) for each in low}
        self._low = [each for each in parameters if id(each) in rounded_ones]
        wide = {id(each): nn.Parameter(each.detach().clone()) for each in self._low}
        self._wide = [wide[id(each)] for each in self._low]
        self.optimizer = optimizer_of(options, [wide.get(id(each), each) for each in parameters])
        numbers = {id(each): number for number, each in enumerate(self._wide)}
        self._buckets = [[numbers[id(each)] for each in bucket] for bucket in in_buckets(self._wide)]
        self._masters = wide if self.keeps else {}
        for weight in self._low:
            weight.data = weight.data.bfloat16()
        if not self.keeps:
            for each in self._wide:
                _empty(each)

    def exact(self, weight: nn.Parameter) -> Tensor:
        """What a weight is, unrounded where that is known; followed by averages."""
        return self._masters.get(id(weight), weight)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Updates all weights by their gradients, which are then gone.

        Args:
            step: of the run, which says how they are rounded.
        """
        self.optimizer.step()  # of what is held in float32: no other has a gradient there
        self.optimizer.zero_grad(set_to_none=True)
        for bucket in self._buckets:
            moved = [number for number in bucket if self._low[number].grad is not None]
            for number in moved:
                wide, weight = self._wide[number], self._low[number]
                if not self.keeps:
                    _fill(wide)
                    wide.copy_(weight)
                wide.grad = weight.grad.float()  # type: ignore[union-attr]
                weight.grad = None
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for number in moved:
                wide, weight = self._wide[number], self._low[number]
                if self.keeps:
                    weight.copy_(wide)
                    continue
                draws = Draws(self.seed, step, 0, wide.numel(), wide.device)
                weight.copy_(rounded(wide, draws, f"rounding {self.name} {number}"))
                _empty(wide)

    def state(self) -> dict[str, Tensor]:
        """The masters, by number."""
        return {str(i): wide.detach() for i, wide in enumerate(self._wide)} if self.keeps else {}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state`."""
        for name, value in state.items():
            self._wide[int(name)].copy_(value)

    def forget(self) -> None:
        """The weights were given anew: moments and masters of the old ones go."""
        self.optimizer.state.clear()
        if self.keeps:
            self.load({str(i): weight for i, weight in enumerate(self._low)})

    def widen(self) -> None:
        """The end of training: every weight is float32 again, its master where it has one."""
        for wide, weight in zip(self._wide, self._low, strict=True):
            weight.data = wide.data if self.keeps else weight.data.float()
        self._wide, self._low, self._buckets = [], [], []


def _empty(weight: Tensor) -> None:
    """Lets its memory go; its shape and its order stay."""
    weight.untyped_storage().resize_(0)


def _fill(weight: Tensor) -> None:
    """Gives it memory again."""
    weight.untyped_storage().resize_(weight.numel() * weight.element_size())


def in_training(objective: Objective, options: TrainOptions) -> dict[str, Weights]:
    """What every turn of a run trains, held as ``train.weights`` says from here on."""
    found, roles = {}, objective.method.roles
    for name, trained in objective.trained.items():
        low: list[nn.Parameter] = []
        if options.weights != "float32" and trained.role is not None:
            low = [weight for module in matrices(roles[trained.role].net) for weight in module.parameters()]
            roles[trained.role].compute = torch.bfloat16
        found[name] = Weights(name, options, objective.weights(name), low)
    return found
