"""Roles: networks that start as the teacher, as copies and as adapters on one network."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import MORE, PIPELINES, shaken, tiny_pipeline, tiny_prompts, tiny_teacher
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.methods import find_method
from stepdistill.networks.denoiser import Denoiser, in_bfloat16
from stepdistill.networks.lora import adapter_on, add_lora, lora_layers, merged_state
from stepdistill.networks.roles import Adapters, Copies, Roles
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.recipes.train_options import TrainOptions
from stepdistill.system.shipped import method_names
from stepdistill.training.roles import held_for_adapters

SHARES: dict[str, Callable[[PipelineTeacher], Roles]] = {
    "copies": Copies,
    "adapters": lambda teacher: Adapters(teacher, 2, 3.0),
}


def teacher_named(name: str) -> PipelineTeacher:
    """One of its own, as its tensors are looked at."""
    return tiny_teacher(name)


def inputs(teacher: PipelineTeacher, name: str, seed: int = 0) -> tuple[Tensor, Tensor, Condition]:
    noise = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(seed))
    return noise, torch.tensor([0.9, 0.4]), teacher.codec.encode(tiny_prompts(name, 2))


def said(roles: Roles, at: tuple[Tensor, Tensor, Condition]) -> dict[str, Tensor]:
    """What every role and the teacher say, without a graph."""
    with torch.no_grad():
        found = {name: roles[name].raw(*at) for name in roles.names}
        return {**found, "teacher": roles.teacher.denoiser.raw(*at)}


def stir(roles: Roles, *names: str) -> None:
    """Moves the weights of roles off their start, each in its own way."""
    for seed, name in enumerate(names):
        shaken(nn.ParameterList(roles.parameters(name)), amount=0.7, seed=seed)


def three(name: str = "sd", **options: Any) -> Adapters:
    """A student, a fake network and a target on one base, all off their start."""
    roles = Adapters(teacher_named(name), 2, 3.0, **options)
    roles.add("fake", rank=4)
    roles.add("target", "student", trained=False)
    stir(roles, "student", "fake", "target")
    return roles


# --- the switch --------------------------------------------------------------------------------------------------


def test_the_switch_sets_what_peft_reads_and_says_nothing_of_gradients() -> None:
    """By hand, layer by layer: W x with no adapter, W x + alpha / r B A x with one. Forward reads two fields alone."""
    roles = three()
    layers = lora_layers(roles.student.net)
    kinds = set()
    reached = {key: value.requires_grad for key, value in roles.student.net.named_parameters()}
    for layer in layers.values():
        base = layer.get_base_layer()
        kinds.add(type(base).__name__)
        conv = isinstance(base, nn.Conv2d)
        x = torch.randn(2, base.in_channels, 4, 4) if conv else torch.randn(2, base.in_features)
        with adapter_on([layer], None):
            assert layer.disable_adapters and torch.equal(layer(x), base(x))
        for name, rank in (("student", 2), ("fake", 4)):
            with adapter_on([layer], name):
                assert layer.active_adapters == [name] and not layer.disable_adapters
                wanted = base(x) + 1.5 * layer.lora_B[name](layer.lora_A[name](x))
                torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=1e-6)
            assert layer.scaling[name] == 1.5 and layer.lora_A[name].weight.shape[0] == rank
        assert layer.disable_adapters  # as before
    assert kinds == {"Linear", "Conv2d"}
    assert reached == {key: value.requires_grad for key, value in roles.student.net.named_parameters()}


def test_the_switch_can_stand_in_itself_and_comes_back_after_an_error() -> None:
    layers = list(lora_layers(three().student.net).values())
    on = lambda: [None if layer.disable_adapters else layer.active_adapters for layer in layers]  # noqa: E731
    student, off = adapter_on(layers, "student"), adapter_on(layers, None)
    with student:
        with pytest.raises(ZeroDivisionError), off, student:
            assert on() == [["student"]] * len(layers)
            _ = 1 / 0
        assert on() == [["student"]] * len(layers)
        with off:
            assert on() == [None] * len(layers)
    assert on() == [None] * len(layers)


# --- who is who --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in MORE])
def test_all_roles_start_as_the_teacher_to_the_last_bit(name: str) -> None:
    for make in SHARES.values():
        teacher = teacher_named(name)
        at = inputs(teacher, name)
        with torch.no_grad():
            before = teacher.denoiser.raw(*at)
        roles = make(teacher)
        roles.add("fake")
        roles.add("target", "student", trained=False)
        assert roles.names == ("student", "fake", "target")
        for value in said(roles, at).values():
            if name == "flux":  # a copy has the teacher's guidance folded into a bias
                torch.testing.assert_close(value, before, atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(value, before)
        assert all(len(roles.parameters(each)) > 8 for each in roles.names)
        assert all(value.requires_grad for value in [*roles.parameters("student"), *roles.parameters("fake")])
        assert not any(value.requires_grad for value in roles.parameters("target"))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_step_of_one_role_leaves_every_other_output_as_it_was(name: str, share: str) -> None:
    teacher = teacher_named(name)
    roles, at = SHARES[share](teacher), inputs(teacher, name)
    roles.add("fake")
    roles.add("target", "student", trained=False)
    stir(roles, *roles.names)
    for learner in ("student", "fake", "student"):
        before = said(roles, at)
        optimizer = torch.optim.AdamW(roles.parameters(learner), lr=1e-2)
        for each in roles.names:
            for value in roles.parameters(each):
                value.requires_grad_(each == learner)
        # All take part in the loss, as in a student's turn, the teacher's call in the middle.
        x = roles[learner].predict(*at).x0
        pull = roles.teacher.predict(x.detach(), *at[1:]).x0 - roles["target"].predict(x.detach(), *at[1:]).x0
        (x - roles["fake"].predict(x, *at[1:]).x0 - pull).square().mean().backward()
        optimizer.step()
        after = said(roles, at)
        assert [key for key in after if not torch.equal(after[key], before[key])] == [learner]


def test_one_network_is_stored_and_the_pipeline_stays_as_it_was() -> None:
    """The teacher's tensors are the base's; three roles add three adapters; the pipeline that was given has none."""
    pipe = tiny_pipeline("sd")
    own = {id(value) for value in pipe.unet.parameters()}
    state = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    teacher = PipelineTeacher(pipe)
    fingerprint = teacher.fingerprint()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft's, that there are several adapters
        roles = Adapters(teacher, 2)
        roles.add("fake")
        roles.add("target", trained=False)
    assert teacher.denoiser.net is pipe.unet and teacher.denoiser.adapter is None
    (net,) = roles.stored().values()
    adapters = {id(value) for name in roles.names for value in roles.parameters(name)}
    assert {id(value) for value in net.parameters()} == own | adapters
    assert roles.student.net is roles["fake"].net is roles.teacher.denoiser.net is net
    stir(roles, *roles.names)
    assert not lora_layers(pipe.unet) and teacher.fingerprint() == fingerprint
    assert all(torch.equal(value, state[key]) for key, value in pipe.unet.state_dict().items())
    assert len(roles.parameters("student")) == 2 * len(lora_layers(net))


# --- three adapters on one base are three networks ---------------------------------------------------------------


def separate(roles: Adapters, teacher: PipelineTeacher, rank: dict[str, int]) -> dict[str, Denoiser]:
    """Every role as a whole network of its own, with the very same adapter."""
    found = {}
    for name in roles.names:
        net = copy.deepcopy(teacher.pipe.unet).requires_grad_(False)
        add_lora(net, teacher.family.lora_targets, rank[name], 1.5 * rank[name], "own")
        parameters = dict(net.named_parameters())
        with torch.no_grad():
            for key, value in roles.weights(name).items():
                parameters[key.removesuffix("weight") + "own.weight"].copy_(value)
        found[name] = Denoiser(net, teacher.path, teacher.denoiser.output, teacher.family)
    return found


def losses(
    of: dict[str, Any], teacher: PipelineTeacher, at: tuple[Tensor, Tensor, Condition]
) -> list[Tensor]:
    """DMD's two, and one against a target, all with their graphs before any backward pass."""
    noise, t, cond = at
    x = of["student"].predict(noise, t, cond).x0
    fake = of["fake"].predict(x.detach() + noise, t, cond).x0
    with torch.no_grad():
        pull = of["fake"].predict(x + noise, t, cond).x0 - teacher.predict(x + noise, t, cond).x0
        wanted = of["target"].predict(noise, t, cond).x0
    return [(x * pull).mean(), (fake - x.detach()).square().mean(), (x - wanted).square().mean()]


