"""Recipes: what they become, and the exact line that a wrong one is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from stepdistill.errors import UserError
from stepdistill.methods import find_method, method_options
from stepdistill.recipes.recipe import Recipe, load_recipe
from stepdistill.recipes.sections import StudentOptions
from stepdistill.system import shipped as content
from stepdistill.training.identity import differences, resolve, resolved_yaml

METHOD = '''"""A method of the test's own."""
from typing import ClassVar
from stepdistill.losses.contract import Loss, Method, MethodOptions

class Options(MethodOptions):
    guidance: float = 2.5
    critic_steps: int = 5

class Mine(Method):
    Options: ClassVar[type[MethodOptions]] = Options
    def loss(self, turn, batch): return Loss(batch.noise.mean())
    def sampler(self): raise AssertionError
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a method in mine.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(METHOD)
    return tmp_path


def message(text: str, **arguments: object) -> str:
    """What my.yaml with this text is refused with."""
    Path("my.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe("my.yaml", **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_holds_what_the_file_says_and_defaults_elsewhere(here: Path) -> None:
    Path("my.yaml").write_text(
        "method: ./mine.py\ntrain: {updates: 7, lr: 1e-5}\nstudent: {times: [1, 0.5]}\n"
    )
    recipe = load_recipe("my.yaml")
    assert recipe.train.updates == 7
    assert recipe.train.lr == 1e-5  # YAML 1.1 reads 1e-5 as text
    assert recipe.student.times == (1.0, 0.5)
    assert (recipe.teacher, recipe.train.batch, recipe.train.betas) == ("emoji", 64, (0.9, 0.999))


def test_arguments_lie_over_the_file_and_later_assignments_over_earlier(here: Path) -> None:
    Path("my.yaml").write_text("method: ./nowhere.py\nteacher: a\ntrain: {updates: 7, lr: 1}\n")
    sets = [
        "train.updates=8",
        "train.updates=9",
        "options.k=[1, {b: 2}]",
        "evaluate=false",
        "data.prompts=my file.txt",
    ]
    recipe = load_recipe("my.yaml", teacher="b", method="./mine.py", sets=sets)
    assert (recipe.teacher, recipe.method) == ("b", "./mine.py")
    assert (recipe.train.updates, recipe.train.lr) == (9, 1.0)
    assert recipe.options == {"k": [1, {"b": 2}]}
    assert recipe.evaluate is False
    assert recipe.data.prompts == "my file.txt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "student: {lora_ranks: 3}",
            "my.yaml: student.lora_ranks is not a key of student (did you mean lora_rank, lora_alpha? "
            "`stepdistill ls keys` lists all)",
        ),
        (
            "student: {zzz: 3}",
            "my.yaml: student.zzz is not a key of student (`stepdistill ls keys` lists all)",
        ),
        (
            "export: {zzz: 3}",
            "my.yaml: export.zzz is not a key of export (it has: what, max_shard_size, kohya, comfyui)",
        ),
        (
            "student: {times: 4}",
            "my.yaml: student.times is 4 and should be a list, such as [1.0, 0.5]; a number of steps is set with "
            "student.steps",
        ),
        ("data: {size: 512}", "my.yaml: data.size is 512 and should be a list, such as [512, 512]"),
        (
            "student: {times: [1, 0.5], steps: 2}",
            "my.yaml: student: steps is 2 and times is [1.0, 0.5]: set one of them",
        ),
        (
            "trian: {}",
            "my.yaml: trian is not a key of a recipe (did you mean train? `stepdistill ls keys` lists all)",
        ),
        ("train: 3", "my.yaml: train is 3 and should be a section of keys"),
        ("train: {batch: 0}", "my.yaml: train.batch is 0 and should be greater than or equal to 1"),
        ("train: {lr: .nan}", "my.yaml: train.lr is nan and should be a finite number"),
        ("train: {average: 1.0}", "my.yaml: train.average is 1.0 and should be less than 1"),
        ("train: {betas: [0.9, 2]}", "my.yaml: train.betas[1] is 2 and should be less than 1"),
        (
            "train: {schedule: step}",
            "my.yaml: train.schedule is 'step' and should be 'constant', 'cosine' or 'linear'",
        ),
        (
            "train: {batch: 10, accumulate: 3}",
            "my.yaml: train: batch (10) must be a multiple of accumulate (3)",
        ),
        (
            "train: {batch: 12, accumulate: 2, group: 4}",
            "my.yaml: train: batch over accumulate (6) must be a multiple of group (4), as a prompt's samples stay "
            "together",
        ),
        (
            "student: {times: [0.5, 1]}",
            "my.yaml: student: times must descend within (0, 1], such as [1.0, 0.5]; found [0.5, 1.0]",
        ),
        ("student: {lora_alpha: 2}", "my.yaml: student: lora_alpha does nothing without lora_rank"),
        ("train: {updates: 0, keep: 0}", None),
    ],
)
def test_a_wrong_recipe_is_answered_with_one_line(here: Path, text: str, expected: str | None) -> None:
    found = message(f"method: ./mine.py\n{text}\n")
    if expected is None:
        assert found.split("; ") == [
            "my.yaml: train.updates is 0 and should be greater than or equal to 1",
            "my.yaml: train.keep is 0 and should be greater than or equal to 1",
        ]
    else:
        assert found == expected


