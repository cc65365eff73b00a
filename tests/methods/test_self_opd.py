"""Fine-tuning at the student's own states, between networks and images whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from run_toy import HERE
from tiny import SIZES, tiny_pipeline, tiny_prompts
from torch import Tensor, nn

from stepdistill.data.prompts import read_rich
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.path import FlowPath
from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.losses.batch import Batch, Examples
from stepdistill.losses.contract import Turn
from stepdistill.losses.rollout import visits
from stepdistill.methods.self_opd import SelfOPD, alike, among
from stepdistill.networks.roles import Copies
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.recipe import load_recipe
from stepdistill.testing.toys import (
    SHAPE,
    Affine,
    Gaussian,
    Perceptron,
    ToyTeacher,
    loss_of,
    toy_batch,
    toy_student,
)
from stepdistill.training.assemble import assemble
from stepdistill.training.identity import resolve
from stepdistill.training.preflight import check_recipe
from stepdistill.training.training_data import training_data

PATH = FlowPath()
TIMES = (1.0, 0.75, 0.5, 0.25)


def between(
    student: nn.Module, teacher: nn.Module, times: tuple[float, ...] = TIMES, **options: Any
) -> SelfOPD:
    roles = Copies(ToyTeacher(teacher, PATH, "x0"), toy_student(student, PATH, "x0"))
    return SelfOPD(roles, times, SelfOPD.Options.model_validate(options))


def labelled(count: int, plain: float, rich: float) -> Batch:
    conditions = (Condition({"label": torch.full((count,), value)}) for value in (plain, rich))
    cond, told = conditions
    return replace(toy_batch(count), cond=cond, rich=told)


def test_where_rich_is_plain_there_is_nothing_to_learn() -> None:
    method = between(Gaussian(PATH, 0.0, 1.0, 2.0), Gaussian(PATH, 0.0, 1.0, 2.0))
    loss, _ = loss_of(method, "student", labelled(8, 0.5, 0.5))
    assert float(loss.detach()) == 0


def test_the_loss_is_that_of_the_clean_predictions_with_halving_weights() -> None:
    """x0 = mu + alpha s^2 (x - alpha mu) / V: what mu is off by comes times sigma^2 / V, here sigma^2 / (alpha^2 +
    sigma^2); the weights are 8, 4, 2, 1 over 15."""
    method = between(Gaussian(PATH, 0.0, 1.0, 2.0), Gaussian(PATH, 0.0, 1.0, 2.0))
    loss, _ = loss_of(method, "student", labelled(8, 0.0, 0.5))
    wanted = sum(
        weight / 15 * (t**2 / ((1 - t) ** 2 + t**2)) ** 2
        for weight, t in zip((8, 4, 2, 1), TIMES, strict=True)
    )
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)


def test_the_teacher_is_an_average_that_gets_no_gradient_and_slows_down() -> None:
    method = between(Affine(0.0, 0.0), Affine(0.0, 0.0))
    with torch.no_grad():
        method.student.net.shift.fill_(1.0)
    method.after_step(Turn("student", 199))
    assert float(method.average.net.shift) == pytest.approx(0.001)
    method.after_step(Turn("student", 200))
    assert float(method.average.net.shift) == pytest.approx(0.001 + 0.0001 * 0.999, rel=1e-3)
    loss_of(method, "student", toy_batch(4))[0].backward()
    assert method.average.net.shift.grad is None and method.student.net.shift.grad is not None
    assert not method.average.net.shift.requires_grad


def images_of(batch: Batch, clean: Tensor, label: Tensor | None = None) -> Batch:
    cond = Condition() if label is None else Condition({"label": label})
    return replace(batch, images=Examples(clean, cond), cond=cond)


def test_the_denoiser_of_the_images_is_the_posterior_mean() -> None:
    """By Bayes' rule, one image at a time; images with another caption have no part."""
    clean, x, t = torch.randn(5, *SHAPE), torch.randn(3, *SHAPE), torch.full((3,), 0.6)
    allowed = torch.tensor([[True, True, False, True, True]]).expand(3, 5)
    said = among(PATH, x, t, clean, allowed).x0
    for row, found in zip(x, said, strict=True):
        law = torch.distributions.Normal(0.4 * clean[[0, 1, 3, 4]], 0.6)
        likelihood = law.log_prob(row).flatten(1).sum(1).exp()
        wanted = (likelihood[:, None, None, None] * clean[[0, 1, 3, 4]]).sum(0) / likelihood.sum()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("renoise", [True, False])
