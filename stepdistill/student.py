"""A network on a path, and the student: a trained copy of the teacher's network that keeps its scale and output."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.families.base import Family
from stepdistill.path import Output, Path, Prediction, per_sample
from stepdistill.types import Condition

if TYPE_CHECKING:
    from stepdistill.teacher import PipelineTeacher

ADAPTER = "student"


class Denoiser(nn.Module):
    """A network with what is needed to read its output.

    Args:
        net: the family's network.
        path: the path its inputs lie on.
        output: what it returns.
        family: how it is called.
    """

    def __init__(self, net: nn.Module, path: Path, output: Output, family: Family) -> None:
        super().__init__()
        self.net = net
        self.path = path
        self.output: Output = output
        self.family = family

    def raw(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's output in its own kind, float32 [B, C, H, W], at x_t [B, C, H, W] and t [B]."""
        dtype = next(self.net.parameters()).dtype
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.tensors.items()}
        timestep = self.family.timestep(self.path, t)
        return self.family.call(self.net, x_t.to(dtype), timestep, Condition(tensors)).float()

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """What the network says about x_t [B, C, H, W] at t [B]."""
        return self.path.read(self.raw(x_t, t, cond), self.output, x_t, t)

    def predict_on(self, path: Path, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """What the network says about a point of another path: same angle, state rescaled, x0 carried over.

        Past the end of a discrete table (pure noise on a flow path) the state counts as the table's last one, which is
        how diffusers' schedulers start from pure noise. The prediction's noise is what x_t and x0 leave.
        """
        alpha, sigma = path.alpha_sigma(t)
        own_t = self.path.time_of(torch.atan2(sigma, alpha))
        own_alpha, own_sigma = self.path.alpha_sigma(own_t)
        scale = torch.hypot(own_alpha, own_sigma) / torch.hypot(alpha, sigma)
        x0 = self.predict(per_sample(scale, x_t) * x_t, own_t, cond).x0
        eps = (x_t - per_sample(alpha, x_t) * x0) / per_sample(sigma, x_t)
        return Prediction(path, x0, eps, t)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's inner picture of x_t, [B, D, h, w], or [B, N, D] for a transformer."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: Any, output: Any) -> None:
            caught.append(output[-1] if isinstance(output, tuple) else output)

        handle = self.family.features_of(self.net).register_forward_hook(catch)
        try:
            self.raw(x_t, t, cond)
        finally:
            handle.remove()
        return caught[0].float()

    def copy(self) -> Denoiser:
        """An independent trainable copy in float32."""
        net = copy.deepcopy(self.net).float().requires_grad_(True)
        return Denoiser(net, self.path, self.output, self.family)


class Student(Denoiser):
    """The network that is distilled: full weights, or LoRA on frozen teacher weights."""

    @staticmethod
    def from_teacher(
        teacher: PipelineTeacher, lora_rank: int = 0, lora_alpha: float | None = None
    ) -> Student:
        """A student that starts as the teacher.

        Args:
            teacher: whose network is copied, in float32.
            lora_rank: 0 trains all weights; otherwise the rank of the adapter that is trained.
            lora_alpha: scale of the adapter times its rank; default the rank, a scale of 1.
        """
        source = teacher.denoiser
        net = copy.deepcopy(source.net).float().requires_grad_(lora_rank == 0)
        if lora_rank:
            add_lora(net, source.family.lora_targets, lora_rank, lora_alpha or float(lora_rank))
        return Student(net.eval(), source.path, source.output, source.family)

    def mean_velocity(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """u(x_t, t, s) with x_s = x_t - (t - s) u, [B, C, H, W]; at s = t the plain velocity."""
        prediction = self.predict(x_t, t, cond)
        gap = per_sample(t - s, x_t)
        mean = (x_t - prediction.at(s)) / torch.where(gap == 0, torch.ones_like(gap), gap)
        return torch.where(gap == 0, prediction.velocity, mean)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """x_s from x_t along the student's own DDIM step, [B, C, H, W]."""
        return self.predict(x_t, t, cond).at(s)


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
