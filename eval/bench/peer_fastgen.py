"""FastGen's DMD2, sCM and MeanFlow, on this package's networks behind FastGen's interface of one.

Settings that make them comparable: the fake network's error in x0, GAN off; sCM with a data deviation of 1, no prior
weight, no division by the number of elements, and no learnt weight; MeanFlow as l2 with p = 1. FastGen's networks of
Stable Diffusion switch gradient checkpointing on in every call; here it is off on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastgen.configs.methods import config_dmd2, config_mean_flow, config_scm
from fastgen.methods import DMD2Model, MeanFlowModel, SCMModel
from fastgen.networks.network import FastGenNetwork
from fastgen.utils import LazyCall
from loguru import logger
from peer import Called, Ours, Pair, Update, handed_out
from torch import Tensor, nn

from stepdistill.attention.forward_mode import ForwardMode
from stepdistill.losses.flow_maps import MapOptions, logit_normal
from stepdistill.networks.student import Student


class Network(FastGenNetwork):
    """A network of this package as FastGen calls one: condition is a Condition, and time FastGen's.

    Args:
        net: what is called with a state, FastGen's time, a condition and the end of a jump.
        kind: of its output.
        schedule: FastGen's name of its path, and what that is made with.
    """

    def __init__(self, net: nn.Module, kind: str, schedule: str, **told: Any) -> None:
        super().__init__(net_pred_type=kind, schedule_type=schedule, **told)
        self.net = net

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Any = None,
        r: Tensor | None = None,
        return_features_early: bool = False,
        feature_indices: set[int] | None = None,
        return_logvar: bool = False,
        fwd_pred_type: str | None = None,
        **_: Any,
    ) -> Any:
        jump = {} if r is None else {"r": r}
        out = self.net(x_t, self.noise_scheduler.rescale_t(t), condition, **jump)
        kind = fwd_pred_type or self.net_pred_type
        out = self.noise_scheduler.convert_model_output(x_t, out, t, self.net_pred_type, kind)
        return (out, out.new_zeros(len(out), 1)) if return_logvar else out


class Jump(nn.Module):
    """The velocity on the straight path, or over a jump, of a network of this package's.

    Args:
        net: the network.
        like: a student that reads one like it.
    """

    def __init__(self, net: nn.Module, like: Student) -> None:
        super().__init__()
        self.net = net
        self._read = Student(net, like.path, like.output, like.family, like.shape)

    def forward(self, x_t: Tensor, time: Tensor, condition: Any, r: Tensor | None = None) -> Tensor:
        t = (time / 1000).float()
        return self._read.flow_velocity(x_t, t, t if r is None else r.float(), condition)


def _model(kind: Any, config: Any, networks: dict[str, Callable[[], FastGenNetwork]], guidance: float) -> Any:
    """A FastGen model of these networks."""
    logger.disable("fastgen")
    order = iter([networks["net"], *(make for name, make in networks.items() if name != "net")])
    config.net = LazyCall(lambda: next(order)())()
    config.device = "cuda" if torch.cuda.is_available() else "cpu"
    config.guidance_scale = guidance if guidance != 1 else None
    config.use_ema = False
    model = kind(config)
    model.on_train_begin()
    return model


def pairs(batch: int) -> Iterator[Pair]:
    for guidance in (3.0, 1.0):
        yield from dmd(batch, guidance)
    yield from scm(batch, 3.0)
    yield from mean_flow(batch, 3.0)


def _name(guidance: float) -> str:
    return f"CFG {guidance:g}" if guidance != 1 else "no CFG"


def dmd(batch: int, guidance: float) -> Iterator[Pair]:
    """On whole timesteps: FastGen's table has nothing between them."""
    ours = Ours("dmd", "emoji", batch, {"guidance": guidance})
    teacher = ours.job.teacher
    index = {name: ours.batch().draws.integers(f"{name} t", 900) + 50 for name in ("score", "fake")}
    given = ours.batch({f"{name} t": (value + 1) / 1000 for name, value in index.items()})
    shape, table = tuple(given.noise.shape[1:]), teacher.pipe.scheduler.alphas_cumprod

    def network(role: str) -> Callable[[], FastGenNetwork]:
        return lambda: Network(
            Called(ours.net(role), teacher.denoiser), "eps", "alphas", alphas_cumprod=table
        )

    config = config_dmd2.ModelConfig(gan_loss_weight_gen=0.0, fake_score_pred_type="x0")
    config.input_shape = list(shape)
    config.sample_t_cfg.time_dist_type = "uniform"
    roles = {"net": network("student"), "teacher": network("teacher"), "fake_score": network("fake")}
    model = _model(DMD2Model, config, roles, guidance)
    data = {"real": given.noise, "condition": given.cond, "neg_condition": ours.null()}
    first = torch.full((batch,), 0.999, dtype=torch.float64)
    times = {name: (value.double() + 1e-6) / 1000 for name, value in index.items()}
    nets = [model.net, model.teacher, model.fake_score]

    def student() -> Tensor:
        model._setup_grad_requirements(0)
        told = {"condition": given.cond, "neg_condition": data["neg_condition"]}
        eps = given.draws.normal("score eps", shape)
        return model._student_update_step(given.noise, first, times["score"], eps, data, **told)[0][
            "total_loss"
        ]

    def fake() -> Tensor:
        model._setup_grad_requirements(1)
        eps, told = given.draws.normal("fake eps", shape), {"condition": given.cond}
        found = model._fake_score_discriminator_update_step(
            given.noise, first, times["fake"], eps, given.noise, **told
        )
        return found[0]["total_loss"]

    def own(phase: int) -> Callable[[int], Tensor]:
        return lambda step: model.single_train_step(data, phase)[0]["total_loss"]

    for name, on_given, phase, net in (
        ("student", student, 0, model.net),
        ("fake", fake, 1, model.fake_score),
    ):
        update = Update(on_given, own(phase), list(net.parameters()), nets)
        yield Pair(f"DMD {name}, {_name(guidance)}", ours.update(name, given), update, batch)


