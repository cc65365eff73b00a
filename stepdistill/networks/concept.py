"""A word that a pipeline did not know: one row in the embedding of each of its text encoders, which is trained.

Textual inversion (Gal et al. 2022, 2208.01618): all other words stay as they are. The word is a token of the tokenizers
and a row of the tables, so what is saved are stock text encoders and tokenizers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.families.condition import Condition
from stepdistill.networks.teacher import PipelineTeacher

KEYS = ("data.placeholder_token", "data.initializer_token")


class Concept(nn.Module):
    """The rows of a new word, and captions that are encoded with them.

    Args:
        rows: those that are trained, [D] each.
        captions: texts that have the word.
        encode: the conditions of texts, with a graph to the rows.

    Attributes:
        parts: names of the pipeline's components that the word has changed.
    """

    parts: tuple[str, ...] = ()

    def __init__(
        self,
        rows: Sequence[nn.Parameter],
        captions: Sequence[str],
        encode: Callable[[list[str]], Condition],
    ) -> None:
        super().__init__()
        self.rows, self.captions, self._encode = nn.ParameterList(rows), tuple(captions), encode

    def encode(self, number: Tensor) -> Condition:
        """The conditions of the captions ``number`` [B], on the CPU; each different one is encoded once. They have a
        graph to the rows where these are trained."""
        each, place = number.unique(return_inverse=True)
        found = self._encode([self.captions[i] for i in each.tolist()])
        rows = place.to(next(iter(found.tensors.values())).device) if found.tensors else place
        return found.rows(rows)

    def settle(self, rounded: Callable[[str, Tensor], Tensor]) -> None:
        """Writes the rows into the tables, for the pipeline to be saved.

        Args:
            rounded: a component's name and a row to that row as it is saved.
        """
        return None


class NewWord(Concept):
    """A concept in a pipeline. The pipeline's tokenizers and text encoders know the word from here on, and read its
    rows wherever they are called.

    Args:
        teacher: whose pipeline; tokenizers, and the encoders of one that is not its own, are replaced by copies.
        token: the word.
        like: a word that it starts as.
        captions: texts that have it, some of them at least.

    Raises:
        UserError: the pipeline has no text encoders, or their derivative is none; the word is known; no caption has it.
    """

    def __init__(self, teacher: PipelineTeacher, token: str, like: str, captions: Sequence[str]) -> None:
        pipe, family, size = teacher.pipe, teacher.family, teacher.size
        pairs = text_encoders(pipe)
        if not pairs:
            raise UserError(
                f"{KEYS[0]} is {token}, but {type(pipe).__name__} has no text encoder that could learn a word"
            )
        if not any(token in caption for caption in captions):
            raise UserError(
                f"{KEYS[0]} is {token}, which no caption of data.images has: write it into them, such as "
                f"'a photo of {token}'"
            )
        parts = {other: copy.deepcopy(getattr(pipe, other)) for other in pairs.values()}
        for name in pairs:
            own = getattr(pipe, name)
            parts[name] = own if teacher.owned else copy.deepcopy(own)
        teacher.replace_parts(**parts)
        pipe = teacher.pipe
        self._places: list[tuple[str, nn.Embedding, int]] = []
        rows = []
        for name, other in pairs.items():
            tokenizer, encoder = parts[other], parts[name]
            number, start = _added(tokenizer, encoder.get_input_embeddings(), token, like, other)
            if number >= encoder.get_input_embeddings().num_embeddings:
                encoder.resize_token_embeddings(number + 1, mean_resizing=False)
            encoder.requires_grad_(False)
            table = encoder.get_input_embeddings()
            rows.append(nn.Parameter(start.float().clone()))
            table.weight.data[number] = start
            table.register_forward_hook(_reader(rows[-1], number))
            self._places.append((name, table, number))
        super().__init__(rows, captions, lambda texts: family.encode(pipe, texts, size))
        self.parts = tuple(parts)
        with torch.enable_grad():
            said = self.encode(torch.tensor([next(i for i, text in enumerate(captions) if token in text)]))
        if not any(value.requires_grad for value in said.tensors.values()):
            raise UserError(
                f"{KEYS[0]} is {token}, but what {type(pipe).__name__} says of a prompt has no derivative in a word, "
                "so that none can be learnt"
            )

    @torch.no_grad()
    def settle(self, rounded: Callable[[str, Tensor], Tensor]) -> None:
        for (name, table, number), row in zip(self._places, self.rows, strict=True):
            row.copy_(rounded(name, row))
            table.weight[number] = row.to(table.weight)


def text_encoders(pipe: Any) -> dict[str, str]:
    """The names of a pipeline's text encoders that have a tokenizer, and those of their tokenizers."""
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    parts = pipe.components
    pairs = {name: name.replace("text_encoder", "tokenizer") for name in parts if "text_encoder" in name}
    kinds = PreTrainedModel, PreTrainedTokenizerBase
    return {
        name: other
        for name, other in pairs.items()
        if isinstance(parts[name], kinds[0]) and isinstance(parts.get(other), kinds[1])
    }


def _added(tokenizer: Any, table: nn.Embedding, token: str, like: str, name: str) -> tuple[int, Tensor]:
    """Makes a tokenizer know a token; its number, and the row [D] that it starts as."""

    def numbers(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    start = numbers(like)
    if not start:
        raise UserError(
            f"{KEYS[1]} is {like!r}, in which {name} finds no word: give one that it knows, such as cat"
        )
    if len(numbers(token)) == 1 or not tokenizer.add_tokens([token]):
        raise UserError(
            f"{KEYS[0]} is {token}, which {name} knows already: give another, such as <{token.strip('<>')}-1>"
        )
    number = int(tokenizer.convert_tokens_to_ids(token))
    return number, table.weight.detach()[start].mean(0)


def _reader(row: nn.Parameter, number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook of an embedding that puts the row [D] where a token stands."""

    def read(table: nn.Module, tokens: tuple[Tensor, ...], found: Tensor) -> Tensor:
        there = (tokens[0] == number)[..., None]
        return torch.where(there, row.to(found), found)

    return read
