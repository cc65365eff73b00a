"""Further teachers of a recipe: loaded, given their prompts, and refused where they cannot teach the same student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE

from stepdistill.errors import UserError
from stepdistill.networks.roles import TEACHER
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.emoji import teacher_folder
from stepdistill.training.assemble import assemble
from stepdistill.training.further_teachers import identity_of
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.preflight import check_recipe
from stepdistill.training.training_data import training_data

COMMON = [
    "train.batch=4",
    "train.updates=2",
    "train.preview_every=0",
    "evaluate=false",
    "options.teacher_calls=1",
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Four prompts, two of which are another teacher's, which is the teacher itself with a larger output."""
    (tmp_path / "prompts.txt").write_text("red heart\nblue fish\ngreen book\nyellow star\n")
    (tmp_path / "other.txt").write_text("blue fish\nyellow star\n")
    return tmp_path


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded teacher, fine-tuned."""
    from diffusers import DiffusionPipeline

    folder = tmp_path_factory.mktemp("changed")
    pipe = DiffusionPipeline.from_pretrained(teacher_folder("emoji"), local_files_only=True)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(0.5)
    pipe.save_pretrained(folder)
    return folder


def recipe_of(place: Path, teacher: Any, *more: str, method: str = "opd") -> Any:
    sets = [
        *COMMON,
        f"data.prompts={place / 'prompts.txt'}",
        f"teachers.other={teacher}",
        f"data.route.other={place / 'other.txt'}",
        *more,
    ]
    return load_recipe(HERE / "empty.yaml", method=method, sets=sets)


def test_each_prompt_learns_from_its_own_teacher_and_a_run_knows_them(place: Path, changed: Path) -> None:
    recipe = recipe_of(place, changed, "options.guidance_of={other: 1.5}")
    check_recipe(recipe)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator)
    route = job.method.roles.route
    assert list(route.teachers) == [TEACHER, "other"] and route.of_prompt.tolist() == [0, 1, 0, 1]  # type: ignore[union-attr]
    own, other = (each.denoiser.net.conv_out.bias for each in route.teachers.values())  # type: ignore[union-attr]
    torch.testing.assert_close(other, own + 0.5)
    assert not any(value.requires_grad for value in route.teachers["other"].denoiser.net.parameters())
    known = identity_of(route)
    assert known.keys() == {"teachers.other", "data.route"}
    data = training_data(job, place)
    train(job.objective, data, recipe, place, accelerator)
    (place / "other.txt").write_text("blue fish\n")
    again = assemble(resolve(recipe), accelerator)
    later = identity_of(again.method.roles.route)
    assert later["teachers.other"] == known["teachers.other"] and later["data.route"] != known["data.route"]
    with pytest.raises(UserError, match=r"data\.route"):
        train(again.objective, training_data(again, place), recipe, place, accelerator, resume=True)


def test_a_weaker_teacher_guides_at_all_prompts_and_a_run_knows_it(place: Path, changed: Path) -> None:
    def recipe_with(method: str, *more: str) -> Any:
        sets = [*COMMON[:-1], f"data.prompts={place / 'prompts.txt'}", f"teachers.weak={changed}", *more]
        return load_recipe(HERE / "empty.yaml", method=method, sets=sets)

    recipe = recipe_with("ayf", "options.guidance=1", "options.pairs=4", "options.pair_steps=2")
    check_recipe(recipe)
    accelerator = Accelerator(cpu=True)
    job = assemble(resolve(recipe), accelerator)
    route = job.method.roles.route
    assert list(route.teachers) == [TEACHER] and route.of_prompt is None and route.weak is not None
    assert identity_of(route).keys() == {"teachers.weak"}
    own, weak = (each.denoiser.net.conv_out.bias for each in (route.teachers[TEACHER], route.weak))  # type: ignore[union-attr]
    torch.testing.assert_close(weak, own + 0.5)
    train(job.objective, training_data(job, place), recipe, place, accelerator)
    with pytest.raises(UserError, match="in meanflow nothing does: leave it out, or take a method"):
        assemble(resolve(recipe_with("meanflow")), accelerator)
    with pytest.raises(UserError, match=r"data\.route gives prompts to weak"):
        recipe_with("ayf", f"data.route.weak={place / 'other.txt'}")


def test_a_lora_may_teach(place: Path, tmp_path: Path) -> None:
    """Saved as diffusers does, on the embedded teacher: its weights are the teacher's with it merged."""
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = DiffusionPipeline.from_pretrained(teacher_folder("emoji"), local_files_only=True)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with torch.no_grad():
        for name, value in pipe.unet.named_parameters():
            if "lora" in name:
                value.fill_(0.1)
    folder = tmp_path / "lora"
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    for given in (folder, folder / "pytorch_lora_weights.safetensors"):
        recipe = recipe_of(place, given)
        check_recipe(recipe)
        job = assemble(resolve(recipe), Accelerator(cpu=True))
        nets = [each.denoiser.net.state_dict() for each in job.method.roles.route.teachers.values()]
        moved = {key for key, value in nets[0].items() if not torch.equal(value, nets[1][key])}
        assert moved and all("to_q" in key for key in moved)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["teachers.other=nowhere"], "teachers.other: teacher nowhere does not exist"),
        (["data.route.other=nowhere.txt"], "data.route.other: nowhere.txt not found"),
    ],
)
def test_what_is_not_there_is_said_before_anything_loads(sets: list[str], says: str, place: Path) -> None:
    with pytest.raises(UserError, match=says):
        check_recipe(recipe_of(place, "emoji", *sets))


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (
            ["data.route={}"],
            "other is in one of teachers and data.route alone, but data.route gives it no prompts",
        ),
        (["teachers={}"], "other is in one of teachers and data.route alone, but teachers has no such name"),
        (["teachers={teacher: emoji}", "data.route={teacher: a.txt}"], "is what the recipe's own is called"),
    ],
)
def test_names_belong_together(sets: list[str], says: str, place: Path) -> None:
    with pytest.raises(UserError, match=says):
        recipe_of(place, "emoji", *sets)


def test_a_method_of_one_teacher_and_teachers_of_other_states_are_refused(place: Path, changed: Path) -> None:
    def assembled(recipe: Any, pipeline: Any = None) -> Any:
        return assemble(resolve(recipe), Accelerator(cpu=True), pipeline)

    with pytest.raises(UserError, match="dmd learns from one teacher: leave teachers and"):
        assembled(load_recipe(HERE / "empty.yaml", method="dmd", sets=[
            *COMMON[:-1], "teachers.other=emoji", f"data.route.other={place / 'other.txt'}",
        ]))  # fmt: skip
    with pytest.raises(UserError, match="several teachers is called for the samples of its own"):
        assembled(recipe_of(place, changed, "train.parallel=sharded"))
    with pytest.raises(UserError, match=r"teachers\.other: emoji-flow has another pipeline class than emoji"):
        assembled(recipe_of(place, "emoji-flow"))
    (place / "third.txt").write_text("blue fish\n")
    both = [f"teachers.third={changed}", f"data.route.third={place / 'third.txt'}"]
    with pytest.raises(UserError, match="gives 'blue fish' to both other and third: take it out"):
        assembled(recipe_of(place, changed, *both))
    (place / "third.txt").write_text("purple fish\n")
    with pytest.raises(UserError, match=r"data\.route\.third: none of the prompts in .* is one to train on"):
        assembled(recipe_of(place, changed, *both))
