"""Students of parts of the prompts: the parts are a partition, each student learns its own, and is asked for it."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from student_toy import drawn
from tiny import shaken, tiny_pipeline

from stepdistill.data.batches import Data
from stepdistill.data.pairs import PairCache
from stepdistill.data.partition import parts_of, place_of
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.joined import write_joined
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import export
from stepdistill.export.verify import verify
from stepdistill.losses.contract import PairOptions
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.emoji import emoji_captions, emoji_groups
from stepdistill.training.joining import members_of

PROMPTS = ["a red heart", "smiling cat face", "yellow star", "blue fish", "a green leaf", "flag"]


@pytest.mark.parametrize("partition", ["hash", "consecutive", "groups"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_parts_are_disjoint_and_together_all(partition, count):
    """Of the captions; equal stretches differ by one, and no Unicode group is torn."""
    parts = parts_of(emoji_captions(), partition, count)
    assert len(parts) == len(emoji_captions()) and set(parts.tolist()) == set(range(count))
    sizes = Counter(parts.tolist())
    if partition == "consecutive":
        assert max(sizes.values()) - min(sizes.values()) <= 1 and (parts.diff() >= 0).all()
    if partition == "groups":
        owners = {(name, part) for name, part in zip(emoji_groups(), parts.tolist(), strict=True)}
        assert len(owners) == len(set(emoji_groups()))


def test_a_file_names_the_keys_and_mistakes_are_said(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("a\nb\na\nb\nc\nc\n")
    parts = parts_of(PROMPTS, str(file), 3)
    assert parts[0] == parts[2] and parts[1] == parts[3] and parts[4] == parts[5] and len(parts.unique()) == 3
    for partition, count, said in (
        (str(file), 4, "has 3 keys"),
        ("hashes", 2, "there is no such file and no such partition"),
        ("groups", 2, "data.prompts has others"),
        ("consecutive", 7, "of which one would have none"),
    ):
        with pytest.raises(UserError, match=said):
            parts_of(PROMPTS, partition, count)
    file.write_text("a\nb\n")
    with pytest.raises(UserError, match="has 2 lines, and there are 6 prompts"):
        parts_of(PROMPTS, str(file), 2)
    for part in ("0/4", "5/4", "1-4"):
        with pytest.raises(UserError, match=r"give k/K"):
            place_of(part)


def test_a_student_of_a_part_meets_its_own_prompts_alone(teacher_of, tmp_path):
    """The pool of pairs stays whole, or is filtered; one part of one is what there is without parts, bit for bit."""
    teacher = teacher_of("sd")
    options = PairOptions(guidance=2.0, pairs=12, pair_steps=2, pair_solver="ddim")
    pairs = PairCache(tmp_path, teacher, PROMPTS, options, 0)
    own = torch.tensor([1, 4])
    whole, part, filtered = (
        Data(teacher, PROMPTS, 0, pairs=pairs, part=each, part_pairs=only)
        for each, only in ((None, False), (own, False), (own, True))
    )
    pairs.make(whole.condition)
    every = Data(teacher, PROMPTS, 0, pairs=pairs, part=torch.arange(6), part_pairs=True)
    texts = teacher.codec.encode(PROMPTS)["encoder_hidden_states"]

    def asked(data):
        batches = [data.batch(step, 0, 6, 6) for step in range(4)]
        prompts = torch.cat([each.prompt for each in batches])
        conds = torch.cat([each.pairs.cond["encoder_hidden_states"] for each in batches])
        near = torch.cdist(conds.flatten(1), texts.flatten(1)).argmin(1)
        return batches, set(prompts.tolist()), set(near.tolist())

    assert asked(part)[1:] == ({1, 4}, set(range(6)))
    assert asked(filtered)[1:] == ({1, 4}, {1, 4})
    for one, two in zip(asked(whole)[0], asked(every)[0], strict=True):
        assert torch.equal(one.prompt, two.prompt) and torch.equal(one.pairs.x0, two.pairs.x0)
        assert torch.equal(one.pairs.noise, two.pairs.noise)


def runs(root, count=2):
    """Runs of so many parts, as far as joining reads them."""
    teacher = PipelineTeacher(tiny_pipeline("sd"))
    sampler = on_stock_grid(Sampler(uniform_times(1), True), teacher.path, teacher.pipe.scheduler)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    parts, places = parts_of(PROMPTS, "consecutive", count), []
    for k in range(count):
        place = root / f"part{k + 1}"
        place.mkdir(parents=True)
        student = Copies(teacher).student
        shaken(student.net, seed=k)
        own = [PROMPTS[i] for i in (parts == k).nonzero()[:, 0].tolist()]
        export(student, sampler, teacher, place / "student", own[:2], "# A card\n", seeds=(0, 1))
        data = {"prompts": str(root / "prompts.txt"), "partition": "consecutive", "part": f"{k + 1}/{count}"}
        recipe = {"teacher": "emoji", "method": "slimflow", "options": {"guidance": 2.0}, "data": data}
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        places.append(place)
    return places


def pictures(folder, prompts):
    pipe = load_pipeline(folder)[0]
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "np", "generator": generators}
    return pipe(prompt=list(prompts), **call, return_dict=False)[0]


def test_every_prompt_is_drawn_by_the_student_that_learnt_it(tmp_path):
    """In one batch of both parts, and so plain diffusers draws it, where stepdistill is not."""
    places = runs(tmp_path)
    members, prompts, parts = members_of([places[1], places[0]])
    assert [member.name for member in members] == [str(place) for place in places]
    write_joined(members, prompts, parts, tmp_path / "joined")
    assert str(verify(tmp_path / "joined")).startswith("verified")
    joined = pictures(tmp_path / "joined", PROMPTS)
    each = [pictures(place / "student", PROMPTS) for place in places]
    for i, part in enumerate(parts.tolist()):
        assert np.abs(joined[i] - each[part][i]).max() < 1e-4
        assert np.abs(joined[i] - each[1 - part][i]).max() > 0.02
    # A word more: the nearest prompt's student draws it, in one network pass.
    pipe = load_pipeline(tmp_path / "joined")[0]
    called = []
    for k, student in enumerate(pipe.unet.students):
        student.register_forward_pre_hook(lambda *_, k=k: called.append(k))
    drawn(pipe, tmp_path / "joined")
    assert sorted(called) == [0, 1]


def test_what_is_no_whole_is_said(tmp_path):
    places = runs(tmp_path)
    with pytest.raises(UserError, match="nobody has learnt part 2/2"):
        members_of(places[:1])
    shutil.copytree(places[0], tmp_path / "again")
    with pytest.raises(UserError, match="both learnt part 1/2"):
        members_of([places[0], tmp_path / "again"])
    file = tmp_path / "again" / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["data"] |= {"part": "2/2", "partition": "hash"}
    file.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"data\.partition hash, and .* consecutive"):
        members_of([places[0], tmp_path / "again"])
