"""Random numbers by counting: the published words, the laws, and the same bits however and wherever they are drawn."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepdistill.diffusion import philox, philox_numpy
from stepdistill.diffusion.draws import Draws, normal_of

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Counter, key and words of philox4x32-10, from Random123's tests."""


@pytest.mark.parametrize("known", KNOWN)
def test_the_words_are_the_published_ones(known: tuple[str, ...]) -> None:
    (c0, c1, c2, c3), (k0, k1), words = ([int(word, 16) for word in text.split()] for text in known)
    x, y = (np.array(pair, np.uint64)[:, None] for pair in ((c0, c2), (c1, c3)))
    signed = (k1 << 32 | k0) - (k1 >> 31 << 64)
    x, y = philox_numpy.philox(x, y, np.empty_like(x), signed)
    assert [x[0, 0], y[0, 0], x[1, 0], y[1, 0]] == words


def test_words_become_the_numbers_that_the_formulas_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Box and Muller's by the functions of math, w / 2^32, floor(w' high / 2^64); also of the first and last words."""
    draws, key = Draws(7, 3, 5, 400), 99
    monkeypatch.setattr("stepdistill.diffusion.draws._key", lambda seed, stream: key)
    words = {law: words_of(key, law, step=3, samples=range(5, 405)) for law in range(4)}
    for w, pair in zip(words[philox_numpy.NORMAL], draws.normal("", (2,)), strict=True):
        radius = math.sqrt(-2 * math.log((w[0] + 0.5) / 2**32))
        angle = math.pi / 2 * (((w[1] & 0x7FFFFFFF) + 0.5) / 2**30 - 1)
        found = (radius * math.cos(angle) * (1 - 2 * (w[1] >> 31)), radius * math.sin(angle))
        assert pair.tolist() == pytest.approx(found, rel=2**-23)
    uniform = torch.tensor([2 + w[0] / 2**32 for w in words[philox_numpy.UNIFORM]])
    torch.testing.assert_close(draws.uniform("", 2.0, 3.0), uniform, rtol=2**-23, atol=0)
    for high in (1, 5, 2**31, 2**32 - 1):
        exact = [(w[0] + (w[1] << 32)) * high >> 64 for w in words[philox_numpy.INTEGERS]]
        assert draws.integers("", high).tolist() == exact
        shared = words_of(key, philox_numpy.SHARED, step=3, samples=[0])[0]
        assert draws.shared_integer("", high) == (shared[0] + (shared[1] << 32)) * high >> 64
    for high in (0, 2**32):
        with pytest.raises(ValueError, match="below a bound of 1 to"):
            draws.integers("", high)


def words_of(key: int, law: int, step: int, samples: Any) -> list[list[int]]:
    """The words of the first block, by the definition on whole numbers."""
    found = []
    for sample in samples:
        c, k = [0, sample, step, law], [key & philox_numpy.MASK, key >> 32]
        for _ in range(philox_numpy.ROUNDS):
            a, b = c[0] * philox_numpy.MULTIPLIERS[0], c[2] * philox_numpy.MULTIPLIERS[1]
            c = [
                (b >> 32) ^ c[1] ^ k[0],
                b & philox_numpy.MASK,
                (a >> 32) ^ c[3] ^ k[1],
                a & philox_numpy.MASK,
            ]
            k = [
                (half + add) & philox_numpy.MASK for half, add in zip(k, philox_numpy.INCREMENTS, strict=True)
            ]
        found.append(c)
    return found


def box_muller(x: list[int], y: list[int]) -> np.ndarray[Any, Any]:
    """Cosines and sines, [2, m]."""
    out, room = np.empty((2, 2, len(x)), np.float32), np.empty((3, 2, len(x)))
    philox_numpy._box_muller(np.array([x, x], np.uint64), np.array([y, y], np.uint64), room, out)
    return out[:, 0]


def test_normal_numbers_are_exact_to_the_end_of_the_tails() -> None:
    """The least and the greatest radius, and an angle at each end of both halves of the circle."""
    ends = [0, 2**30, 2**31 - 1, 2**31, 2**31 + 2**30, 2**32 - 1]
    cos, sin = box_muller([0] * 6, ends)
    radius = math.sqrt(66 * math.log(2))
    assert sin.tolist() == pytest.approx([-radius, 0, radius, -radius, 0, radius], rel=1e-7, abs=2e-8)
    assert (cos > 0).tolist() == [True] * 3 + [False] * 3
    assert abs(cos).tolist() == pytest.approx(
        [radius * math.sin(math.pi * 2**-32), radius, radius * math.sin(math.pi * 2**-32)] * 2, rel=1e-7
    )
    words = [2**32 - 1, 2**31, 3037000499, 3037000500]  # the last two on both sides of the root of 1/2
    exact = [math.sqrt(-2 * math.log1p(-(2**32 - word - 0.5) / 2**32)) for word in words]
    assert box_muller(words, [2**30] * 4)[0].tolist() == pytest.approx(exact, rel=1e-7)


def test_numbers_belong_to_the_sample_and_not_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, in halves, one by one, in any order, in chunks of any size, of any device's processes, to the bit."""
    whole = Draws(3, 7, 0, 8)
    splits = [[whole.part(0, 3), whole.part(3, 5)], [Draws(3, 7, i, 1) for i in range(8)]]
    drawn: list[Callable[[Draws], Tensor]] = [
        lambda d: d.normal("a", (3, 3)),
        lambda d: d.normal("a", ()),
        lambda d: d.uniform("a", 0.02, 0.98),
        lambda d: d.integers("a", 1000),
    ]
    for draw in drawn:
        kept = draw(whole)
        for parts in splits:
            assert torch.equal(kept, torch.cat([draw(part) for part in parts]))
        for chunk in (1, 5, 7):
            with monkeypatch.context() as patch:
                patch.setattr(philox_numpy, "CHUNK", chunk)
                assert torch.equal(kept, draw(whole))
    assert len({d.shared_integer("exit", 1000) for d in (whole, *splits[0], *splits[1])}) == 1
    order = torch.tensor([6, 0, 6, 3])
    found = normal_of(3, "a", order, (3, 3), CPU)
    assert torch.equal(found, Draws(3, 0, 0, 8).normal("a", (3, 3))[order])
    long = Draws(3, 7, 2, 1).normal("a", (40,))
    assert torch.equal(
        long[:, :9], whole.normal("a", (3, 3))[2:3].flatten(1)
    )  # an element's place is its own


