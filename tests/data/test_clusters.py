"""Prompts of one kind together: clusters of equal size, and the file of parts that a recipe takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline
from torch import Tensor

from stepdistill.data.clusters import (
    WIDTH,
    _lloyd,
    _shared_out,
    balanced_clusters,
    features_of,
    narrow,
    sum_of_squares,
)
from stepdistill.data.held_out import HELD_OUT, LEAST, Rest, hold_out
from stepdistill.data.partition import parts_of
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.system.emoji import emoji_captions, emoji_groups


def blobs(*sizes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around corners that lie 10 apart, in any order, and whose they are."""
    draw = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    owner = owner[torch.randperm(len(owner), generator=draw)]
    return 10 * torch.eye(len(sizes))[owner] + 0.5 * torch.randn(
        len(owner), len(sizes), generator=draw
    ), owner


@pytest.mark.parametrize("seed", range(5))
def test_equal_clusters_that_are_there_are_found(seed: int) -> None:
    points, owner = blobs(20, 20, 20, 20, seed=seed)
    found = balanced_clusters(points, 4, seed)
    assert sorted(Counter(zip(found.tolist(), owner.tolist(), strict=True)).values()) == [20] * 4
    assert torch.equal(found, balanced_clusters(points, 4, seed))


def test_the_best_of_several_starts_is_taken() -> None:
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    best = sum_of_squares(points, balanced_clusters(points, 8))
    alone = [sum_of_squares(points, _lloyd(points, 8, torch.Generator().manual_seed(i))) for i in range(20)]
    assert best < sorted(alone)[10] < float((points - points.mean(0)).square().sum())
    four, mean = torch.tensor([[0.0], [2.0], [10.0], [14.0]]), torch.tensor([0, 0, 1, 1])
    assert sum_of_squares(four, mean) == 2 + 8


def test_no_cluster_is_larger_than_its_share() -> None:
    """Where there are two clusters of 70 and 10 points, one of the halves is of the large one alone."""
    points, owner = blobs(70, 10)
    found = balanced_clusters(points, 2)
    assert sorted(Counter(found.tolist()).values()) == [40, 40]
    assert {len(set(owner[found == k].tolist())) for k in (0, 1)} == {1, 2}
    assert sorted(Counter(balanced_clusters(points, 3).tolist()).values()) == [26, 27, 27]
    assert sorted(balanced_clusters(torch.zeros(5, 2), 5).tolist()) == list(range(5))


def test_nobody_is_nearer_to_another_cluster_that_would_rather_have_them() -> None:
    """Stability: a cluster nearer than one's own is full, of points that all are nearer to it."""
    distances = torch.rand(61, 5, generator=torch.Generator().manual_seed(3)) + torch.arange(5) * 0.1
    found = _shared_out(distances)
    sizes = Counter(found.tolist())
    assert max(sizes.values()) == 13 and len(found) == 61
    for point, own in enumerate(found.tolist()):
        for other in range(5):
            if distances[point, other] < distances[point, own]:
                assert sizes[other] == 13 and distances[found == other, other].max() < distances[point, other]


def test_padding_says_nothing_and_each_thing_counts_once() -> None:
    tokens, pooled = torch.randn(2, 3, 4), torch.randn(2, 6)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    cond = Condition(
        {"encoder_hidden_states": tokens, "text_mask": mask, "pooled": 100 * pooled, "ids": mask}
    )
    found = features_of(cond)
    assert found.shape == (2, 10)
    mean = tokens[0, :2].mean(0)
    torch.testing.assert_close(found[0, :4], mean / mean.norm())
    torch.testing.assert_close(found[:, 4:], pooled / pooled.norm(dim=1, keepdim=True))


def test_wide_features_keep_their_distances() -> None:
    points = torch.randn(20, 3000, generator=torch.Generator().manual_seed(0))
    near = narrow(points)
    assert near.shape == (20, WIDTH) and narrow(points[:, :WIDTH]).equal(points[:, :WIDTH])
    ratio = (torch.pdist(near) / torch.pdist(points)).square()
    # A mean of WIDTH squares deviates from 1 by (2 / WIDTH)^1/2.
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
    assert float(ratio.std()) == pytest.approx((2 / WIDTH) ** 0.5, rel=0.3)
    torch.testing.assert_close(narrow(points[:3]), near[:3], rtol=1e-4, atol=1e-3)


def test_the_command_writes_parts_that_a_recipe_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stepdistill.cli.partition import partition

    monkeypatch.chdir(tmp_path)
    of_food = [name == "Food & Drink" for name in emoji_groups()]
    assert sum(of_food) > 50
    food = [caption for caption, own in zip(emoji_captions(), of_food, strict=True) if own][:60]
    people = [caption for caption in emoji_captions() if caption.endswith("skin tone")][::30][:60]
    Path("prompts.txt").write_text("\n".join([*food, *people]))
    partition(Path("parts.txt"), prompts=Path("prompts.txt"), parts=2)
    said = capsys.readouterr().out
    assert "part 1: 60 prompts, such as: " in said and said.endswith("parts.txt\n")
    parts = parts_of([*food, *people], "parts.txt", 2)
    mine = Counter(zip(parts.tolist(), [0] * 60 + [1] * 60, strict=True))
    assert max(mine.values()) >= 48  # most food is not with people
    with pytest.raises(UserError, match="--parts is 121, and there are 120 prompts"):
        partition(Path("parts.txt"), prompts=Path("prompts.txt"), parts=121)
    with pytest.raises(UserError, match="is a folder"):
        partition(tmp_path)
    tiny_pipeline("dit").save_pretrained("dit")
    with pytest.raises(UserError, match="give --prompts FILE"):
        partition(Path("parts.txt"), teacher="dit")
    with pytest.raises(UserError, match="dit draws classes, not prompts"):
        partition(Path("parts.txt"), teacher="dit", prompts=Path("prompts.txt"))


def test_a_file_of_parts_has_a_line_for_prompts_that_are_held_out_too(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(LEAST + 20)]
    held, rest = hold_out(prompts)
    assert len(held) == HELD_OUT and isinstance(rest, Rest) and rest.whole == len(prompts)
    (tmp_path / "parts.txt").write_text("".join(f"{i % 2}\n" for i in range(len(prompts))))
    parts = parts_of(rest, str(tmp_path / "parts.txt"), 2)
    numbers = torch.tensor([int(prompt.split()[1]) for prompt in rest])
    assert len({(int(n) % 2, int(p)) for n, p in zip(numbers, parts, strict=True)}) == 2
    (tmp_path / "parts.txt").write_text("0\n1\n" * (len(rest) // 2))
    with pytest.raises(UserError, match=rf"has {len(rest)} lines, and there are {len(prompts)} prompts"):
        parts_of(rest, str(tmp_path / "parts.txt"), 2)