def test_a_file_that_is_no_recipe(here: Path) -> None:
    assert message("teacher: emoji") == "my.yaml: method is missing"
    assert message("- dmd") == "my.yaml: a recipe is a mapping of keys to values, and this file is not"
    assert (
        message("method: a\nb: [")
        == "my.yaml: not valid YAML in line 2: expected the node content, but found '<stream end>'"
    )
    with pytest.raises(UserError, match=r"^other\.yaml: there is no such recipe file"):
        load_recipe("other.yaml")
    with pytest.raises(UserError, match=r"^other is not a shipped recipe"):
        load_recipe("other")


def test_an_error_names_the_argument_it_came_from(here: Path) -> None:
    good = "method: ./mine.py\n"
    assert message(good, sets=["train.batch=0"]).startswith("--set: train.batch is 0 and ")
    assert message(good, sets=["student.x=1"]).startswith("--set: student.x is not a key of student ")
    assert (
        message(good, sets=["train.lr"])
        == "--set train.lr: write it as key=value, such as --set train.lr=1e-4"
    )
    assert message("method: ./mine.py\nteacher: a", sets=["teacher.x=1"]) == (
        "--set teacher.x=1: teacher is a value, not a section"
    )
    assert message(good, method="dmdd").startswith("--method: dmdd is not a method (did you mean dmd? ")
    assert message(good, method="./gone.py") == "--method: method is ./gone.py, and there is no such file"


def test_options_are_checked_by_the_method(here: Path) -> None:
    Path("my.yaml").write_text("method: ./mine.py\noptions: {critic_step: 3}\n")
    with pytest.raises(UserError) as caught:
        method_options(load_recipe("my.yaml"))
    assert str(caught.value) == (
        "my.yaml: options.critic_step is not an option of mine "
        "(did you mean critic_steps? it has: guidance, guidance_2, guidance_interval, guidance_rescale, shift, "
        "critic_steps)"
    )
    recipe = load_recipe("my.yaml", sets=["options={guidance: high}"])
    with pytest.raises(UserError, match=r"^--set: options\.guidance is 'high' and should be a valid number"):
        method_options(recipe)
    options = method_options(load_recipe("my.yaml", sets=["options={guidance: 1e-1}"]))
    assert options.model_dump() == {
        "guidance": 0.1,
        "guidance_2": None,
        "guidance_interval": (0.0, 1.0),
        "guidance_rescale": 0.0,
        "shift": None,
        "critic_steps": 5,
    }


def test_resolved_yaml_reads_back_to_an_equal_recipe_with_every_key(here: Path) -> None:
    recipe = Recipe(method="./mine.py", options={"guidance": 1}, student=StudentOptions(times=(1.0, 0.1)))
    Path("recipe.yaml").write_text(resolved_yaml(resolve(recipe)))
    assert load_recipe("recipe.yaml") == resolve(recipe).recipe
    tree = yaml.safe_load(Path("recipe.yaml").read_text())
    assert set(tree) == set(Recipe.model_fields)
    assert tree["options"]["critic_steps"] == 5 and tree["options"]["guidance_interval"] == [0.0, 1.0]
    assert tree["student"]["times"] == [1.0, 0.1] and tree["student"]["output"] == "auto"


