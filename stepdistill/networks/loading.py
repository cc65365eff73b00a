"""Pipelines from folders and the Hub: safetensors only, foreign code never run."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import nn

from stepdistill.errors import UserError
from stepdistill.families import Family, family_named, known_family
from stepdistill.families._classes import check_class
from stepdistill.networks.adapter_teacher import teacher_named
from stepdistill.networks.find import find_pipeline, find_teacher, local_folder
from stepdistill.networks.hub import reason_of
from stepdistill.networks.offloading import check_unmoved
from stepdistill.networks.pipeline_files import (
    ADAPTER,
    LORA,
    SAFETY_CHECKER,
    TILED_VAE,
    absent_components,
    check_files,
    components,
    read_index,
)
from stepdistill.networks.scheduler_path import path_of
from stepdistill.networks.tiles import set_tiles, tiles_in
from stepdistill.system.log import quiet_loading
from stepdistill.system.parsing import parse_json
from stepdistill.system.travelling import is_own_code, travelling_code, travelling_module

CHECKER = "safety checker"
FILTERS = {SAFETY_CHECKER: CHECKER, "watermark": "watermarker"}
"""Parts of pipelines that alter pictures after the decoder: a student could not learn what they do, and scores would
count pictures that were blacked out."""


def load_folder(
    folder: Path,
    what: str,
    dtype: torch.dtype | None = None,
    *,
    own_code: bool = False,
    filters: bool = False,
) -> Any:
    """The pipeline of a diffusers folder; safetensors weights only.

    Args:
        folder: a diffusers folder.
        what: what it is, to begin an error with.
        dtype: of its networks; None is diffusers' own choice.
        own_code: run Python files that travel in it.
        filters: keep what FILTERS names.

    Raises:
        UserError: a file is damaged, weights are missing, or diffusers cannot load it.
    """
    from diffusers import DiffusionPipeline

    quiet_loading()
    check_files(folder, what)
    index = read_index(folder)
    _check_backends(str(index.get("_class_name")), what)
    given: dict[str, Any] = dict(absent_components(folder))
    present = components(index)
    if not filters and SAFETY_CHECKER in present and _draws_unchecked(_diffusers_class(index)):
        given |= {SAFETY_CHECKER: None, "requires_safety_checker": False}
    try:
        for name, (library, kind) in present.items():
            found = _class(library, kind)
            if name not in given and found is not None and (folder / name).is_dir():
                given[name] = _network(found, folder / name, what, dtype)
        pipe = DiffusionPipeline.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=own_code,
            **given,
        )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise UserError(f"{what}: diffusers cannot load it: {reason}") from error
    if type(pipe.components.get("vae")).__name__ == TILED_VAE:
        pipe.vae.enable_tiling()
    set_tiles(pipe.components.get("vae"), tiles_in(folder))
    return pipe if filters else without_filters(pipe)


def _check_backends(kind: str, what: str) -> None:
    """Refuses a pipeline class in whose place diffusers has a dummy, as libraries that it needs are not installed."""
    import diffusers

    needs = getattr(getattr(diffusers, kind, None), "_backends", [])
    lacking = [name for name in needs if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(
            f"{what}: {kind} needs {', '.join(lacking)}, which is not installed: pip install {' '.join(lacking)}"
        )


def _class(library: str, kind: str) -> Any:
    """The class of a network; None for what is no network, or of neither library."""
    if library not in ("diffusers", "transformers"):
        return None
    found = getattr(importlib.import_module(library), kind, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _network(kind: Any, folder: Path, what: str, dtype: torch.dtype | None) -> nn.Module:
    """A network all of whose weights are in its files. (transformers fills what is missing with random numbers.)"""
    from transformers import PreTrainedModel

    key = "dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype"
    network, told = kind.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **{key: dtype}
    )
    missing = sorted(told["missing_keys"])
    if missing:
        why = f"{what}: the weights of {folder.name} lack {missing[0]}"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        if any(".base_layer." in key for key in told["unexpected_keys"]):
            raise UserError(
                f"{why}{more}: it was saved with its LoRA on; fuse and unload the LoRA, and save it again"
            )
        raise UserError(f"{why}{more}: get them again, or save the pipeline again")
    return network  # type: ignore[no-any-return]


def filters_of(pipeline: Any) -> list[str]:
    """What FILTERS names in a pipeline object, a folder, or a Hub name that was downloaded; for cards and reports."""
    if not isinstance(pipeline, (str, Path)):
        found = [name for part, name in FILTERS.items() if getattr(pipeline, part, None) is not None]
        return found if _draws_unchecked(type(pipeline)) else [each for each in found if each != CHECKER]
    from diffusers.utils.import_utils import is_invisible_watermark_available

    folder = local_folder(pipeline) or Path(pipeline)
    if (folder / ADAPTER).is_file():
        return []
    index = read_index(folder)
    checked = SAFETY_CHECKER in components(index) and _draws_unchecked(_diffusers_class(index))
    found = [CHECKER] if checked else []
    if str(index.get("_class_name")).startswith("StableDiffusionXL") and is_invisible_watermark_available():
        found.append(FILTERS["watermark"])
    return found


def _diffusers_class(index: Mapping[str, Any]) -> Any:
    """The class of a folder's pipeline; None for one that diffusers does not have."""
    import diffusers

    return getattr(diffusers, str(index.get("_class_name")), None)