def gradients(roles: Roles) -> list[Tensor]:
    """Those of student and fake, zero where there are none."""
    trained = [value for name in ("student", "fake") for value in roles.parameters(name)]
    return [torch.zeros_like(value) if value.grad is None else value.grad.clone() for value in trained]


def test_three_adapters_are_as_three_networks_with_the_same_adapters() -> None:
    roles = three()
    teacher: Any = roles.teacher
    at = inputs(teacher, "sd")
    alone = separate(roles, teacher, {"student": 2, "fake": 4, "target": 2})
    shared_losses = losses({name: roles[name] for name in roles.names}, roles.teacher, at)
    alone_losses = losses(alone, teacher, at)
    torch.testing.assert_close(torch.stack(shared_losses), torch.stack(alone_losses), atol=1e-5, rtol=1e-5)
    sum(shared_losses).backward()  # type: ignore[union-attr]
    sum(alone_losses).backward()  # type: ignore[union-attr]
    for name in ("student", "fake"):
        parameters = dict(alone[name].net.named_parameters())
        for key, value in roles.weights(name).items():
            other = parameters[key.removesuffix("weight") + "own.weight"].grad
            assert (value.grad is None) == (other is None), key
            if value.grad is not None:
                torch.testing.assert_close(value.grad, other, atol=1e-5, rtol=1e-5)
        assert sum(float(value.grad.abs().max()) > 0 for value in roles.parameters(name)) > 20
    assert all(value.grad is None for value in roles.parameters("target"))
    assert all(value.grad is None for value in teacher.pipe.unet.parameters())


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_recomputed_forward_runs_under_the_adapter_of_the_first(name: str) -> None:
    """Gradients with and without checkpointed activations are equal to the last bit, while other roles are called
    between a forward and its backward pass; a second backward pass of one graph is as the first."""
    found = []
    for enabled in (False, True):
        teacher = teacher_named(name)
        if enabled:
            teacher.denoiser.net.enable_gradient_checkpointing()  # type: ignore[operator]
        roles = Adapters(teacher, 2, 3.0)
        roles.add("fake", rank=4)
        roles.add("target", "student", trained=False)
        stir(roles, *roles.names)
        calls: list[bool] = []
        layer = list(lora_layers(roles.student.net).values())[5]
        layer.register_forward_pre_hook(
            lambda module, args, calls=calls: calls.append(module.disable_adapters)
        )
        total = sum(losses({each: roles[each] for each in roles.names}, roles.teacher, inputs(teacher, name)))
        before = len(calls)
        total.backward(retain_graph=True)  # type: ignore[union-attr]
        assert (len(calls) > before) == enabled
        once = gradients(roles)
        total.backward()  # type: ignore[union-attr]
        twice = gradients(roles)
        assert all(torch.equal(two, 2 * one) for one, two in zip(once, twice, strict=True))
        found.append(once)
    plain, recomputed = found
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))
    assert sum(float(grad.abs().max()) > 0 for grad in plain) > 20


