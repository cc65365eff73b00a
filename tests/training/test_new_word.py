"""A word that text encoders learn: one row is trained, all else stays, and a stock pipeline has it afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from run_toy import HERE
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.export.verify import verify
from stepdistill.networks.concept import NewWord
from stepdistill.networks.loading import load_pipeline, load_teacher
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.system.emoji import emoji_images
from stepdistill.training.assemble import Assembled, assemble
from stepdistill.training.exporting import export_student, started_by
from stepdistill.training.identity import resolve
from stepdistill.training.loop import train
from stepdistill.training.preflight import check_recipe
from stepdistill.training.training_data import training_data

CAPTIONS = ("a <striped> apple", "red <striped> apple")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two images with the word in their captions, and prompts of other things."""
    images = tmp_path / "images"
    images.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.fromarray(emoji_images()[number]).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(caption)
    (tmp_path / "prompts.txt").write_text("red heart\nblue fish\n")
    return tmp_path


def recipe_of(place: Path, *more: str, method: str = "echo", word: str = "<striped>") -> Any:
    sets = [
        *("train.batch=2", "train.updates=8", "train.preview_every=0", "train.checkpoint_every=4"),
        *("evaluate=false", "train.lr=1e-3", "train.average=0", "student.output=teacher"),
        *(
            "options.pairs=4",
            "options.pair_steps=2",
            "options.echo_after=4",
            "student.freeze=[all-but-prompts]",
        ),
        *("data.initializer_token=apple", f"data.placeholder_token={word}"),
        *(f"data.images={place / 'images'}", f"data.prompts={place / 'prompts.txt'}"),
        *more,
    ]
    return load_recipe(HERE / "empty.yaml", method=method, sets=[each for each in sets if each])


def assembled(recipe: Any) -> Assembled:
    check_recipe(recipe)
    return assemble(resolve(recipe), Accelerator(cpu=True))


def trained(place: Path, *more: str, resume: bool = False) -> Assembled:
    recipe = recipe_of(place, *more)
    job, output = assembled(recipe), place / "run"
    output.mkdir(exist_ok=True)
    train(job.objective, training_data(job, output), recipe, output, Accelerator(cpu=True), resume=resume)
    return job


def table(job: Assembled) -> Any:
    return job.teacher.pipe.text_encoder.get_input_embeddings().weight


def said(teacher: PipelineTeacher, text: str) -> torch.Tensor:
    """The one tensor of a prompt's condition."""
    (found,) = teacher.codec.encode([text]).tensors.values()
    return found


@pytest.mark.slow
def test_one_row_is_trained_and_a_stock_pipeline_has_it(place: Path) -> None:
    plain = PipelineTeacher(load_teacher("emoji"))
    job = trained(place)
    concept, teacher = job.method.roles.concept, job.teacher
    assert concept is not None
    number = teacher.pipe.tokenizer.convert_tokens_to_ids("<striped>")
    own, before = table(job), plain.pipe.text_encoder.get_input_embeddings().weight
    assert len(own) == len(before) + 1 == number + 1
    start = before[plain.pipe.tokenizer("apple", add_special_tokens=False).input_ids].mean(0)
    assert torch.equal(own[number], start)  # the table's own row, until the word is settled
    assert float((concept.rows[0] - start).abs().max().detach()) > 1e-4
    assert torch.equal(said(plain, "red heart"), said(teacher, "red heart"))
    (told,) = concept.encode(torch.tensor([0])).tensors.values()
    assert torch.equal(told, said(teacher, CAPTIONS[0]))
    # Of both networks keys and values of attention to prompts, and nothing else.
    roles = job.method.roles
    for name, source in (("student", teacher.start), ("learner", teacher.start)):
        moved = {
            key
            for key, value in roles[name].net.state_dict().items()
            if not torch.equal(value, source.net.state_dict()[key])
        }
        assert moved and moved == set(roles.weights(name)) and all(".attn2.to_" in key for key in moved)
    export_student(job, place / "student", [started_by(job, "stepdistill train")])
    pipe, _ = load_pipeline(place / "student")
    assert pipe.tokenizer.convert_tokens_to_ids("<striped>") == number
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[number], concept.rows[0])
    assert "`<striped>`, a token of its tokenizer, learnt from images" in (
        place / "student" / "README.md"
    ).read_text("utf-8")
    assert job.shown(2)[0] == CAPTIONS[0]
    verify(place / "student")