def test_each_noise_is_led_to_one_of_the_images_of_its_caption_and_each_image_gets_its_share(
    renoise: bool,
) -> None:
    """Two captions with images at -1, 1 and at 9, 11 (in every element): where the trajectory ends."""
    count = 400
    label = (torch.arange(count) % 2).float()
    centre = 10 * label + torch.where(torch.arange(count) % 4 < 2, 1.0, -1.0)
    clean = centre[:, None, None, None].expand(count, *SHAPE)
    batch = images_of(toy_batch(count), clean, label)
    options: dict[str, Any] = {"source": "images", "renoise": renoise, "reference_calls": 64}
    method = between(Affine(0.0, 0.0), Affine(0.0, 0.0), (1.0,), **options)
    visit = visits(method.student, method.sampler(), batch, batch.cond)[0]
    ends = method.from_images(visit, batch.images, alike(batch.images.cond, count, clean))  # type: ignore[arg-type,union-attr]
    assert float((ends - 10 * label[:, None, None, None]).abs().sub(1).abs().max()) < 0.05
    upper = (ends.flatten(1).mean(1) - 10 * label > 0).float()
    assert float(upper.mean()) == pytest.approx(0.5, abs=0.1)
    assert (
        float((upper - (batch.noise.flatten(1).sum(1) > 0).float()).abs().mean()) < 0.02
    )  # by its noise alone


def test_a_student_with_fresh_noise_is_told_the_trajectorys_end_and_another_where_its_own_step_ends() -> None:
    """One image: its trajectory is the line to it, whose clean prediction is the image at every call."""
    batch = images_of(toy_batch(8), torch.full((8, *SHAPE), 0.7))
    for renoise in (True, False):
        method = between(
            Affine(0.2, 0.0), Affine(0.2, 0.0), source="images", renoise=renoise, keep_weight=0.0
        )
        loss, _ = loss_of(method, "student", batch)
        assert float(loss.detach()) == pytest.approx(0.25, rel=1e-4)


def test_with_fresh_noise_the_target_of_the_first_of_many_calls_is_that_of_one_call() -> None:
    """Of several images the clean prediction at noise is their mean, and the trajectory's end is one of them."""
    count = 16
    clean = torch.where(torch.arange(count) % 2 < 1, 1.0, -1.0)[:, None, None, None].expand(count, *SHAPE)
    batch, ends = images_of(toy_batch(count), clean), []
    for times in ((1.0,), TIMES):
        method = between(Affine(0.0, 0.0), Affine(0.0, 0.0), times, source="images", renoise=True)
        visit = visits(method.student, method.sampler(), batch, batch.cond)[0]
        everyone = torch.ones(count, count, dtype=torch.bool)
        ends.append(method.from_images(visit, batch.images, everyone))  # type: ignore[arg-type]
    torch.testing.assert_close(*ends)
    assert float(ends[0].abs().mean()) > 0.8


def test_other_prompts_hold_the_student_to_the_network_that_it_was() -> None:
    method = between(Affine(0.7, 0.0), Affine(0.2, 0.0), source="images", keep_weight=3.0)
    loss, logs = loss_of(method, "student", images_of(toy_batch(8), torch.full((8, *SHAPE), 0.7)))
    assert float(logs["new"].detach()) == pytest.approx(0, abs=1e-10)
    assert float(logs["kept"].detach()) == pytest.approx(0.25) and float(loss.detach()) == pytest.approx(0.75)
    fresh = between(Perceptron(), Perceptron(), source="images")
    assert (
        float(loss_of(fresh, "student", images_of(toy_batch(8), torch.zeros(8, *SHAPE)))[1]["kept"].detach())
        == 0
    )


