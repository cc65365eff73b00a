"""Folders whose weights have a variant in their names: that is told, with what makes a folder of them that is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.networks.loading import load_pipeline, load_teacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training.preflight import check_recipe

UNET = "unet/diffusion_pytorch_model"


def half(folder: Path, **how: Any) -> Path:
    tiny_pipeline("sd").to(torch.float16).save_pretrained(folder, variant="fp16", **how)
    return folder


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "20KB"}], ids=["whole", "shards"])
def test_weights_of_a_variant_alone_are_refused_with_what_to_do(how: dict[str, Any], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = half(tmp_path / "sd", **how)
    says = r"text_encoder has weights of the variant fp16 alone \(model\..*safetensors\)"
    recipe = load_recipe(None, teacher=str(folder), method="dmd")
    for take in (
        lambda: check_recipe(recipe),
        lambda: load_teacher(str(folder)),
        lambda: load_pipeline(folder),
    ):
        with pytest.raises(UserError, match=says) as caught:
            take()
        assert "\n" not in str(caught.value) and "variant='fp16').save_pretrained('OTHER')" in str(
            caught.value
        )
    DiffusionPipeline.from_pretrained(folder, variant="fp16").save_pretrained(tmp_path / "other")
    assert load_teacher(str(tmp_path / "other")).unet.dtype == torch.float32


def test_a_variant_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path)
    half(tmp_path)
    assert (tmp_path / f"{UNET}.fp16.safetensors").is_file() and (tmp_path / f"{UNET}.safetensors").is_file()
    wanted = tiny_pipeline("sd").unet.state_dict()
    found = load_teacher(str(tmp_path)).unet.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
