"""The files of a diffusers folder, looked at before any of them is loaded.

Imports no torch, so that a mistake is told at once.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.system.files import readable_as_usual
from stepdistill.system.inside import is_inside
from stepdistill.system.parsing import parse_json
from stepdistill.system.shipped import is_lfs_pointer
from stepdistill.system.travelling import is_own_code

INDEX = "model_index.json"
SAFETY_CHECKER = "safety_checker"
ADAPTER = "adapter.json"
"""In the folder of a student that is an adapter alone: which teacher it is for."""
LORA = "pytorch_lora_weights.safetensors"
TILED_VAE = "AutoencoderKLAllegro"
"""It decodes in tiles alone, which whoever draws switches on: no folder says so."""
_OTHER_WEIGHTS = {
    ".bin",
    ".ckpt",
    ".flax",
    ".h5",
    ".index",
    ".msgpack",
    ".onnx",
    ".ot",
    ".pb",
    ".pt",
    ".pth",
    ".tflite",
}
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_VARIANT = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.([^.-]+)(-\d+-of-\d+)?\.safetensors")


def read_index(folder: Path, what: str = "") -> dict[str, Any]:
    """What a folder's model_index.json holds.

    Args:
        folder: a diffusers folder.
        what: what it is, to begin an error with; default its path.

    Raises:
        UserError: it holds no table.
    """
    index = _json(folder / INDEX, folder, what or str(folder))
    if not isinstance(index, dict):
        raise UserError(f"{what or folder}: {INDEX} holds no table of components: get it again")
    return index


def pipeline_class(folder: Path) -> str:
    """The class a diffusers folder says it is, such as StableDiffusionPipeline."""
    return str(read_index(folder).get("_class_name", "of no stated class"))


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Library and class of the components that an index says are there."""
    pairs = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: (str(library), str(kind)) for name, (library, kind) in pairs.items() if library and kind}


def absent_components(folder: Path) -> dict[str, None]:
    """Components that a pipeline folder says it is without (SD3 without T5, say), as from_pretrained must be told."""
    if not (folder / INDEX).is_file():
        return {}
    return {name: None for name, entry in read_index(folder).items() if entry == [None, None]}


def _check_code(folder: Path, index: dict[str, Any], what: str) -> None:
    """No class that an index names is code of the folder's own, but what is a file of ours.

    Raises:
        UserError: one is.
    """
    parts = [(folder / name, library) for name, (library, _) in components(index).items()]
    whole = index.get("_class_name")
    if isinstance(whole, list):
        parts.append((folder, str(whole[0]) if whole else ""))
    for place, module in parts:
        file = place / f"{module}.py"
        if file.is_file() and not (is_inside(module) and is_own_code(file)):
            short = file.relative_to(folder).as_posix()
            raise UserError(
                f"{what} carries code of its own ({short}), which is not run: read it, and where you trust it load "
                "the folder yourself, with diffusers' trust_remote_code=True, and give stepdistill.distill or evaluate "
                "that pipeline"
            )


def check_files(folder: Path, what: str) -> None:
    """Every file of a component is what its name says: whole safetensors, JSON, and no Git LFS pointer; none of the
    classes is code that we did not write.

    Args:
        folder: a diffusers folder.
        what: what it is, to begin an error with.

    Raises:
        UserError: one is not.
    """
    from safetensors import SafetensorError, safe_open

    index = read_index(folder, what)
    _check_code(folder, index, what)
    names = components(index)
    names.pop(SAFETY_CHECKER, None)  # is not loaded
    for name in sorted(names):
        _check_variant(folder, name, what)
    for file in _files(folder, names):
        short = file.relative_to(folder).as_posix()
        if is_lfs_pointer(file):
            raise UserError(
                f"{what}: {short} is a Git LFS pointer, not the file itself: run git lfs pull in {folder}"
            )
        if file.suffix == ".json":
            content = _json(file, folder, what)
            _check_json(content, file, names[file.parent.name][1], f"{what}: {short}")
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, "np"):  # reads the header, and compares the file's length with it
                    pass
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{what}: {short} is cut off or no safetensors file ({error}): get it again"
                ) from None


def _check_variant(folder: Path, name: str, what: str) -> None:
    """A component has weights without a variant, which are those that are loaded, where it has one.

    Raises:
        UserError: it has those of a variant alone.
    """
    files = [file.name for file in sorted((folder / name).glob("*.safetensors"))]
    found = [match for file in files if (match := _VARIANT.fullmatch(file))]
    if found and not any(_WEIGHTS.fullmatch(file) for file in files):
        variant = found[0][3]
        raise UserError(
            f"{what}: {name} has weights of the variant {variant} alone ({found[0][0]}), but those without one are "
            f"read: save it again, DiffusionPipeline.from_pretrained({str(folder)!r}, "
            f"variant={variant!r}).save_pretrained('OTHER'), and name that folder"
        )


def _check_json(content: Any, file: Path, kind: str, what: str) -> None:
    """A JSON file of a component of a class names no code, and, where it is one of shards, files beside it."""
    if kind.startswith("Auto") and isinstance(content, dict) and content.get("auto_map"):
        raise UserError(
            f"{what} asks for code of its own (auto_map), which is not run: name a class of diffusers or transformers "
            f"in the place of {kind} in {INDEX}"
        )
    if not file.name.endswith(".index.json"):
        return
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict):
        raise UserError(f"{what} has no table of files (weight_map): get it again")
    for shard in sorted(set(map(str, shards.values()))):
        if not is_inside(shard) or not (file.parent / shard).is_file():
            raise UserError(f"{what} names {shard}, which is not there: get it again")


def loaded_files(component: Path) -> list[Path]:
    """The files of a component that are loaded: safetensors without a variant, and what is no weights; no code."""
    found = []
    for file in sorted(file for file in component.rglob("*") if file.is_file()):
        weights = ".safetensors" in file.suffixes or file.suffix in _OTHER_WEIGHTS
        if _WEIGHTS.fullmatch(file.name) or not (
            weights or file.suffix == ".py" or file.name.endswith(".bin.index.json")
        ):
            found.append(file)
    return found


def take_over(component: Path, to: Path) -> None:
    """The loaded files of a component once more, byte for byte: weights are hard links where the disk allows it."""
    for file in loaded_files(component):
        target = to / file.relative_to(component)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if file.suffix != ".safetensors" or not readable_as_usual(file):
                raise OSError  # a text may be edited, and its original is not to change
            os.link(file.resolve(), target)
        except OSError:
            shutil.copyfile(file, target)


def tensor_types(component: Path) -> Mapping[str, str]:
    """The types of a component's tensors as safetensors names them (F32, BF16), by name; reads headers alone."""
    found: dict[str, str] = {}
    for file in loaded_files(component):
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                header = parse_json(stream.read(int.from_bytes(stream.read(8), "little")))
            found |= {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return found


def largest_shard(component: Path) -> int | None:
    """Bytes of the largest of a component's shards; None where it has one file alone."""
    sizes = [file.stat().st_size for file in loaded_files(component) if file.suffix == ".safetensors"]
    return max(sizes) if len(sizes) > 1 else None


def _files(folder: Path, names: dict[str, tuple[str, str]]) -> Iterator[Path]:
    for name in sorted(names):
        yield from sorted(file for file in (folder / name).glob("*") if file.is_file())


def _json(file: Path, folder: Path, what: str) -> Any:
    short = file.relative_to(folder).as_posix()
    try:
        return parse_json(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        if is_lfs_pointer(file):
            raise UserError(
                f"{what}: {short} is a Git LFS pointer, not the file itself: run git lfs pull in {folder}"
            ) from None
        raise UserError(f"{what}: {short} is not JSON ({error}): get it again") from None
    except OSError as error:
        raise UserError(f"{what}: {short} cannot be read ({error.strerror})") from None
