"""What went wrong with a name of the Hub, and a pipeline in one file: in one line, with what to do."""

from __future__ import annotations

from pathlib import Path

from stepdistill.system.parsing import parse_json

SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
"""Ends of files that hold a whole pipeline's weights, or a network's, as other trainers write them."""

_PIPELINES = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
    "model.diffusion_model.joint_blocks.": "StableDiffusion3Pipeline",
    "model.diffusion_model.double_blocks.": "FluxPipeline",
    "double_blocks.": "FluxPipeline",
}
"""How a tensor's name begins in the single file of a pipeline -> its class."""


def of_single_file(name: str) -> str:
    """What a single file is, and the line that makes a folder of it. (Its configs are the base model's, on the Hub.)"""
    file = Path(name)
    keys = _tensor_names(file) if file.suffix == ".safetensors" else []
    if keys and all(".lora" in key or "lora_" in key or key.endswith(".alpha") for key in keys):
        return (
            "is a LoRA alone: load its pipeline, `pipe.load_lora_weights(FILE)`, `pipe.fuse_lora()`, "
            "`pipe.unload_lora_weights()`, `pipe.save_pretrained(FOLDER)`, and give FOLDER"
        )
    kinds = (kind for start, kind in _PIPELINES.items() if any(key.startswith(start) for key in keys))
    kind = next(kinds, "StableDiffusionXLPipeline")
    code = f"from diffusers import {kind} as P; P.from_single_file('{name}').save_pretrained('{file.stem}')"
    return (
        "is a single file, and a teacher is a diffusers folder. Convert it once, with a connection to the Hub for the "
        f'base model\'s configs: python -c "{code}", then give --teacher {file.stem}'
    )


def _tensor_names(file: Path) -> list[str]:
    """The names in a safetensors file, from its head alone; none where it has no such head."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            head = parse_json(stream.read(length)) if length < 100_000_000 else {}
    except (OSError, ValueError):
        return []
    return [key for key in head if key != "__metadata__"] if isinstance(head, dict) else []


def reason_of(name: str, error: BaseException) -> str:
    """Why the Hub did not give a repository: the first cause that is known, else the deepest one's first line."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for one in chain:
        if isinstance(one, errors.GatedRepoError):
            return f"its licence must be accepted first, at https://huggingface.co/{name}, and then `hf auth login`"
        if isinstance(one, errors.RepositoryNotFoundError):
            return "the Hub has no such repository, or it is private: mend the name, or `hf auth login`"
        if isinstance(one, errors.EntryNotFoundError) and not isinstance(one, errors.LocalEntryNotFoundError):
            return "it is no diffusers pipeline: it has no model_index.json"
    offline = any(isinstance(one, errors.LocalEntryNotFoundError | ConnectionError) for one in chain)
    if offline or any(type(one).__name__ in ("ConnectError", "ConnectTimeout") for one in chain):
        return "the Hub cannot be reached, and it is not in the cache: give a folder, or try again with a connection"
    return (str(chain[-1]).strip().splitlines() or [type(chain[-1]).__name__])[0][:300]