def test_no_counter_is_that_of_another_number() -> None:
    """Ends of the ranges in steps, samples and elements, laws and streams: no number in common among 4000."""
    far = Draws(0, 2**31, 2**31 - 10, 10)
    blocks = [
        *(Draws(0, step, 0, 10).normal("a", (40,)) for step in (0, 1, 2)),
        Draws(0, 0, 10, 10).normal("a", (40,)),
        far.normal("a", (40,)),
        Draws(0, 2**31, 0, 10).normal("a", (40,)),
        Draws(0, 0, 2**31 - 10, 10).normal("a", (40,)),
        Draws(0, 0, 0, 10).normal("b", (40,)),
        Draws(1, 0, 0, 10).normal("a", (40,)),
        Draws(-1, 0, 0, 10).normal("a", (40,)),
    ]
    numbers = torch.cat([block.flatten() for block in blocks])
    assert len(numbers.unique()) > len(numbers) - 3  # of 32 bits, by chance
    ((_, x, y),) = philox_numpy._words(5, 0, 1, np.array([2]), 1)
    other = [
        next(iter(philox_numpy._words(5, law, step, np.array([sample]), 2)))[1][0, block]
        for law, step, sample, block in ((1, 1, 2, 0), (0, 2, 2, 0), (0, 1, 3, 0), (0, 1, 2, 1), (0, 2, 1, 0))
    ]
    assert len({int(x[0, 0]), int(y[0, 0]), *map(int, other)}) == 7


COUNT = 40_000


def kolmogorov(numbers: Tensor, distribution: Callable[[Tensor], Tensor]) -> float:
    """sqrt(n) times the largest distance of two distribution functions: above 1.95 once in a thousand times."""
    below = distribution(numbers.double().sort().values)
    steps = torch.arange(len(below) + 1) / len(below)
    return math.sqrt(len(below)) * float(torch.maximum(below - steps[:-1], steps[1:] - below).max())