def _draws_unchecked(kind: Any) -> bool:
    """Whether pipelines of the class draw without their safety checker: Cosmos' do not."""
    return kind is None or "requires_safety_checker" in inspect.signature(kind.__init__).parameters


def without_filters(pipe: Any) -> Any:
    """The pipeline itself, or, where it has what FILTERS names, a copy that shares its networks and lacks that."""
    if not filters_of(pipe):
        return pipe
    plain = copy.copy(pipe)
    if CHECKER in filters_of(pipe):
        plain.register_modules(**{SAFETY_CHECKER: None})
        plain.register_to_config(requires_safety_checker=False)
    if getattr(pipe, "watermark", None) is not None:
        plain.watermark = None
    return plain


def adapters_of(pipe: Any) -> list[str]:
    """Names of the adapters on a pipeline's networks."""
    from stepdistill.networks.lora import lora_layers

    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    layers = [layer for network in networks for layer in lora_layers(network).values()]
    return sorted({name for layer in layers for name in (*layer.active_adapters, *layer.merged_adapters)})


def with_merged_adapters(pipe: Any) -> Any:
    """The pipeline itself, or, where its networks carry adapters, a copy with what they do in the weights."""
    from stepdistill.networks.lora import lora_layers

    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    carrying = {name: network for name, network in networks.items() if lora_layers(network)}
    if not carrying:
        return pipe
    merged = copy.copy(pipe)
    merged.register_modules(**{name: _merged(network) for name, network in carrying.items()})
    return merged


def _merged(network: nn.Module) -> nn.Module:
    """A copy without adapters that returns what the network does: active ones count, with their scales, and fused."""
    from stepdistill.networks.lora import lora_layers

    plain: Any = copy.deepcopy(network)
    for name, layer in lora_layers(plain).items():
        if not layer.disable_adapters:
            layer.merge()  # passes over those that are merged already, as by fuse_lora
        elif layer.merged:
            layer.unmerge()
        plain.set_submodule(name, layer.get_base_layer())
    for mark in ("peft_config", "_hf_peft_config_loaded"):
        vars(plain).pop(mark, None)
    return plain  # type: ignore[no-any-return]


def taken_as(pipeline: Any) -> list[str]:
    """What was changed in a pipeline (an object, a folder, a Hub name) when it was taken; one sentence each."""
    told = [f"The {name} is off: it alters pictures after they are drawn." for name in filters_of(pipeline)]
    names = [] if isinstance(pipeline, (str, Path)) else adapters_of(pipeline)
    return told + ([f"Its adapters ({', '.join(names)}) are merged into its weights."] if names else [])


def load_pipeline(
    pipeline: Any, device: torch.device | str | None = None, *, filters: bool = False
) -> tuple[Any, str]:
    """A pipeline object and what to call it, from an object or from what ``checks.find_pipeline`` takes.

    Args:
        pipeline: the object or its name.
        device: where it goes; None leaves an object where it is, and puts a folder on CUDA if there is one.
        filters: keep a safety checker and a watermarker, which alter pictures after they are drawn.

    Raises:
        UserError: the path is not a folder with a model_index.json, it is damaged, or diffusers cannot load it; the
            object is offloaded and there is a device.
    """
    if not isinstance(pipeline, (str, Path)):
        if device is not None:
            check_unmoved(pipeline)
        pipe, label = pipeline if filters else without_filters(pipeline), type(pipeline).__name__
    else:
        folder, label = find_pipeline(pipeline), str(pipeline)
        code = travelling_code(folder)
        # A student may carry a class of ours; other code is not run.
        own_code = bool(code) and all(is_own_code(file) for file in code)
        if (folder / ADAPTER).is_file():
            pipe = _load_adapter(folder, label)
        else:
            pipe = load_folder(folder, label, torch.float32, own_code=own_code, filters=filters)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device is not None:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, label


def _load_adapter(folder: Path, what: str) -> Any:
    """The teacher's pipeline with a student that is an adapter alone, and its scheduler."""
    import diffusers

    pipe = load_teacher(teacher_named(folder)[0])
    pipe.load_lora_weights(folder, weight_name=LORA)
    set_tiles(pipe.components.get("vae"), tiles_in(folder))
    place = folder / "scheduler"
    kind = str(parse_json((place / "scheduler_config.json").read_text("utf-8"))["_class_name"])
    code = [file for file in travelling_code(folder) if is_own_code(file)]
    found = getattr(travelling_module(code[0].stem) if code else diffusers, kind, None)
    if found is None:
        raise UserError(f"{what}: its scheduler {kind} is none of diffusers' or ours")
    pipe.scheduler = found.from_pretrained(place)
    return pipe


def load_teacher(source: str, dtype: torch.dtype = torch.float32, family: Family | None = None) -> Any:
    """A pipeline from an embedded teacher's name, a folder or a hub id; safetensors weights only.

    Args:
        source: what it is named.
        dtype: of its networks.
        family: one of the user's own that serves it; None looks for one of ours.

    Raises:
        UserError: when there is nothing to load, it is no pipeline of diffusers' or its scheduler is not known (said
            before any weight is read), or files are damaged or lack weights.
    """
    from diffusers import DiffusionPipeline

    quiet_loading()
    place, what = find_teacher(source), f"teacher {source}"
    local = FilePath(place).is_dir()
    try:
        index = read_index(FilePath(place), what) if local else DiffusionPipeline.load_config(place)
        name = str(index.get("_class_name", "of no stated class"))
        if family is None:
            if known_family(name) is None:
                _check_recordable(name)
        elif name not in family.pipelines:
            raise UserError(
                f"{what} is a {name}, but the recipe's family is for {', '.join(family.pipelines)}: leave it out, or "
                "name the teacher that it is for"
            )
        path_of(_scheduler(place, index))
        if not local:
            place = DiffusionPipeline.download(place, use_safetensors=True, safety_checker=None)
    except OSError as error:
        why = " ".join(str(error).split())[:400] if local else reason_of(source, error)
        raise UserError(f"{what} could not be loaded: {why}") from error
    return load_folder(FilePath(place), what, dtype)


def _check_recordable(name: str) -> None:
    """Refuses a class that no family serves, where its name or its signatures say that it cannot be recorded."""
    import diffusers

    found = getattr(diffusers, name, None)
    if not isinstance(found, type):
        family_named(name)  # raises: only pipelines of diffusers' own are recorded
    elif issubclass(found, diffusers.DiffusionPipeline):  # the stand-in for one without its libraries is none
        check_class(found)


def _scheduler(place: str, index: Any) -> Any:
    import diffusers

    _, kind = components(index).get("scheduler", ("", "none"))
    found = getattr(diffusers, kind, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise UserError(f"the teacher's scheduler {kind} is none of diffusers'")
    return found.from_pretrained(place, subfolder="scheduler")
