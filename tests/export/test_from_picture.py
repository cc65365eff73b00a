"""Students that draw from a picture: their proof holds the pictures, and their pipelines are called with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import shaken, tiny_pipeline
from tiny_from_picture import SIZES, pictured, tiny_from_picture
from typer.testing import CliRunner

from stepdistill.cli import app
from stepdistill.data.prompts import read_prompts
from stepdistill.errors import UserError
from stepdistill.evaluation.asked import asked_of
from stepdistill.evaluation.draw_into import as_named, draw_into
from stepdistill.evaluation.sample import sample
from stepdistill.evaluation.trace import asked as asked_pipelines
from stepdistill.evaluation.trace import trace
from stepdistill.export.card import model_card
from stepdistill.export.student_folder import export, pipeline_call
from stepdistill.export.verify import verify
from stepdistill.networks.own_call import own_call, proof_calls, proof_prompts
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pictures.given import asked, with_picture
from stepdistill.sharing.drawers import student_drawer
from stepdistill.sharing.hub_card import hub_card

NAMES = ("kontext", "wan-i2v")


class Made:
    """A student's folder, beside its teacher's."""

    def __init__(self, name: str, place: Path) -> None:
        self.teacher = PipelineTeacher(tiny_from_picture(name), size=SIZES[name], guidance=2.0)
        self.prompts, self.sampler = pictured(place, 2, SIZES[name]), Sampler((1.0,), renoise=False)
        self.folder, self.place = place / "student", place
        roles = Copies(self.teacher)
        shaken(torch.nn.ParameterList(roles.parameters("student")))
        export(
            roles.student, self.sampler, self.teacher, self.folder, self.prompts, "# A card\n", seeds=(0, 1)
        )
        self.manifest: dict[str, Any] = json.loads((self.folder / "verification/manifest.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {name: Made(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_proof_is_drawn_from_the_pictures_beside_it(name: str, made: dict[str, Made]) -> None:
    run = made[name]
    call = run.manifest["call"]
    assert call["prompt"] == [asked(prompt).words for prompt in run.prompts]
    assert call["image"] == ["verification/given_0.png", "verification/given_1.png"]
    assert set(call["image"]) <= run.manifest["files"].keys()
    for kept, prompt in zip(call["image"], run.prompts, strict=True):
        own = np.asarray(Image.open(str(asked(prompt).picture)))
        assert np.array_equal(np.asarray(Image.open(run.folder / kept)), own)
    found = verify(run.folder)
    assert found.images == 2 and found.worst <= 1
    calls = proof_calls(run.manifest, run.folder)
    assert [len(seeds) for _, seeds in calls] == [1, 1]
    again = proof_prompts(run.manifest, run.folder)
    assert again is not None and [asked(prompt).words for prompt in again] == call["prompt"]


def test_a_proof_whose_picture_was_swapped_or_lies_outside_does_not_pass(
    made: dict[str, Made], tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(made["kontext"].folder, folder)
    first, second = (folder / f"verification/given_{i}.png" for i in range(2))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"given_0\.png was altered since export"):
        verify(folder)
    first.write_bytes(kept)
    file = folder / "verification/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["call"]["image"][0] = "../outside.png"
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"call has \.\./outside\.png, which is no file of the folder"):
        verify(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_is_sampled_from_pictures(name: str, made: dict[str, Made], tmp_path: Path) -> None:
    """As its proof was drawn, whatever else is asked for, one at a time where its call takes one."""
    run = made[name]
    own = own_call(run.folder)
    assert own is not None and "image" not in own.arguments and own.alone and own.from_picture
    drawn = sample(str(run.folder), run.prompts, seed=0)
    for i, frames in enumerate(drawn.frames):
        kept = np.asarray(Image.open(run.folder / f"verification/{i}.png")).astype(int)
        shown = [frames[k] for k in dict.fromkeys((0, len(frames) // 2, len(frames) - 1))]
        assert np.abs(np.concatenate([np.asarray(each) for each in shown], 1).astype(int) - kept).max() <= 1
    draw_into(tmp_path / "into", [as_named(str(run.folder))], run.prompts, 2, progress=False)
    index = read_prompts(tmp_path / "into/student/metadata.jsonl")
    assert index == run.prompts
    middle = [frames[len(frames) // 2] for frames in drawn.frames]
    for i, picture in enumerate(middle):
        (file,) = (tmp_path / "into/student").glob(f"*{i}.png")
        assert np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(picture).astype(int)).max() <= 1
    with pytest.raises(UserError, match=r"prompt 1, 'a cat', names no picture, but .* draws from one: write"):
        sample(str(run.folder), ["a cat"])
    with pytest.raises(
        UserError, match="demo: this student draws from a picture, which is not served here yet"
    ):
        student_drawer(run.folder, "name", "cpu")


def test_the_command_takes_a_picture_for_all_prompts_or_one_for_each(
    made: dict[str, Made], tmp_path: Path
) -> None:
    run = made["kontext"]
    words, files = zip(*(asked(prompt) for prompt in run.prompts), strict=True)
    asks = ["sample", str(run.folder), *words]

    def grid(*more: str) -> np.ndarray:
        done = CliRunner().invoke(app, [*asks, *more, "--output", str(tmp_path / "grid.png")])
        assert done.exit_code == 0, done.output
        return np.asarray(Image.open(tmp_path / "grid.png")).astype(int)

    each = grid("--image", str(files[0]), "--image", str(files[1]))
    first = grid("--image", str(files[0]))
    half = each.shape[1] // 2
    assert np.array_equal(each[:, :half], first[:, :half]) and not np.array_equal(each, first)
    done = CliRunner().invoke(app, [*asks, *(f"--image={files[0]}" for _ in range(3))])
    assert "--image is given 3 times for 2 prompts: give one, or one for each" in str(done.exception)


def test_a_call_has_the_size_that_its_pictures_are_cropped_to(made: dict[str, Made], tmp_path: Path) -> None:
    run = made["kontext"]
    told = asked_of(run.teacher.pipe, run.prompts[:1], {"height": 32, "width": 16})
    assert (told["height"], told["width"], told["max_area"]) == (32, 16, 512) and told["image"].size == (
        16,
        32,
    )
    assert told["prompt"] == ["make it red"] and told["_auto_resize"] is False
    own = asked_of(run.teacher.pipe, run.prompts[:1], {})  # its pipeline's own
    assert own["image"].size == (own["width"], own["height"])
    with pytest.raises(
        UserError, match=r"prompt 1, .* names a picture, but StableDiffusionPipeline draws from text"
    ):
        asked_of(tiny_pipeline("sd"), [with_picture("a", tmp_path / "a.png")], {})


def test_a_card_says_that_it_draws_from_a_picture(made: dict[str, Made]) -> None:
    run = made["wan-i2v"]
    call = pipeline_call("WanImageToVideoPipeline", run.sampler, run.teacher.codec, run.prompts)
    card = model_card(
        teacher="owner/name", method="dmd", summary="DMD", steps=1, guidance=2.0, call=call, grid="", command="",
        video=True,
    )  # fmt: skip
    assert "pipeline_tag: image-to-video" in card and "from diffusers.utils import load_image\n" in card
    assert 'picture = ImageOps.fit(load_image("picture.png"), (16, 32))\n' in card
    assert "pipe(image=picture, prompt='make it red', " in card
    shared = hub_card(
        card, repo="me/it", pipeline="WanImageToVideoPipeline", call=run.manifest["call"], files={},
        base_model=None, licence=None,
    )  # fmt: skip
    assert "pipeline_tag: image-to-video" in shared


def test_a_trace_draws_each_seed_from_the_picture(made: dict[str, Made], tmp_path: Path) -> None:
    """Its last prediction of the first seed is the first picture of the proof."""
    run = made["wan-i2v"]
    (found,) = trace(asked_pipelines([str(run.folder)], None, None), run.prompts[:1], 2, tmp_path, "emoji")
    kept = np.asarray(Image.open(run.folder / "verification/0.png")).astype(int)
    first, second = (found.pictures[0, seed, -1].permute(1, 2, 0).numpy().astype(int) for seed in (0, 1))
    assert np.abs(first - kept).max() <= 1 and not np.array_equal(first, second)
