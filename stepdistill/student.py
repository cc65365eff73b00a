"""A network on a path, and the student: a trained copy of the teacher's network that keeps its scale and output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.experts import Experts
from stepdistill.families.base import GAP, Family
from stepdistill.path import FlowPath, Output, Path, Prediction, per_sample
from stepdistill.types import Condition

if TYPE_CHECKING:
    from stepdistill.teacher import PipelineTeacher

ADAPTER = "student"

STRAIGHT = FlowPath()
"""The path x_t = (1 - t) x0 + t eps on which flow maps are stated, whatever the networks' own path is."""


def carried(path: Path, x_t: Tensor, t: Tensor, own: Path) -> tuple[Tensor, Tensor]:
    """The point of ``own`` with the signal-to-noise ratio of (x_t [B, ...], t [B]) on ``path``: its state and time.

    Past the end of a discrete table (pure noise on a flow path) that is the table's last point, which is how
    diffusers' schedulers start from pure noise.
    """
    alpha, sigma = path.alpha_sigma(t)
    # Off both ends by rounding: time_of clamps there, and at the edge of a clamp forward mode has no derivative.
    angle = torch.atan2(sigma, alpha)
    own_t = own.time_of(angle * (1 - torch.finfo(angle.dtype).eps) + 1e-30)
    own_alpha, own_sigma = own.alpha_sigma(own_t)
    scale = torch.hypot(own_alpha, own_sigma) / torch.hypot(alpha, sigma)
    return per_sample(scale, x_t) * x_t, own_t


def predict_elsewhere(
    predict: Callable[[Tensor, Tensor], Prediction], own: Path, path: Path, x_t: Tensor, t: Tensor
) -> Prediction:
    """What ``predict`` (x [B, ...], t [B] on ``own``) says about a point (x_t, t) of another path.

    Same angle, state rescaled, x0 carried over. The prediction's noise is what x_t and x0 leave, which at clean data
    is the predicted one.
    """
    if path == own:
        return predict(x_t, t)
    said = predict(*carried(path, x_t, t, own))
    alpha, sigma = path.alpha_sigma(t)
    left = (x_t - per_sample(alpha, x_t) * said.x0) / per_sample(sigma, x_t).clamp_min(1e-12)
    return Prediction(path, said.x0, torch.where(per_sample(sigma == 0, x_t), said.eps, left), t)


