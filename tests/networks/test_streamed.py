"""Networks that lie in the host's memory and compute elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline
from torch import Tensor, nn

from stepdistill.networks.codec import Codec
from stepdistill.networks.streamed import device_of, layer_by_layer, on_host, streamed
from stepdistill.networks.teacher import PipelineTeacher

CPU, META = torch.device("cpu"), torch.device("meta")


def drawn(codec: Codec) -> Tensor:
    torch.manual_seed(0)
    found: Tensor = codec.pipe(
        "a red heart", num_inference_steps=2, height=32, width=32, output_type="pt", return_dict=False
    )[0]
    return found


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_network_computes_layer_by_layer_what_it_does(name: str, tmp_path: Path) -> None:
    """Also within its pipeline, which asks it where to compute; and after it nothing is left of that."""
    codec = PipelineTeacher(tiny_pipeline(name)).codec
    net = getattr(codec.pipe, codec.family.network)
    before, forward = drawn(codec), {id(each): each.forward for each in net.modules()}
    with layer_by_layer(net, CPU):
        assert any(each.forward != forward[id(each)] for each in net.modules())
        assert torch.equal(drawn(codec), before)
    assert torch.equal(drawn(codec), before)
    net.save_pretrained(tmp_path)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in copy.deepcopy(net).state_dict().items())


def test_what_lies_where_it_computes_is_left_alone() -> None:
    net, there = tiny_pipeline("sd").unet, nn.Linear(1, 1, device=META)
    assert device_of(net) == CPU and device_of(there) == META and device_of(nn.Module()) == CPU
    with streamed([net], CPU), streamed([there, there], META):
        assert not any(hasattr(each, "_diffusers_hook") for each in (*net.modules(), there))


def test_a_copy_on_the_host_shares_nothing() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[0].weight.requires_grad_(False)
    made = on_host(net)
    state = net.state_dict()
    assert all(
        torch.equal(v, state[k]) and v.data_ptr() != state[k].data_ptr() for k, v in made.state_dict().items()
    )
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in net.parameters()]
