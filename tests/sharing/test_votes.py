"""Votes are blind and fair, are kept as they were given, and their interval is Wilson's."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.networks.own_call import distilled_at
from stepdistill.sharing.demo_page import Demo, caption, enlarged, standing, verdict
from stepdistill.sharing.drawers import (
    Drawer,
    first_prompt,
    short_names,
    student_drawer,
    teacher_drawer,
)
from stepdistill.sharing.votes import (
    Side,
    Vote,
    append_vote,
    binomial_interval,
    blind_pair,
    read_votes,
    tally,
)


def vote(left: str, right: str, choice: str) -> Vote:
    return Vote("apple", 3, Side(left, 1, 0.1), Side(right, 4, 0.2), choice, 1.5, "2026-01-01T00:00:00+00:00")  # type: ignore[arg-type]


@pytest.mark.parametrize(("successes", "trials"), [(5, 10), (0, 10), (37, 40), (1, 1)])
def test_the_ends_are_where_the_share_found_is_z_deviations_away(successes: int, trials: int) -> None:
    share, z = successes / trials, 1.959964
    for end in binomial_interval(successes, trials):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / trials), rel=1e-5)
    low, high = binomial_interval(successes, trials)
    assert low <= share <= high and (successes > 0 or low == 0)


def test_known_intervals() -> None:
    assert binomial_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert binomial_interval(0, 10) == pytest.approx((0, 0.2775), abs=5e-5)
    assert binomial_interval(0, 0) == (0, 1)
    low, high = binomial_interval(50, 100, level=0.5)
    assert high - low == pytest.approx(2 * 0.67449 * 0.05, rel=0.01)


def test_every_pair_and_either_side_is_as_likely() -> None:
    chooser = random.Random(0)
    found = Counter(blind_pair("abc", chooser) for _ in range(3000))
    assert len(found) == 6 and all(abs(count - 500) < 4 * math.sqrt(500) for count in found.values())
    with pytest.raises(UserError, match="needs two pipelines"):
        blind_pair(["a"], chooser)


def test_votes_are_kept_and_counted_whichever_side_they_were_on(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    given = [vote("a", "b", "left"), vote("b", "a", "left"), vote("b", "a", "right"), vote("a", "b", "same"),
             vote("c", "a", "left")]  # fmt: skip
    for each in given:
        append_vote(file, each)
    assert read_votes(file) == given and read_votes(tmp_path / "none") == []
    first, second, third = tally(given, ["a", "b", "c"])
    assert (first.first_better, first.second_better, first.same, first.share) == (2, 1, 1, 2 / 3)
    assert (second.first, second.second, second.second_better, second.share) == ("a", "c", 1, 0.0)
    assert third.share is None and third.interval == (0, 1)
    text = standing([first, third])
    assert "**a** against **b**: 2 to 1, and 1 for no difference; a wins 67% [21%, 94%]" in text
    assert "**b** against **c**: no votes yet" in text
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(UserError, match=r"votes.jsonl, line 6 is not a vote"):
        read_votes(file)


def test_a_student_draws_its_own_pictures_and_in_no_other_count(run: Path) -> None:
    drawer = student_drawer(run / "student", "tiny", "cpu")
    drawn = drawer.draw(first_prompt(run / "student"), 0)
    kept = np.array(Image.open(run / "student" / "verification" / "0.png"), dtype=int)
    assert np.abs(np.array(drawn.image, dtype=int) - kept).max() <= 1
    assert drawn.steps == 1 and drawn.seconds > 0 and drawer.step_counts == (1,)
    with pytest.raises(UserError, match=r"tiny draws in 1 step\(s\), not in 4"):
        drawer.draw("apple", 0, 4)
    assert distilled_at(run / "student") == 2.5 and distilled_at(run) is None
    assert caption("tiny", drawn).startswith("**tiny**: 1 step, ")
    assert enlarged(drawn.image).size == (256, 256) and enlarged(Image.new("RGB", (300, 20))).size == (
        300,
        20,
    )


def test_a_teacher_that_takes_middle_times_draws_in_any_number_and_what_was_asked_for() -> None:
    import torch
    from tiny import SIZES, tiny_pipeline

    pipe, size = tiny_pipeline("sana-sprint"), SIZES["sana-sprint"]
    own = {"height": size.height, "width": size.width}
    drawer = Drawer("teacher", pipe, (1, 2, 3), 3, own, "prompt")
    for steps, told in ((3, {"intermediate_timesteps": None}), (2, {})):
        plain = pipe(
            ["a red heart"], num_inference_steps=steps, use_resolution_binning=False, **own, **told,
            generator=[torch.Generator().manual_seed(7)],
        ).images[0]  # fmt: skip
        assert np.array_equal(np.array(drawer.draw("a red heart", 7, steps).image), np.array(plain))


def test_the_teacher_draws_with_the_guidance_it_is_given() -> None:
    import torch

    drawer = teacher_drawer("emoji", 2.5, "cpu")
    assert (drawer.name, drawer.steps, drawer.call) == ("teacher emoji", 25, {"guidance_scale": 2.5})
    plain = drawer.pipe(["red apple"], num_inference_steps=2, guidance_scale=2.5,
                        generator=[torch.Generator().manual_seed(7)]).images[0]  # fmt: skip
    assert np.array_equal(np.array(drawer.draw("red apple", 7, 2).image), np.array(plain))


def test_a_pair_is_of_one_prompt_and_seed_and_its_vote_says_whose_it_was(run: Path, tmp_path: Path) -> None:
    one = student_drawer(run / "student", "one", "cpu")
    other = Drawer("other", one.pipe, (1,), 1, {**one.call, "guidance_rescale": 0.0}, one.condition)
    demo = Demo([one, other], tmp_path / "votes.jsonl", random.Random(1))
    first, second, pair = demo.new_pair("apple", [1, 1])
    assert {pair.left.name, pair.right.name} == {"one", "other"}
    assert np.array_equal(np.array(first.image), np.array(second.image))  # the same network, prompt and seed
    assert np.array_equal(np.array(one.draw("apple", pair.seed).image), np.array(first.image))
    assert demo.new_pair("apple", [1, 1])[2].seed != pair.seed
    kept = demo.vote(pair, "right")
    assert kept.winner == pair.right.name and f"B was **{pair.right.name}**" in verdict(kept)
    row = json.loads((tmp_path / "votes.jsonl").read_text())
    assert (row["prompt"], row["seed"], row["choice"], row["left"]["name"]) == (
        "apple",
        pair.seed,
        "right",
        pair.left.name,
    )
    assert [each.first_better + each.second_better for each in demo.counts()] == [1]
    with pytest.raises(UserError, match="have one name"):
        Demo([one, one], tmp_path / "votes.jsonl")


def test_students_are_called_by_their_runs_as_far_as_that_tells_them_apart(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "elsewhere" / "tiny_one"
    second.mkdir(parents=True)
    (run / "student").rename(second / "student")
    third = tmp_path / "third"
    (third / "student" / "verification").mkdir(parents=True)
    (third / "student" / "verification" / "manifest.json").write_text("{}")
    assert list(short_names([str(second), str(third)])) == ["tiny_one", "third"]
    with pytest.raises(UserError, match="third is named twice"):
        short_names([str(third), str(third / "student")])


def test_the_page_is_built_and_loads_nothing_from_elsewhere(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='needs pip install "stepdistill[demo]"')
    from fastapi.testclient import TestClient

    from stepdistill.sharing.demo_page import application, build

    one = student_drawer(run / "student", "one", "cpu")
    slider = Drawer("slider", one.pipe, tuple(range(1, 9)), 4, one.call, one.condition)
    page = build(Demo([one, slider], tmp_path / "votes.jsonl"), "apple")
    kinds = {part.label: type(part).__name__ for part in page.blocks.values() if getattr(part, "label", None)}
    assert (kinds["Steps of one"], kinds["Steps of slider"]) == ("Radio", "Slider")
    client = TestClient(application(page), base_url="http://127.0.0.1")
    answer = client.get("/")
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    for elsewhere in ("googleapis", "cdnjs", "cdn."):
        assert elsewhere not in answer.text
    assert client.get("/", headers={"Host": "elsewhere.example"}).status_code == 400
