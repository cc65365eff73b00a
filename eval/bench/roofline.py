"""What a DMD unit costs at least on an H100, from counted operations and bytes: python eval/bench/roofline.py

Networks are diffusers' classes in the shapes of the published ones, on torch's meta device: no weights, no GPU. A unit
is one student update, with a guided teacher and a forward of the fake network, and k fake ones. P are parameters, F the
operations of a forward of one sample and "graph" those of a forward and backward, counted by torch.utils.flop_counter:

operations  B (graph + guided F + F + k (F + graph)); guidance takes two forwards, or one where the network is told it
weights     2 P a forward, 2 P and a float32 gradient (4 P) a backward, AdamW in float32 28 P: reads w, g, m, v, writes
            w, m, v. In all P (40 + 38 k)
activations every operator's output written and read once in bf16, attention as one operator, a backward as two
            forwards: what unfused operators move, so an estimate and no part of the limit

The limit is the larger of operations at 989 TFLOP/s (bf16, dense) and weights at 3.35 TB/s. Numbers by batch are parted
by a slash.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import gpu_training
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

FLOPS, BYTES = gpu_training.PEAK_FLOPS, 3.35e12


def sdxl() -> tuple[nn.Module, dict[str, Any]]:
    """128 x 128 x 4 latents, 1024 pixels."""
    with patch.object(gpu_training, "DEVICE", torch.device("meta")):
        net = gpu_training.sdxl_unet(False)
    return net, {
        "sample": torch.randn(1, 4, 128, 128),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.randn(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 1280), "time_ids": torch.zeros(1, 6)},
    }


def sd35_medium() -> tuple[nn.Module, dict[str, Any]]:
    """4,096 tokens of 1024 pixels and 333 of text."""
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    return net, {
        "hidden_states": torch.randn(1, 16, 128, 128),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.randn(1, 333, 4096),
        "pooled_projections": torch.randn(1, 2048),
    }


def flux_dev() -> tuple[nn.Module, dict[str, Any]]:
    """4,096 tokens of 1024 pixels and 512 of text; guidance is an input."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True), {
        "hidden_states": torch.randn(1, 4096, 64),
        "timestep": torch.zeros(1),
        "guidance": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768),
        "img_ids": torch.zeros(4096, 3),
        "txt_ids": torch.zeros(512, 3),
    }


NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], int]] = {
    "SDXL": (sdxl, 2),
    "SD3.5-M": (sd35_medium, 2),
    "Flux.1 dev": (flux_dev, 1),
}
"""By name, and forwards of a guided teacher."""


class Written(TorchDispatchMode):
    """Counts elements of what operators make, but for views and what is made in place."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):
            self.elements += sum(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


@dataclass(frozen=True)
class Network:
    """Sizes of a network, of one sample.

    Attributes:
        parameters: their number.
        forward: operations of a forward.
        graph: of a forward and a backward.
        written: elements that operators of a forward write.
        guided: forwards of a guided teacher.
    """

    parameters: int
    forward: int
    graph: int
    written: int
    guided: int

    @staticmethod
    def counted(make: Callable[[], tuple[nn.Module, dict[str, Any]]], guided: int) -> Network:
        with torch.device("meta"):
            net, inputs = make()
        with FlopCounterMode(display=False) as forward:
            said = net(**inputs, return_dict=False)[0]
        with FlopCounterMode(display=False) as backward:
            said.sum().backward()
        plain = patch(
            "torch.nn.functional.scaled_dot_product_attention", lambda query, *_, **__: query.clone()
        )
        with plain, torch.no_grad(), Written() as written:
            net(**inputs, return_dict=False)
        ahead = forward.get_total_flops()
        parameters = sum(p.numel() for p in net.parameters())
        return Network(parameters, ahead, ahead + backward.get_total_flops(), written.elements, guided)

    def unit(self, fake_updates: int, batch: int) -> dict[str, float]:
        """Operations and bytes of a unit."""
        looks = self.guided + 1 + fake_updates
        graphs = 1 + fake_updates
        return {
            "flops": batch * (looks * self.forward + graphs * self.graph),
            "weights": self.parameters * (40.0 + 38 * fake_updates),
            "activations": batch * self.written * 2 * 2.0 * (looks + 3 * graphs),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--fake-steps", type=int, nargs="+", default=[1, 5])
    chosen = parser.parse_args()
    print(
        "| network | B params | TFLOP a forward | unit | TFLOP a sample | weights GB | FLOP a byte |", end=""
    )
    print(" ms of operations | ms of weights | limit | ms of activations |")
    print("|---" * 11 + "|")
    for name, (make, guided) in NETWORKS.items():
        net = Network.counted(make, guided)
        for k in chosen.fake_updates:
            found = [net.unit(k, batch) for batch in chosen.batch]
            flops, moved = ([one[key] for one in found] for key in ("flops", "weights"))
            limits = [
                "operations" if f / FLOPS > w / BYTES else "weights"
                for f, w in zip(flops, moved, strict=True)
            ]
            cells = [
                f"{name} | {net.parameters / 1e9:.2f} | {net.forward / 1e12:.2f} | 1 + {k}",
                f"{net.unit(k, 1)['flops'] / 1e12:,.0f}",
                f"{moved[0] / 1e9:,.0f}",
                " / ".join(f"{f / w:,.0f}" for f, w in zip(flops, moved, strict=True)),
                " / ".join(f"{f / FLOPS * 1e3:,.0f}" for f in flops),
                f"{moved[0] / BYTES * 1e3:,.0f}",
                " / ".join(dict.fromkeys(limits)),
                " / ".join(f"{one['activations'] / BYTES * 1e3:,.0f}" for one in found),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
