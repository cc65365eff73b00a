"""A pipeline object whose networks are moved while they are called is refused in one line, before anything is made."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_pipeline

from stepdistill.errors import UserError
from stepdistill.networks.loading import load_pipeline
from stepdistill.networks.teacher import PipelineTeacher


def by_model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def by_layer(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")


def in_groups(pipe: Any) -> None:
    pipe.unet.enable_group_offload("cpu", offload_type="leaf_level")


def mapped(pipe: Any) -> None:
    pipe.hf_device_map = {"unet": 0, "vae": "cpu"}


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        (by_model, r"is offloaded to the CPU.*call pipe\.remove_all_hooks\(\) first"),
        (by_layer, r"is offloaded to the CPU.*call pipe\.remove_all_hooks\(\) first"),
        (in_groups, "is offloaded in groups"),
        (mapped, r"has a device_map.*call pipe\.reset_device_map\(\) first"),
    ],
)
def test_a_pipeline_that_is_moved_is_refused(moved: Any, said: str) -> None:
    pipe = tiny_pipeline("sd")
    moved(pipe)
    for take in (PipelineTeacher, lambda given: load_pipeline(given, "cpu")):
        with pytest.raises(UserError, match=said) as caught:
            take(pipe)
        assert "\n" not in str(caught.value)


def test_a_pipeline_without_its_hooks_teaches() -> None:
    """As the refusal says; and one that is only measured is left as it is."""
    pipe = tiny_pipeline("sd")
    by_model(pipe)
    assert load_pipeline(pipe)[0] is pipe
    pipe.remove_all_hooks()
    PipelineTeacher(pipe)
