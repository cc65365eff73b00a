"""Parts of gpu.py: fused attention, its errors, the tiles of its kernels and its times. Each takes its argument and
whether sizes are toys, and yields rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import attention as bench
import torch
from gpu_device import CUDA, DEVICE, Row, alone
from torch import Tensor

from stepdistill.system.provenance import provenance


def errors(argument: str, tiny: bool) -> Iterator[Row]:
    """One half of the cases, 1 or 2."""
    dtype, half = argument.split("-")
    kind = getattr(torch, dtype)
    large = [
        bench.Case(4096, 4096, 64, 4, 4, batch=1),
        bench.Case(4096, 77, 64, 10, 10, "keys", 1),
        bench.Case(2048, 2048, 128, 4, 4, batch=1),
        bench.Case(2048, 16, 128, 4, 4, batch=1),
        bench.Case(16, 2048, 128, 4, 4, batch=1),
    ]
    cases = [*bench.CASES[:4], *([] if tiny else [*bench.CASES[4:], *large])]
    for case in cases[int(half) - 1 :: 2]:
        try:
            yield {"case": _short(case), **bench.errors(case, kind, DEVICE)}
        except Exception as error:
            yield {"case": _short(case), "failed": f"{type(error).__name__}: {error}"[:300]}
    if half == "2":
        return
    yield {"case": "two runs", "same bits": str(_repeats(kind))}
    if CUDA:
        from stepdistill.attention.triton_launch import SHAPES, Shape

        # More than a card has: float32 ends with products in full.
        key = ("forward", torch.finfo(kind).bits, 128)
        large_one = Shape(128, 128, 8, 2, "tf32x3") if dtype == "float32" else Shape(128, 128, 8, 12)
        kept, SHAPES[key] = SHAPES[key], large_one
        case = bench.Case(513, 600, 128)
        found = bench.errors(case, kind, DEVICE)
        yield {"case": f"shrunk to {_name(SHAPES[key])}", **found}
        SHAPES[key] = kept


def _short(case: bench.Case) -> str:
    return f"{case.n}x{case.m} D{case.d} heads {case.heads}/{case.kv_heads} {case.mask}"


def _repeats(dtype: torch.dtype) -> bool:
    inputs, _, grad, mask = bench.CASES[4].draw(dtype, DEVICE)
    leaves = [x.requires_grad_() for x in inputs]
    runs = [torch.autograd.grad(bench.fused_attention(*leaves, mask), leaves, grad) for _ in range(2)]
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# By kernel: what is tried beside the shape in use; rows, columns, warps, stages.
HALF = {
    "forward": "128-128-8-2 128-64-8-3 128-64-4-3 64-64-4-3 64-128-4-3",
    "tangent": "128-64-8-1 128-32-8-2 64-64-4-2 64-64-4-3 128-32-4-2 64-128-8-2",
    "of_queries": "128-64-8-3 128-64-4-2 64-64-4-2 64-64-4-3 128-128-8-2",
    "of_keys": "64-128-8-3 64-64-4-2 32-128-8-2 128-128-8-2 64-64-8-2 128-64-4-2",
}
WHOLE = {
    "forward": "32-32-8-1 x128-64-8-2 x64-64-4-2 x64-32-4-1 x64-32-4-2",
    "tangent": "16-16-8-1 x64-32-4-1 x128-32-8-1",
    "of_queries": "32-32-4-1 x64-32-4-1 x64-64-4-1 x128-32-8-1",
    "of_keys": "32-32-4-1 x32-64-4-1 x64-64-4-1 x32-128-8-1 x32-32-4-1",
}


def edges(warps: str, tiny: bool) -> Iterator[Row]:
    """A tile that ``Shape.smaller`` avoids, in a process of its own: what fails takes the device with it."""
    from stepdistill.attention import triton_launch

    shape = _shape(f"x64-16-{warps}-1")
    row: Row = {"kernel": "tangent, heads of 128", "shape": _name(shape)}
    triton_launch.SHAPES["tangent", 32, 128] = shape
    try:
        row |= bench.errors(bench.Case(64 if tiny else 2048, 64, 128, batch=1), torch.float32, DEVICE)
    except Exception as error:
        row["found"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    yield row


def tiles(kind: str, tiny: bool) -> Iterator[Row]:
    from stepdistill.attention import triton_launch
    from stepdistill.attention.triton_launch import SHAPES

    bits, head = map(int, kind.split("-"))
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    tokens, heads = (40, 1) if tiny else (2048, 8) if bits == 32 else (4096, 16)
    q, k, v, tq, tk, tv, g = (
        torch.randn(1, heads, tokens, head, device=DEVICE, dtype=dtype) for _ in range(7)
    )
    scale = head**-0.5
    out, logsum = triton_launch.forward(q, k, v, None, scale)

    def call(kernel: str) -> tuple[Tensor, ...]:
        if kernel == "forward":
            return triton_launch.forward(q, k, v, None, scale)[:1]
        if kernel == "tangent":
            return (triton_launch.tangent(q, k, v, None, scale, out, logsum, tq, tk, tv),)
        return triton_launch.backward(q, k, v, None, scale, out, logsum, g)

    def wanted(kernel: str) -> list[Tensor]:
        wide = [x.double() for x in (q, k, v)]
        if kernel == "forward":
            return [bench.plain(*wide, None)]
        if kernel == "tangent":
            along = tuple(x.double() for x in (tq, tk, tv))
            return [torch.func.jvp(lambda *x: bench.plain(*x, None), tuple(wide), along)[1]]
        leaves = [x.requires_grad_() for x in wide]
        return list(torch.autograd.grad(bench.plain(*leaves, None), leaves, g.double()))

    for kernel, texts in (HALF if bits == 16 else WHOLE).items():
        key, exact = (kernel, bits, head), wanted(kernel)
        kept = SHAPES[key]
        tried = [kept, *(_shape(text) for text in (texts.split()[-1:] if tiny else texts.split()))]
        for shape in tried:
            SHAPES[key] = shape
            row: Row = {"kernel": kernel, "shape": _name(shape), "in use": "*" if shape == kept else ""}
            try:
                began = time.perf_counter()
                found = call(kernel)
                row["compile s"] = time.perf_counter() - began
                if CUDA:
                    torch.cuda.synchronize()  # what fails, fails here
                if SHAPES[key] != shape:
                    yield {**row, "failed": f"shrank to {_name(SHAPES[key])}"}
                    continue
                with alone():
                    row["ms"] = (
                        statistics.median(bench._seconds(lambda k=kernel: call(k), DEVICE) for _ in range(8))
                        * 1e3
                    )
                row["error"] = max(
                    float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
                )
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            yield row
        SHAPES[key] = kept


def _shape(text: str) -> Any:
    from stepdistill.attention.triton_launch import Shape

    numbers = [int(x) for x in text.lstrip("x").split("-")]
    return Shape(*numbers, precision="tf32x3" if text.startswith("x") else "ieee")


def _name(shape: Any) -> str:
    return f"{shape.rows}x{shape.columns} warps {shape.warps} stages {shape.stages} {shape.precision}"


def attention(_: str, tiny: bool) -> Iterator[Row]:
    yield {"kernel": provenance(DEVICE)["hardware"], "work": f"torch {torch.__version__}"}
    grid = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64), (torch.float32, 128)]
    for work in bench.WORK:  # the first calls of a process are slow in Python too
        for name in bench.KERNELS:
            bench.measure(name, work, (1, 8, 64, 64), torch.bfloat16, DEVICE, 2 if tiny else 50)
    for dtype, dim in grid[:1] if tiny else grid:
        for tokens in (64,) if tiny else (1024, 4096, 16384) if dtype == torch.bfloat16 else (1024, 4096):
            for work in bench.WORK:
                repeats = 2 if tiny else 5 if tokens > 4096 else 20
                found = {
                    name: bench.measure(name, work, (1, 8, tokens, dim), dtype, DEVICE, repeats)
                    for name in bench.KERNELS
                }
                row: Row = {"dtype": str(dtype)[6:], "D": dim, "tokens": tokens, "work": work}
                for name, one in found.items():
                    row |= {f"{name} ms": one.get("ms", "-"), f"{name} MiB": one.get("mib", "-")}
                if "ms" in found["math"] and "ms" in found["fused"]:
                    row["math/fused"] = found["math"]["ms"] / found["fused"]["ms"]
                if "ms" in found["sdpa"] and "ms" in found["fused"]:
                    row["sdpa/fused"] = found["sdpa"]["ms"] / found["fused"]["ms"]
                failures = {name: one["error"] for name, one in found.items() if "error" in one}
                yield {
                    **row,
                    **(
                        {"no rule" if set(failures) == {"sdpa"} else "failed": str(failures)}
                        if failures
                        else {}
                    ),
                }


PARTS: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "errors": errors,
    "edges": edges,
    "tiles": tiles,
    "attention": attention,
}
