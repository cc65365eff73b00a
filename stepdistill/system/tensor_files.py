"""Named tensors of a file, without running anything that the file says."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError


def read_tensors(file: Path, like: str) -> dict[str, Tensor]:
    """Of a safetensors file or a PyTorch state dict; the latter by PyTorch's restricted unpickler, which makes tensors
    and plain containers and nothing else.

    Args:
        file: the file.
        like: what it should be, for the message.

    Raises:
        UserError: it is damaged or holds something else.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(file)
            except SafetensorError as error:
                raise ValueError(str(error)) from None
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("it is a compressed zip, which torch does not write")
        state: Any = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not named tensors")
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # a made-up file can raise anything in a reader; nothing of it was run
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{file} is not readable as weights ({reason}); it must be {like}") from None
