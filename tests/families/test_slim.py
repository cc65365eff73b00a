"""A slim network is the teacher's class at a smaller size, and a student with it is a stock diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_pipeline, tiny_prompts
from torch import nn

import stepdistill
from stepdistill.errors import UserError
from stepdistill.families._slim_unet import slim_unet
from stepdistill.methods.slimflow import SlimFlow
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.roles import Adapters
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.run import Run

Teachers = Callable[[str], PipelineTeacher]
UNETS = ("unet-ddpm", "unet-classes", "sd", "sdxl")


def weights(net: nn.Module) -> int:
    return sum(value.numel() for value in net.parameters())


@pytest.mark.parametrize("name", UNETS)
def test_a_slim_network_takes_and_gives_what_the_old_one_does(name: str, teacher_of: Teachers) -> None:
    """Same class, inputs and outputs; random weights, the same at every call, without a draw from the global stream."""
    teacher = teacher_of(name)
    old: Any = teacher.denoiser.net
    state = torch.get_rng_state()
    slim: Any = teacher.family.changes.slimmer(old, 0.5, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(slim) is type(old) and slim.training == old.training
    assert weights(slim) < 0.5 * weights(old)
    other = teacher.family.changes.slimmer(old, 0.5, 1.0).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in slim.state_dict().items())
    assert all(value.requires_grad for value in slim.parameters())
    changed = {key for key, value in old.config.items() if slim.config[key] != value}
    assert changed <= {"block_out_channels", "attention_head_dim", "_use_default_values"}
    cond = teacher.codec.encode(tiny_prompts(name, 3))
    x = torch.randn(3, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    student = Student(slim, teacher.path, teacher.denoiser.output, teacher.family)
    said = student.predict(x, torch.full((3,), 0.5), cond).x0
    assert said.shape == x.shape and bool(torch.isfinite(said).all())
    shape = teacher.family.feature_shape(slim, teacher.codec.shape)
    assert student.features(x, torch.full((3,), 0.5), cond).shape[1:] == shape


def size_on_meta(width: float, depth: float, **config: Any) -> tuple[Any, float]:
    """The slim config and its share of the weights, without memory for either."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        old = UNet2DConditionModel(**config)
        slim: Any = slim_unet(old, width, depth)
    return slim.config, weights(slim) / weights(old)


def test_half_the_channels_are_a_quarter_of_the_weights_of_stable_diffusion() -> None:
    """Networks of Stable Diffusion 1.5 (8 heads), 2.1 (64 channels a head) and SDXL (up to 10 transformer layers)."""
    config, share = size_on_meta(0.5, 1.0, cross_attention_dim=768)
    assert list(config.block_out_channels) == [160, 320, 640, 640]
    assert list(config.attention_head_dim) == [8, 8, 8, 8]
    assert 0.24 < share < 0.3
    config, both = size_on_meta(0.5, 0.5, cross_attention_dim=768)
    assert config.layers_per_block == 1 and both < 0.75 * share
    config, _ = size_on_meta(0.7, 1.0, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20])
    assert list(config.block_out_channels) == [224, 448, 896, 896]
    # 224 does not split into 5 heads, 448 not into 10, 896 not into 20.
    assert list(config.attention_head_dim) == [4, 8, 16, 16]
    config, share = size_on_meta(
        1.0,
        0.5,
        cross_attention_dim=2048,
        attention_head_dim=[5, 10, 20],
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=[1, 2, 10],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    assert list(config.transformer_layers_per_block) == [1, 1, 5]
    assert list(config.block_out_channels) == [320, 640, 1280] and share < 0.5


def test_what_cannot_be_slimmer_is_refused(teacher_of: Teachers) -> None:
    for name in ("dit", "sd3"):
        teacher = teacher_of(name)
        with pytest.raises(UserError, match="Model: leave both at 1"):
            teacher.family.changes.slimmer(teacher.denoiser.net, 0.5, 1.0)
    teacher = teacher_of("sd")
    with pytest.raises(UserError, match=r"channels come in multiples of 4 \(8, 16\)"):
        teacher.family.changes.slimmer(teacher.denoiser.net, 1.0, 0.5)  # it has one layer a resolution
    with pytest.raises(UserError, match=r"set student\.lora_rank=0"):
        SlimFlow(Adapters(teacher, 2), (1.0,), SlimFlow.Options(width=0.5))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet-classes", "sd"])
def test_a_slim_student_is_a_stock_folder(name: str, tmp_path: Path) -> None:
    """Trained over both stages, exported, verified: the teacher's pipeline class around a smaller unet. Its checkpoint
    goes back into a run that is built anew."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\ndog\ncat face\nsun\n")
    sets = [
        *("train.batch=4", "train.checkpoint_every=2", "train.preview_every=0", "evaluate=false"),
        *("options.pairs=4", "options.pair_steps=2", "options.reflow_updates=2", "options.width=0.5"),
        *([f"data.prompts={prompts}"] if name == "sd" else []),
        "train.updates=4",
    ]
    teacher = tiny_pipeline(name)
    run = stepdistill.distill(teacher, "slimflow", tmp_path / "run", sets=sets)
    assert "differ from the trainer's by" in run.report.verification
    index = json.loads((run.student / "model_index.json").read_text())
    assert index["_class_name"] == type(teacher).__name__
    assert index["unet"] == ["diffusers", type(teacher.unet).__name__]
    assert not list(run.student.rglob("*.py"))
    loaded = load_teacher(str(run.student))
    assert weights(loaded.unet) < 0.5 * weights(teacher.unet)
    assert list(loaded.unet.config.block_out_channels) == [4, 8]
    # Its output is v: another than the teacher's eps, as the scheduler is told.
    scheduler = json.loads((run.student / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    recipe = load_recipe(run.folder / "recipe.yaml")
    job = assemble(resolve(recipe), Accelerator(cpu=True), tiny_pipeline(name))
    Run(job.objective, recipe, run.folder).restore()
    saved = loaded.unet.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in job.student.net.state_dict().items())
