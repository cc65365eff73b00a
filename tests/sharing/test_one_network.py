"""The network of a one-step student, written for other programs, is the pipeline's: noise in, its latents out."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shared_student import student_run

from stepdistill.errors import UserError
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.sharing.one_network import DESCRIPTION, one_step, write_network

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def test_it_draws_the_latents_of_the_pipeline(run: Path) -> None:
    network, inputs, told = one_step(run / "student")
    manifest = json.loads((run / "student" / "verification" / "manifest.json").read_text())
    noise = torch.cat([torch.randn(1, *inputs.tensors["noise"].shape[1:], generator=torch.Generator().manual_seed(s))
                       for s in manifest["seeds"]])  # fmt: skip
    pipe, _ = load_pipeline(run / "student", "cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in manifest["seeds"]]
    expected = pipe(**manifest["call"], generator=generators, output_type="latent").images
    with torch.no_grad():
        found = network(noise, *inputs.in_order[1:])
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert told["time"] == 1.0 and told["inputs"]["noise"]["shape"] == ["batch", *noise.shape[1:]]


def test_what_is_written_computes_the_same_for_any_batch(
    teacher_of: Callable[[str], PipelineTeacher], tmp_path: Path
) -> None:
    run = student_run(teacher_of("dit"), (1.0,), tmp_path / "dit", "dit")
    formats = ["torch", "onnx"] if ONNX else ["torch"]
    folder = write_network(run, formats)
    assert folder == run / "network"
    told = json.loads((folder / DESCRIPTION).read_text())["formats"]
    assert told["torch"]["difference"] <= 1e-6
    if ONNX:
        assert 0 < told["onnx"]["difference"] <= 1e-4
    network, inputs, _ = one_step(run / "student")
    loaded = torch.export.load(folder / "network.pt2").module()
    for batch in (1, 5):
        rows = torch.arange(batch) % 2
        given = [value[rows] for value in inputs.in_order]
        with torch.no_grad():
            found, expected = loaded(*given), network(*given)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    (folder / DESCRIPTION).unlink()
    with pytest.raises(UserError, match="holds no network of an earlier export"):
        write_network(run, ["torch"])


def test_a_student_of_several_steps_is_refused(
    teacher_of: Callable[[str], PipelineTeacher], tmp_path: Path
) -> None:
    run = student_run(teacher_of("sd"), (1.0, 0.5), tmp_path / "two")
    with pytest.raises(UserError, match="draws in 2 steps, with a scheduler between them"):
        write_network(run, ["torch"])
    assert not (run / "network").exists()