def test_with_an_embedded_scale_the_network_that_it_was_is_the_teacher_at_that_scale() -> None:
    pipe = tiny_pipeline("flux")
    teacher = PipelineTeacher(pipe, size=SIZES["flux"], guidance=3.5)
    method = SelfOPD(
        Copies(teacher), (1.0, 0.5), SelfOPD.Options.model_validate({"source": "images", "guidance": 3.5})
    )
    draws = Draws(0, 0, 0, 2)
    batch = Batch(draws, teacher.codec.shape, teacher.codec.encode(tiny_prompts("flux", 2)), torch.arange(2))
    for visit in visits(method.student, method.sampler(), batch, batch.cond):
        started, kept = (
            method.student.predict(visit.x, visit.t, batch.cond).x0,
            method.from_start(visit, batch.cond),
        )
        torch.testing.assert_close(kept, started, atol=1e-5, rtol=1e-5)
        plain = teacher.predict(visit.x, visit.t, batch.cond).x0
        assert float((plain - kept).abs().max()) > 0.1


def test_conditions_that_are_alike_are_equal_in_all_their_tensors() -> None:
    cond = Condition({"a": torch.tensor([[1.0, 2], [1, 2], [1, 3]]), "b": torch.tensor([0, 1, 0])})
    assert alike(cond, 3, torch.zeros(3)).tolist() == [[i == j for j in range(3)] for i in range(3)]
    assert bool(alike(Condition(), 3, torch.zeros(3)).all())


def test_rich_captions_are_read_and_stand_beside_their_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("sks\nblue fish\n")
    (tmp_path / "rich.jsonl").write_text('{"prompt": "sks", "rich": "red apple"}\n')
    sets = [f"data.prompts={tmp_path / 'prompts.txt'}", "train.batch=4", "evaluate=false"]
    plain = load_recipe(HERE / "empty.yaml", method="self_opd", sets=sets)
    with pytest.raises(UserError, match="learns from rich captions: give a file"):
        assemble(resolve(plain), Accelerator(cpu=True))
    recipe = load_recipe(
        HERE / "empty.yaml", method="self_opd", sets=[*sets, f"data.rich={tmp_path / 'rich.jsonl'}"]
    )
    check_recipe(recipe)
    job = assemble(resolve(recipe), Accelerator(cpu=True))
    assert "warning: self_opd goes on from a student of few steps" in capsys.readouterr().err
    data = training_data(job, tmp_path)
    batch = data.batch(0, 0, 4, 4)
    encode = job.teacher.codec.encode
    for i, prompt in enumerate(batch.prompt.tolist()):
        wanted = encode([("red apple", "blue fish")[prompt]])
        for name, value in batch.rich.tensors.items():  # type: ignore[union-attr]
            torch.testing.assert_close(value[i], wanted[name][0])
    half = batch.split(2)[0].rich
    assert half is not None and all(len(value) == 2 for value in half.tensors.values())
    assert "data.rich" in data.identity()
    (tmp_path / "rich.jsonl").write_text('{"prompt": "a dog", "rich": "red apple"}\n')
    with pytest.raises(UserError, match="a rich caption for none of the prompts"):
        training_data(job, tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a"}\n', "line 1 has no text under rich"),
        ('{"rich": "a"}\n', "line 1 has no text under prompt"),
    ],
)
def test_a_row_without_one_of_the_two_is_named(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "rich.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        read_rich(file)
    with pytest.raises(UserError, match=r"data\.rich: .* not found"):
        read_rich(tmp_path / "none.jsonl")


@pytest.mark.parametrize(("step", "decay"), [(0, 0.5), (4, 0.5), (5, 0.9), (300, 0.9)])
def test_the_teacher_follows_the_student_fast_at_first_and_slowly_then(step: int, decay: float) -> None:
    method = between(Affine(0.0, 1.0), Affine(0.0, 1.0), early_decay=0.5, early_updates=5, target_decay=0.9)
    before = [weight.clone() for weight in method.roles.parameters("target")]
    with torch.no_grad():
        for weight in method.roles.parameters("student"):
            weight += 1.0
    method.after_step(Turn("student", step))
    for old, weight in zip(before, method.roles.parameters("target"), strict=True):
        torch.testing.assert_close(weight, old + (1 - decay))