def test_differences_are_the_key_paths_that_changed(here: Path) -> None:
    first = load_recipe(None, method="./mine.py")
    same = load_recipe(None, method="./mine.py", sets=["options.critic_steps=5"])
    other = load_recipe(
        None, method="./mine.py", sets=["options.critic_steps=4", "train.lr=1", "evaluate=false"]
    )
    assert differences(first, same) == []
    assert differences(first, other) == ["options.critic_steps", "train.lr", "evaluate"]
    assert differences(first, load_recipe(None, method="dmd", teacher="x")) == ["teacher", "method"]


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Recipe(method="dmd").method = "lcm"  # type: ignore[misc]


SELF_EVIDENT = set(
    "teacher method prompts images batch lr betas weight_decay warmup checkpoint_every preview_every precision".split()
)


@pytest.mark.parametrize("name", sorted(content.recipe_files()))
def test_every_shipped_recipe_is_valid_and_opens_with_its_command(name: str) -> None:
    file = content.recipe_files()[name]
    recipe = load_recipe(name)
    method_options(recipe)
    lines = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert lines[0].removeprefix("# ").startswith(f"stepdistill train {name}")
    assert any(line.startswith("# Needs") for line in lines)
    assert any(line.startswith(("# Gave: gap closed ", "# Not measured.")) for line in lines)
    for line in file.read_text().splitlines():
        key, _, value = line.partition(": ")
        if value and not line.startswith("#") and key.strip() not in SELF_EVIDENT:
            assert "  # " in value, f"{key.strip()} has no comment"


def test_nothing_given_takes_the_quick_recipe_of_the_embedded_teacher() -> None:
    quick = content.recipe_files().get("dmd_emoji_quick")
    recipe = load_recipe()
    assert (recipe.teacher, recipe.method) == ("emoji", "dmd")
    assert recipe == (load_recipe(quick) if quick else Recipe(method="dmd"))
    assert load_recipe(teacher="./mine", method="dmd") == Recipe(teacher="./mine", method="dmd")


def test_steps_take_the_place_of_a_files_times_and_times_of_its_steps(here: Path) -> None:
    Path("my.yaml").write_text("method: ./mine.py\nstudent: {times: [1, 0.5]}\n")
    student = load_recipe("my.yaml", sets=["student.steps=3"], flags={"student.steps": "--steps"}).student
    assert (student.steps, student.times) == (3, None)
    Path("my.yaml").write_text("method: ./mine.py\nstudent: {steps: 3}\n")
    student = load_recipe("my.yaml", sets=["student.times=[1]"]).student
    assert (student.steps, student.times) == (None, (1.0,))
    wrong = message("method: ./mine.py", sets=["student.steps=0"], flags={"student.steps": "--steps"})
    assert wrong == "--steps: student.steps is 0 and should be greater than or equal to 1"


def test_a_number_of_steps_takes_the_methods_usual_times() -> None:
    lcm, dmd = find_method("lcm"), find_method("dmd")
    assert lcm.usual_times() == lcm.usual_times(4) == (1.0, 0.75, 0.5, 0.25)
    assert lcm.usual_times(2) == dmd.usual_times(2) == (1.0, 0.5) and dmd.usual_times() == (1.0,)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "dmd"}, "recipe: dmd_emoji_quick (two to five minutes on two CPU cores)"),
        ({"method": "lcm"}, "recipe: lcm_emoji (about 5 minutes on two CPU cores)"),
        (
            {"method": "lcm", "sets": ["train.updates=9"]},
            "recipe: lcm_emoji (as shipped: about 5 minutes on two CPU cores)",
        ),
        (
            {"method": "tcd", "teacher": "stabilityai/stable-diffusion-xl-base-1.0"},
            "recipe: tcd_sdxl",
        ),
        (
            {"method": "lcm", "teacher": "./mine"},
            "recipe: none is shipped for lcm on ./mine: defaults of lcm and of train are taken; to start from: "
            "lcm_lora_sdxl (`stepdistill ls keys` lists the keys)",
        ),
    ],
)
def test_what_will_run_is_said(arguments: dict[str, Any], said: str) -> None:
    assert load_recipe(**arguments).announced == said


def test_a_method_is_not_taken_for_a_recipe() -> None:
    with pytest.raises(UserError, match=r"^lcm is a method, not a recipe: give --method lcm, or"):
        load_recipe("lcm")
