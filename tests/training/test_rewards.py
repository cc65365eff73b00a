"""Every reward of training/rewards.py keeps the contract of Reward, without being told about it."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.features.load import load_features
from stepdistill.networks.loading import load_teacher
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system import emoji
from stepdistill.training.distil import distill
from stepdistill.training.rewards import REWARDS

PROMPTS = ["red heart", "a fish", "thumbs up", "a cat"]


@pytest.fixture(scope="module")
def teacher():
    return PipelineTeacher(load_teacher("emoji"))


def decode_of(teacher):
    return lambda states: teacher.codec.to_frames(states)[:, 0]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A whole name for each reward: what stands behind the colon is the network that ships."""
    folder = tmp_path_factory.mktemp("clip")
    for source in (emoji.features_folder(), emoji.tokenizer_folder()):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return {"emoji": "emoji", "clip": f"clip:{folder}"}


@pytest.mark.parametrize("kind", REWARDS)
def test_a_reward_is_a_number_a_sample_with_a_graph_into_it_alone(kind, names, teacher):
    reward = REWARDS[kind](names[kind], torch.device("cpu"), decode_of(teacher), PROMPTS)
    x0 = torch.randn(3, *teacher.codec.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prompt = torch.tensor([2, 0, 2])
    value = reward(x0, prompt)
    assert value.shape == (3,) and bool(torch.isfinite(value).all())
    for row in range(3):  # of its own sample alone, whatever stands beside it
        (gradient,) = torch.autograd.grad(value[row], x0, retain_graph=True)
        reached = gradient.flatten(1).abs().amax(1) > 0
        assert reached.tolist() == [other == row for other in range(3)]
        alone = reward(x0[row : row + 1], prompt[row : row + 1])
        torch.testing.assert_close(alone[0], value[row], rtol=1e-4, atol=1e-5)


def test_the_clip_reward_is_the_cosine_of_image_and_own_prompt(teacher):
    network, decode = load_features("emoji"), decode_of(teacher)
    reward = REWARDS["emoji"]("emoji", torch.device("cpu"), decode, PROMPTS)
    x0 = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = network.images(255 * decode(x0))
        value = reward(x0, torch.tensor([3, 1]))
    wanted = (images * network.texts([PROMPTS[3], PROMPTS[1]])).sum(1)
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def test_a_reward_is_refused_where_there_are_no_prompts(tmp_path):
    with pytest.raises(UserError, match=r"terms\.reward_weight is 1, but .* draws classes"):
        distill(tiny_pipeline("dit"), "dmd", tmp_path / "run", sets=["terms.reward_weight=1"])
