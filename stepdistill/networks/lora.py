"""LoRA adapters on a frozen network: added, found, merged."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ADAPTER = "student"


def add_lora(net: nn.Module, targets: list[str], rank: int, alpha: float) -> None:
    """Adds a trainable LoRA adapter named ADAPTER to a frozen diffusers network, zero at the start."""
    from diffusers.loaders.peft import PeftAdapterMixin
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]  # a float serves
    if isinstance(net, PeftAdapterMixin):
        net.add_adapter(config, adapter_name=ADAPTER)
    else:
        inject_adapter_in_model(config, net, adapter_name=ADAPTER)


def lora_layers(net: nn.Module) -> dict[str, Any]:
    """The layers of a network that carry the adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in net.named_modules() if isinstance(module, BaseTunerLayer)}


def merged_state(net: nn.Module) -> dict[str, Tensor]:
    """The state of a network with its LoRA (if any) added to the base weights, under the base network's names."""
    layers = lora_layers(net)
    state = {}
    for name, value in net.state_dict().items():
        if ".lora_" in name:
            continue
        state[name.replace(".base_layer.", ".")] = value
    for name, layer in layers.items():
        state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(ADAPTER)
    return {name: value.detach().clone() for name, value in state.items()}