NORMALS: dict[str, Callable[[], Tensor]] = {
    "elements": lambda: Draws(0, 0, 0, 1).normal("n", (COUNT,)),
    "samples": lambda: Draws(0, 0, 0, COUNT).normal("n", ()),
    "cosines": lambda: Draws(0, 0, 0, COUNT).normal("n", (2,))[:, 0],
    "sines": lambda: Draws(0, 0, 0, COUNT).normal("n", (2,))[:, 1],
    "steps": lambda: torch.cat([Draws(0, step, 0, 100).normal("n", ()) for step in range(COUNT // 100)]),
    "streams": lambda: torch.cat([Draws(0, 0, 0, 100).normal(f"n{i}", ()) for i in range(COUNT // 100)]),
}


@pytest.mark.parametrize("over", NORMALS)
def test_normal_numbers_are_normal(over: str) -> None:
    """However they are counted; the variances of the first four powers are 1, 2, 15 and 96."""
    z = NORMALS[over]().double().flatten()
    assert len(z) == COUNT
    expected = ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96))
    for power, mean, variance in expected:
        assert abs(float((z**power).mean()) - mean) < 4 * math.sqrt(variance / COUNT)
    assert kolmogorov(z, torch.special.ndtr) < 1.95


def test_uniform_numbers_and_integers_are_uniform() -> None:
    draws = Draws(0, 0, 0, COUNT)
    assert kolmogorov(draws.uniform("u", 2.0, 4.0), lambda x: (x - 2) / 2) < 1.95
    for high in (2, 10, 1000):
        seen = torch.bincount(draws.integers("i", high), minlength=high)
        chi = float((seen - COUNT / high).square().sum()) * high / COUNT
        assert abs(chi - (high - 1)) < 4 * math.sqrt(2 * (high - 1)) + 4  # high - 1 degrees of freedom
    shared = [Draws(0, step, 0, 2).shared_integer("s", 4) for step in range(800)]
    assert torch.bincount(torch.tensor(shared)).tolist() == pytest.approx([200] * 4, abs=50)


def test_uniform_numbers_stay_below_the_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the greatest word, between bounds whose formula rounds up to the upper one; equal bounds are the number."""

    def greatest(key: int, law: int, step: int, samples: Any, blocks: int) -> Any:
        words = np.full((2, len(samples)), philox_numpy.MASK, np.uint64)
        yield slice(0, len(samples)), words, words

    monkeypatch.setattr(philox_numpy, "_words", greatest)
    draws = Draws(0, 0, 0, 3)
    for low, high in ((0.0, 1.0), (0.02, 0.98), (0.3, 0.3 + 2**-24), (-3.0, -2.9)):
        end = torch.tensor(high, dtype=torch.float32)
        found = draws.uniform("u", low, high)
        assert bool((found == torch.nextafter(end, torch.tensor(low))).all())
    assert draws.uniform("u", 0.7, 0.7).tolist() == pytest.approx([0.7] * 3, rel=1e-7)
    assert draws.integers("i", 7).tolist() == [6] * 3
    with pytest.raises(ValueError, match="from a lower to an upper bound"):
        draws.uniform("u", 2.0, 1.0)


def test_nothing_is_correlated_with_its_neighbours() -> None:
    """Streams, seeds, steps, samples, elements next to each other and of one block, and the squares of all."""
    draws, shape = Draws(0, 0, 0, 200), (200,)
    z = draws.normal("a", shape)
    pairs = {
        "streams": (z, draws.normal("b", shape)),
        "seeds": (z, Draws(1, 0, 0, 200).normal("a", shape)),
        "steps": (z, Draws(0, 1, 0, 200).normal("a", shape)),
        "samples": (z[1:], z[:-1]),
        "far samples": (z, Draws(0, 0, 2**20, 200).normal("a", shape)),
        **{f"elements {k} apart": (z[:, k:], z[:, :-k]) for k in (1, 2, 3, 4)},
        "cosine and sine": (z[:, 0::2], z[:, 1::2]),
        "laws": (z[:, 0], draws.uniform("a") - 0.5),
    }
    for name, (a, b) in pairs.items():
        for power in (1, 2):
            both = torch.stack([a.flatten() ** power, b.flatten() ** power])
            found = float(torch.corrcoef(both)[0, 1])
            assert abs(found) < 4 / math.sqrt(a.numel()), (name, power, found)


def test_a_draw_is_one_operator() -> None:
    """As profilers see it; and what compilers are told of its result is true."""

    def drawn() -> tuple[Tensor, ...]:
        draws = Draws(0, 0, 0, 4)
        return draws.normal("a", (3,)), draws.uniform("a"), draws.integers("a", 4)

    with torch.autograd.profiler.profile() as seen:
        drawn()
    names = [event.name for event in seen.function_events if event.name.startswith("stepdistill::")]
    assert names == [f"stepdistill::{name}" for name in ("normal", "uniform", "integers")]
    with torch._subclasses.FakeTensorMode():
        fakes = drawn()
    for fake, real in zip(fakes, drawn(), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def kernels(monkeypatch: pytest.MonkeyPatch, interpret: bool) -> Any:
    """A second copy of the module of Triton's kernels, for its interpreter or for its compiler."""
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpret)))
    file = Path(philox_numpy.__file__).with_name("philox_triton.py")
    spec = importlib.util.spec_from_file_location("philox_kernels", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_triton
def test_triton_in_its_interpreter_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of whole and of broken blocks, several programs, the last samples and steps, listed samples, large keys."""
    triton = kernels(monkeypatch, True)
    listed = torch.tensor([2**31 - 1, 0, 9])
    for key, step, first, samples, shape in (
        (-(2**63), 2**31, 2**31 - 3, None, [3, 90, 8]),
        (2**63 - 1, 0, 0, listed, [3, 1, 7]),
        (5, 1, 4, None, [300]),
    ):
        wanted = philox.normal(key, step, first, samples, shape, CPU)
        assert torch.equal(triton.normal(key, step, first, samples, shape, CPU), wanted)
    low, high = np.float32(0.02), np.float32(0.98)
    bounds = (float(low), float(high), float(np.nextafter(high, low)))
    found = triton.uniform(-7, 2, 5, 300, *bounds, CPU)
    assert torch.equal(found, philox.uniform(-7, 2, 5, 300, 0.02, 0.98, CPU))
    for high in (3, 2**32 - 1):
        assert torch.equal(triton.integers(-7, 2, 5, 9, high, CPU), philox.integers(-7, 2, 5, 9, high, CPU))


@needs_triton
@pytest.mark.parametrize("name", ["normals", "uniforms", "integers_below"])
def test_triton_kernels_compile_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code for compute capability 9.0, in which no product of float64 is fused with a sum."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels(monkeypatch, False), name)
    fixed = {
        "BLOCK": 256,
        "LISTED": True,
        "LOG": philox_numpy.LOG,
        "SIN": philox_numpy.SIN,
        "COS": philox_numpy.COS,
    }
    kinds = {"key": "i64", "OUT": "*i64" if name == "integers_below" else "*fp32", "SAMPLES": "*i64"}
    kinds |= {"low": "fp32", "high": "i64" if name == "integers_below" else "fp32", "last": "fp32"}
    names = [parameter.name for parameter in kernel.params]
    signature = {x: "constexpr" if x in fixed else kinds.get(x, "i32") for x in names}
    constants = {(i,): fixed[x] for i, x in enumerate(names) if x in fixed}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {}),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": False},
    )
    text = compiled.asm["ptx"]
    assert "fma" not in text and ("sqrt.rn.f64" in text) == ("div.rn.f64" in text) == (name == "normals")
    assert len(compiled.asm["cubin"]) > 1000


def test_draws_of_groups_are_one_for_each_and_the_same_in_a_part() -> None:
    whole = Draws(3, 5, 0, 12)
    shared = whole.of_groups(4).normal("t", (2,))
    assert shared.shape == (3, 2)
    assert torch.equal(whole.part(4, 8).of_groups(4).normal("t", (2,)), shared[1:])
    assert torch.equal(whole.of_groups(1).normal("t", (2,)), whole.normal("t", (2,)))
    with pytest.raises(ValueError, match=r"samples 2 \.\. 5 are no groups of 4"):
        whole.part(2, 4).of_groups(4)
