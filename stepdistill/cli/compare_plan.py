"""``stepdistill compare --methods NAMES --dry-run``: what each run takes, and what they share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.comparison.plan import Entry, Plan

if TYPE_CHECKING:
    from stepdistill.networks.passes import Passes
    from stepdistill.networks.teacher import PipelineTeacher


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        pairs, training: network passes.
        pair_seconds, training_seconds: estimates.
        warm_seconds: of the training, its warm start.
    """

    pairs: int
    training: int
    pair_seconds: float
    training_seconds: float
    warm_seconds: float


def show(wanted: Plan, folder: Path) -> None:
    """Prints the runs with their passes and times, and what is made once for several of them."""
    from stepdistill.comparison.shared import pool_of, told, warm_start_of
    from stepdistill.planning.table import duration

    measured = Measure(wanted.entries[0])
    head = ("run", "needs", "updates", "passes", "of pairs", "time", "there is")
    rows, total, seen = [head], 0.0, set[str]()
    for entry in wanted.entries:
        cost, state = measured.cost(entry), state_of(folder / entry.name)
        seconds = cost.pair_seconds + cost.training_seconds
        rows.append(
            (
                entry.name,
                needs_of(entry),
                f"{entry.recipe.train.updates:,}",
                f"{(cost.pairs + cost.training) / 1e6:.2f} M",
                f"{cost.pairs / 1e6:.2f} M" if cost.pairs else "-",
                duration(seconds / 3600),
                state,
            )
        )
        if state == "all of it":
            continue
        for name, own in (
            (pool_of(entry.recipe), cost.pair_seconds),
            (warm_start_of(entry.recipe), cost.warm_seconds),
        ):
            seconds -= own if name in seen else 0.0
            seen |= set() if name is None else {name}
        total += seconds
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = list(zip(row, widths, strict=True))
        left = [cell.ljust(width) for cell, width in cells[:2]]
        print("  ".join([*left, *(cell.rjust(width) for cell, width in cells[2:])]))
    for line in told(wanted.entries):
        print(line)
    if wanted.without_recipe:
        print(f"no recipe for: {', '.join(wanted.without_recipe)}")
    print(
        f"time: {duration(total / 3600)} in all for what is not there yet, what is shared once: from passes counted on "
        f"small networks, and {measured.unit}. Exporting and measuring come after each."
    )
    print("dry run: nothing was written")


def needs_of(entry: Entry) -> str:
    """What a run asks of the data, and which networks it has beside student and teacher."""
    from stepdistill.training.identity import resolve

    needs = resolve(entry.recipe).options.needs | entry.recipe.terms.needs
    return ", ".join(need for need in ("images", "pairs") if need in needs) or "prompts"


def state_of(place: Path) -> str:
    """What of a run lies in its folder."""
    from stepdistill.system.run_folder import RunFolder
    from stepdistill.training.checkpoint import checkpoints_in

    if (place / "report.json").is_file():
        return "all of it"
    found = checkpoints_in(RunFolder(place).checkpoints)
    return f"{int(found[-1].name.removeprefix('step-')):,} updates" if found else "-"


class Measure:
    """Passes of a run, and how long one takes on this machine, from a few calls of the teacher's network.

    Args:
        first: an entry, with whose batch it is tried.
    """

    def __init__(self, first: Entry) -> None:
        import torch

        from stepdistill.networks.loading import load_teacher
        from stepdistill.networks.teacher import PipelineTeacher

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher: PipelineTeacher = PipelineTeacher(load_teacher(first.recipe.teacher), self.device)
        self.prompt = "a cat" if self.teacher.family.has_prompts else "0"
        self.without, self.with_graph = self._seconds(first.recipe.train.batch)

    @property
    def unit(self) -> str:
        """How long a pass takes, in words."""
        return (
            f"{1000 * self.without:.2g} ms a pass without a graph and {1000 * self.with_graph:.2g} ms with one, as "
            "tried on this machine"
        )

    def _seconds(self, batch: int) -> tuple[float, float]:
        import torch

        cond = self.teacher.codec.encode([self.prompt] * batch)
        x = torch.randn(batch, *self.teacher.codec.shape, device=self.device)
        t, own = torch.full((batch,), 0.5, device=self.device), self.teacher.start.copy()
        own.net.to(self.device)

        def plain() -> float:
            with torch.no_grad():
                return float(own.predict(x, t, cond).x0.mean())

        def trained() -> float:
            own.predict(x, t, cond).x0.square().mean().backward()
            return float(next(own.net.parameters()).flatten()[0].detach())

        return _timed(plain) / batch, _timed(trained) / batch

    def seconds(self, passes: Passes) -> float:
        """What so many passes take."""
        kinds = passes.by_network.values()
        return sum(k["with_graph"] * self.with_graph + k["without_graph"] * self.without for k in kinds)

    def cost(self, entry: Entry) -> Cost:
        """What a run takes; its time is at most its budget."""
        from stepdistill.comparison.shared import warm_start_of
        from stepdistill.data.pairs import passes_of_pairs
        from stepdistill.losses.contract import PairOptions
        from stepdistill.networks.passes import Passes
        from stepdistill.testing.passes import passes_of_training
        from stepdistill.training.identity import resolve

        recipe, train = entry.recipe, entry.recipe.train
        resolved = resolve(recipe)
        options, kind = resolved.options, resolved.kind
        times = recipe.student.times or kind.usual_times(recipe.student.steps)
        made = passes_of_training(kind, options, times, train.updates, train.batch, self.teacher.path)
        pairs, warm = Passes(), Passes()
        if "pairs" in options.needs | recipe.terms.needs:
            drawn = options if isinstance(options, PairOptions) else PairOptions(guidance=options.guidance)
            pairs.add(passes_of_pairs(self.teacher, self.teacher.codec.encode([self.prompt]), drawn))
        if warm_start_of(recipe) is not None:
            warm.count("student", kind.shared_start(options) * train.batch, graph=True)
        seconds, budget = self.seconds(made), train.budget_seconds or float("inf")
        return Cost(
            pairs.total,
            made.total,
            self.seconds(pairs),
            min(seconds, budget),
            min(self.seconds(warm), budget),
        )


def _timed(call: Callable[[], float]) -> float:
    """Seconds of a call, the least of three after one to warm up."""
    call()
    found = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)
