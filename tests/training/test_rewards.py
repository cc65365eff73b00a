"""Every reward of training/rewards.py keeps the contract of Reward, without being told about it; and what each says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_toy import HERE
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.features.load import load_features
from stepdistill.metrics.colours import HUES, hue_of, hue_share
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.pictures.given import with_picture
from stepdistill.recipes.recipe import load_recipe
from stepdistill.recipes.rewards import REWARDS as NAMED
from stepdistill.system import emoji
from stepdistill.training.distil import distill
from stepdistill.training.own_files import as_begun, own_files
from stepdistill.training.rewards import REWARDS, make_reward

PROMPTS = ["red heart", "a fish", "thumbs up", "blue circle"]
CPU = torch.device("cpu")
OWN = """import torch


def brightness(images, captions):
    return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(caption)) for caption in captions])


def mean_of_all(images, captions):
    return images.mean()


def without_a_graph(images, captions):
    return images.detach().mean(dim=(1, 2, 3))
"""


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A whole name for each reward: what stands behind the colon is the network that ships, or a function."""
    folder = tmp_path_factory.mktemp("rewards")
    for source in (emoji.features_folder(), emoji.tokenizer_folder()):
        shutil.copytree(source, folder / "clip", dirs_exist_ok=True)
    (folder / "own.py").write_text(OWN)
    (folder / "own_reward_on_the_path.py").write_text(OWN)
    return {
        "clip": f"clip:{folder / 'clip'}",
        "judge": "judge",
        "colour": "colour",
        "ink": "ink:0.3",
        "module": "module:own_reward_on_the_path:brightness",
        "file": f"{folder / 'own.py'}:brightness",
    }


@pytest.mark.parametrize("name", REWARDS)
def test_a_prompt_is_judged_by_its_words_whatever_picture_it_names(name, names, monkeypatch):
    monkeypatch.syspath_prepend(Path(names["file"].rpartition(":")[0]).parent)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    plain, named = (
        make_reward(names[name], CPU, prompts)(images, torch.arange(4))
        for prompts in (PROMPTS, [with_picture(prompt, "a.png") for prompt in PROMPTS])
    )
    assert torch.equal(plain, named)


def pictures(count=3, seed=0):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_every_name_of_a_recipe_is_made():
    assert set(REWARDS) == set(NAMED)


@pytest.mark.parametrize("kind", REWARDS)
def test_a_reward_is_a_number_a_picture_with_a_graph_into_it_alone(kind, names, monkeypatch):
    monkeypatch.syspath_prepend(names["file"].rpartition("/")[0])
    reward = make_reward(names[kind], CPU, PROMPTS)
    images = pictures().requires_grad_()
    prompt = torch.tensor([3, 0, 3])
    value = reward(images, prompt)
    assert value.shape == (3,) and bool(torch.isfinite(value).all())
    for row in range(3):  # of its own picture alone, whatever stands beside it
        (gradient,) = torch.autograd.grad(value[row], images, retain_graph=True)
        reached = gradient.flatten(1).abs().amax(1) > 0
        assert reached.tolist() == [other == row for other in range(3)]
        alone = reward(images[row : row + 1], prompt[row : row + 1])
        torch.testing.assert_close(alone[0], value[row], rtol=1e-4, atol=1e-5)