def test_the_networks_that_compare_pictures_are_those_of_the_recipe_and_no_run_is_ranked_by_them(
    place: Path,
) -> None:
    job = assembled(recipe_of(place))
    looks = job.method.looks
    assert looks is not None and list(looks.eyes) == ["emoji"]
    assert job.options.networks == {"emoji": "options.features"}
    latents = torch.zeros(2, *job.teacher.codec.shape, requires_grad=True)
    pictures = looks.decode(latents)
    assert pictures.shape == (2, 3, 32, 32)
    seen = looks.first.embed(pictures)
    assert seen.shape == (2, looks.first.dimension)
    (slope,) = torch.autograd.grad(seen.sum(), latents)
    assert float(slope.abs().max()) > 0


@pytest.mark.slow
def test_a_run_goes_on_with_its_word(place: Path) -> None:
    whole = trained(place)
    rows = whole.method.roles.concept.rows[0].detach().clone()  # type: ignore[union-attr]
    shutil.rmtree(place / "run" / "work" / "checkpoints" / "step-00000008")
    again = trained(place, resume=True)
    assert torch.equal(again.method.roles.concept.rows[0], rows)  # type: ignore[union-attr]
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.method.roles.parameters("student"), whole.method.roles.parameters("student"), strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_every_text_encoder_of_a_pipeline_learns_it(name: str) -> None:
    """And the pipeline that was handed in keeps its own."""
    given = tiny_pipeline(name)
    teacher = PipelineTeacher(given)
    sizes = {
        n: p.get_input_embeddings().num_embeddings
        for n, p in given.components.items()
        if n.startswith("text_") and p
    }
    word = NewWord(teacher, "<thing>", "a", ["a <thing>", "b"])
    assert len(word.rows) == len(sizes) and len(word.parts) == 2 * len(sizes)
    cond = word.encode(torch.tensor([0, 1, 0]))
    total = sum(value.float().square().sum() for value in cond.tensors.values() if value.requires_grad)
    slopes = torch.autograd.grad(total, list(word.rows))  # type: ignore[arg-type]
    assert all(float(slope.abs().max()) > 0 for slope in slopes)
    for part, size in sizes.items():
        assert given.components[part].get_input_embeddings().num_embeddings == size
    word.settle(lambda part, row: row.to(torch.float16).to(row))
    for row in word.rows:
        assert torch.equal(row, row.to(torch.float16).float())


def test_what_cannot_be_learnt_is_refused(place: Path) -> None:
    def refused(says: str, *more: str, **changed: Any) -> None:
        with pytest.raises(UserError, match=says):
            assembled(recipe_of(place, *more, **changed))

    refused(r"data\.placeholder_token is heart, which no caption", word="heart")
    refused(r"data\.placeholder_token is apple, which tokenizer knows already", word="apple")
    refused(r"data\.initializer_token say nothing", "data.initializer_token=null")
    refused(
        r"options\.features has judge, which gives no gradient to its pictures", "options.features=[judge]"
    )
    refused(r"echo learns a word from a few images", "data.images=null")
    refused(r"export\.what is adapter, but echo also teaches", "export.what=adapter", "student.freeze=[]",
            "student.lora_rank=2")  # fmt: skip
    with pytest.raises(
        UserError, match=r"data\.placeholder_token is <x>, but dmd learns no word: leave it out"
    ):
        assembled(
            load_recipe(
                HERE / "empty.yaml",
                method="dmd",
                sets=[
                    "data.placeholder_token=<x>",
                    f"data.prompts={place / 'prompts.txt'}",
                    "evaluate=false",
                ],
            )
        )


def test_a_pipeline_without_a_text_encoder_learns_no_word() -> None:
    with pytest.raises(UserError, match="has no text encoder that could learn a word"):
        NewWord(PipelineTeacher(tiny_pipeline("dit")), "<thing>", "a", ["a <thing>"])
