"""Prompts of a file that are kept from training, so that what is drawn from them says something of new prompts.

They follow from the file alone: a run may be measured or not, and measured again, and learns from the same prompts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import overload

HELD_OUT = 64
"""Prompts that are held out."""
LEAST = 20 * HELD_OUT
"""Prompts of a file from which some are: a twentieth at most."""


def hold_out(prompts: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """HELD_OUT prompts spread evenly over all, and the others without any that is equal to one of them.

    Fewer are held out where some of those are equal, and none where all are fewer than LEAST, or where a tenth of them
    would go.
    """
    count = len(prompts)
    if count < LEAST:
        return [], prompts
    places = ((2 * i + 1) * count // (2 * HELD_OUT) for i in range(HELD_OUT))
    held = dict.fromkeys(prompts[place] for place in places)
    skipped = [number for number, prompt in enumerate(prompts) if prompt in held]
    if 10 * len(skipped) > count:
        return [], prompts
    return list(held), Rest(prompts, skipped)


class Rest(Sequence[str]):
    """Texts without some of them, read where they lie.

    Args:
        texts: all.
        skipped: the numbers of those that are left out, ascending.
    """

    def __init__(self, texts: Sequence[str], skipped: Sequence[int]) -> None:
        self._texts, self._skipped = texts, frozenset(skipped)
        # The k-th that is left out stands before as many of the others as its number is above k.
        self._before = [number - k for k, number in enumerate(skipped)]

    def __len__(self) -> int:
        return len(self._texts) - len(self._before)

    @property
    def whole(self) -> int:
        """How many texts there are with those that are left out."""
        return len(self._texts)

    def like(self, others: Sequence[str]) -> list[str]:
        """Of another sequence, as long as ``whole``, what stands where these texts do."""
        return [other for number, other in enumerate(others) if number not in self._skipped]

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._texts[place + bisect_right(self._before, place)]

    def __iter__(self) -> Iterator[str]:
        return (text for number, text in enumerate(self._texts) if number not in self._skipped)