def test_the_clip_reward_is_the_cosine_of_image_and_own_prompt():
    network = load_features("emoji")
    reward, images = make_reward("clip:emoji", CPU, PROMPTS), pictures(2, seed=1)
    with torch.no_grad():
        value = reward(images, torch.tensor([3, 1]))
    wanted = (network.images(255 * images) * network.texts([PROMPTS[3], PROMPTS[1]])).sum(1)
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def disc(colour):
    """A disc of one colour on white, [1, 3, 32, 32]."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    inside = ((x - 15.5).square() + (y - 15.5).square() < 100).float()
    return (1 - inside) + inside * torch.tensor(colour)[:, None, None]


def test_the_colour_rule_tells_named_hues_apart():
    """A disc in the hue of a word has nearly all its ink there; each of the rest less; another caption has none."""
    rgb = {
        "red": (0.9, 0.2, 0.2),
        "green": (0.45, 0.7, 0.3),
        "blue": (0.3, 0.6, 0.9),
        "purple": (0.7, 0.4, 0.8),
    }
    prompts = [f"large {word} circle" for word in rgb] + ["a fish"]
    reward = make_reward("colour", CPU, prompts)
    for place, colour in enumerate(rgb.values()):
        images = torch.stack([disc(colour)] * 5).requires_grad_()
        value = reward(images, torch.arange(5))
        assert float(value[place].detach()) > 0.75 and float(value[4].detach()) == 0
        assert all(float(value[i].detach()) < 0.2 for i in range(4) if i != place)
        (gradient,) = torch.autograd.grad(value.sum(), images)
        assert bool(torch.isfinite(gradient).all()) and not bool(gradient[4].any())


def test_brown_is_a_dark_orange_and_captions_whose_word_is_untrue_name_none():
    hue = torch.tensor([HUES["brown"]])
    dark, light = disc((0.7, 0.45, 0.37))[None], disc((1.0, 0.55, 0.4))[None]
    assert float(hue_share(dark, hue)) > 0.7 > 0.2 > float(hue_share(light, hue))
    assert hue_of("large brown circle") == HUES["brown"] and hue_of("Red Apple") == HUES["red"]
    for caption in ("black heart", "blue car", "two hearts", "white square button", "red and blue book"):
        assert hue_of(caption) != hue_of(caption)  # not a number


def test_without_a_caption_of_a_colour_there_is_nothing_to_climb():
    with pytest.raises(UserError, match=r"terms\.reward is colour, but no prompt names a hue"):
        make_reward("colour", CPU, ["a fish"])


def test_ink_is_the_share_that_is_not_white():
    grey = torch.ones(2, 3, 8, 8)
    grey[0, :, :4] = 0.0
    share = make_reward("ink", CPU, PROMPTS)(grey, torch.tensor([0, 1]))
    assert share.tolist() == pytest.approx([0.5, 0.0], abs=1e-3)
    towards = make_reward("ink:0.4", CPU, PROMPTS)(grey, torch.tensor([0, 1]))
    assert towards.tolist() == pytest.approx([-0.01, -0.16], abs=1e-3)


def test_a_function_of_ones_own_is_told_captions_and_what_it_breaks(names):
    own = names["file"].rpartition(":")[0]
    images, prompt = pictures().requires_grad_(), torch.tensor([1, 0, 2])
    found = make_reward(f"{own}:brightness", CPU, PROMPTS)(images, prompt)
    wanted = images.mean(dim=(1, 2, 3)) + torch.tensor([6.0, 9.0, 9.0])
    torch.testing.assert_close(found, wanted)
    for name, says in (
        ("mean_of_all", r"gave \[\] for 3 pictures"),
        ("without_a_graph", "has no gradient in the pictures"),
    ):
        with pytest.raises(UserError, match=says):
            make_reward(f"{own}:{name}", CPU, PROMPTS)(images, prompt)
    with pytest.raises(UserError, match="the file has no function nothing"):
        make_reward(f"{own}:nothing", CPU, PROMPTS)
    with pytest.raises(UserError, match=r"give module:PACKAGE\.MODULE:FUNCTION"):
        make_reward("module:no_such_package:f", CPU, PROMPTS)


def test_a_saturated_pixel_still_has_a_gradient():
    """Decoded pictures are clamped, and the clamp is soft to a gradient: no reward loses a pixel that is white."""
    teacher = PipelineTeacher(load_teacher("emoji"))
    x0 = 3 * torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(0))
    leaf = x0.clone().requires_grad_()
    frames = teacher.codec.to_frames(leaf)
    with torch.no_grad():
        assert torch.equal(frames, teacher.codec.to_frames(x0))
    assert float(frames.detach().min()) == 0.0 and float(frames.detach().max()) == 1.0
    inside, white = ((frames > 0) & (frames < 1)).float(), (frames == 1).float()
    strengths = [
        float(torch.autograd.grad((frames * m).sum(), leaf, retain_graph=True)[0].norm())
        for m in (inside, white)
    ]
    assert min(strengths) > 0


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["terms.reward=emoji"], "the reward emoji is called clip:emoji"),
        (
            ["terms.reward=beauty"],
            r"reward 'beauty' is not known: give clip:emoji .*judge.*colour.*ink.*module:.*FILE",
        ),
        (["terms.reward=ink:2"], r"ink takes a share in \[0, 1\]"),
        (["terms.reward=colour:red"], "colour takes nothing behind a colon"),
        (["terms.reward=[./a.py:f, ./b.py:f]"], "of them one file at most"),
        (["terms.reward_share=0.3"], r"one over a whole number, such as 0\.25"),
        (["terms.reward_below=0.9"], "reward_below is 0.9, which is for predictions"),
        (["terms.reward_proxy=true"], "reward_proxy is true, which is for predictions"),
        (["terms.reward_last_call=false", "terms.reward_bounded=true"], "reward_last_call is false"),
    ],
)
def test_what_a_recipe_cannot_say_of_rewards(sets, says):
    with pytest.raises(UserError, match=says):
        load_recipe(HERE / "empty.yaml", method="lcm", sets=sets)


def test_a_reward_is_refused_where_there_are_no_prompts(tmp_path):
    with pytest.raises(UserError, match=r"terms\.reward_weight is 1, but .* draws classes"):
        distill(tiny_pipeline("dit"), "dmd", tmp_path / "run", sets=["terms.reward_weight=1"])


def test_a_missing_file_is_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"terms\.reward \./nothing\.py:f: there is no such file"):
        distill("emoji", "lcm", tmp_path / "run", sets=["terms.reward=./nothing.py:f"])


@pytest.mark.slow
def test_a_run_keeps_a_copy_of_a_reward_of_ones_own(names, tmp_path):
    """A file beside the recipe, two rewards, the proxy: one short run of RG-LCD; the copy is what the run was of."""
    shutil.copyfile(names["file"].rpartition(":")[0], tmp_path / "own.py")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("teacher: emoji\nmethod: lcm\nterms: {reward: ./own.py:brightness}\n")
    sets = [
        f"data.prompts={HERE / 'prompts.txt'}", "train.updates=4", "train.batch=4", "train.preview_every=0",
        "options.pairs=8", "options.pair_steps=2", "options.guidance=2.0", "evaluate=false", "student.times=[1.0]",
        "terms.reward_weight=0.1", "terms.reward_of=prediction", "terms.reward_below=0.9", "terms.reward_share=0.5",
        "terms.reward_bounded=true", "terms.reward_proxy=true",
    ]  # fmt: skip
    made = load_recipe(recipe, sets=sets)
    assert own_files(made) == {"terms.reward": tmp_path / "own.py"}
    run = distill("emoji", None, tmp_path / "run", recipe=recipe, sets=sets)
    folder = tmp_path / "run"
    assert (folder / "reward.py").read_text() == OWN and run is not None
    assert as_begun(made, folder).terms.reward == f"{folder / 'reward.py'}:brightness"
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [row["network"] for row in rows] == ["latent reward", "student"] * 2
    assert all("term reward" in row for row in rows[1::2])
