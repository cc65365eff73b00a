"""The flow teacher that ships in parts: put together once, whole, and small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from stepdistill.errors import UserError
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.emoji import embedded_teachers, features_folder, teacher_folder
from stepdistill.system.shipped import cache_folder

NAME = "emoji-flow"


def test_the_flow_teacher_is_put_together_once_and_plain_diffusers_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    folder = teacher_folder(NAME)
    assert folder is not None and folder.is_relative_to(tmp_path)
    made = (folder / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert teacher_folder(NAME) == folder and [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == made
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.shift == 3.0
    clip = load_file(features_folder() / "model.safetensors")
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, clip[name].float())
    states, _, _, _ = pipe.encode_prompt("red apple", None, None, do_classifier_free_guidance=False)
    assert not states[:, pipe.tokenizer_max_length :].any()  # the third encoder says nothing
    images = [pipe(p, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
              for p in ("red apple", "green apple")]  # fmt: skip
    red, green = (image.mean((0, 2, 3)) for image in images)
    assert red[0] - red[1] > 0.1 + green[0] - green[1]  # it draws what it is asked for


def test_what_ships_of_the_flow_teacher_is_small() -> None:
    files = [path for path in embedded_teachers()[NAME].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set STEPDISTILL_CACHE to a folder that can be written to"):
        teacher_folder(NAME)


def test_a_method_on_an_embedded_teacher_means_its_recipe_there() -> None:
    assert load_recipe(None, teacher=NAME, method="lcm") == load_recipe("lcm_emoji-flow")
    assert load_recipe(None, method="dmd") == load_recipe("dmd_emoji_quick")
    assert load_recipe(None, method="lcm") == load_recipe("lcm_emoji")
    assert load_recipe(None, teacher="some/folder", method="lcm").options == {}


def test_the_cache_lies_where_its_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPDISTILL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value, wanted in (("", tmp_path / "home" / ".cache"), (str(tmp_path / "xdg"), tmp_path / "xdg")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == wanted / "stepdistill"
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
