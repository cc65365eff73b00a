"""Every key: what it takes, its default and its line, read from the code; and recipes written out with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, Field

from stepdistill.cli import listing
from stepdistill.methods import find_method
from stepdistill.recipes.recipe import Recipe, load_recipe
from stepdistill.recipes.reference import Key, in_yaml, keys_of, kind_of, option_keys, recipe_keys
from stepdistill.system.shipped import method_names
from stepdistill.training.identity import resolve


class Base(BaseModel):
    """Options.

    Attributes:
        a, b: said of both,
            on two lines. And more.
    """

    a: int = 1
    b: bool = True


class Small(Base):
    # above it
    c: tuple[float, ...] | None = None  # behind it; None is none
    a: int = 2  # its own word


def test_words_come_from_attributes_and_comments_the_nearest_class_first() -> None:
    keys = {key.path: key for key in keys_of(Small, "x.")}
    assert keys["x.a"] == Key("x.a", "integer", "2", "its own word", True)
    assert keys["x.b"] == Key("x.b", "true or false", "true", "said of both, on two lines. And more.", False)
    assert keys["x.b"].line == "said of both, on two lines"
    assert keys["x.c"].text == "above it behind it; null is none"
    assert (keys["x.c"].kind, keys["x.c"].default) == ("list of numbers or null", "null")


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Literal["a", "b"] | None, "a or b or null"),
        (tuple[Annotated[float, Field(ge=0, lt=1)], int], "[number >= 0 and < 1, integer]"),
        (Annotated[int, Field(gt=0)], "integer > 0"),
        (bool | str, "true or false or text"),
    ],
)
def test_types_are_words(annotation: Any, words: str) -> None:
    assert kind_of(annotation) == words


@pytest.mark.parametrize(
    "value", [1e-5, 1.5e-7, -2e-9, 0.1, 0, True, None, "no", "null", "a: b", "./m.py", "", [1.0, None], "1e3"]
)
def test_a_value_in_yaml_reads_back(value: object) -> None:
    assert yaml.safe_load(in_yaml(value)) == value


def test_every_key_has_a_line() -> None:
    for key in [*recipe_keys(), *(k for m in method_names() for k in option_keys(find_method(m).Options))]:
        assert key.line and len(key.line) <= 100 and "``" not in key.line and key.kind != "anything", key
    assert {key.path for key in recipe_keys() if "." not in key.path} == {
        *("teacher", "family", "teachers", "method", "evaluate", "output")
    }


@pytest.mark.parametrize("name", ["lcm_emoji", "dmd2_sdxl_1step", "phased_dmd_wan22"])
def test_a_recipe_in_full_has_every_key_and_reads_back_to_an_equal_one(name: str, tmp_path: Path) -> None:
    listing.copy_shipped(name, str(tmp_path / "full.yaml"), full=True)
    resolved = resolve(load_recipe(name)).recipe
    assert load_recipe(tmp_path / "full.yaml") == resolved
    tree = yaml.safe_load((tmp_path / "full.yaml").read_text())
    assert tree.keys() == Recipe.model_fields.keys()
    assert tree["options"].keys() == resolved.options.keys()
    assert (tmp_path / "full.yaml").read_text().startswith(f"# stepdistill train {name}")


def test_ls_keys_prints_one_line_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    listing.list_names("keys", "lcm")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(find_method("lcm").Options.model_fields)
    assert lines[0].split()[:3] == ["options.guidance", "7.5", "number"]
    assert lines[0].endswith("  fixed guidance of the teacher's step, and of the cached samples")
