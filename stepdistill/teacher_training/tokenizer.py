"""A CLIP tokenizer learnt from captions: byte-level byte-pair encoding (Sennrich et al. 2016, 1508.07909).

The learner is written out because the one of the tokenizers library breaks ties by the order of a hash table,
which differs from run to run. Here the smaller pair wins, so that equal captions give an equal tokenizer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

END_OF_WORD = "</w>"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"

Pair = tuple[str, str]


def train_tokenizer(captions: Sequence[str], vocabulary: int, tokens: int) -> CLIPTokenizer:
    """A tokenizer of at most ``vocabulary`` entries and model_max_length ``tokens``.

    The 256 bytes come first, then the same at the end of a word, then merges as long as there is room, then
    the two special tokens: every text has an encoding, and none needs an unknown token.
    """
    # The splitting and lower-casing rules belong to CLIPTokenizer: take them from there.
    rules = CLIPTokenizer(vocab={BEGIN: 0, END: 1}, merges=[]).backend_tokenizer
    words: Counter[str] = Counter()
    for caption in captions:
        text = rules.normalizer.normalize_str(caption)
        words.update(word for word, _ in rules.pre_tokenizer.pre_tokenize_str(text))
    alphabet = sorted(ByteLevel.alphabet())
    entries = dict.fromkeys([*alphabet, *(byte + END_OF_WORD for byte in alphabet)])
    merges = learn_merges(words, vocabulary - 2 - len(entries))
    entries.update(dict.fromkeys(left + right for left, right in merges))
    names = [*entries, BEGIN, END]
    vocab = {name: index for index, name in enumerate(names)}
    made: CLIPTokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=tokens)  # type: ignore[arg-type]
    return made


def learn_merges(words: Counter[str], room: int) -> list[Pair]:
    """The most frequent neighbours, merged one pair after the other, until they make ``room`` new entries or
    no pair is left. Of equally frequent pairs the smaller one in the order of strings goes first.

    Args:
        words: how often each word occurs; its symbols are its characters, the last with the end-of-word mark.
    """
    spelt = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    times = list(words.values())
    count: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)

    def enter(index: int, sign: int) -> None:
        for pair in zip(spelt[index], spelt[index][1:], strict=False):
            count[pair] += sign * times[index]
            places[pair].add(index)

    for index in range(len(spelt)):
        enter(index, 1)
    merges: list[Pair] = []
    made: set[str] = set()
    while True:
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 1:
            return merges
        if best[0] + best[1] not in made and len(made) == room:
            return merges
        made.add(best[0] + best[1])
        merges.append(best)
        for index in sorted(places.pop(best)):
            enter(index, -1)
            spelt[index] = _merged(spelt[index], best)
            enter(index, 1)
        del count[best]


def _merged(symbols: list[str], pair: Pair) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        # A symbol just made is longer than either half: it is not merged again.
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined
