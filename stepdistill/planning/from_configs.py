"""Pipelines from configs alone: their networks are fake tensors, which have shapes and types and no numbers.

A pipeline folder serves as it is, with weights or without; of well-known models the configs ship in ``teachers/``.
Prompts are encoded by the folder's own tokenizers and by a fake run of its encoders; for a shipped config, which has
neither, the shapes of conditions are stated in it.
"""

from __future__ import annotations

import importlib.util
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from stepdistill.errors import UserError, did_you_mean
from stepdistill.families import Family, family_named
from stepdistill.families._from_picture import PICTURE, FromPicture
from stepdistill.families.condition import MASK, Condition
from stepdistill.families.size import Size
from stepdistill.networks.find import find_teacher
from stepdistill.networks.pipeline_files import SAFETY_CHECKER, components, read_index
from stepdistill.system.log import quiet_loading
from stepdistill.system.parsing import parse_json

TEACHERS = Path(__file__).parent / "teachers"

ENCODERS = ("text_encoder", "image_encoder", "connectors")
"""How the names of components begin that prompts go through."""

RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
"""Classes that folders name and transformers has under another name by now, as diffusers takes them, too."""


@dataclass(frozen=True)
class Planned:
    """A teacher that is planned with.

    Attributes:
        pipe: the pipeline, its networks fake.
        family: how it is called.
        source: where its configs are from.
        encoders: parameters of its text encoders, where ``pipe`` is without them.
    """

    pipe: Any
    family: Family
    source: str
    encoders: int = 0


@cache
def shipped_teachers() -> dict[str, Path]:
    """Files of the configs that ship, by name and by their names on the Hub."""
    found: dict[str, Path] = {}
    for file in sorted(TEACHERS.glob("*.json")):
        found[file.stem] = file
        found |= dict.fromkeys(parse_json(file.read_text("utf-8"))["hub"], file)
    return found


def pipeline_of(teacher: str, where: AbstractContextManager[Any], family: Family | None = None) -> Planned:
    """The pipeline that a name means, without weights.

    Args:
        teacher: an embedded teacher, a pipeline folder, a shipped config's name, a file of that kind (.json), or a
            Hub name that one ships for or whose configs are in the Hub's cache.
        where: in what its networks are made: the mode of fake tensors, or a device, which makes random weights.
        family: one of the user's own; None looks for one of ours.

    Raises:
        UserError: there is no such teacher, no family serves it, or a config is missing.
    """
    quiet_loading()
    own = Path(teacher) if teacher.endswith(".json") and Path(teacher).is_file() else None
    if (file := own or shipped_teachers().get(teacher)) is not None:
        return _shipped(file, where, family)
    folder = _folder(teacher)
    index = read_index(folder, f"teacher {teacher}")
    name = str(index.get("_class_name", "of no stated class"))
    family = _with_zero_pictures(family or family_named(name), where)
    made: dict[str, Any] = {}
    for part, (library, kind) in components(index).items():
        if part != SAFETY_CHECKER:
            made[part] = _component(library, kind, folder / part, where)
    pipe = _pipeline(name, made, index)
    for part, component in made.items():
        if part.startswith(ENCODERS) and isinstance(component, nn.Module):
            _encode_in_fake(component, where)
    return Planned(pipe, family, str(folder))


def _folder(teacher: str) -> Path:
    try:
        place = Path(find_teacher(teacher))
    except UserError as error:
        known = did_you_mean(teacher, shipped_teachers())
        raise UserError(f"{error}; configs ship for {', '.join(_short_names())} {known}") from None
    if place.is_dir():
        return place
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(teacher, "model_index.json")
    if not isinstance(cached, str):
        raise UserError(
            f"teacher {teacher} is not on this disk, and no configs ship for it: download the folder without weights "
            f"(hf download {teacher} --include '*.json' '*.txt' '*.model'), or plan with one of "
            f"{', '.join(_short_names())}"
        )
    return Path(cached).parent


def _short_names() -> list[str]:
    return [file.stem for file in sorted(TEACHERS.glob("*.json"))]


