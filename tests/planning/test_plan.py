"""Plans are made of shapes alone, and say what a run of the same code holds."""

from __future__ import annotations

import json
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import flagging_checker, tiny_pipeline
from torch import nn

from stepdistill.cli.plan import bytes_of
from stepdistill.errors import UserError
from stepdistill.planning.fake import fake_tensors
from stepdistill.planning.from_configs import TEACHERS, _component, pipeline_of
from stepdistill.planning.live_bytes import LiveBytes
from stepdistill.planning.plan import plan
from stepdistill.planning.quantized_layers import quantised_in_plan
from stepdistill.planning.table import duration
from stepdistill.recipes.recipe import load_recipe
from stepdistill.training import roles


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium", "flux-dev", "wan21-1.3b", "sana15-1.6b"])
def test_a_shipped_config_has_the_published_number_of_parameters(name: str) -> None:
    planned = pipeline_of(name, torch.device("meta"))
    net = getattr(planned.pipe, planned.family.network)
    published = json.loads((TEACHERS / f"{name}.json").read_text("utf-8"))["million"]
    assert sum(value.numel() for value in net.parameters()) / 1e6 == pytest.approx(published, rel=2e-3)


def test_bytes_are_counted_from_the_first_operator_to_the_end() -> None:
    live = LiveBytes(1)
    with fake_tensors({}, live) as mode, mode, live:
        net = nn.Linear(1000, 1000, bias=False)
        live.mark_network(net, "weights")
        live.begin()
        x = torch.zeros(10, 1000)
        y = net(net(x))  # the graph keeps x and the first product
        del x
        y.square().sum().backward()
        assert live.flops == 5 * 2 * 10 * 1000 * 1000  # two products, and three of them backwards
        live.mark([net.weight.grad], "gradients")
        del y
        peak = live.peak()
        assert live.held() == {"weights": 4_000_000, "gradients": 4_000_000}
    assert peak.by_kind["weights"] == 4_000_000
    # Both calls have a gradient of the weight, which are added.
    assert 12_000_000 <= peak.total <= 16_200_000


@pytest.mark.parametrize(
    ("bits", "weight"),
    [
        ("int8", 1024 * 1024 + 2 * 1024),
        ("nf4", 1024 * 1024 // 2 + 1024 * 1024 // 64 + 4 * (64 + 512)),
    ],
)
def test_a_quantised_layer_is_held_packed_and_widened_for_each_product(bits: str, weight: int) -> None:
    live, wide = LiveBytes(1), 2 * 1024 * 1024
    with fake_tensors({}, live) as mode, mode, live, quantised_in_plan():
        net: nn.Module = nn.Sequential(OrderedDict(to_q=nn.Linear(1024, 1024, False, dtype=torch.bfloat16)))
        net = roles.quantized(net, bits, ["to_q"])  # type: ignore[arg-type]
        assert sum(live.held().values()) == weight + 2  # and the number that stands for the weight
        x = torch.zeros(8, 1024, dtype=torch.bfloat16, requires_grad=True)
        live.begin()
        y = net(x)
        assert live.peak().total - sum(live.held().values()) >= wide
        assert sum(live.held().values()) == weight + 2 + 2 * (2 * 8 * 1024)  # nothing wide is kept
        y.sum().backward()
        assert live.flops == 2 * 2 * 8 * 1024 * 1024  # there and back, and none for a weight


def test_memory_is_said_as_on_a_card() -> None:
    assert bytes_of("24GB") == bytes_of("24 GiB") == 24 * 2**30
    with pytest.raises(UserError, match="give it as 24GB"):
        bytes_of("much")


def test_hours_are_said_in_the_unit_in_which_they_are_read() -> None:
    assert [duration(hours) for hours in (1234.5, 1, 0.5, 0.01)] == ["1,234.5 h", "1.0 h", "30.0 min", "36 s"]


@pytest.mark.parametrize(
    ("name", "roles", "notes"),
    [
        ("gdd_i_emoji", {"teacher", "student"}, []),
        (
            "echo_emoji",
            {"teacher", "student", "learner", "start"},
            [
                "student.start counts as large as the teacher's network",
                "the word's way through the text encoders",
            ],
        ),
    ],
)
def test_recipes_that_freeze_and_start_elsewhere_are_planned(
    name: str, roles: set[str], notes: list[str]
) -> None:
    seen = plan(load_recipe(name, sets=["student.start=nowhere"] if notes else []), device="cuda").trace
    assert set(seen.parameters) == roles and 0 < seen.trained["student"] < 0.6 * seen.parameters["teacher"]
    assert len(seen.notes) == len(notes) and all(map(str.startswith, seen.notes, notes))
    by_name = {update.network: update.passes for update in seen.updates}
    if name == "echo_emoji":
        assert by_name["discriminator"] == {"student": 1.0}
        assert by_name["student"] == {"student*": 2.0, "learner": 1.0, "start": 1.0}


@pytest.mark.parametrize("library", ["DiffusionPipeline", "ltx2.export_utils", "os", "..ltx2"])
def test_a_folder_names_no_module_but_a_pipelines_own(library: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{library} has no Thing, so this teacher cannot be planned"):
        _component(library, "Thing", tmp_path, nullcontext())


@pytest.mark.slow
def test_a_folder_that_names_a_class_by_its_former_name_is_planned(tmp_path: Path) -> None:
    """As Stable Diffusion's folders of 2022 do, and diffusers reads them."""
    import transformers

    pipe = tiny_pipeline("sd")
    pipe.register_modules(feature_extractor=flagging_checker()["feature_extractor"])
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text("utf-8"))
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    index["feature_extractor"][1] = "CLIPFeatureExtractor"
    (tmp_path / "model_index.json").write_text(json.dumps(index), "utf-8")
    planned = pipeline_of(str(tmp_path), torch.device("meta"))
    assert isinstance(planned.pipe.feature_extractor, transformers.CLIPImageProcessor)
    seen = plan(
        load_recipe("dmd_emoji", sets=[f"teacher={tmp_path}", "data.prompts=null"]), device="cuda"
    ).trace
    assert seen.parameters["teacher"] == sum(value.numel() for value in pipe.unet.parameters())
