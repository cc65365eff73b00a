"""Families that draw from a picture: their calls are their pipelines', also guided, and the picture is heard."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_from_picture import BUILDERS, SIZES, pictured, tiny_from_picture
from torch import Tensor

from stepdistill.diffusion.solvers import solve
from stepdistill.errors import UserError
from stepdistill.export.checks import teacher_check
from stepdistill.families._from_picture import PICTURE
from stepdistill.families.size import Size
from stepdistill.families.watching import frames_of, watch
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pictures.given import asked, pictures_of, with_picture

EDITS = ("qwen-edit", "qwen-edit-plus")
EMBEDDED = ("kontext", "flux-2-edit")
OPTIONAL = ("klein-edit", "flux-2-edit")
Teachers = Callable[[str], PipelineTeacher]


@pytest.fixture(scope="module", autouse=True)
def small_pictures() -> Iterator[None]:
    """Qwen-Image-Edit's pipelines give their network a million pixels; here a 16th, by their own arithmetic."""
    names = ("pipeline_qwenimage_edit", "pipeline_qwenimage_edit_plus")
    modules = [importlib.import_module(f"diffusers.pipelines.qwenimage.{name}") for name in names]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            whole = module.calculate_dimensions
            patch.setattr(
                module, "calculate_dimensions", lambda area, ratio, own=whole: own(area / 16, ratio)
            )
        yield


@pytest.fixture(scope="module")
def teacher_of() -> Teachers:
    return cache(lambda name: PipelineTeacher(tiny_from_picture(name), size=SIZES[name]))


def drawn_by(teacher: PipelineTeacher, prompt: str, seed: int, **call: Any) -> tuple[Tensor, list[float]]:
    """The stock pipeline's own picture, as frames, and the noise levels at which it called its network."""
    words, picture = asked(prompt)
    size = teacher.size
    sides: dict[str, Any] = {"height": size.height, "width": size.width}
    if size.frames > 1:
        sides["num_frames"] = size.frames
    if teacher.family.name == "Flux.1 Kontext":
        sides |= {"max_area": size.height * size.width, "_auto_resize": False}
    assert picture is not None
    drawn = teacher.pipe(
        prompt=words, image=Image.open(picture), **sides, **call, output_type="np", return_dict=False,
        generator=torch.Generator().manual_seed(seed),
    )[0]  # fmt: skip
    return frames_of(drawn), teacher.pipe.scheduler.sigmas.tolist()


def guidance_of(name: str, scale: float) -> dict[str, Any]:
    """How a call of the pipeline says it."""
    return {"true_cfg_scale": scale, "negative_prompt": " "} if name in EDITS else {"guidance_scale": scale}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_guided_draw_is_the_pipelines(name: str, teacher_of: Teachers, tmp_path: Path) -> None:
    # Of three hundred tokens of its edits a few differ.
    teacher, scale = teacher_of(name), 300.0 if name in EDITS else 3.0
    (prompt,) = pictured(tmp_path, 1, SIZES[name])
    frames, times = drawn_by(teacher, prompt, 3, num_inference_steps=4, **guidance_of(name, scale))
    noise = torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(3))
    cond = teacher.codec.encode([prompt])
    states = solve(lambda x, t: teacher.predict(x, t, cond, guidance=scale), noise, times, "euler")
    ours = teacher.codec.to_frames(states)
    assert (ours - frames).abs().max() < 1e-4 and ours.std() > 0.02
    plain = solve(lambda x, t: teacher.predict(x, t, cond), noise, times, "euler")
    assert (teacher.codec.to_frames(plain) - frames).abs().max() > 1e-3  # and guidance does something


@pytest.mark.parametrize("name", BUILDERS)
def test_the_picture_is_heard_and_each_sample_has_its_own(
    name: str, teacher_of: Teachers, tmp_path: Path
) -> None:
    teacher = teacher_of(name)
    first, second = pictured(tmp_path, 2, SIZES[name])
    other = with_picture(asked(first).words, str(asked(second).picture))
    t, scale = torch.full((3,), 0.7), 2.0
    x_t = torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(1)).expand(
        3, *teacher.codec.shape
    )
    both = teacher.predict(x_t, t, teacher.codec.encode([first, second, other]), guidance=scale).x0
    apart = [
        teacher.predict(x_t[:1], t[:1], teacher.codec.encode([prompt]), guidance=scale).x0
        for prompt in (first, second, other)
    ]
    assert (both - torch.cat(apart)).abs().max() < 1e-4
    assert (apart[0] - apart[2]).abs().max() > 1e-3  # another picture, of the same words
    assert (apart[1] - apart[2]).abs().max() > 1e-6  # other words, of the same picture
    assert teacher.has_null == (name not in EMBEDDED)


