"""Every family calls its network as diffusers' own pipeline does, and a student starts as its teacher, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from tiny import (
    EMBEDDED,
    FLOW,
    GUIDED,
    MORE_FLOW,
    PIPELINES,
    SIZES,
    VIDEO,
    WITH_VAE,
    call_of,
    tiny_pipeline,
    tiny_prompts,
)
from torch import Tensor

from stepdistill.diffusion.path import FlowPath
from stepdistill.diffusion.solvers import solve
from stepdistill.errors import UserError
from stepdistill.export.schedulers import on_stock_grid
from stepdistill.families import families, family_named, family_of
from stepdistill.families._unet_condition_changes import embed_guidance
from stepdistill.families.condition import GUIDANCE, Condition
from stepdistill.families.size import Size
from stepdistill.families.watching import frames_of
from stepdistill.networks.lora import lora_layers
from stepdistill.networks.roles import Adapters, Copies, Roles
from stepdistill.networks.sampler import schedule_times
from stepdistill.networks.scheduler_path import path_of
from stepdistill.networks.student import Student
from stepdistill.networks.switched import networks_in
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.system.travelling import travelling_module

Teachers = Callable[[str], PipelineTeacher]


def with_exact_scheduler(teacher: PipelineTeacher) -> Any:
    """The teacher's pipeline with the stock scheduler that takes DDIM steps on the grid 1, 1 - 1/K, ..., 0."""
    from diffusers import DDIMScheduler, FlowMapEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    pipe = copy.copy(teacher.pipe)
    scheduler: Any
    if isinstance(teacher.path, FlowPath):
        own = (
            FlowMatchEulerDiscreteScheduler
            if "mu" in teacher.family.passes
            else FlowMapEulerDiscreteScheduler
        )
        scheduler = own(shift=1.0)
        if "timesteps" in teacher.family.passes:  # a grid that no stock scheduler of few steps has
            own = travelling_module("flow_consistency").FlowConsistencyScheduler
            scheduler = own(clock_shift=teacher.path.clock_shift, renoise=False)
    else:
        name = type(teacher.pipe.scheduler).__name__
        own = type(teacher.pipe.scheduler) if name.startswith("CogVideoX") else DDIMScheduler
        keep = ("beta_start", "beta_end", "beta_schedule", "prediction_type")
        config = {key: teacher.pipe.scheduler.config[key] for key in keep}
        scheduler = own(
            **config,
            rescale_betas_zero_snr=own is not DDIMScheduler,
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            clip_sample=False,
        )
    pipe.register_modules(scheduler=scheduler)
    return pipe


def close(ours: Tensor, wanted: Tensor) -> bool:
    """Equal to 2e-5 of the largest value: x0 = (x_t - sigma eps) / alpha magnifies rounding where alpha is small."""
    return bool((ours - wanted).abs().max() <= 2e-5 * wanted.abs().max().clamp_min(1))


def same(name: str) -> Callable[[Tensor, Tensor], bool]:
    """Bit-equal, or close where a student has its teacher's guidance folded into a bias, and where convolutions over
    frames round a copy's weights in another order."""
    return close if name in (*EMBEDDED, "text-to-video") else torch.equal


