"""One draw of a pipeline, watched: what its networks were called with, what its scheduler was told, its noise.

The draw works on a shallow copy of the pipeline with a copy of its scheduler: the pipeline stays as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepdistill.diffusion.shift import counts_up


@dataclass(frozen=True)
class Call:
    """A call of one of a pipeline's networks.

    Attributes:
        network: its name among the components.
        args, kwargs: copies of what it was given.
        output: what it returned; None where the draw was ended before.
    """

    network: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def nest(self) -> dict[str, Any]:
        """What it was given, as one nest."""
        return {"args": self.args, "kwargs": self.kwargs}


@dataclass(frozen=True)
class Step:
    """A step of a pipeline's scheduler.

    Attributes:
        calls: of networks, since the step before.
        timestep: the scheduler's time, as of one that counts down with the noise.
        sigma: its noise level, where it has a list of them.
        sample: the state it was given, as the pipeline has it.
        output: the network's output as it was given it.
        result: the state it returned.
        given: what else it was given, by name; a generator as it was before.
    """

    calls: tuple[Call, ...]
    timestep: float
    sigma: float | None
    sample: Tensor
    output: Tensor
    result: Tensor
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """The output without the channels of a variance that was learned beside it."""
        extra = self.output.shape[1:2] != self.sample.shape[1:2]
        return self.output[:, : self.sample.shape[1]] if extra else self.output


@dataclass
class Draw:
    """What was seen of a draw.

    Attributes:
        grid: what ``set_timesteps`` was given, by name.
        generator: whether ``step`` was given a generator.
        steps: the steps that were taken.
        calls: of networks since the last step.
        noises: standard normal tensors, in the order in which they were drawn.
        scheduler: the copy that took the steps, as it was before the first.
        copies: of it, that the pipeline made to step other things with, which are not seen.
        drawn: what the pipeline returned; None where the draw was ended before.
    """

    grid: dict[str, Any] = field(default_factory=dict)
    generator: bool = False
    steps: list[Step] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    noises: list[Tensor] = field(default_factory=list)
    scheduler: Any = None
    copies: int = 0
    drawn: Any = None


class _Enough(Exception):
    """Ends a draw that has shown what was asked."""


class _Noise(TorchFunctionMode):
    """Keeps every standard normal tensor that is drawn."""

    def __init__(self, found: list[Tensor]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like):
            self.found.append(value.clone())
        return value


@torch.no_grad()
def watch(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    scheduler: Any = None,
    end_at: str | None = None,
    end_after: int | None = None,
    answer: Tensor | None = None,
    instead: Mapping[str, Callable[..., Any]] | None = None,
) -> Draw:
    """Draws and watches.

    Args:
        pipe: the pipeline.
        call: its arguments.
        scheduler: another than its own.
        end_at: the draw ends where this network would be called.
        end_after: it ends after so many steps.
        answer: what every step returns in place of its own result.
        instead: functions that are called in place of networks.
    """
    pipe = copy.copy(pipe)
    pipe.scheduler = own = copy.deepcopy(scheduler or pipe.scheduler)
    seen = Draw()
    set_timesteps, step = own.set_timesteps, own.step
    grid_takes, step_takes = inspect.signature(set_timesteps), inspect.signature(step)

    def told(*args: Any, **kwargs: Any) -> Any:
        given = dict(grid_takes.bind(*args, **kwargs).arguments)
        seen.grid = {name: value for name, value in given.items() if value is not None}
        seen.calls.clear()
        return set_timesteps(*args, **kwargs)

    def stepped(*args: Any, **kwargs: Any) -> Any:
        seen.generator = seen.generator or kwargs.get("generator") is not None
        if "generator" not in step_takes.parameters:
            kwargs.pop("generator", None)
        given = step_takes.bind(*args, **kwargs).arguments
        output, sample = given["model_output"].clone(), given["sample"].clone()
        count, sigmas = len(seen.steps), getattr(own, "sigmas", None)
        if not count:
            seen.scheduler = _plain_copy(own)
        kept = _kept(given)
        result = step(*args, **kwargs) if answer is None else _answer(answer, given)
        state = result[0] if isinstance(result, tuple) else result.prev_sample
        sigma = None if sigmas is None or count >= len(sigmas) else float(sigmas[count])
        time = float(torch.as_tensor(given["timestep"]).flatten()[0])
        if sigma is not None and counts_up(own):
            time, sigma = own.config.num_train_timesteps - time, 1 - sigma
        seen.steps.append(Step(tuple(seen.calls), time, sigma, sample, output, state.clone(), kept))
        seen.calls.clear()
        if end_after == len(seen.steps):
            raise _Enough
        return result

    def copied(memo: Any) -> Any:
        seen.copies += 1
        return _plain_copy(own)

    vars(own)["__deepcopy__"] = copied
    with ExitStack() as stack:
        stack.enter_context(_instead(own, "set_timesteps", told, grid_takes))
        stack.enter_context(_instead(own, "step", stepped, _with_generator(step_takes)))
        for name, network in _networks(pipe).items():
            stack.callback(_restored, _processors_of(network))
            for hook in _hooks(name, network, seen, end_at):
                stack.callback(hook.remove)
            if instead and name in instead:
                takes = inspect.signature(network.forward)
                stack.enter_context(_instead(network, "forward", instead[name], takes))
        stack.enter_context(_Noise(seen.noises))
        stack.enter_context(quietly())  # a pipeline that is tried out warns of what it is not meant for
        with suppress(_Enough):
            seen.drawn = pipe(**_copied(dict(call)), return_dict=False)[0]  # some write into their prompts
    return seen


def frames_of(drawn: Any) -> Tensor:
    """What a pipeline drew with ``output_type="np"``, pictures [B, H, W, 3] or videos [B, F, H, W, 3], as frames
    [B, F, 3, H, W]; what is drawn of transparency is left out."""
    pixels = torch.as_tensor(drawn)[..., :3]
    return (pixels if pixels.ndim == 5 else pixels[:, None]).movedim(-1, 2)


def _networks(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _processors_of(network: nn.Module) -> dict[nn.Module, Any]:
    """What computes attention in each layer, which some pipelines replace for a draw and leave so."""
    return {part: part.processor for part in network.modules() if hasattr(part, "set_processor")}


def _restored(processors: Mapping[nn.Module, Any]) -> None:
    for part, processor in processors.items():
        if part.processor is not processor:
            part.set_processor(processor)  # type: ignore[operator]


def _copied(value: Any) -> Any:
    """A nest of dicts, tuples and lists with copies of its tensors."""
    if isinstance(value, dict):
        changed = {key: _copied(inner) for key, inner in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(inner) for inner in value)
    return value.clone() if isinstance(value, Tensor) else value


def _hooks(name: str, network: nn.Module, seen: Draw, end_at: str | None) -> Iterator[Any]:
    """Notes the network's calls from the moment on at which the scheduler is told its grid."""
    open_calls: list[Call] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        if seen.grid:
            open_calls.append(Call(name, _copied(args), _copied(kwargs)))  # pipelines write into latents
            if name == end_at:
                seen.calls.append(open_calls[-1])
                raise _Enough

    def after(module: Any, args: Any, output: Any) -> None:
        if open_calls:
            call = open_calls.pop()
            seen.calls.append(Call(name, call.args, call.kwargs, _copied(output)))

    yield network.register_forward_pre_hook(before, with_kwargs=True)
    yield network.register_forward_hook(after)


