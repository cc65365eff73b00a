"""The stock diffusers scheduler that draws as a sampler does."""

from __future__ import annotations

from stepdistill.diffusion.path import FlowPath
from stepdistill.diffusion.path import Path as NoisePath
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.networks.sampler import Sampler


def check_sampler(sampler: Sampler, path: NoisePath, family: Family) -> None:
    """Refuses a sampler with which the family's pipeline does not draw one picture from one seed.

    Raises:
        UserError: for fresh noise between steps on a table where the pipeline keeps its generator to itself.
    """
    own = isinstance(path, FlowPath)  # the scheduler that travels there has noise of its own
    if sampler.renoise and sampler.steps > 1 and not (own or family.passes_generator):
        raise UserError(
            f"a {sampler.steps}-step student that takes fresh noise between steps could not be reproduced from a seed: "
            f"{', '.join(family.pipelines)} hands its generator to no scheduler. Set student.times=[1.0], or the "
            "method's options.renoise=false where it has that option"
        )
