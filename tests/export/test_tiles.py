"""A VAE that decodes in tiles does so wherever its student draws: no folder of diffusers says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from run_toy import HERE
from student_toy import drawn, kept
from tiny import shaken, tiny_pipeline, tiny_prompts

from stepdistill.errors import UserError
from stepdistill.export.card import PLAIN
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import export
from stepdistill.export.verify import verify
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.networks.tiles import tiles_in, tiles_of
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve

SMALL = {"tile_sample_min_size": 16, "tile_latent_min_size": 4}
"""Of pictures of 32 x 32 pixels."""


def tiled() -> Any:
    pipe = tiny_pipeline("sd")
    pipe.vae.enable_tiling()
    for name, value in SMALL.items():
        setattr(pipe.vae, name, value)
    return pipe


def exported(pipe: Any, folder: Path) -> Path:
    teacher = PipelineTeacher(pipe)
    student = Student.from_teacher(teacher)
    shaken(student.net)
    sampler = on_stock_grid(Sampler((1.0, 0.5), True), student.path, teacher.pipe.scheduler)
    export(student, sampler, teacher, folder, tiny_prompts("sd", 2), PLAIN, seeds=(0, 1))
    return folder


def test_a_student_of_a_tiled_vae_is_verified_and_says_so(tmp_path: Path) -> None:
    folder = exported(tiled(), tmp_path / "student")
    assert tiles_in(folder) == {"use_tiling": True, **SMALL}
    assert verify(folder).worst <= 1
    pipe, _ = load_pipeline(folder, "cpu")
    assert tiles_of(pipe.vae) == tiles_in(folder)
    own = drawn(pipe, folder).int()
    assert (own - kept(folder).int()).abs().max() <= 1
    pipe.vae.disable_tiling()
    assert (drawn(pipe, folder).int() - own).abs().max() > 8
    card = (folder / "README.md").read_text("utf-8")
    assert '")\npipe.vae.enable_tiling()\npipe.vae.tile_sample_min_size = 16\n' in card

    file = folder / "verification" / "manifest.json"
    manifest = json.loads(file.read_text("utf-8"))
    del manifest["vae"]
    file.write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(UserError, match="its pictures differ from the trainer's"):
        verify(folder)


def test_a_student_of_a_whole_vae_says_nothing(tmp_path: Path) -> None:
    folder = exported(tiny_pipeline("sd"), tmp_path / "student")
    assert "vae" not in json.loads((folder / "verification" / "manifest.json").read_text("utf-8"))
    assert "pipe.vae" not in (folder / "README.md").read_text("utf-8")


def test_what_the_folder_says_itself_is_not_said_again() -> None:
    vae: Any = tiny_pipeline("sd").vae
    assert tiles_of(vae) == {} and tiles_of(None) == {} and tiles_of(torch.nn.Linear(1, 1)) == {}
    vae.enable_slicing()
    assert tiles_of(vae) == {"use_slicing": True}
    assert isinstance(vae, AutoencoderKL)
    video = tiny_pipeline("wan").vae
    video.enable_tiling(tile_sample_min_height=64)
    assert tiles_of(video) == {"use_tiling": True, "tile_sample_min_height": 64}


@pytest.mark.parametrize("said", [{"forward": 1}, {"use_tiling": [1]}, [1], 3])
def test_a_manifest_sets_nothing_else(said: Any, tmp_path: Path) -> None:
    (tmp_path / "verification").mkdir()
    (tmp_path / "verification" / "manifest.json").write_text(json.dumps({"vae": said}), "utf-8")
    assert tiles_in(tmp_path) == {}


def test_a_recipe_asks_for_tiles_of_a_folders_vae(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "sd")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red heart\nyellow star\n" * 8, "utf-8")

    def vae_of(*sets: str) -> Any:
        sets = (f"teacher={tmp_path / 'sd'}", f"data.prompts={prompts}", "evaluate=false", *sets)
        recipe = load_recipe(HERE / "empty.yaml", method="dmd", sets=[*sets, "train.batch=2"])
        return assemble(resolve(recipe), Accelerator(cpu=True)).teacher.pipe.vae

    assert vae_of("data.tiling=true").use_tiling and not vae_of().use_tiling
    tiny_pipeline("unet-ddpm").save_pretrained(tmp_path / "pixels")
    with pytest.raises(UserError, match=r"data\.tiling is true, but the teacher has no VAE: set it to false"):
        vae_of("data.tiling=true", f"teacher={tmp_path / 'pixels'}", "data.prompts=null")