@contextmanager
def _instead(owner: Any, name: str, function: Any, signature: inspect.Signature) -> Iterator[None]:
    """An object's method replaced by a function; pipelines ask for its signature, which is the method's."""

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    before = vars(owner).get(name)
    replaced.__signature__ = signature  # type: ignore[attr-defined]
    vars(owner)[name] = replaced
    try:
        yield
    finally:
        if before is None:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before


@contextmanager
def quietly() -> Iterator[None]:
    """Without what diffusers warns of."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _kept(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a step was given beside its three tensors, with generators of the same state."""

    def own(value: Any) -> Any:
        if isinstance(value, list):
            return [own(inner) for inner in value]
        return value.clone_state() if isinstance(value, torch.Generator) else value

    left_out = ("model_output", "timestep", "sample", "return_dict")
    return {name: own(value) for name, value in given.items() if name not in left_out}


def silent(output: Any, rows: int) -> Any:
    """What a network would return for so many states, of zeros: its output for one, repeated along B."""
    if isinstance(output, Tensor):
        return output.new_zeros(rows, *output.shape[1:])
    if isinstance(output, dict):
        return type(output)(**{key: silent(inner, rows) for key, inner in output.items()})
    if isinstance(output, list) and len(output) == 1:
        return [torch.zeros_like(output[0]) for _ in range(rows)]
    return (
        type(output)(silent(inner, rows) for inner in output) if isinstance(output, (list, tuple)) else output
    )


def _plain_copy(scheduler: Any) -> Any:
    """A copy of a scheduler without what stands in for its methods."""
    plain = copy.copy(scheduler)
    for name in ("set_timesteps", "step", "__deepcopy__"):
        vars(plain).pop(name)
    return copy.deepcopy(plain)


def _with_generator(takes: inspect.Signature) -> inspect.Signature:
    """A signature with ``generator``: whether a pipeline would hand its own over does not depend on its scheduler."""
    if "generator" in takes.parameters:
        return takes
    more = inspect.Parameter("generator", inspect.Parameter.KEYWORD_ONLY, default=None)
    kept = [each for each in takes.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    return takes.replace(parameters=[*kept, more])


def _answer(state: Tensor, given: Mapping[str, Any]) -> Any:
    """A state as a step's result."""
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

    state = state.to(given["sample"])
    if given.get("return_dict", True):
        return DDIMSchedulerOutput(prev_sample=state, pred_original_sample=state)
    return state, state
