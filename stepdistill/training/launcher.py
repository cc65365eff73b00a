"""What ``accelerate launch`` says about how processes share a run, beside how many they are: an FSDP2 config.

Nothing here imports torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pydantic import ValidationError

from stepdistill.errors import UserError
from stepdistill.recipes.messages import explain
from stepdistill.recipes.recipe import Recipe
from stepdistill.system.processes import told

REFUSED = {
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "weights stay where they are computed with"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "set train.checkpointing=true"),
}
"""Switches of an FSDP2 config that are not followed, by the environment variable that carries them."""


@dataclass(frozen=True)
class Fsdp:
    """What of an FSDP2 config is followed; the blocks that are sharded are those that diffusers names in each network.

    Attributes:
        reshard: whether gathered weights go after a forward pass, and are gathered again in the backward pass.
    """

    reshard: bool = True


def fsdp() -> Fsdp | None:
    """The launcher's FSDP2 config; None where it has none.

    Raises:
        UserError: it asks for what is not done here.
    """
    if not _is_on("ACCELERATE_USE_FSDP"):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"the launcher's config has fsdp_version {version}: set fsdp_version: 2")
    for variable, (name, instead) in REFUSED.items():
        if _is_on(variable):
            raise UserError(
                f"the launcher's config has {name}: true, which is not followed: set it to false; {instead}"
            )
    return Fsdp(reshard=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")


def as_launched(recipe: Recipe) -> Recipe:
    """The recipe with ``train.parallel`` as the launcher's config has it, where it has FSDP2: sharded.

    Raises:
        UserError: recipe and config contradict each other.
    """
    if fsdp() is None or told().count == 1:
        return recipe
    train = recipe.train
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", {"float32": "no"}.get(train.precision, train.precision)):
        raise UserError(
            f"the launcher's config has mixed_precision: {precision}, and train.precision is {train.precision}: set "
            "mixed_precision to 'no', where the recipe decides, or both alike"
        )
    if train.parallel == "replicated":
        raise UserError(
            "train.parallel is replicated, but the launcher's config shards networks (FSDP2): set "
            "train.parallel=sharded, or launch with a config of distributed_type: MULTI_GPU"
        )
    try:
        sharded = type(train).model_validate({**train.model_dump(), "parallel": "sharded"})
    except ValidationError as error:
        wrong = explain(error, type(train), "train", "train", {"": "the launcher's FSDP2 config"})
        raise UserError(wrong) from None
    return recipe.model_copy(update={"train": sharded})


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