def inputs(teacher: PipelineTeacher, name: str, count: int = 3) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(count, *teacher.codec.shape, generator=generator)
    t = torch.tensor([0.9, 0.501, 0.0307])[:count]
    return x_t, t, teacher.codec.encode(tiny_prompts(name, count))


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "sana-sprint"])  # see its own test
def test_the_network_is_called_as_the_pipeline_calls_it(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    pipe = with_exact_scheduler(teacher)
    calls: list[tuple[float, Tensor, Tensor]] = []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        out = output[0] if isinstance(output, tuple) else output.sample
        if name == "z-image":  # lists of pictures with an axis of frames, and x0 - eps
            x, out = torch.stack(x)[:, :, 0], -torch.stack(out)[:, :, 0]
        out = -out if name == "lumina2" else out
        time = float(torch.as_tensor(timestep).flatten()[0])
        state = teacher.codec.shape
        x, out = (
            value if value.shape[1:] == state else teacher.family.unpack(value, state) for value in (x, out)
        )
        calls.append((time, x.clone(), out[:, : x.shape[1]]))

    hooks = [net.register_forward_hook(note, with_kwargs=True) for net in networks_in(teacher.denoiser.net)]
    prompts = tiny_prompts(name, 2)
    try:
        pipe(
            **call_of(name, prompts, 0.0),
            num_inference_steps=4,
            output_type="pt",
            generator=torch.Generator().manual_seed(1),
        )
    finally:
        for hook in hooks:
            hook.remove()
    told = {"1000 t": [1000, 750, 500, 250], "t": [1, 0.75, 0.5, 0.25]}[teacher.family.clock]
    if name in ("z-image", "lumina2"):
        told = [0, 0.25, 0.5, 0.75]
    elif name == "sana":
        told = [700, 525, 350, 175]
    if name == "cogview4":  # whose clock does not know of the shift s: t = s u / (1 + (s - 1) u)
        s = teacher.pipe.scheduler.config.max_shift * 0.25 + 0.25
        assert s == pytest.approx(0.4375)
        told = [1000 * t / (s + (1 - s) * t) for t in (1, 0.75, 0.5, 0.25)]
    flow = isinstance(teacher.path, FlowPath)
    assert [time for time, _, _ in calls] == pytest.approx(told if flow else [999, 749, 499, 249])
    noise = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(calls[0][1], noise)
    cond = teacher.codec.encode(prompts)
    for i, (_, x, out) in enumerate(calls):
        t = torch.full((2,), 1 - i / 4)
        said = teacher.predict(x, t, cond, guidance=0.0 if name in EMBEDDED else 1.0)
        ours = teacher.path.target(said.x0, said.eps, t, teacher.denoiser.output)
        assert (ours - out).abs().max() < 1e-5
        if cond.tensors:  # the condition matters: two prompts at one x_t are told apart
            same = teacher.denoiser.raw(x[:1].expand_as(x), t, cond)
            assert (same[0] - same[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", GUIDED)
def test_guided_prediction_is_one_call_of_both_and_extrapolates(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    x_t, t, cond = inputs(teacher, name)
    null = teacher.null
    assert null is not None
    weak, strong = teacher.predict(x_t, t, null.repeat(3)), teacher.predict(x_t, t, cond)
    assert (weak.eps - strong.eps).abs().max() > 1e-2
    calls: list[int] = []
    hook = teacher.denoiser.net.register_forward_hook(lambda *said: calls.append(1))
    guided = teacher.predict(x_t, t, cond, guidance=4.0)
    hook.remove()
    assert len(calls) == (3 if name == "kandinsky5" else 1)  # its network is called once for each length
    if teacher.family.keeps_length:  # in the same direction, as long as the strong one, token by token
        v, u, c = (teacher.family.pack(said.eps - said.x0) for said in (guided, weak, strong))
        assert close(v, torch.nn.functional.normalize(u + 4 * (c - u), dim=-1) * c.norm(dim=-1, keepdim=True))
        assert close(teacher.path.noised(guided.x0, guided.eps, t), x_t)
    else:
        for ours, u, c in ((guided.x0, weak.x0, strong.x0), (guided.eps, weak.eps, strong.eps)):
            assert close(ours, u + 4 * (c - u))
    scales = torch.tensor([1.0, 2.5, 7.0])
    several = teacher.predict(x_t, t, cond, guidance=scales)
    for i, scale in enumerate(scales.tolist()):
        alone = teacher.predict(x_t, t, cond, guidance=scale)
        assert close(several.x0[i], alone.x0[i])


@pytest.mark.parametrize("name", ["sd", "qwen-image", "lumina2"])
def test_scale_0_is_the_unconditional_mode_whatever_is_done_to_guided_outputs(name: str) -> None:
    """Neither the strong output's length nor its deviation is given to it, alone and in a batch."""
    teacher = PipelineTeacher(tiny_pipeline(name), size=SIZES.get(name), guidance_rescale=0.7)
    assert teacher.family.keeps_length == (name != "sd")
    x_t, t, cond = inputs(teacher, name)
    assert teacher.null is not None
    weak = teacher.predict(x_t, t, teacher.null.repeat(3)).x0
    assert close(teacher.predict(x_t, t, cond, guidance=0.0).x0, weak)
    mixed = teacher.predict(x_t, t, cond, guidance=torch.tensor([0.0, 4.0, 0.0])).x0
    assert close(mixed[[0, 2]], weak[[0, 2]])
    assert close(mixed[1], teacher.predict(x_t, t, cond, guidance=4.0).x0[1])
    assert float((mixed[1] - weak[1]).abs().max()) > 1e-2


def test_guidance_without_an_unconditional_mode_is_refused(teacher_of: Teachers) -> None:
    for name in sorted(set(PIPELINES) - set(GUIDED) - set(EMBEDDED)):
        teacher = teacher_of(name)
        x_t, t, cond = inputs(teacher, name)
        with pytest.raises(UserError, match="needs an unconditional mode"):
            teacher.predict(x_t, t, cond, guidance=2.0)


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in (*MORE_FLOW, "sana-sprint")])
def test_ddim_on_our_path_draws_what_the_pipeline_draws(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    scale = 3.0 if name in (*GUIDED, *EMBEDDED) else 1.0
    prompts, steps = tiny_prompts(name, 2), 5
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    drawn = with_exact_scheduler(teacher)(
        **call_of(name, prompts, scale),
        num_inference_steps=steps,
        output_type="pt",
        generator=generators,
        return_dict=False,
    )[0]
    drawn = torch.as_tensor(drawn)  # some give arrays for "pt"
    frames = drawn if drawn.ndim == 5 else drawn[:, None]
    noise = torch.cat(
        [torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(s)) for s in (7, 8)]
    )
    cond = teacher.codec.encode(prompts)
    times = [1 - i / steps for i in range(steps)] + [0.0]
    states = solve(lambda x, t: teacher.predict(x, t, cond, guidance=scale), noise, times, "ddim")
    ours = teacher.codec.to_frames(states)
    assert ours.shape == frames.shape
    assert (ours - frames).abs().max() < 1e-3
    assert ours.std() > 0.02  # and they are pictures, not one grey
    seen = teacher.codec.by_frame(states)
    assert (seen is not None) == teacher.family.video
    if seen is not None:  # [B, F, C, H, W]
        unit = teacher.family.pixels(teacher.pipe)
        assert seen.shape[:2] == (2, (ours.shape[1] - 1) // teacher.family.stride(teacher.pipe) + 1)
        assert seen.shape[3:] == (ours.shape[3] // unit, ours.shape[4] // unit)
        assert seen.numel() == teacher.family.decoded_part(teacher.pipe, states, teacher.size).numel()


@pytest.mark.parametrize("name", FLOW)
def test_at_full_steps_the_pipeline_draws_on_its_own_scheduler_what_the_teacher_does(
    name: str, teacher_of: Teachers
) -> None:
    """Where the pipeline passes its times, they are those of the teacher's schedule, its dynamic shift with them."""
    teacher = teacher_of(name)
    steps = (
        50 if name in ("klein", "flux-2") else 10 if name in MORE_FLOW else 25
    )  # its shift goes by the number, too
    prompts, scale = tiny_prompts(name, 1), 1.0 if name in ("klein", "schnell") else 4.0
    call = {**call_of(name, prompts, scale), "num_inference_steps": steps, "output_type": "np"}
    drawn = teacher.pipe(**call, generator=torch.Generator().manual_seed(3), return_dict=False)[0]
    times = teacher.pipe.scheduler.sigmas.tolist()
    if "sigmas" in teacher.family.passes - {"timesteps"} and name not in ("qwen-image", "ltx", "cogview4"):
        assert times == pytest.approx([*schedule_times(teacher.path, steps), 0.0], abs=1e-6)
    noise = torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(3))
    cond = teacher.codec.encode(prompts)
    states = solve(lambda x, t: teacher.predict(x, t, cond, guidance=scale), noise, times, "euler")
    assert (teacher.codec.to_frames(states) - frames_of(drawn)).abs().max() < 1e-4


@pytest.mark.parametrize("name", PIPELINES)
def test_a_student_starts_as_its_teacher(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    x_t, t, cond = inputs(teacher, name)
    said = teacher.predict(x_t, t, cond)
    assert not said.x0.requires_grad and said.x0.grad_fn is None and said.eps.grad_fn is None

    student = Student.from_teacher(teacher)
    own = student.predict(x_t, t, cond)
    assert same(name)(own.x0, said.x0) and same(name)(own.eps, said.eps)
    assert own.x0.grad_fn is not None
    own.x0.square().mean().backward()
    with_gradient = [name for name, value in student.net.named_parameters() if value.grad is not None]
    assert len(with_gradient) > 0.9 * len(list(student.net.parameters()))
    assert all(value.grad is None and not value.requires_grad for value in teacher.denoiser.net.parameters())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_lora_student_starts_as_its_teacher_and_trains_adapters_alone(
    name: str, teacher_of: Teachers
) -> None:
    teacher = teacher_of(name)
    x_t, t, cond = inputs(teacher, name)
    student = Adapters(teacher, 2).student
    own = student.predict(x_t, t, cond)
    assert same(name)(own.x0, teacher.predict(x_t, t, cond).x0)
    own.x0.square().mean().backward()
    trained = {key for key, value in student.net.named_parameters() if value.requires_grad}
    touched = {key for key, value in student.net.named_parameters() if value.grad is not None}
    assert touched and touched <= trained
    assert all(".lora_" in key and ".student." in key for key in trained)
    # At zero B the gradient lands on B: every adapter that was reached has one.
    moved = [
        value.grad
        for key, value in student.net.named_parameters()
        if "lora_B" in key and value.grad is not None
    ]
    assert sum(float(grad.abs().max()) > 0 for grad in moved) > len(moved) / 2
    kept = teacher.denoiser.trainable_net().state_dict()
    merged = student.plain_net().state_dict()
    assert merged.keys() == kept.keys() and all(torch.equal(merged[key], kept[key]) for key in kept)
    assert lora_layers(student.net)


LAST = {
    "dit": "proj_out_2",
    "z-image": "all_final_layer.2-1",
    "lumina2": "norm_out",
    "kandinsky5": "out_layer",
}
"""A layer at the end of a network; of others conv_out of a UNet, proj_out of a transformer."""


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "wan-2.2"])  # see test_wan_2_2.py
def test_features_are_those_of_the_full_forward_and_end_it(name: str, teacher_of: Teachers) -> None:
    """Of the stated shape, equal to what the module gives in the whole network; no layer after it runs."""
    teacher = teacher_of(name)
    x_t, t, cond = inputs(teacher, name)
    student = Student.from_teacher(teacher)
    module, ran, caught = student.family.features_of(student.net), [], []
    usual = {"unet": "conv_out", "transformer": "proj_out"}[student.family.network]
    last = student.net.get_submodule(LAST.get(name, usual))
    last.register_forward_hook(lambda *_: ran.append(name))
    features = student.features(x_t, t, cond)
    assert not ran and not module._forward_hooks
    handle = module.register_forward_hook(lambda m, a, out: caught.append(out))
    # Prompts of several lengths, as the third is, are called apart.
    apart = [slice(i, i + 1) for i in range(len(x_t))] if name == "kandinsky5" else [slice(None)]
    for own in apart:
        student.raw(x_t[own], t[own], cond.rows(own))
    handle.remove()
    whole = torch.cat([student.family.picture(student.net, out, student.shape) for out in caught])
    assert ran and torch.equal(features, whole)
    width, height, breadth = student.family.feature_shape(student.net, student.shape)
    assert features.shape[1:] in {(width, height, breadth), (height * breadth, width)}
    assert features.grad_fn is not None and features.dtype == torch.float32
    assert not torch.equal(features[0], features[1])


@pytest.mark.parametrize("name", ["unet-ddpm", "dit", "sd", "sd3"])
def test_features_have_their_gradient_under_checkpointing_and_autocast(
    name: str, teacher_of: Teachers
) -> None:
    """Layers that run once more in the backward pass give the same gradients; autocast is left as it was found."""
    teacher = teacher_of(name)
    x_t, t, cond = inputs(teacher, name)
    student: Any = Student.from_teacher(teacher)
    parameters = list(student.net.parameters())

    def gradients() -> list[Tensor | None]:
        loss = student.features(x_t, t, cond).square().mean()
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    plain = gradients()
    student.net.enable_gradient_checkpointing()
    for one, other in zip(plain, gradients(), strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or close(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        low = student.features(x_t, t, cond)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    features = student.features(x_t, t, cond)
    assert 0 < float((low - features).norm()) < 0.05 * float(features.norm())
    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():  # no hook of a checkpoint that was left early is still around
        (x * x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0, 2.0]


def frames_for(teacher: PipelineTeacher) -> Tensor:
    """Two random videos or pictures [2, F, 3, H, W] in [-1, 1], of the size that the teacher draws."""
    size = teacher.size
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, size.frames, 3, size.height, size.width, generator=generator) * 2 - 1


@pytest.mark.parametrize("name", WITH_VAE)
def test_latents_are_the_shifted_and_scaled_posterior_mode(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    vae, frames = teacher.pipe.vae, frames_for(teacher)
    states = teacher.codec.to_states(frames)
    assert states.shape == (2, *teacher.codec.shape)
    shifted = name in ("sd3", "sd3.5", "flux", "schnell", "z-image", "lumina2", "chroma")
    shift, scale = torch.tensor(0.1 if shifted else 0.0), torch.tensor(0.5)
    images = frames[:, 0]
    if name in VIDEO or name == "qwen-image":  # by channel, and frames behind channels
        images = frames.transpose(1, 2)
    if name == "text-to-video":  # whose VAE is one of pictures
        images = frames.flatten(0, 1)
    if name == "ltx":  # by numbers that stand beside its weights
        scale = 1 / vae.latents_std[:, None, None, None]
        shift = vae.latents_mean[:, None, None, None]
    elif name in ("wan", "wan-2.2", "qwen-image"):
        shift = torch.tensor([-0.7, 0.1, 0.4, 0.9])[:, None, None, None]
        scale = 1 / torch.tensor([2.8, 1.4, 0.9, 1.7])[:, None, None, None]
    with torch.no_grad():
        mean = vae.encode(images)
        mean = mean.latent if name.startswith("sana") else mean.latent_dist.mean
        patched = mean
        if name in ("klein", "flux-2"):  # in its own evaluation mode, a batch normalisation of patches
            patched = teacher.pipe._patchify_latents(mean)
            shift, scale = (
                vae.bn.running_mean[:, None, None],
                (vae.bn.running_var + 1e-4)[:, None, None] ** -0.5,
            )
        wanted = (patched - shift) * scale
        if name.startswith("cog-video-x"):  # whose states have their frames first
            wanted = wanted.transpose(1, 2)
        if name == "cog-video-x-1.5":  # and one more in front, which is not decoded
            wanted = torch.cat([wanted[:, :1], wanted], dim=1)
        if name == "kandinsky5":  # whose states have their channels last
            wanted = wanted.movedim(1, -1)
        if name == "text-to-video":
            wanted = wanted.unflatten(0, (2, -1)).transpose(1, 2)
        assert torch.allclose(states, wanted.squeeze(2) if name == "qwen-image" else wanted, atol=1e-6)
        told = [torch.zeros(2)] if name == "ltx" else []  # that there is no noise left
        decoded = (vae.decode(mean, *told).sample / 2 + 0.5).clamp(0, 1)
    wanted = decoded.transpose(1, 2) if images.ndim == 5 else decoded.reshape(frames.shape)
    assert torch.allclose(teacher.codec.to_frames(states), wanted, atol=1e-5)


@pytest.mark.parametrize("name", WITH_VAE)
def test_the_vae_computes_in_float32_under_autocast_too(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    frames = frames_for(teacher)
    states = teacher.codec.to_states(frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.codec.to_states(frames), states)
        low = teacher.codec.to_frames(states)
    assert torch.equal(low, teacher.codec.to_frames(states))


@pytest.mark.parametrize("name", sorted(set(PIPELINES) - set(WITH_VAE)))
def test_pixels_are_scaled_to_minus_one_and_one(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.allclose(
        teacher.codec.to_frames(teacher.codec.to_states(images[:, None]))[:, 0] * 2 - 1, images, atol=1e-6
    )


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_guidance_embedding_is_the_pipelines(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    numbers = [1.0, 1.5, 3.3, 7.5, 12.1, 14.25]
    scales = torch.tensor(numbers)
    ours = embed_guidance(teacher.denoiser.net, scales)
    less_one = torch.tensor(
        [number - 1 for number in numbers]
    )  # as the pipeline takes it off, before float32
    theirs = teacher.pipe.get_guidance_scale_embedding(less_one, embedding_dim=256)
    assert (ours - theirs).abs().max() < 1e-6

    x_t, t, cond = inputs(teacher, name)
    student = Student.from_teacher(teacher)
    student.add_guidance_input()
    cond = cond.with_tensor(GUIDANCE, scales[1:4])
    said = student.predict(x_t, t, cond)
    assert torch.equal(said.x0, teacher.predict(x_t, t, Condition(dict(list(cond.tensors.items())[:-1]))).x0)
    said.x0.square().mean().backward()
    assert student.net.get_submodule("time_embedding.cond_proj").weight.grad.abs().max() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_teacher_that_takes_guidance_as_an_input_gets_it(name: str) -> None:
    """As its pipeline embeds it, in one call; a student, adapters or not, is plain and has one scale folded in; its
    pipeline draws what it draws."""
    from stepdistill.export.student_folder import check_export
    from stepdistill.networks.sampler import Sampler

    pipe = tiny_pipeline(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = type(pipe.unet).from_config(pipe.unet.config, time_cond_proj_dim=32)
        torch.nn.init.normal_(net.time_embedding.cond_proj.weight, std=0.3)
    pipe.register_modules(unet=net)
    seen: list[Any] = []
    hook = net.register_forward_pre_hook(
        lambda module, args, more: seen.append(more["timestep_cond"]), with_kwargs=True
    )
    pipe("dog", num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    with pytest.raises(UserError, match="takes guidance as an input"):
        PipelineTeacher(pipe, guidance=5.0, guidance_rescale=0.7)
    teacher = PipelineTeacher(pipe, guidance=5.0)
    x_t, t, cond = inputs(teacher, name)
    wanted = teacher.predict(x_t, t, cond, guidance=5.0).x0
    hook.remove()
    assert torch.allclose(seen[1], seen[0].expand(len(t), -1), atol=1e-6)
    assert torch.allclose(teacher.denoiser.predict(x_t, t, cond).x0, wanted, atol=1e-5)
    other = teacher.predict(x_t, t, cond, guidance=2.0).x0
    assert (other - wanted).abs().max() > 1e-2
    mixed = teacher.predict(x_t, t, cond, guidance=torch.tensor([2.0] + [5.0] * (len(t) - 1))).x0
    assert torch.allclose(mixed[0], other[0], atol=1e-4) and torch.allclose(mixed[1:], wanted[1:], atol=1e-4)
    both: tuple[Roles, ...] = (Copies(teacher), Adapters(teacher, 2))
    for student in (roles.student for roles in both):
        assert torch.allclose(student.predict(x_t, t, cond).x0, wanted, atol=1e-3)
        sampler = on_stock_grid(Sampler((1.0, 0.5), True), teacher.path, pipe.scheduler)
        check_export(student, sampler, teacher, "dog")
    assert torch.allclose(teacher.denoiser.copy().predict(x_t, t, cond).x0, wanted, atol=1e-3)


def test_sdxls_null_is_what_its_pipeline_takes_for_no_prompt() -> None:
    for zeros in (True, False):
        pipe = tiny_pipeline("sdxl")
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        teacher = PipelineTeacher(pipe)
        assert teacher.null is not None
        wanted = {
            key: torch.zeros_like(value) if zeros else value
            for key, value in teacher.codec.encode([""]).tensors.items()
        }
        for key in ("encoder_hidden_states", "text_embeds"):
            assert torch.allclose(teacher.null.tensors[key], wanted[key], atol=1e-6)
        assert teacher.null.tensors["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


@pytest.mark.parametrize("name", ["sd3", "dit", "unet-ddpm"])
def test_families_without_a_guidance_embedding_say_so(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    with pytest.raises(UserError, match=f"a {type(teacher.denoiser.net).__name__} has none"):
        teacher.family.changes.guidance_input(teacher.denoiser.net)


def test_a_guidance_embedding_on_adapters_is_refused(teacher_of: Teachers) -> None:
    student = Adapters(teacher_of("sd"), 2).student
    with pytest.raises(UserError, match="lora_rank"):
        student.add_guidance_input()


def test_an_unknown_pipeline_is_told_the_families_in_one_line() -> None:
    with pytest.raises(UserError) as caught:
        family_named("IFPipeline")
    message = str(caught.value)
    assert "\n" not in message and "IFPipeline" in message and "docs/extend/own_family.md" in message
    assert all(family.name in message for family in families())
    assert all(name in message for family in families() for name in family.pipelines)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_finds_its_family(name: str, teacher_of: Teachers) -> None:
    teacher = teacher_of(name)
    assert type(teacher.pipe).__name__ in family_of(teacher.pipe).pipelines
    path, output = path_of(teacher.pipe.scheduler)
    assert isinstance(path, FlowPath) == (name in FLOW)
    assert output == (
        "velocity"
        if name in FLOW
        else "v"
        if name in ("sd-v", "cog-video-x", "cog-video-x-1.5", "hunyuan-dit", "sana-sprint")
        else "eps"
    )


def test_class_labels_are_checked(teacher_of: Teachers) -> None:
    for name, count in (("unet-classes", 10), ("dit", 1000)):
        teacher = teacher_of(name)
        assert teacher.codec.encode(["0", " 7 ", str(count - 1)]).tensors["class_labels"].tolist() == [
            0,
            7,
            count - 1,
        ]
        for wrong in (str(count), "-1", "cat", "", "1.5", "²"):
            with pytest.raises(UserError, match=f"is not a class.*0 to {count - 1}"):
                teacher.codec.encode([wrong])
    assert teacher_of("unet-ddpm").codec.encode(["anything", ""]) == Condition()


def test_dit_takes_its_label_names(teacher_of: Teachers) -> None:
    teacher = teacher_of("dit")
    assert teacher.codec.encode(["goldfish", "tench", "5"]).tensors["class_labels"].tolist() == [1, 0, 5]
    spelt = teacher.family.call_prompts(teacher.pipe, ["goldfish", "5"])
    assert teacher.family.call_arguments("DiTPipeline", spelt, None, None)["class_labels"] == [1, 5]


@pytest.mark.parametrize("name", ["dit", "sd", "sd3"])
def test_fingerprints_follow_weights_and_schedule(name: str) -> None:
    teacher = PipelineTeacher(tiny_pipeline(name))
    first = teacher.fingerprint()
    assert PipelineTeacher(tiny_pipeline(name)).fingerprint() == first
    with torch.no_grad():
        weight = next(iter(teacher.denoiser.net.parameters()))
        weight.view(-1)[0] += 1e-3
    assert teacher.fingerprint() != first


def test_the_tokens_of_an_absent_t5_are_one_that_counts_for_all(teacher_of: Teachers) -> None:
    teacher = teacher_of("sd3")
    x_t, t, cond = inputs(teacher, "sd3")
    length, counts = teacher.pipe.tokenizer_max_length, cond.tensors["last_token_counts"]
    assert cond.tensors["encoder_hidden_states"].shape[1] == length + 1 and counts.tolist() == [256] * 3
    once = teacher.denoiser.raw(x_t, t, cond)
    ignored = teacher.denoiser.raw(x_t, t, cond.with_tensor("last_token_counts", torch.ones(3)))
    plain = teacher.denoiser.copy()
    plain.net.set_attn_processor(JointAttnProcessor2_0())  # type: ignore[operator]
    assert (once - plain.raw(x_t, t, cond)).abs().max() < 1e-5 < 1e-3 < (once - ignored).abs().max()


def test_prompts_of_several_lengths_are_what_each_is_alone_without_a_mask(teacher_of: Teachers) -> None:
    teacher, prompts = teacher_of("cogview4"), ["flag", "a red heart on a field of snow", "blue fish"]
    x_t, t, _ = inputs(teacher, "cogview4")
    cond = teacher.codec.encode(prompts)
    assert cond["encoder_hidden_states.mask"].sum(1).tolist() == [16, 32, 16]
    both = teacher.denoiser.raw(x_t, t, cond)
    for i, prompt in enumerate(prompts):
        alone = teacher.denoiser.raw(x_t[i : i + 1], t[i : i + 1], teacher.codec.encode([prompt]))
        assert close(both[i : i + 1], alone)


def test_a_kandinsky_5_beside_a_picture_draws_what_its_pipeline_does() -> None:
    """At both scales of its places: of sides from 480 to 854, and of others."""
    from tiny_more import kandinsky5_beside_a_picture

    from stepdistill.export.checks import teacher_check

    pipe = kandinsky5_beside_a_picture()
    for size in (Size(16, 32, 5), Size(480, 480, 1)):
        assert teacher_check(PipelineTeacher(pipe, size=size), "a red heart", 2) == 0.0
    pipe.transformer.register_to_config(attention_type="nabla")
    with pytest.raises(UserError, match="has nabla attention"):
        PipelineTeacher(pipe)


def test_a_wan_that_is_told_a_time_for_every_token_draws_what_its_teacher_does() -> None:
    """As Wan 2.2 TI2V-5B, whose VAE is another."""
    from diffusers import AutoencoderKLWan, WanPipeline

    parts = {**tiny_pipeline("wan").components, "transformer_2": None}
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.7, 0.1, 0.4, 0.9],
        latents_std=[2.8, 1.4, 0.9, 1.7],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        decoder_base_dim=4,
    )
    pipe = WanPipeline(**{**parts, "vae": vae}, expand_timesteps=True)
    teacher = PipelineTeacher(pipe, size=Size(32, 64, 5))
    assert teacher.codec.shape == (4, 2, 2, 4) and teacher.codec.to_states(frames_for(teacher)).shape[1:] == (
        4,
        2,
        2,
        4,
    )
    call = teacher.family.call_arguments("WanPipeline", ["a red heart"], 4.0, teacher.size)
    generator = torch.Generator().manual_seed(3)
    drawn = pipe(**call, num_inference_steps=6, output_type="np", generator=generator, return_dict=False)[0]
    noise = torch.randn(1, *teacher.codec.shape, generator=torch.Generator().manual_seed(3))
    cond, times = teacher.codec.encode(["a red heart"]), pipe.scheduler.sigmas.tolist()
    states = solve(lambda x, t: teacher.predict(x, t, cond, guidance=4.0), noise, times, "euler")
    frames = teacher.codec.to_frames(states)
    assert frames.shape == (1, 5, 3, 32, 64) and (frames - frames_of(drawn)).abs().max() < 1e-4


def test_cog_video_x_1_5_draws_a_frame_to_throw_away_where_its_tokens_need_one() -> None:
    from stepdistill.export.checks import teacher_check

    pipe = tiny_pipeline("cog-video-x-1.5")
    for frames, drawn in ((9, 4), (5, 2), (1, 2)):
        teacher = PipelineTeacher(pipe, size=Size(16, 32, frames))
        assert (
            teacher.codec.shape[0] == drawn and teacher.codec.to_states(frames_for(teacher)).shape[1] == drawn
        )
        assert teacher_check(teacher, "a red heart", 2) == 0.0
    x0 = torch.randn(1, 2, 4, 4, 8)
    kept, changed = x0.clone(), x0.clone()
    kept[:, 0], changed[:, 1] = 0, 0
    assert torch.equal(teacher.codec.to_frames(kept), teacher.codec.to_frames(x0))
    assert not torch.equal(teacher.codec.to_frames(changed), teacher.codec.to_frames(x0))
    pipe.transformer.register_to_config(ofs_embed_dim=4)
    with pytest.raises(UserError, match=r"takes an offset \(ofs_embed_dim\)"):
        PipelineTeacher(pipe)