def scm(batch: int, guidance: float) -> Iterator[Pair]:
    """At the flow teacher, whose path FastGen knows; its derivative runs on the attention that this package's has."""
    options = {
        "guidance": guidance,
        "pairs": batch,
        "pair_steps": 2,
        "tangent_warmup": 0,
        "derivative": "exact",
    }
    ours = Ours("scm", "emoji-flow", batch, {**options, "adaptive": False})
    given, method = ours.batch(), ours.method
    pair = given.pairs
    assert pair is not None
    shape = tuple(pair.x0.shape[1:])

    def network(role: str) -> Callable[[], FastGenNetwork]:
        return lambda: Network(Called(ours.net(role), ours.job.teacher.denoiser), "flow", "rf")

    config = config_scm.ModelConfig()
    config.input_shape = list(shape)
    config.sample_t_cfg.sigma_data = 1.0
    config.sample_t_cfg.time_dist_type = "logitnormal"
    wanted = config.loss_config
    wanted.use_cd, wanted.prior_weighting_enabled, wanted.divide_x_0_spatial_dim = True, False, False
    wanted.tangent_warmup_steps = 1
    model = _model(SCMModel, config, {"net": network("student"), "teacher": network("teacher")}, guidance)
    data = {"real": pair.x0, "condition": pair.cond, "neg_condition": ours.null()}
    t = method.drawn_times(given.draws).clamp_max(0.999)

    def on_given() -> Tensor:
        told = {"condition": pair.cond, "neg_condition": data["neg_condition"], "iteration": 10}
        with handed_out(given.draws.normal("eps", shape)), ForwardMode():
            return model._compute_scm_loss(pair.x0, t, **told)[0].mean()

    def own(step: int) -> Tensor:
        with ForwardMode():
            return model.single_train_step(data, 10)[0]["total_loss"]

    nets = [model.net, model.teacher]
    update = Update(on_given, own, list(model.net.parameters()), nets)
    yield Pair(f"sCM, {_name(guidance)}", ours.update("student", given), update, batch)


def mean_flow(batch: int, guidance: float) -> Iterator[Pair]:
    """At the embedded teacher, read on the straight path by this package on both sides: FastGen's tables have no
    velocity."""
    asked = {
        "guidance": guidance,
        "pairs": batch,
        "pair_steps": 2,
        "tangent_warmup": 0,
        "derivative": "exact",
    }
    jumps = {"warm_start": 0, "same": 0.0, "to_data": 0.0, "noise_share": 0.0, "power": 1.0}
    ours = Ours("meanflow", "emoji", batch, {**asked, **jumps})
    given, method = ours.batch(), ours.method
    options = method.options
    assert isinstance(options, MapOptions)
    pair = given.pairs
    assert pair is not None
    a, b = (logit_normal(given.draws, k, options.time_mean, options.time_deviation) for k in ("a", "b"))
    _, _, t, s, _ = method.points(given, a, b)

    def network(role: str) -> Callable[[], FastGenNetwork]:
        return lambda: Network(Jump(ours.net(role), method.student), "flow", "rf", t_precision="float32")

    config = config_mean_flow.ModelConfig()
    config.input_shape = list(pair.x0.shape[1:])
    config.sample_t_cfg.time_dist_type = "logitnormal"
    config.sample_t_cfg.r_sample_ratio = 1.0
    wanted = config.loss_config
    wanted.use_cd, wanted.loss_type, wanted.norm_method, wanted.norm_const = (
        True,
        "l2",
        "poly_1.0",
        options.offset,
    )
    model = _model(
        MeanFlowModel, config, {"net": network("student"), "teacher": network("teacher")}, guidance
    )
    data = {"real": pair.x0, "condition": pair.cond, "neg_condition": ours.null()}

    def on_given() -> Tensor:
        told = {"condition": pair.cond, "neg_condition": data["neg_condition"], "iteration": 10}
        with handed_out(given.draws.normal("eps", tuple(pair.x0.shape[1:]))), ForwardMode():
            return model._compute_mf_loss(pair.x0, t, s, **told)[0].mean()

    def own(step: int) -> Tensor:
        with ForwardMode():
            return model.single_train_step(data, 10)[0]["total_loss"]

    update = Update(on_given, own, list(model.net.parameters()), [model.net, model.teacher])
    yield Pair(f"MeanFlow, {_name(guidance)}", ours.update("student", given), update, batch)
