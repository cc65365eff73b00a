"""The path and the output kind that a diffusers scheduler's config states."""

from __future__ import annotations

from typing import Any

from stepdistill.diffusion.path import FlowPath, Output, Path, TablePath, TrigPath
from stepdistill.errors import UserError, did_you_mean

OUTPUTS: dict[str, Output] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "velocity",
}
"""diffusers' prediction_type -> ours."""

PREDICTION_TYPES: dict[Output, str] = {ours: theirs for theirs, ours in OUTPUTS.items()}


def path_of(scheduler: Any) -> tuple[Path, Output]:
    """The path and the output kind that a diffusers scheduler's config states.

    Raises:
        UserError: for a scheduler whose noise schedule is not known here.
    """
    name = type(scheduler).__name__
    if name.startswith(("FlowMatch", "FlowMap", "FlowConsistency")):
        return FlowPath(), "velocity"
    kind = scheduler.config.get("prediction_type", "epsilon")
    if name == "SCMScheduler" and kind == "trigflow":
        return TrigPath(), "v"  # for states over its sigma_data
    if kind not in OUTPUTS:
        raise UserError(f"{name} has prediction_type {kind!r} {did_you_mean(kind, OUTPUTS)}")
    # DPMSolver, UniPC, DEIS and SASolver serve both: their table of alphas means nothing with flow sigmas.
    if scheduler.config.get("use_flow_sigmas"):
        return FlowPath(), OUTPUTS[kind]
    if kind == "flow_prediction":
        raise UserError(
            f"the teacher's scheduler {name} has prediction_type flow_prediction without use_flow_sigmas, so that it "
            "draws on another path than the network knows: set use_flow_sigmas to true in its config"
        )
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise UserError(
            f"the teacher's scheduler {name} states no noise schedule that is known here. If its network was trained "
            "on that of a scheduler with alphas_cumprod (DDPM, DDIM, DPMSolver, Euler, LCM, PNDM ...) or of a "
            "FlowMatch scheduler, use that one; other networks, as those of tokens, cannot be teachers"
        )
    if scheduler.config.get("rescale_betas_zero_snr") and OUTPUTS[kind] == "eps":
        raise UserError(
            "an eps-prediction teacher with zero terminal SNR carries no information at pure noise"
        )
    return TablePath.from_alphas_cumprod(table), OUTPUTS[kind]
