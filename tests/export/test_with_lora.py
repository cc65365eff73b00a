"""A LoRA of the teacher in its student's weights: as plain diffusers has it on the student, and nothing at scale 0."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from student_toy import drawn
from tiny import shaken, tiny_prompts

from stepdistill.diffusion.solvers import uniform_times
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.export.student_folder import export
from stepdistill.export.verify import verify
from stepdistill.export.with_lora import write_with_lora
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.roles import Adapters, Copies
from stepdistill.networks.sampler import Sampler

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def folders(teacher, place):
    """A student, and a run whose adapter is a LoRA for its teacher."""
    sampler = on_stock_grid(Sampler(uniform_times(2), True), teacher.path, teacher.pipe.scheduler)
    student = Copies(teacher).student
    shaken(student.net)
    export(student, sampler, teacher, place / "student", tiny_prompts("sd", 2), "# A card\n", seeds=(0, 1))
    roles = Adapters(teacher, 2, 6.0)
    shaken(torch.nn.ParameterList(roles.parameters("student")), amount=1.0)
    export(
        roles.student, sampler, teacher, place / "other", tiny_prompts("sd", 2), "# A card\n", seeds=(0, 1)
    )
    return place / "student", place / "other" / "pytorch_lora_weights.safetensors"


@pytest.mark.slow
def test_at_scale_0_it_is_the_student_bit_for_bit_and_at_others_what_diffusers_draws(teacher_of, tmp_path):
    student, lora = folders(teacher_of("sd"), tmp_path)
    write_with_lora(student, str(lora), 0.0, tmp_path / "none")
    own, same = load_file(student / WEIGHTS), load_file(tmp_path / "none" / WEIGHTS)
    assert own.keys() == same.keys() and all(torch.equal(value, same[key]) for key, value in own.items())
    verify(tmp_path / "none")
    pipe = load_pipeline(student)[0]
    pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="x")
    for scale in (0.5, 1.0):
        write_with_lora(student, str(lora), scale, tmp_path / "with")
        assert str(verify(tmp_path / "with")).startswith("verified")
        pipe.set_adapters(["x"], adapter_weights=[scale])
        found = drawn(load_pipeline(tmp_path / "with")[0], tmp_path / "with")
        assert (found.int() - drawn(pipe, student).int()).abs().max() <= 1
        assert (found.int() - drawn(load_pipeline(student)[0], student).int()).abs().max() > 4
        assert not list((tmp_path / "with").rglob("pytorch_lora*"))


def test_what_is_no_lora_of_the_teacher_is_said(teacher_of, tmp_path):
    student, _ = folders(teacher_of("sd"), tmp_path)
    with pytest.raises(UserError, match=r"is no LoRA: give a \.safetensors file"):
        write_with_lora(student, str(tmp_path / "no_such"), 1.0, tmp_path / "with")
    with pytest.raises(UserError, match=r"does not fit|has nothing for"):
        write_with_lora(student, str(student / WEIGHTS), 1.0, tmp_path / "with")
    assert not (tmp_path / "with").exists()