@pytest.mark.parametrize("name", BUILDERS)
def test_checks_and_plans_may_ask_without_a_picture(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    apart = teacher_check(teacher, "a photograph of a cat", 2)
    assert apart is not None and apart < 1e-5
    shape = teacher.family.shape_of(teacher.pipe, teacher.size)  # type: ignore[attr-defined]
    found = teacher.codec.encode(["a cat"]).get(PICTURE)
    assert (found is None) == (name in OPTIONAL) and (found is None or found.shape == (1, *shape))
    # Its call is told the size that its pictures are cropped to, also where it is the pipeline's own.
    own = teacher.family.default_size(teacher.pipe)
    assert replace(teacher.codec, size=own).told_size == own


@pytest.mark.parametrize("name", BUILDERS)
def test_a_discriminator_reads_what_is_drawn_alone(name: str, teacher_of: Teachers, tmp_path: Path) -> None:
    teacher = teacher_of(name)
    (prompt,) = pictured(tmp_path, 1, SIZES[name])
    student, cond = Student.from_teacher(teacher), teacher.codec.encode([prompt])
    x_t, t = torch.randn(1, *teacher.codec.shape), torch.full((1,), 0.6)
    features = student.features(x_t, t, cond)
    channels, height, width = student.family.feature_shape(student.net, student.shape)
    assert features.shape == (1, height * width, channels)


@pytest.mark.parametrize("name", OPTIONAL)
def test_where_a_picture_is_optional_all_prompts_name_one_or_none_does(
    name: str, teacher_of: Teachers, tmp_path: Path
) -> None:
    teacher = teacher_of(name)
    named = pictured(tmp_path, 2, SIZES[name])
    teacher.family.check_prompts("Flux2", named)
    teacher.family.check_prompts("Flux2", ["a cat", "a dog"])
    with pytest.raises(UserError, match="prompt 2, 'a cat', names no picture, but others name one: write"):
        teacher.family.check_prompts("Flux2", [named[0], "a cat"])
    call = teacher.family.call_arguments("", ["a cat"], None, teacher.size)
    assert "image" not in call and call["prompt"] == ["a cat"]


def test_flux_2_shrinks_a_picture_of_more_than_a_million_pixels(tmp_path: Path) -> None:
    """As its pipeline does, to sides that are multiples of what one token stands for."""
    teacher = PipelineTeacher(tiny_from_picture("klein-edit"), size=Size(1024, 1040))
    (prompt,) = pictured(tmp_path, 1, teacher.size)
    picture = pictures_of([prompt], 1024, 1040)
    unit = teacher.family.unit(teacher.pipe)
    found = teacher.family.latents_of(teacher.pipe, picture, teacher.size)  # type: ignore[attr-defined]
    assert found.shape[2:] == (1016 // unit, 1031 // unit)
    call = {"prompt": "red", "image": picture[0], "height": 64, "width": 64, "num_inference_steps": 1}
    seen = watch(teacher.pipe, {**call, "guidance_scale": 1.0}, end_after=1).steps[0].calls[0]
    torch.testing.assert_close(
        seen.kwargs["hidden_states"][:, 64 // unit * 64 // unit :], teacher.family.pack(found)
    )


def test_of_wan_2_2_5b_the_first_frame_is_the_picture_from_any_state(teacher_of: Teachers) -> None:
    teacher = teacher_of("wan-2.2-ti2v")
    cond = teacher.codec.encode(["a cat"])
    for t in (1.0, 0.4):
        x_t = torch.randn(1, *teacher.codec.shape)
        said = teacher.predict(x_t, torch.tensor([t]), cond)
        assert torch.allclose(said.x0[:, :, :1], cond[PICTURE], atol=1e-5)
        moved = torch.cat([torch.randn_like(x_t[:, :, :1]), x_t[:, :, 1:]], 2)
        again = teacher.predict(moved, torch.tensor([t]), cond)
        assert torch.allclose(again.x0, said.x0, atol=1e-5)


def test_pictures_of_another_size_are_cropped_to_what_is_drawn(teacher_of: Teachers, tmp_path: Path) -> None:
    teacher = teacher_of("kontext")
    height, width = SIZES["kontext"].height, SIZES["kontext"].width
    (exact,) = pictured(tmp_path, 1, SIZES["kontext"])
    whole = np.asarray(Image.open(str(asked(exact).picture)))
    wide = np.concatenate([np.zeros((height, 8, 3), np.uint8), whole, np.zeros((height, 8, 3), np.uint8)], 1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert wide.shape == (height, width + 16, 3)
    same, other = (
        teacher.codec.encode([with_picture("make it red", file)])[PICTURE]
        for file in (str(asked(exact).picture), tmp_path / "wide.png")
    )
    assert torch.equal(same, other)


def test_a_pipeline_that_cannot_read_its_prompts_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ftfy" else find(name))
    with pytest.raises(UserError, match="reads prompts with ftfy, which is not installed: pip install ftfy"):
        PipelineTeacher(tiny_from_picture("wan-i2v"), size=SIZES["wan-i2v"])


def test_a_pipeline_without_one_of_its_networks_is_refused() -> None:
    pipe = tiny_from_picture("wan-2.2-i2v")
    pipe.transformer_2 = None
    with pytest.raises(
        UserError, match="this WanImageToVideoPipeline has no transformer_2, which it calls in a"
    ):
        PipelineTeacher(pipe, size=SIZES["wan-2.2-i2v"])
