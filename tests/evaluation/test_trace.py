"""A trace shows what the network of a pipeline predicts at each of its steps."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny import shaken, tiny_prompts

from stepdistill.cli import main
from stepdistill.diffusion.solvers import uniform_times
from stepdistill.evaluation.trace import asked, clean_predictions, trace
from stepdistill.export.hybrid import write_hybrid
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import export
from stepdistill.families.watching import watch
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.roles import Copies
from stepdistill.networks.sampler import Sampler


def folders(teacher, place):
    """A student of four steps with fresh noise between them, and the hybrid with its teacher."""
    sampler = on_stock_grid(Sampler(uniform_times(4), True), teacher.path, teacher.pipe.scheduler)
    student = Copies(teacher).student
    shaken(student.net)
    export(student, sampler, teacher, place / "student", tiny_prompts("sd", 2), "# A card\n", seeds=(0, 1))
    write_hybrid(teacher, "tiny", place / "student", place / "hybrid", guidance=3.0, calls=1)
    return place / "student", place / "hybrid"


def test_the_last_clean_prediction_is_what_is_drawn_and_the_first_is_the_networks(teacher_of, tmp_path):
    """Of the student its own x0 at pure noise, of the hybrid the guided teacher's at the same noise."""
    teacher = teacher_of("sd")
    student, hybrid = folders(teacher, tmp_path)
    noise = torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(3))
    cond = teacher.codec.encode(["a red heart"])
    call = {"prompt": "a red heart", "num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "latent"}
    for folder in (student, hybrid):
        pipe = load_pipeline(folder)[0]
        seen = watch(pipe, {**call, "generator": [torch.Generator().manual_seed(3)]})
        times, states = clean_predictions(seen, teacher.family, teacher.codec.shape, 1)
        assert torch.allclose(torch.tensor(times), torch.tensor([1.0, 0.75, 0.5, 0.25]), atol=1e-3)
        assert torch.allclose(states[-1], seen.drawn, atol=1e-5)
        t = torch.tensor([times[0]])
        if folder == hybrid:
            wanted = teacher.predict(noise, t, cond, guidance=3.0).x0
            assert torch.allclose(states[0], wanted, atol=1e-3 * float(wanted.abs().max()))
        else:
            assert not torch.allclose(states[0], teacher.predict(noise, t, cond, guidance=3.0).x0, atol=1e-2)


def test_a_page_a_picture_and_numbers_are_written(teacher_of, tmp_path):
    teacher = teacher_of("sd")
    student, hybrid = folders(teacher, tmp_path)
    found = trace(
        asked([str(student), str(hybrid)], None, None),
        ["a red heart", "yellow star"],
        3,
        tmp_path / "out",
        "emoji",
    )
    numbers = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert [each["name"] for each in numbers["pipelines"]] == [str(student), str(hybrid)]
    for one in found:
        assert len(one.moving) == len(one.diversity) == 4 and one.moving[-1] == 0 and one.moving[0] > 0
        assert min(one.diversity) > 0 and one.pictures.shape[:3] == (2, 3, 4)
    page = (tmp_path / "out" / "trace.html").read_text()
    assert page.count("<svg role=img") == 2 and page.count("<figcaption>") == 2 * 2 + 2
    assert (tmp_path / "out" / "trace.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["emoji"], "there is no prompt"),
        (["no_such", "--prompt", "a"], "pipeline no_such does not exist"),
        (["emoji", "emoji", "--prompt", "a"], "named twice"),
    ],
)
def test_a_mistake_is_one_line(more, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stepdistill", "trace", *more])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and expected in said and said.count("\n") == 1
