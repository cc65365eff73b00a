"""The worked example of a method from outside the package: its theorem, and its recipe from start to student."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.methods import find_method, needs
from stepdistill.networks.roles import Copies
from stepdistill.recipes.recipe import Recipe, load_recipe
from stepdistill.system.files import sha256_of
from stepdistill.system.run_folder import RunFolder
from stepdistill.system.shipped import content_folder, template_files
from stepdistill.testing import check_method
from stepdistill.testing.toys import Gaussian, GaussianMap, ToyTeacher, loss_of, toy_batch, toy_student
from stepdistill.training.checkpoint import read_state
from stepdistill.training.distil import export_run, run_recipe
from stepdistill.training.identity import resolve
from stepdistill.training.own_files import as_begun, check_own_files, copies, keep_own_files, own_hashes
from stepdistill.training.run import check_resume

EXAMPLE = content_folder("train") / "examples" / "own_method.py"


def halving(mean: float, deviation: float, student_mean: float):
    kind, path = find_method(str(EXAMPLE)), FlowPath()
    teacher = ToyTeacher(Gaussian(path, mean, deviation), path)
    return kind(
        Copies(teacher, toy_student(Gaussian(path, student_mean, deviation), path)),
        (1.0, 0.5),
        kind.Options(),
    )


def test_one_step_and_two_agree_where_trajectories_are_straight() -> None:
    """All data at one point: the teacher's x0 is that point everywhere, so is the target, and the loss of a student at
    another point is the mean weight times the squared distance."""
    batch = toy_batch(64, pairs=lambda z: torch.full_like(z, 0.7))
    assert loss_of(halving(0.7, 0.0, 0.7), "student", batch)[0].item() < 1e-10
    loss, logs = loss_of(halving(0.7, 0.0, 0.2), "student", batch)
    assert logs["error"].item() == pytest.approx(0.25, rel=1e-4)
    # t is 1 or 1/2 with SNR 0 or 1: every weight is at its floor of 1.
    assert loss.item() == pytest.approx(0.25, rel=1e-4)


def test_the_example_is_short_and_one_class() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
    assert find_method(str(EXAMPLE)) is find_method(str(EXAMPLE))  # one class in all parts of a run
    assert needs(str(EXAMPLE)) == "noise, prompts, pairs"


@pytest.mark.parametrize("file", [EXAMPLE, template_files()["own_method"]])
def test_what_ships_to_start_from_keeps_the_contract(file: Path) -> None:
    check_method(file)


def test_the_template_is_zero_where_the_student_is_the_teachers_map() -> None:
    """And else the squared distance, whose mean is that of the shift."""
    kind, path = find_method(str(template_files()["own_method"])), FlowPath()
    teacher = ToyTeacher(Gaussian(path, 0.7, 0.4), path)
    batch = toy_batch(64, pairs=lambda z: 0.7 + 0.4 * z)
    for shift in (0.0, 0.5):
        student = toy_student(GaussianMap(path, 0.7 + shift, 0.4), path)
        method = kind(Copies(teacher, student), (1.0,), kind.Options())
        assert loss_of(method, "student", batch)[0].item() == pytest.approx(shift**2, abs=1e-6)


def test_a_family_of_ones_own_is_kept_as_a_method_is(tmp_path: Path) -> None:
    own, run = tmp_path / "mine.py", tmp_path / "run"
    run.mkdir()
    own.write_text("first")
    recipe = Recipe(teacher="emoji", method="dmd", family=str(own))
    keep_own_files(recipe, run)
    assert {key: file.name for key, file in copies(run).items()} == {"family": "family.py"}
    check_own_files(recipe, run)
    own.write_text("second")
    with pytest.raises(UserError, match=r"family .*mine.py differs from .*--set family=.*family.py"):
        check_own_files(recipe, run)
    on_the_copy = recipe.model_copy(update={"family": str(run / "family.py")})
    check_own_files(on_the_copy, run)
    keep_own_files(on_the_copy, run)
    assert (run / "family.py").read_text() == "first"
    assert as_begun(recipe, run) == as_begun(on_the_copy, run) == on_the_copy


def test_needs_tell_what_single_options_add() -> None:
    assert needs("reflow") == "noise, prompts, pairs"
    assert needs("lcm") == "noise, prompts, pairs (+ images)"
    assert needs("dmd") == "noise, prompts (+ images, pairs, states, reward)"


def test_a_recipe_finds_the_method_beside_it_and_gives_a_verified_student(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(EXAMPLE.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    tiny_pipeline("unet-classes").save_pretrained(tmp_path / "teacher")
    sets = ["train.updates=3", "train.batch=4", "train.preview_every=0", "options.pairs=4", "options.pair_steps=2",
            "options.guidance=1", "evaluate=false"]  # fmt: skip
    recipe = load_recipe(folder / "own_method.yaml", teacher=str(tmp_path / "teacher"), sets=sets)
    run = run_recipe(recipe, output=tmp_path / "run")
    assert run.report.method == str(folder / "own_method.py")
    assert "differ from the trainer's by" in run.report.verification
    assert json.loads((run.student / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    assert run.report.summary == "Halving: one step of the student lands where two steps of the teacher land."

    assert run.report.prompts is None and "| prompts |" not in (run.student / "README.md").read_text()

    # The run keeps what it was begun with: an edited file is refused, the copy goes on, a lost one is not missed.
    own, copy = folder / "own_method.py", run.folder / "method.py"
    assert copy.read_bytes() == own.read_bytes()
    own.write_text(own.read_text() + "\n# edited\n")
    with pytest.raises(
        UserError, match=rf"method {own} differs from {copy}.* go on with the copy by --set method="
    ):
        run_recipe(recipe, output=run.folder, resume=True)
    place, again = RunFolder(run.folder), recipe.model_copy(update={"method": str(copy)})
    check_own_files(again, run.folder)
    assert check_resume(place, resolve(again).recipe).name == "step-00000003"
    own.unlink()
    with pytest.raises(
        UserError, match=r"there is no such file; the run keeps a copy of it: add --set method="
    ):
        load_recipe(place.recipe)
    assert "Halving: one step" in (export_run(run.folder, tmp_path / "again") / "README.md").read_text()
    # With what it was begun is in the checkpoint, too, should the copy be edited.
    kept = read_state(place.checkpoints / "step-00000003")["inputs"]["method"]
    assert kept == sha256_of(copy) == own_hashes(again)["method"]


def test_a_method_file_that_cannot_be_imported_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module_at_all")
    with pytest.raises(UserError, match=r"broken.py: it cannot be imported: ModuleNotFoundError"):
        find_method(str(file))