def _component(library: str, kind: str, folder: Path, where: AbstractContextManager[Any]) -> Any:
    """A component: a network in fake tensors, anything else as it is."""
    # No other module is imported because a folder names it: these, and a pipeline's own of diffusers.
    module = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    known = module == library or (library.isidentifier() and importlib.util.find_spec(module) is not None)
    found: Any = None
    if known:
        place = importlib.import_module(module)
        found = getattr(place, kind, None) or getattr(place, RENAMED.get(kind, kind), None)
    if not inspect.isclass(found):
        raise UserError(f"{folder}: {library} has no {kind}, so this teacher cannot be planned")
    network: Any = found if issubclass(found, nn.Module) else None
    own_code = {"trust_remote_code": False} if library == "transformers" else {}
    try:
        if network is None:
            return cast(Any, found).from_pretrained(folder, local_files_only=True, **own_code)
        if library == "transformers":
            from transformers.initialization import no_init_weights

            config = network.config_class.from_pretrained(folder, local_files_only=True)
            with where, no_init_weights():  # which asks of some whether they were drawn well
                return network(config).eval()
        return _network(network, network.load_config(folder, local_files_only=True), where)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: its {kind} cannot be made from its config: {reason}; a plan needs the folder's JSON files and "
            "tokenizers"
        ) from None


def _network(kind: Any, config: Any, where: AbstractContextManager[Any]) -> nn.Module:
    with where:
        net: nn.Module = kind.from_config(config)
    return net.eval()


def _pipeline(name: str, made: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """The pipeline of those components; what its constructor asks for besides is None, or as ``arguments`` say."""
    import diffusers

    kind: Any = getattr(diffusers, name)
    told: dict[str, Any] = dict(made)
    for key, parameter in inspect.signature(kind.__init__).parameters.items():
        if key in ("self", *made):
            continue
        if key in arguments and not isinstance(arguments[key], list):
            told[key] = arguments[key]
        elif parameter.default is inspect.Parameter.empty or key == SAFETY_CHECKER:
            told[key] = None
        if key == "requires_safety_checker":
            told[key] = False
    return kind(**told)


def _encode_in_fake(network: nn.Module, where: AbstractContextManager[Any]) -> None:
    """Gives an encoder a forward that says zeros of the right shapes, from real inputs: what lies around it in a
    pipeline looks into tokens and masks, which fake tensors have not."""
    whole = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with where, torch.no_grad():
            said = whole(*args, **kwargs)
        return tree_map_only(FakeTensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), said)

    cast(Any, network).forward = forward


def _with_zero_pictures(family: Family, where: AbstractContextManager[Any]) -> Family:
    """A family that draws from pictures, whose latents are zeros made where the networks are."""
    base: Any = type(family)
    if not issubclass(base, FromPicture):
        return family

    class Blank(base):  # type: ignore[misc]
        def latents_of(self, pipe: Any, pictures: list[Any], size: Size) -> Tensor:
            with where:
                return torch.zeros(len(pictures), *self.shape_of(pipe, size))

    return cast(Family, Blank())


def _shipped(file: Path, where: AbstractContextManager[Any], family: Family | None) -> Planned:
    import diffusers

    made: dict[str, Any] = {}
    try:
        said = parse_json(file.read_text("utf-8"))
        family = family or family_named(str(said["pipeline"]))
        for part, (kind, config) in said["components"].items():
            found: Any = getattr(diffusers, kind)
            is_network = issubclass(found, nn.Module)
            made[part] = _network(found, config, where) if is_network else found.from_config(config)
        pipe = _pipeline(str(said["pipeline"]), made, said.get("arguments", {}))
        if said["conditions"]:
            family = _with_conditions(family, said["conditions"], said.get("guided", True), where)
        encoders = int(said.get("encoders", 0))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{file} is not a teacher's configs, as stepdistill/planning/teachers has them ({reason})"
        ) from None
    return Planned(pipe, family, f"{file.stem}, as it ships", encoders)


def _with_conditions(
    family: Family, shapes: dict[str, list[int]], guided: bool, where: AbstractContextManager[Any]
) -> Family:
    """The family, whose conditions are zeros of these shapes, without B, made where the networks are."""
    base: Any = type(family)

    def zeros(count: int) -> Condition:
        def one(name: str, shape: list[int]) -> Tensor:
            if name.endswith(MASK):
                return torch.ones(count, *shape, dtype=torch.bool)
            return torch.zeros(count, *shape)

        with where:
            return Condition({name: one(name, shape) for name, shape in shapes.items()})

    class Told(base):  # type: ignore[misc]
        def encode(self, pipe: Any, prompts: list[str], size: Size) -> Condition:
            if not isinstance(self, FromPicture) or self.picture_optional:
                return zeros(len(prompts))
            with where:
                picture = torch.zeros(len(prompts), *self.shape_of(pipe, size))
            return zeros(len(prompts)).with_tensor(PICTURE, picture)

        def null(self, pipe: Any, size: Size) -> Condition | None:
            return zeros(1) if guided else None

    return cast(Family, Told())
