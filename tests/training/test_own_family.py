"""The worked example of a family from outside the package: the pipeline's own calls, and its recipe to the student."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BETAS, tiny_t5, tiny_t5_tokenizer, tiny_vae
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.families import family_in
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.shipped import content_folder
from stepdistill.training.distil import run_recipe

EXAMPLE = content_folder("train") / "examples" / "own_family.py"


@pytest.fixture
def pipe() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=16,
            caption_channels=16,
            norm_num_groups=4,
            use_additional_conditions=False,
        )
        for value in transformer.parameters():  # its last layer starts at zero
            torch.nn.init.normal_(value, std=0.2)
        pipe = PixArtSigmaPipeline(
            transformer=transformer,
            vae=tiny_vae(),
            scheduler=DPMSolverMultistepScheduler(**BETAS),
            text_encoder=tiny_t5(16),
            tokenizer=tiny_t5_tokenizer(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_example_is_short_and_calls_the_network_as_its_pipeline_does(pipe: Any) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
    teacher = PipelineTeacher(pipe, family=family_in(str(EXAMPLE)))
    said: list[tuple[Tensor, float, Tensor]] = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, more, out: said.append((args[0], float(more["timestep"][0]), out[0])),
        with_kwargs=True,
    )
    prompts = ["a red heart", "blue fish"]
    call = teacher.family.call_arguments("PixArtSigmaPipeline", prompts, None, None)
    pipe(**call, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent")
    hook.remove()
    assert len(said) == 3
    for x, timestep, out in said:
        ours = teacher.denoiser.raw(x, torch.full((2,), (timestep + 1) / 1000), teacher.codec.encode(prompts))
        assert (ours - out[:, :4]).abs().max() < 1e-5
        assert (ours[0] - ours[1]).abs().max() > 1e-3


def test_a_recipe_finds_the_family_beside_it_and_gives_a_verified_student(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(EXAMPLE.parent, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    pipe.save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red heart\nblue fish\n")
    sets = [
        *("train.updates=2", "train.batch=2", "train.preview_every=0", "train.precision=float32"),
        *("options.fake_warm_start=0", "student.output=teacher", "student.times=[1.0,0.5]"),
        *("data.size=[32,16]", f"data.prompts={tmp_path / 'prompts.txt'}"),
    ]
    recipe = load_recipe(tmp_path / "mine" / "own_family.yaml", teacher=str(tmp_path / "teacher"), sets=sets)
    monkeypatch.chdir(tmp_path)
    run = run_recipe(recipe, output=tmp_path / "run")
    assert run.report is not None and re.search("by [01]/255 at most", run.report.verification)


def test_a_family_that_is_not_the_teachers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        family_in(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="defines 0 subclasses of Family"):
        family_in(str(tmp_path / "empty.py"))
    recipe = load_recipe(sets=["family=" + str(EXAMPLE), "evaluate=false"])
    with pytest.raises(
        UserError, match=r"teacher emoji is a \w+, but the recipe's family is for PixArtSigma"
    ):
        run_recipe(recipe, output=tmp_path / "run")