class _Reached(Exception):
    """Ends a network's forward where its features are."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


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
        # What it computes in, whatever is on around the call; None takes what is on.
        self.compute: torch.dtype | None = None
        # For a teacher's network with embedded guidance, the scale where none is given, and of its copies.
        self.guidance: float | None = None

    def raw(self, x_t: Tensor, t: Tensor, cond: Condition, s: Tensor | None = None) -> Tensor:
        """The network's output in its own kind, float32 [B, C, H, W], at x_t [B, C, H, W] and t [B]; s [B] is the end
        of the jump, for a network with a second time."""
        if s is not None:
            cond = cond.with_tensor(GAP, t - s)
        if isinstance(self.net, Experts):
            return self.net.by_time(t, lambda net, own: self._call(net, x_t[own], t[own], cond.rows(own)))
        return self._call(self.net, x_t, t, cond)

    def _call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if self.guidance is not None and "guidance_embedding" not in cond.tensors:
            cond = self.guided(cond, torch.full_like(t, self.guidance))
        dtype = torch.float32 if self.compute else next(net.parameters()).dtype
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.tensors.items()}
        timestep = self.family.timestep(self.path, t)
        with self._arithmetic(x_t.device.type):
            return self.family.call(net, x_t.to(dtype), timestep, Condition(tensors)).float()

    def _arithmetic(self, device: str) -> torch.autocast:
        """Autocast as it is on around the call, or as ``compute`` says. A cast of a weight that is made without a graph
        is not kept: some versions of torch hand it to a later call with one, and the weight gets no gradient."""
        low = torch.is_autocast_enabled(device) if self.compute is None else self.compute != torch.float32
        dtype = torch.get_autocast_dtype(device) if self.compute is None or not low else self.compute
        return torch.autocast(device, dtype, low, cache_enabled=torch.is_grad_enabled())

    def guided(self, cond: Condition, scale: Tensor) -> Condition:
        """The condition with guidance scales [B] embedded in it."""
        return cond.with_tensor("guidance_embedding", self.family.embed_guidance(self.net, scale))

    def trainable_net(self) -> nn.Module:
        """A copy of the network in float32 for training; one with embedded guidance has its scale folded in."""
        net = copy.deepcopy(self.net).float()
        net = net if self.guidance is None else self.family.fold_guidance(net, self.guidance)
        return net.requires_grad_(True)

    def predict(self, x_t: Tensor, t: Tensor, cond: Condition, s: Tensor | None = None) -> Prediction:
        """What the network says about x_t [B, C, H, W] at t [B]; with a second time, for a jump to s [B]."""
        return self.path.read(self.raw(x_t, t, cond, s), self.output, x_t, t)

    def x0_gain(self, times: Sequence[float]) -> float:
        """How far the clean sample moves with the network's output, as root mean square over the times."""
        gain = self.path.x0_gain(self.output, torch.tensor(times, device=next(self.net.parameters()).device))
        return float(gain.square().mean().sqrt())

    def predict_on(
        self, path: Path, x_t: Tensor, t: Tensor, cond: Condition, s: Tensor | None = None
    ) -> Prediction:
        """What the network says about a point of another path, see :func:`predict_elsewhere`; s is on that path too."""

        def predict(x: Tensor, own_t: Tensor) -> Prediction:
            own_s = s if s is None or path == self.path else carried(path, x_t, s, self.path)[1]
            return self.predict(x, own_t, cond, own_s)

        return predict_elsewhere(predict, self.path, path, x_t, t)

    def features(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The network's inner picture of x_t, [B, D, h, w], or [B, N, D] for a transformer; what comes after it in the
        network does not run."""

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(output[-1] if isinstance(output, tuple) else output)

        handle = self.family.features_of(self.net).register_forward_hook(stop)
        try:
            self.raw(x_t, t, cond)
        except _Reached as reached:
            return reached.features.float()
        finally:
            handle.remove()
        raise RuntimeError(f"a {type(self.net).__name__} did not call the module its features come from")

    def copy(self) -> Denoiser:
        """An independent trainable copy in float32."""
        return Denoiser(self.trainable_net(), self.path, self.output, self.family)


class Student(Denoiser):
    """The network that is distilled: full weights, or LoRA on frozen teacher weights."""

    @staticmethod
    def from_teacher(
        teacher: PipelineTeacher,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        adapter: Mapping[str, Tensor] | None = None,
    ) -> Student:
        """A student that starts as the teacher, in the output kind of ``teacher.start``.

        Args:
            teacher: whose network is copied, in float32.
            lora_rank: 0 trains all weights; otherwise the rank of the adapter that is trained.
            lora_alpha: scale of the adapter times its rank; default the rank, a scale of 1.
            adapter: the weights with which the adapter turns the teacher's own network into ``teacher.start``; None
                where it starts at zero.
        """
        start = teacher.start
        source = teacher.denoiser if adapter else start
        net = source.trainable_net().requires_grad_(lora_rank == 0)
        if lora_rank:
            add_lora(net, source.family.lora_targets, lora_rank, lora_alpha or float(lora_rank))
            net.load_state_dict(adapter or {}, strict=False)
        return Student(net.eval().to(teacher.device), start.path, start.output, start.family)

    @property
    def two_times(self) -> bool:
        """Whether the network is also told where its jump ends."""
        first = self.net.nets[0] if isinstance(self.net, Experts) else self.net
        return self.family.has_second_time(first)

    def add_second_time(self) -> None:
        """Gives the network its second time t - s, which changes nothing at the start.

        Raises:
            UserError: where the family has no way to, or the student is a LoRA.
        """
        if self.two_times:
            return
        self._refuse_lora("this method adds a second time to the network", "")
        self.net = self.family.second_time(self.net)

    def add_guidance_input(self) -> None:
        """Gives the network the guidance scale as an input, which changes nothing at the start.

        Raises:
            UserError: where the family has no way to, or the student is a LoRA.
        """
        self._refuse_lora("options.guidance_range adds weights", ", or use one fixed options.guidance")
        self.net = self.family.guidance_input(self.net)

    def make_slimmer(self, width: float, depth: float) -> None:
        """Replaces the network by a smaller one of its class, with new weights.

        Args:
            width: channels over the old ones, in (0, 1].
            depth: layers of each resolution over the old ones, in (0, 1].

        Raises:
            UserError: where the family has no smaller network, nothing would get smaller, or the student is a LoRA.
        """
        self._refuse_lora("a smaller student has new weights", "")
        self.net = self.family.slimmer(self.net, width, depth)

    def _refuse_lora(self, what: str, otherwise: str) -> None:
        if lora_layers(self.net):
            raise UserError(f"{what}, which a LoRA cannot hold: set student.lora_rank=0{otherwise}")

    def stock_net(self, gap: float) -> nn.Module:
        """The network as an ordinary diffusers class: with a second time, its constant embedding of t - s = ``gap`` is
        folded into a bias; otherwise the network itself. ``gap`` is that of the sampler, ``Sampler.gap``."""
        return self.family.fold_second_time(self.net, gap) if self.two_times else self.net

    def _towards(self, s: Tensor) -> Tensor | None:
        return s if self.two_times else None

    def mean_velocity(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """u(x_t, t, s) with x_s = x_t - (t - s) u, [B, C, H, W]; at s = t the plain velocity."""
        prediction = self.predict(x_t, t, cond, self._towards(s))
        if isinstance(self.path, FlowPath):
            return prediction.velocity  # a DDIM step on the straight path is an Euler step
        gap = per_sample(t - s, x_t)
        mean = (x_t - prediction.at(s)) / torch.where(gap == 0, torch.ones_like(gap), gap)
        return torch.where(gap == 0, prediction.velocity, mean)

    def flow_velocity(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """The same read on the straight path: for x_t, t and s there, x_s = x_t - (t - s) u, whatever the own path is.

        DDIM steps commute with a change of path, so a flow map learnt there is one on the student's own path."""
        return self.predict_on(STRAIGHT, x_t, t, cond, self._towards(s)).velocity

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """x_s from x_t along the student's own DDIM step, [B, C, H, W]."""
        return self.predict(x_t, t, cond, self._towards(s)).at(s)


def in_bfloat16(net: nn.Module) -> nn.Module:
    """A copy that holds the weights of its linear layers and convolutions in bfloat16, and all others in float32. Under
    autocast it computes bit for bit what float32 weights do, from half the memory."""
    low = copy.deepcopy(net).float()
    for module in low.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.to(torch.bfloat16)
    return low


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
