"""A student that starts as another network than the teacher's: what it is then, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE

from stepdistill.errors import UserError
from stepdistill.families._slim_unet import slim_unet
from stepdistill.networks.denoiser import Denoiser
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.emoji import teacher_folder
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.cost import passes_before
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.preflight import check_recipe
from stepdistill.training.training_data import training_data

SETS = (
    *(
        "train.batch=2",
        "train.updates=2",
        "train.preview_every=0",
        "evaluate=false",
        "options.fake_updates=1",
    ),
    "student.output=teacher",
)


def saved(folder: Path, added: float, **scheduler: Any) -> Path:
    """The embedded teacher with another bias at its end, and another scheduler where some of its config is given."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(teacher_folder("emoji"), local_files_only=True)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(added)
    if scheduler:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **scheduler)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that says v, where the teacher says eps."""
    return saved(tmp_path_factory.mktemp("start"), 0.5, prediction_type="v_prediction")


def recipe_of(place: Path, start: object, *more: str, method: str = "dmd") -> Any:
    (place / "prompts.txt").write_text("red heart\nblue fish\n")
    sets = [*(SETS if method == "dmd" else SETS[:-2]), f"data.prompts={place / 'prompts.txt'}"]
    return load_recipe(HERE / "empty.yaml", method=method, sets=[*sets, f"student.start={start}", *more])


def assembled(recipe: Any) -> Assembled:
    check_recipe(recipe)
    return assemble(resolve(recipe), Accelerator(cpu=True))


def bias(of: Denoiser) -> torch.Tensor:
    return of.net.conv_out.bias.detach().clone()  # type: ignore[union-attr,operator]


def test_the_student_alone_starts_there_and_says_what_it_says_there(tmp_path: Path, of_v: Path) -> None:
    job = assembled(recipe_of(tmp_path, of_v))
    roles = job.method.roles
    own = bias(roles.teacher.denoiser)
    assert torch.equal(bias(job.student), own + 0.5) and torch.equal(bias(roles["fake"]), own)
    assert job.student.output == "v" and roles["fake"].output == roles.teacher.denoiser.output == "eps"
    assert job.sampler.prediction_type == "v_prediction"
    assert all(value.requires_grad for value in job.student.net.parameters())
    assert not passes_before(job, training_data(job, tmp_path)).total  # nothing was turned into v


def test_a_run_goes_on_with_the_very_same_start_alone(tmp_path: Path) -> None:
    start = saved(tmp_path / "start", 0.5)
    recipe = recipe_of(tmp_path, start)
    job = assembled(recipe)
    train(job.objective, training_data(job, tmp_path), recipe, tmp_path, Accelerator(cpu=True))
    trained = bias(job.student)
    again = assembled(recipe)
    train(
        again.objective, training_data(again, tmp_path), recipe, tmp_path, Accelerator(cpu=True), resume=True
    )
    assert torch.equal(bias(again.student), trained)
    saved(start, 0.25)
    other = assembled(recipe)
    with pytest.raises(UserError, match=r"student\.start \(.*start\) changed since step 2"):
        train(
            other.objective,
            training_data(other, tmp_path),
            recipe,
            tmp_path,
            Accelerator(cpu=True),
            resume=True,
        )


def test_a_part_of_it_may_be_frozen(tmp_path: Path, of_v: Path) -> None:
    job = assembled(recipe_of(tmp_path, of_v, "student.freeze=[conv_out]"))
    assert "conv_out.bias" not in job.method.roles.weights("student")
    assert torch.equal(bias(job.student), bias(job.teacher.denoiser) + 0.5)


def test_a_smaller_network_may_start_it(tmp_path: Path) -> None:
    """As a slim student is distilled further, whose class is the teacher's."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(teacher_folder("emoji"), local_files_only=True)
    pipe.unet = slim_unet(pipe.unet, 0.4, 1.0)
    pipe.save_pretrained(tmp_path / "slim")
    recipe = recipe_of(tmp_path, tmp_path / "slim", "options.fake_updates=1")
    job = assembled(recipe)
    count = [
        sum(p.numel() for p in each.net.parameters()) for each in (job.student, job.method.roles["fake"])
    ]
    assert count[0] < 0.5 * count[1]
    train(job.objective, training_data(job, tmp_path), recipe, tmp_path, Accelerator(cpu=True))
    again = recipe_of(tmp_path, tmp_path / "slim", "options.reflow_updates=1", method="slimflow")
    assert sum(p.numel() for p in assembled(again).student.net.parameters()) == count[0]


def test_what_cannot_start_it_is_refused(tmp_path: Path, of_v: Path) -> None:
    with pytest.raises(
        UserError, match=r"start is .* and lora_rank is 4, but adapters all lie on the teacher's"
    ):
        recipe_of(tmp_path, of_v, "student.lora_rank=4")
    with pytest.raises(UserError, match=r"student\.start: teacher .*nowhere does not exist"):
        check_recipe(recipe_of(tmp_path, tmp_path / "nowhere"))
    with pytest.raises(
        UserError, match=r"student\.output is x0, but student\.start: .* says v, and stays so"
    ):
        assembled(recipe_of(tmp_path, of_v, "student.output=x0"))
    with pytest.raises(
        UserError, match=r"options\.width=0\.5 and options\.depth=1 give the student a new network"
    ):
        assembled(recipe_of(tmp_path, of_v, "options.width=0.5", method="slimflow"))
    linear = saved(tmp_path / "linear", 0.0, beta_schedule="linear")
    with pytest.raises(UserError, match=r"has another noise schedule than emoji"):
        assembled(recipe_of(tmp_path, linear))
    with pytest.raises(UserError, match=r"student\.start: emoji-flow has another pipeline class"):
        assembled(recipe_of(tmp_path, "emoji-flow"))
