"""What a run's student is measured by, and what it scores: on a suite, or against its teacher's pictures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers

from stepdistill.errors import UserError
from stepdistill.evaluation.against_teacher import AgainstTeacher
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.scores import by_metric
from stepdistill.evaluation.suite import load_suite
from stepdistill.evaluation.teacher_scores import gap_closed, teacher_scores
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.networks.sampler import Sampler
from stepdistill.system.log import say
from stepdistill.training.assemble import Assembled


def against_teacher(run: Assembled, counts: Sequence[int] = ()) -> AgainstTeacher | None:
    """How the student is measured against its teacher's pictures; None where it is by a suite, or not at all.

    Args:
        run: of the student.
        counts: step counts; none are all that it draws in.
    """
    if run.recipe.evaluate is not True or run.embedded:
        return None
    return AgainstTeacher(
        run.teacher,
        run.options.guidance,
        counts or run.sampler.step_counts,
        run.held_out or run.prompts,
        held_out=bool(run.held_out),
        saw=_saw(run),
        options=run.recipe.against_teacher,
    )


def check_suite(run: Assembled) -> None:
    """The recipe's suite compares pictures of a size that the student's pipeline draws.

    Raises:
        UserError: it does not, and the pipeline takes no other size.
    """
    if not isinstance(run.recipe.evaluate, str):
        return
    suite, size, codec = load_suite(run.recipe.evaluate), run.teacher.size, run.teacher.codec
    name = codec.family.student_pipeline(codec.pipe, run.student.net) or type(codec.pipe).__name__
    takes = inspect.signature(getattr(diffusers, name).__call__).parameters
    own = size.height == size.width == suite.resolution
    if not (own or suite.draw_resolution or {"height", "width"} <= set(takes)):
        raise UserError(
            f"evaluate: suite {suite.label} compares {suite.resolution} x {suite.resolution} pixels, and "
            f"{run.recipe.teacher} draws {size.height} x {size.width}: set its draw_resolution to own, or evaluate to "
            "another suite, true or false"
        )


def student_scores(run: Assembled, student: Path, against: AgainstTeacher | None) -> dict[str, Any]:
    """Teacher and student on the recipe's suite or against the teacher's pictures, as report.json has them; empty where
    nothing is to be measured."""
    wanted = run.recipe.evaluate
    if against is not None:
        return against.scores(lambda steps: against.drawn(run.student, _sampler(run, steps)))
    if wanted is False:
        return {"suite": None, "n": 0, "student": {"fd": {}, "clip_score": {}}, "loss_saw": _saw(run)}
    suite = load_suite("emoji" if wanted is True else str(wanted))
    counts, guidance = run.sampler.step_counts, run.options.guidance
    drawn = evaluate(
        student,
        suite,
        steps=counts,
        guidance=run.sampler.guidance,
        device=run.accelerator.device,
        eta=run.sampler.gamma or None,
        saw=_saw(run),
    )
    asked = sorted({1, *counts, suite.teacher_steps})
    guided = teacher_scores(run.source, suite, steps=asked, guidance=guidance, device=run.accelerator.device)
    plain = teacher_scores(run.source, suite, steps=1, guidance=1.0, device=run.accelerator.device)
    # The teacher at one step is taken at its better guidance, so that the gap is not flattered.
    best = min(guided[1], plain[1], key=lambda scores: math.inf if scores.fd is None else scores.fd)
    teachers = {**guided, 1: best}
    full = guided[suite.teacher_steps]
    try:
        gaps = {
            str(k): gap_closed(v.fd, best.fd, full.fd)
            for k, v in drawn.scores.items()
            if not (v.fd is None or best.fd is None or full.fd is None)
        }
    except UserError as error:  # every other number stands all the same
        gaps = {}
        say(f"gap closed is left out: {error}")
    return {
        "suite": suite.label,
        "n": suite.n,
        "against": "real images",
        "metrics": dict(drawn.metrics),
        "better": dict(drawn.better),
        "loss_saw": _saw(run),
        "conflicts": dict(drawn.conflicts),
        "protocol": dict(drawn.protocol),
        "guidance": guidance,
        "teacher": by_metric(teachers),
        "student": by_metric(drawn.scores),
        "gap_closed": gaps,
        # Of the teacher at full steps; a student below 0.9 of it has lost some of what the teacher draws.
        "recall_of_teachers": {
            str(k): v.recall / full.recall
            for k, v in drawn.scores.items()
            if v.recall is not None and full.recall
        },
    }


def _saw(run: Assembled) -> dict[str, str]:
    """The feature networks that the run's loss looks through, and the recipe's keys that say so."""
    terms = run.recipe.terms.networks(rewarded="reward" in run.options.needs)
    own = run.options.networks
    return {
        spec: ", ".join(found[spec] for found in (terms, own) if spec in found) for spec in {**terms, **own}
    }


def _sampler(run: Assembled, steps: int) -> Sampler:
    """How the student draws in so many steps, as its scheduler does."""
    if steps == run.sampler.steps:
        return run.sampler
    passes = run.teacher.family.passes
    return on_stock_grid(run.sampler, run.student.path, run.teacher.pipe.scheduler, steps, passes)
