"""Every recipe for a real teacher: two updates on a tiny random one of its class, to the student that is proven."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from tiny import SIZES, tiny_pipeline
from tiny_from_picture import BUILDERS as FROM_PICTURE
from tiny_from_picture import SIZES as PICTURE_SIZES
from tiny_from_picture import tiny_from_picture

from stepdistill.errors import UserError
from stepdistill.export.verify import verify
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.shipped import of_real_teacher, recipe_files
from stepdistill.training.assemble import assemble
from stepdistill.training.exporting import export_student
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.preflight import check_recipe
from stepdistill.training.run_report import Start
from stepdistill.training.training_data import training_data

PAIRS = ("options.pairs=2", "options.pair_steps=2")
FAKE = ("options.fake_updates=1",)
# The tiny teacher, and what of the recipe is made smaller beside its length.
REAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "dmd2_sdxl_4step": ("sdxl", FAKE),
    "dmd2_sdxl_lora": ("sdxl", FAKE),
    "dmd2_sdxl_1step": ("sdxl", (*PAIRS, *FAKE, "options.warm_start=1", "train.updates=3")),
    "lcm_lora_sdxl": ("sdxl", ()),
    "tcd_sdxl": ("sdxl", ()),
    "pcm_sd15": ("sd", ()),
    "hyper_sd15": ("sd", ("options.stage_updates=1", "options.segments=[2,1]")),
    "scm_sana": ("sana", ()),
    "dmd2_sd35_medium": ("sd3", FAKE),
    "dmd2_flux_lora": ("flux", FAKE),
    "phased_dmd_qwen_image_lora": ("qwen-image", (*FAKE, "options.phase_updates=1", "train.updates=4")),
    "phased_dmd_wan22": ("wan-2.2", (*FAKE, "options.phase_updates=1", "train.updates=4")),
    "dmd2_flux_kontext_lora": ("kontext", FAKE),
    "phased_dmd_qwen_image_edit_lora": (
        "qwen-edit-plus",
        (*FAKE, "options.phase_updates=1", "train.updates=4"),
    ),
    "phased_dmd_wan22_i2v": ("wan-2.2-i2v", (*FAKE, "options.phase_updates=1", "train.updates=4")),
    "sim_pixart": ("pixart-alpha", FAKE),
    "instaflow_sd15": (
        "sd",
        (*PAIRS, "options.reflow_updates=1", "options.l2_updates=1", "options.flow_steps=2"),
    ),
}
COMMON = (
    "train.updates=2 train.batch=1 train.accumulate=1 train.preview_every=0 train.warmup=0 train.precision=float32 "
    "train.teacher_precision=null train.lr=1e-3 evaluate=false"
).split()


def test_all_real_recipes_are_run_and_say_what_they_are() -> None:
    real = {name: file.read_text() for name, file in recipe_files().items() if of_real_teacher(file)}
    assert real.keys() == {*REAL, "freeflow_dit"}
    for name, text in real.items():
        assert "Not measured. Two updates" in text and "Needs: " in text and load_recipe(name).teacher in text
        assert "Memory, by arithmetic" in text or name == "freeflow_dit"
        assert re.search(r"\d{4}\.\d{5}", text), name  # its paper


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and two pictures with captions."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("a red heart\nblue fish\n")
    (folder / "images").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(("a red heart", "blue fish")[i])
    rows = [{"prompt": "make it red", "input_image": f"images/{i}.png"} for i in range(2)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_of(name: str, inputs: Path, output: Path, *more: str) -> Any:
    """The run of a shrunken recipe, trained."""
    tiny, own = REAL[name]
    recipe, size = load_recipe(name), (SIZES | PICTURE_SIZES).get(tiny)
    file = "prompts.jsonl" if tiny in FROM_PICTURE else "prompts.txt"
    sets = [*COMMON, f"data.prompts={inputs / file}"]
    sets += [f"data.images={inputs / 'images'}"] if recipe.data.images else []
    sets += ["student.lora_rank=2"] if recipe.student.lora_rank else []
    sides = [size.height, size.width, size.frames][: 3 if size.frames > 1 else 2] if size else None
    sets += [f"data.size={sides or 'null'}", *own, *more]
    recipe = load_recipe(name, teacher=tiny, sets=sets)
    accelerator = Accelerator(cpu=True)
    pipe = tiny_from_picture(tiny) if tiny in FROM_PICTURE else tiny_pipeline(tiny)
    run = assemble(resolve(recipe), accelerator, pipe)
    train(run.objective, training_data(run, output), recipe, output, accelerator)
    return run


SLOW = ("phased_dmd_qwen_image_edit_lora", "phased_dmd_wan22_i2v")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in REAL]
)
def test_two_updates_on_a_tiny_teacher_end_in_a_proven_student(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    run = run_of(name, inputs, tmp_path)
    export_student(run, tmp_path / "student", [Start(command="none")])
    found = verify(tmp_path / "student")
    assert found.worst <= 1 and found.steps == len(run.sampler.times)
    if name == "dmd2_sdxl_1step":  # on SDXL's own table
        assert run.sampler.times == (0.4,) and [int(t) for t in _timesteps(tmp_path / "student")] == [399]


def _timesteps(student: Path) -> list[float]:
    from diffusers import LCMScheduler

    scheduler: Any = LCMScheduler.from_pretrained(student, subfolder="scheduler")
    scheduler.set_timesteps(1)
    return [float(t) for t in scheduler.timesteps]


def test_prompts_and_pictures_must_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.prompts: prompts\.txt not found: give"):
        check_recipe(load_recipe("dmd2_sdxl_4step", teacher="emoji"))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(UserError, match=r"data\.images: images is not a folder"):
        check_recipe(load_recipe("dmd2_sdxl_4step", teacher="emoji"))
    with pytest.raises(UserError, match=r"or without images, .*: --set options\.source=pairs$"):
        check_recipe(load_recipe("lcm_lora_sdxl", teacher="emoji"))
    # What is not read need not be there.
    check_recipe(load_recipe("lcm_lora_sdxl", teacher="emoji", sets=["options.source=pairs"]))
