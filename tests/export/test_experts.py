"""Networks of several experts, loaded as their users load them: in bfloat16, by plain diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, shaken, tiny_pipeline, tiny_prompts

from stepdistill.export.experts import one_network
from stepdistill.system.travelling import travelling_module

HALF = torch.bfloat16


def routed(nets: list[Any]) -> Any:
    """The networks as those of two prompts."""
    config = {name: value for name, value in nets[0].config.items() if not name.startswith("_")}
    place = ["encoder_hidden_states"]
    made = travelling_module("routed_experts").RoutedExperts(
        type(nets[0]).__name__, config, len(nets), place, 2, 16
    )
    state = {f"students.{i}.{key}": v for i, net in enumerate(nets) for key, v in net.state_dict().items()}
    made.load_state_dict({**state, "anchors": torch.randn(2, 16), "owners": torch.tensor([0, 1])})
    return made.eval()


def phased(nets: list[Any]) -> Any:
    return one_network(nets, [500.0])


def in_float32(net: Any) -> set[str]:
    return {name for name, value in net.named_parameters() if value.dtype == torch.float32}


@pytest.mark.parametrize(("name", "made"), [("kandinsky5", phased), ("wan", phased), ("wan", routed)])
def test_experts_in_bfloat16_keep_in_float32_what_their_class_keeps(
    name: str, made: Any, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    pipe = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path / "stock")
    other = copy.deepcopy(pipe.transformer)
    shaken(other)
    pipe.register_modules(transformer=made([pipe.transformer, other]))
    pipe.save_pretrained(tmp_path / "experts")

    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "stock", torch_dtype=HALF)
    loaded: Any = DiffusionPipeline.from_pretrained(
        tmp_path / "experts", torch_dtype=HALF, trust_remote_code=True
    )
    loaded.set_progress_bar_config(disable=True)
    net, kept = loaded.transformer, in_float32(stock.transformer)
    assert kept and kept != {name for name, _ in stock.transformer.named_parameters()}
    part = "experts" if made is phased else "students"
    assert in_float32(net) == {f"{part}.{i}.{each}" for i in range(2) for each in kept}
    assert net.dtype == stock.transformer.dtype == HALF
    size, prompts = SIZES[name], tiny_prompts(name, 2)
    frames = loaded(
        prompt=prompts,
        height=size.height,
        width=size.width,
        num_frames=size.frames,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        return_dict=False,
        generator=torch.Generator().manual_seed(0),
    )[0]
    assert frames.isfinite().all()
    # Whoever stores weights in eight bits leaves the same layers alone as in the stock class.
    for each in (net, stock.transformer):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=HALF)
    eight = {each for each, value in stock.transformer.named_parameters() if value.element_size() == 1}
    assert eight
    assert {each for each, value in net.named_parameters() if value.element_size() == 1} == {
        f"{part}.{i}.{each}" for i in range(2) for each in eight
    }
    # A load of another class meanwhile has its own list.
    assert type(net)._keep_in_fp32_modules is None and net._keep_in_fp32_modules
