"""Records a family: draws with a pipeline, watches, and finds what is done around its network.

Nothing goes by names but the call's own ``prompt``, ``guidance_scale`` and ``negative_prompt``: the network is what is
called between two steps of the scheduler, its arguments are what they equal or how they change (_arguments.py), the
layout of its tokens is where each value of the noise went. What was found is then used to repeat the calls and the
picture, which must be equal.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stepdistill.diffusion.path import Output, Path, TablePath
from stepdistill.diffusion.shift import shifted
from stepdistill.errors import UserError, first_line
from stepdistill.families._arguments import Calls, Unlike
from stepdistill.families._classes import check_class, pictures_taken, unrecorded
from stepdistill.families._findings import (
    clock_of,
    goes_back,
    layout_of,
    linear_layers,
    near,
    passes_in,
    reading_of,
    rows_of_call,
    shift_in,
)
from stepdistill.families._guidance import guidance_of
from stepdistill.families.condition import Condition, joined
from stepdistill.families.network_changes import NetworkChanges
from stepdistill.families.plain_calls import FRAMES
from stepdistill.families.recorded import (
    Clock,
    FixedGuidance,
    Recorded,
    Recording,
    prompt_arguments,
    two_prompts,
)
from stepdistill.families.size import Size
from stepdistill.families.watching import Draw, Step, frames_of, watch

STEPS = 3
EMBEDDED = ("guidance_scale", "distilled_guidance_scale")
"""What pipelines call a scale of guidance that is an input of the network; the first is also that of any other."""
SCALES = (*EMBEDDED, "true_cfg_scale")
"""All of their scales; the last is that of guidance beside an input."""


def record(
    pipe: Any, path: Path, output: Output, size: Size | None = None, guidance: float = 1.0
) -> Recorded:
    """The family of one pipeline at one size, from draws of its own.

    Args:
        pipe: the pipeline, on its device.
        path: the path of its scheduler.
        output: what its network returns.
        size: what is drawn; None is what its call draws by itself.
        guidance: the scale, where the network takes it as an input.

    Raises:
        UserError: the pipeline does something that was not foreseen, saying what.
    """
    kind = type(pipe)
    check_class(kind)
    try:
        return _Recorder(pipe, path, output, size, guidance).family()
    except Unlike as found:
        reason = str(found)
    except UserError:
        raise
    except NameError as error:  # of a package that diffusers imports where it is there
        reason = f"it needs {error.name}, which is not installed or not defined"
    except Exception as error:
        reason = f"a draw of its own fails ({first_line(error)})"
        if (pictures := pictures_taken(kind)) and "image" in reason.lower():
            reason += f"; its call takes {', '.join(pictures)}, which no prompt gives"
    raise unrecorded(kind, reason)


class _Recorder:
    def __init__(self, pipe: Any, path: Path, output: Output, size: Size | None, guidance: float) -> None:
        self.pipe, self.path, self.output, self.size, self.scale = pipe, path, output, size, guidance
        self.takes = frozenset(inspect.signature(type(pipe).__call__).parameters)
        self.prompts = list(two_prompts("prompt" in self.takes))
        self.embedded = next((name for name in EMBEDDED if name in self.takes), None)

        self.more: dict[str, Any] = {}
        networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        for network in networks:  # CogVideoX takes one length, which its call does not ask its config for
            length = getattr(network.config, "max_text_seq_length", None)
            if length is not None and "max_sequence_length" in self.takes:
                self.more["max_sequence_length"] = length

    def draw(
        self, prompts: list[str], seeds: list[int], more: dict[str, Any], pipe: Any = None, **watched: Any
    ) -> Draw:
        call = {
            **prompt_arguments(self.takes, prompts, self.size),
            **({"num_inference_steps": STEPS} if "num_inference_steps" in self.takes else {}),
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            "output_type": "np",
            **self.more,
            **more,
        }
        return watch(pipe or self.pipe, call, **watched)

    def family(self) -> Recorded:
        one, off = self._unguided()
        network = one.steps[0].calls[-1].network
        first, second = self.prompts
        other = self.draw([second], [1], off, end_after=1)
        two = self.draw([first, second], [0, 1], off, end_after=1)
        scaled = self._at_scales(network)
        # Some of the shifts that pipelines compute go by the number of steps: it is that of their own.
        default = inspect.signature(type(self.pipe).__call__).parameters.get("num_inference_steps")
        own = {**off, "num_inference_steps": default.default} if default else off
        usual = self.draw([first], [0], own, end_at=network)
        steps = one.steps[:STEPS]
        calls = Calls(
            one=steps[0].calls[-1].nest,
            later=[step.calls[-1].nest for step in steps[1:]],
            other=other.steps[0].calls[-1].nest,
            two=two.steps[0].calls[-1].nest,
            scaled=scaled,
            samples=[step.sample for step in steps],
            scales=[self._input_scale(step) for step in steps],
        )
        template = calls.template()
        told = next(iter(calls.times.values()))
        state, order = layout_of(one, other, self._input_scale(one.steps[0]))
        frames = frames_of(one.drawn)
        drawn = Size(frames.shape[3], frames.shape[4], frames.shape[1])
        size = self.size or drawn
        off = {**off, self.embedded: self.scale} if calls.embedded and self.embedded else off
        self.turned, reading = -1 if goes_back(steps) else 1, reading_of(steps)
        found = Recording(
            template=template,
            reading=replace(reading, sign=self.turned * reading.sign),
            state=state,
            packed=tuple(steps[0].sample.shape[1:]),
            order=order,
            clock=clock_of(self.path, steps, told),
            scheduler=self.pipe.scheduler,
            silent=steps[0].calls[-1].output,
            call={**self.more, **off},
            scale=1.0 if calls.embedded else self.scale,
            size=size,
            shift=shift_in(self.path, usual, self.pipe.scheduler.config),
            takes=self.takes,
        )
        facts = {
            "name": type(self.pipe).__name__,
            "pipelines": (type(self.pipe).__name__,),
            "network": network,
            "passes": self._passes(one, off, network),
            "has_prompts": "prompt" in self.takes,
            "video": frames.shape[1] > 1 or bool(self.takes & FRAMES),
            "lora_targets": linear_layers(getattr(self.pipe, network)),
            "changes": FixedGuidance() if calls.embedded else NetworkChanges(),
        }
        kind: type[Recorded] = type(f"Recorded{type(self.pipe).__name__}", (Recorded,), facts)
        other_size = "" if drawn == size else f", asked for {size} it draws {drawn}"
        found = self._checked(kind, found, one, other, told)
        found, guided = (
            (found, "an input of the network")
            if calls.embedded
            else guidance_of(self.draw, self.pipe, kind, found, off, self.turned)
        )
        kind.remark = (
            f"no family for {type(self.pipe).__name__}: recorded from a draw of its own: replay equal, time "
            f"{found.clock if not isinstance(self.path, TablePath) else 'its table index'}, output "
            f"{'-' if found.reading.sign < 0 else ''}{self.output}, guidance {guided}{other_size}"
        )
        kind.differentiable, kind.alone = found.plain_vae, bool(found.lengths or found.one_by_one)
        made: Recorded = kind(replace(found, scale=self.scale))
        return made

    def _passes(self, one: Draw, off: dict[str, float], network: str) -> frozenset[str]:
        """What the pipeline hands to a student's scheduler: of some it asks first whether their shift is dynamic."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        grid = one.grid
        if not isinstance(self.path, TablePath):
            students: Any = FlowMatchEulerDiscreteScheduler()
            with suppress(Exception):  # a pipeline that takes no such scheduler
                grid = self.draw(self.prompts[:1], [0], off, end_at=network, scheduler=students).grid
        found = passes_in(grid, STEPS)
        found |= {"generator"} if one.generator else set()
        found |= {"negated"} if one.scheduler.config.get("invert_sigmas") else set()
        return frozenset(found)

    def _unguided(self) -> tuple[Draw, dict[str, float]]:
        """A whole draw of the first prompt that calls one network once a step, and what switches guidance off."""
        named = [name for name in SCALES if name in self.takes]
        seen = ""
        for scale in (1.0, 0.0, -1.0) if named else (1.0,):
            off = dict.fromkeys(named, scale)
            draw = self.draw(self.prompts[:1], [0], off)
            if draw.copies:
                raise Unlike(
                    "it draws with copies of its scheduler, as for sound or each frame, that are not seen"
                )
            if isinstance(draw.drawn, tuple):
                raise Unlike(f"it draws {len(draw.drawn)} things at once, and not pictures or videos alone")
            if len(shapes := {step.sample.shape for step in draw.steps}) > 1:
                raise Unlike(
                    f"it draws more than pictures: its scheduler steps states of {len(shapes)} shapes"
                )
            if len(draw.steps) < 2:
                raise Unlike(f"its scheduler takes {len(draw.steps)} steps in a draw of {STEPS}")
            calls = [[call.network for call in step.calls] for step in draw.steps[1:]]
            first = [call.network for call in draw.steps[0].calls[-1:]]  # encoders may be called before it
            networks = sorted({name for names in (first, *calls) for name in names})
            if len(networks) > 1:
                raise Unlike(f"several networks are called between its steps: {', '.join(networks)}")
            last = draw.steps[1].calls[-1:]
            if not networks:
                raise Unlike("it calls none of its networks between the steps of its scheduler")
            if all(len(names) == 1 for names in calls) and rows_of_call(last[0], draw.steps[1].sample) == 1:
                return draw, off
            most = max(map(len, calls))
            seen = (
                f"{most} calls of {networks[0]}"
                if most > 1
                else f"a call of {networks[0]} for several states"
            )
        scales = ", at a guidance scale of 1, 0 and -1" if named else ""
        raise Unlike(
            f"its guidance cannot be switched off, or it draws a picture in parts: {seen} a step{scales}"
        )

    def _at_scales(self, network: str) -> list[tuple[float, Any]]:
        """The network's first call of the first prompt at other scales of guidance."""
        if self.embedded is None:
            return []
        found = list[tuple[float, Any]]()
        for scale in (3.0, 7.0):
            more: dict[str, Any] = {self.embedded: scale}
            try:
                drawn = self.draw(self.prompts[:1], [0], more, end_at=network)
            except Exception:  # some are guided by no negative prompt but one that is given
                if "negative_prompt" not in self.takes:
                    raise
                drawn = self.draw(self.prompts[:1], [0], {**more, "negative_prompt": [""]}, end_at=network)
            found.append((scale, drawn.calls[-1].nest))
        return found

    def _input_scale(self, step: Step) -> float:
        """What the scheduler's sample is times to lie on the path: those of Euler keep it as x0 + sigma eps."""
        spread = float(getattr(self.pipe.scheduler, "init_noise_sigma", 1.0))
        if not isinstance(self.path, TablePath) or spread == 1.0 or step.sigma is None:
            return 1.0
        return float((1 + step.sigma**2) ** -0.5)

    def _checked(
        self, kind: type[Recorded], found: Recording, one: Draw, other: Draw, told: list[float]
    ) -> Recording:
        """The recording, after it has repeated the calls and the picture."""
        family = kind(found)
        conditions = [family.conditions(draw.steps[0].calls[-1].nest, 1) for draw in (one, other)]
        shapes = [{name: value.shape for name, value in each.tensors.items()} for each in conditions]
        try:
            wrong = self._repeated(family, one, other, conditions, told)
        except (ValueError, RuntimeError, IndexError):
            wrong = ["differ"]
        if wrong and (lengths := tuple(name for name in shapes[0] if shapes[0][name] != shapes[1][name])):
            found = replace(found, lengths=lengths)
            family = kind(found)
            conditions = [family.conditions(draw.steps[0].calls[-1].nest, 1) for draw in (one, other)]
            wrong = self._repeated(family, one, other, conditions, told)
        if wrong:
            raise Unlike(f"its network, called as was recorded, answers otherwise ({', '.join(wrong)})")
        last, frames = one.steps[-1].result, frames_of(one.drawn)
        states = family.unpack(last, found.state).float()
        decode = super(Recorded, family).to_frames
        try:
            plain = decode(self.pipe, states)
        except Exception:  # whatever a VAE says to states of another layout
            plain = None
        if plain is not None and plain.shape == frames.shape and near(plain.cpu(), frames):
            found = replace(found, plain_vae=True)
        else:
            decode = family.drawn_frames
            if not near(decode(self.pipe, states).cpu(), frames):
                raise Unlike("the last state, decoded again, is another picture")
        try:
            decode(self.pipe, torch.cat([states, states]))
        except RuntimeError:  # that of HunyuanVideo 1.5 takes no two videos
            found = replace(found, one_by_one=True)
        return found

    def _repeated(
        self, family: Recorded, one: Draw, other: Draw, conditions: list[Condition], told: list[float]
    ) -> list[str]:
        """What differs when the calls are repeated: those of one prompt, and of both at once."""
        net, wrong, state = getattr(self.pipe, family.network), list[str](), family.found.state
        steps, times = [*one.steps[:STEPS], other.steps[0]], [*told, told[0]]
        conds = [*[conditions[0]] * (len(steps) - 1), conditions[1]]
        for some in [*([i] for i in range(len(steps))), [0, len(steps) - 1]]:
            x = torch.cat([self._input_scale(steps[i]) * steps[i].sample for i in some])
            t = torch.tensor([self._time(steps[i], family.found.clock) for i in some], device=x.device)
            time = torch.tensor([times[i] for i in some], device=x.device)
            if not torch.allclose(family.time(self.path, t), time, rtol=1e-4, atol=1e-4 * max(times)):
                wrong.append(f"at time {float(family.time(self.path, t)[0]):.6g} for {float(time[0]):.6g}")
            x, cond = (
                family.unpack(x.to(next(net.parameters()).dtype), state),
                joined([conds[i] for i in some]),
            )
            with torch.no_grad():
                said = family.call(net, x, time, cond)
            wanted = self.turned * family.unpack(torch.cat([steps[i].mean for i in some]), state)
            if not near(said, wanted):
                wrong.append(f"by {float((said - wanted).abs().max()):.2g}")
        return wrong

    def _time(self, step: Step, clock: Clock) -> float:
        if isinstance(self.path, TablePath):
            return (step.timestep + 1) / self.path.steps
        return shifted(step.timestep / 1000, clock.shift)