# --- become, average, state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
def test_a_role_becomes_another_and_the_teacher_again(share: str) -> None:
    teacher = teacher_named("sd")
    roles, at = SHARES[share](teacher), inputs(teacher, "sd")
    roles.add("fake", restarts=True)
    started = [value.clone() for value in roles.parameters("fake")]
    roles.add("flow", "student", trained=False)
    stir(roles, "student", "fake", "flow")
    roles.become("flow", "student")
    now = said(roles, at)
    assert torch.equal(now["flow"], now["student"]) and not torch.equal(now["flow"], now["fake"])
    stir(roles, "student")  # they share nothing
    assert torch.equal(said(roles, at)["flow"], now["flow"])
    roles.become("fake", "teacher")
    assert torch.equal(said(roles, at)["fake"], now["teacher"])
    assert all(torch.equal(value, was) for value, was in zip(roles.parameters("fake"), started, strict=True))


@pytest.mark.parametrize("share", SHARES)
def test_an_average_follows_weight_by_weight(share: str) -> None:
    roles = SHARES[share](teacher_named("sd"))
    roles.add("target", "student", trained=False)
    stir(roles, "student", "target")
    wanted = {
        key: 0.75 * value + 0.25 * roles.weights("student")[key]
        for key, value in roles.weights("target").items()
    }
    roles.average("target", "student", 0.75)
    for key, value in roles.weights("target").items():
        torch.testing.assert_close(value, wanted[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("share", SHARES)
def test_what_is_saved_restores_every_role_and_adapters_save_no_base(share: str) -> None:
    def made() -> Roles:
        roles = SHARES[share](teacher_named("sd"))
        roles.add("fake")
        roles.add("target", "student", trained=False)
        return roles

    roles, again = made(), made()
    at = inputs(roles.teacher, "sd")  # type: ignore[arg-type]
    stir(roles, *roles.names)
    kept = {key: value.clone() for key, value in roles.state().items()}
    assert not any(value.requires_grad for value in kept.values())
    assert {key.split(".")[0] for key in kept} == set(roles.names)
    if share == "adapters":
        assert all(".lora_A." in key or ".lora_B." in key for key in kept)
        assert sum(value.numel() for value in kept.values()) == sum(
            value.numel() for name in roles.names for value in roles.parameters(name)
        )
    again.load(kept)
    one, other = said(roles, at), said(again, at)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert len({float(value.sum()) for value in one.values()}) == 4


# --- methods on adapters -----------------------------------------------------------------------------------------


FOLLOWED = [name for name in method_names() if "fake_lora_rank" in find_method(name).Options.model_fields]


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_fake_network_is_an_adapter_of_the_students_rank_or_its_own(name: str) -> None:
    kind = find_method(name)
    more = {"tscd": {"score_weight": 1.0}}.get(name, {})
    for given, rank in ((None, 2), (5, 5)):
        roles = Adapters(teacher_named("sd"), 2)
        kind(roles, (1.0, 0.5), kind.Options(guidance=2.0, fake_lora_rank=given, **more))
        assert {value.shape[0] for key, value in roles.weights("fake").items() if ".lora_A." in key} == {rank}
        assert len(roles.stored()) == 1


# --- adapters: their start, their types, whole networks ----------------------------------------------------------


def test_adapters_start_alike_in_every_process() -> None:
    torch.manual_seed(1)
    one = Adapters(teacher_named("sd"), 2)
    torch.manual_seed(2)
    other = Adapters(teacher_named("sd"), 2)
    for key, value in one.weights("student").items():
        assert torch.equal(value, other.weights("student")[key])
        assert bool(value.any()) == (".lora_A." in key)
    one.add("fake")
    first, second = one.weights("student"), one.weights("fake")
    assert not any(torch.equal(first[key], second[key]) for key in first if ".lora_A." in key)


def test_all_roles_start_under_an_adapter_that_turned_the_output() -> None:
    source = three()
    start = {key: value.detach().clone() for key, value in source.weights("student").items()}
    at = inputs(source.teacher, "sd")  # type: ignore[arg-type]
    turned = said(source, at)["student"]
    teacher = teacher_named("sd")
    roles = Adapters(teacher, 2, 3.0, output="v", start=start)
    fake = roles.add("fake")
    found = said(roles, at)
    assert torch.equal(found["student"], turned) and torch.equal(found["fake"], turned)
    assert torch.equal(found["teacher"], said(source, at)["teacher"])
    assert roles.student.output == fake.output == "v" and teacher.denoiser.output == "eps"
    with pytest.raises(UserError, match="give it the student's rank"):
        roles.add("other", rank=4)


@pytest.mark.parametrize("share", SHARES)
def test_a_name_is_one_roles(share: str) -> None:
    roles = SHARES[share](teacher_named("unet-ddpm"))
    roles.add("fake")
    for name in ("fake", "student", "teacher"):
        with pytest.raises(ValueError, match=f"there is a role '{name}' already"):
            roles.add(name)


def test_a_rank_without_adapters_is_refused() -> None:
    with pytest.raises(UserError, match=r"set student\.lora_rank"):
        Copies(teacher_named("unet-ddpm")).add("fake", rank=4)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_base_in_bfloat16_trains_as_one_in_float32_under_autocast_and_is_merged_unrounded(
    name: str,
) -> None:
    found = []
    for low in (False, True):
        teacher = teacher_named(name)
        exact = {key: value.clone() for key, value in teacher.denoiser.net.state_dict().items()}
        if low:
            teacher.compute_in(torch.bfloat16)
        roles = Adapters(teacher, 2, 3.0, exact=exact)
        roles.add("fake")
        assert all(value.dtype == torch.float32 for value in roles.parameters("student"))
        stir(roles, "student", "fake")
        at = inputs(teacher, name)
        with torch.autocast("cpu", torch.bfloat16, enabled=not low):  # a rounded base says so itself
            x = roles.student.raw(*at)
            loss = (x - roles["fake"].raw(*at)).square().mean()
        loss.backward()
        plain = roles.student.trainable_net()
        wanted = merged_state(roles.student.net, "student", exact)
        assert all(torch.equal(value, wanted[key]) for key, value in plain.state_dict().items())
        found.append((x, loss, *gradients(roles), *plain.state_dict().values()))
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_base_is_rounded_in_place_as_in_a_copy() -> None:
    net = teacher_named("sd").denoiser.net
    before = {key: value.clone() for key, value in net.state_dict().items()}
    own = list(net.parameters())
    copied = in_bfloat16(net).state_dict()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert in_bfloat16(net, in_place=True) is net
    assert all(one is other for one, other in zip(net.parameters(), own, strict=True))
    assert {value.dtype for value in net.parameters()} == {torch.bfloat16, torch.float32}
    for key, value in net.state_dict().items():
        assert value.dtype == copied[key].dtype and torch.equal(value, copied[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("owned", [False, True])
def test_what_is_exported_was_never_rounded_and_is_kept_as_it_was(owned: bool, dtype: torch.dtype) -> None:
    teacher = teacher_named("sd")
    teacher.owned = owned
    loaded = teacher.denoiser.net.to(dtype)
    state = {key: value.clone() for key, value in loaded.state_dict().items()}
    exact = held_for_adapters(teacher, TrainOptions(precision="bf16"))
    assert (teacher.denoiser.net is loaded) == owned
    if dtype == torch.bfloat16:
        assert exact is None  # nothing was rounded
    else:
        assert exact is not None and {value.dtype for value in exact.values()} == {dtype}
    plain = Adapters(teacher, 2, exact=exact).student.plain_net().state_dict()
    assert all(torch.equal(value, state[key].float()) for key, value in plain.items())


def test_the_plain_network_of_a_role_says_what_the_role_does() -> None:
    roles = three()
    at = inputs(roles.teacher, "sd")  # type: ignore[arg-type]
    for name in roles.names:
        whole = roles[name].copy()
        assert not lora_layers(whole.net) and all(value.requires_grad for value in whole.net.parameters())
        with torch.no_grad():
            torch.testing.assert_close(whole.raw(*at), said(roles, at)[name], atol=1e-5, rtol=1e-5)


# --- as few operators as there can be ----------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts what would be launches on a GPU: operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("low", [False, True])
def test_an_adapter_costs_two_products_and_a_sum_a_layer_and_none_costs_nothing(low: bool) -> None:
    """Under autocast the adapter's two weights are cast, too, and no activation that the layer alone would not cast."""
    teacher = teacher_named("sd")
    if low:
        teacher.compute_in(torch.bfloat16)
    at, seen = inputs(teacher, "sd"), []
    with torch.no_grad():
        for denoiser in (
            teacher.denoiser,
            (roles := Adapters(teacher, 2, 3.0)).teacher.denoiser,
            roles.student,
        ):
            denoiser.raw(*at)  # what is remembered of the times is made here
            with Operators() as operators:
                denoiser.raw(*at)
            seen.append(operators.seen)
    count = len(lora_layers(roles.student.net))
    assert seen[0]["_to_copy"] == seen[1]["_to_copy"] and seen[0]["mm"] == seen[1]["mm"]
    more = seen[2] - seen[1]
    assert more["mm"] + more["convolution"] == 2 * count and more["add"] == count
    assert more["mul"] == 0 and more["_to_copy"] == 2 * count * low
