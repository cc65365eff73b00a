"""Prompts that name a picture: written in a line, read from rows, known by what is in the file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepdistill.data.captions import read_metadata
from stepdistill.data.prompts import read_prompts
from stepdistill.data.texts import rows_sha256
from stepdistill.errors import UserError
from stepdistill.pictures.given import (
    Asked,
    any_named,
    asked,
    check_named,
    identity,
    opened,
    pictures_of,
    placeholder,
    row_of,
    with_picture,
    words_of,
)


def saved(file: Path, pixels: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_prompt_with_a_picture_is_taken_apart_as_it_was_put_together() -> None:
    prompt = with_picture("make it red", "photos/my car.png")
    assert prompt == "make it red <image: photos/my car.png>"
    assert asked(prompt) == Asked("make it red", Path("photos/my car.png"))
    assert asked(with_picture("", "a.png")) == Asked("", Path("a.png"))
    assert asked(with_picture("two\nlines", "a.png")) == Asked("two\nlines", Path("a.png"))
    for text in ("a cat", "a <image: b.png> inside", "<image: >", "1 < 2 >", "<image: a<b.png>"):
        assert asked(text) == Asked(text, None)
    assert words_of([prompt, "a cat"]) == ["make it red", "a cat"]
    assert row_of(prompt) == {"prompt": "make it red", "input_image": "photos/my car.png"}
    assert row_of("a cat") == {"prompt": "a cat"}
    with pytest.raises(ValueError, match="holds <, > or a line feed: rename the file"):
        with_picture("make it red", "a>b.png")


def test_rows_name_their_picture_beside_their_prompt_from_where_their_file_lies(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "set", tmp_path / "other.png"
    rows = [
        {"prompt": "make it red", "Input_Image": "in/a.png"},
        {"prompt": "at night", "input_image": str(elsewhere)},
        {"prompt": "a hat <image: in/b.png>"},
        {"prompt": "a cat", "input_image": ""},
    ]
    wanted = [
        Asked("make it red", place / "in/a.png"),
        Asked("at night", elsewhere),
        Asked("a hat", place / "in/b.png"),
        Asked("a cat", None),
    ]
    place.mkdir()
    (place / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (place / "p.json").write_text(json.dumps(rows))
    with (place / "p.csv").open("w", newline="") as stream:
        table = [(row["prompt"], row.get("Input_Image", row.get("input_image"))) for row in rows]
        csv.writer(stream).writerows([("prompt", "input_image"), *table])
    lines = ("make it red <image: in/a.png>", f"at night <image: {elsewhere}>", rows[2]["prompt"], "a cat")
    (place / "p.txt").write_text("\n".join(lines))
    for file in ("p.jsonl", "p.json", "p.csv", "p.txt"):
        assert [asked(prompt) for prompt in read_prompts(place / file)] == wanted, file
    (place / "metadata.jsonl").write_text(json.dumps({"file_name": "after.png", **rows[0]}))
    assert [asked(each.text) for each in read_metadata(tmp_path).values()] == wanted[:1]
    (place / "p.jsonl").write_text(json.dumps({"prompt": "a", "input_image": 3}))
    with pytest.raises(UserError, match="line 1: input_image is 3, not the path of a picture"):
        read_prompts(place / "p.jsonl")
    (place / "p.jsonl").write_text(json.dumps({"prompt": "a", "input_image": "<.png"}))
    with pytest.raises(UserError, match=r"line 1: input_image: the path '<\.png' holds"):
        read_prompts(place / "p.jsonl")


def test_a_picture_is_known_by_its_content(tmp_path: Path) -> None:
    """What is cached of a prompt outlives a move, and not another picture in the old one's place."""
    first, second = (saved(tmp_path / name / "a.png", noise(4, 4)) for name in ("here", "there"))
    named = [with_picture("red", file) for file in (first, second)]
    assert identity(named[0]) == identity(named[1]) != named[0]
    before = rows_sha256(named[:1])
    assert before == rows_sha256(named[1:]) != rows_sha256(["red"])
    saved(first, noise(4, 4, seed=1))
    assert rows_sha256(named[:1]) != before
    assert identity("red") == "red"
    first.unlink()
    with pytest.raises(UserError, match=r"a\.png, which a prompt names, not found"):
        identity(named[0])


def test_a_picture_is_turned_upright_and_its_middle_taken_at_the_size_that_is_drawn(tmp_path: Path) -> None:
    pixels = noise(8, 12)
    exact = saved(tmp_path / "exact.png", pixels)
    assert np.array_equal(np.asarray(opened(exact, 8, 12)), pixels)
    wide = saved(tmp_path / "wide.png", np.concatenate([noise(8, 4, 1), pixels, noise(8, 4, 2)], 1))
    assert np.array_equal(np.asarray(opened(wide, 8, 12)), pixels)
    turned = Image.fromarray(np.rot90(pixels).copy())
    tag = Image.Exif()
    tag[0x0112] = 6  # shown after a quarter turn to the right
    turned.save(tmp_path / "turned.png", exif=tag)
    assert np.array_equal(np.asarray(opened(tmp_path / "turned.png", 8, 12)), pixels)
    one, other = pictures_of([f"red <image: {exact}>", "red"], 8, 12)
    assert np.array_equal(np.asarray(one), pixels) and other.size == (12, 8)
    assert np.array_equal(np.asarray(other), np.asarray(placeholder(8, 12)))
    stands = np.asarray(placeholder(17, 33)).astype(int)
    assert stands[[0, -1], 0, 0].tolist() == [0, 255] and stands[0, [0, -1], 1].tolist() == [0, 255]
    tiles = stands[[0, 7, 8, 0, 8, 16], [0, 7, 0, 8, 8, 32], 2]
    assert tiles.tolist() == [0, 0, 255, 255, 0, 0]
    assert np.asarray(placeholder(1, 1)).tolist() == [[[0, 0, 0]]]
    assert (np.diff(stands[..., 0], axis=0) > 0).all() and (np.diff(stands[..., 1], axis=1) > 0).all()


def test_a_picture_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UserError, match=r"a\.png, which a prompt names, cannot be read"):
        opened(tmp_path / "a.png", 8, 8)
    with pytest.raises(UserError, match=r"b\.png, which a prompt names, not found: a relative path is that"):
        opened(tmp_path / "b.png", 8, 8)


def test_every_prompt_names_a_picture_where_one_is_drawn_from_and_none_elsewhere(tmp_path: Path) -> None:
    there = with_picture("red", saved(tmp_path / "a.png", noise(4, 4)))
    check_named([there, there], True, "WanImageToVideoPipeline")
    check_named([there, there], True, "Flux2Pipeline", optional=True)
    check_named(["red", "blue"], True, "Flux2Pipeline", optional=True)
    with pytest.raises(UserError, match="prompt 2, 'blue', names no picture, but others name one: write"):
        check_named([there, "blue"], True, "Flux2Pipeline", optional=True)
    assert any_named(["red", there]) and not any_named(["red", "blue"]) and not any_named([])
    check_named(["red"], False, "WanPipeline")
    with pytest.raises(
        UserError, match=r"^data\.prompts: prompt 2, 'a cat', names no picture, but Wan draws from one"
    ):
        check_named([there, "a cat"], True, "Wan")
    with pytest.raises(
        UserError, match=r"^--prompts: prompt 1, .* names a picture, but Wan draws from text alone"
    ):
        check_named([there], False, "Wan", "--prompts")
    with pytest.raises(UserError, match=r"prompt 1 names .*b\.png, which is not there"):
        check_named([with_picture("red", tmp_path / "b.png")], True, "Wan")
