"""Time and peak memory of attention's kernels, with and without a derivative, and how exact the fused one is.

python eval/bench/attention.py                     # 512 to 8k tokens, on cuda where there is one
python eval/bench/attention.py --tokens 1024 --dim 128 --dtype bfloat16
python eval/bench/attention.py --threads 2 --heads 4 --kernels math fused --work derivative
python eval/bench/attention.py --errors            # the fused kernel against float64, as JSON

math is torch's plain product, sdpa the fused kernel torch picks, fused our own: Triton's on cuda, tiles in torch
elsewhere. ``derivative`` is torch.func.jvp along query, key and value, for which sdpa has no rule. Memory is what a
call takes at its peak beyond its inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.attention import fused_attention, tiled
from stepdistill.system.provenance import provenance


@dataclass(frozen=True)
class Case:
    """A shape of attention; ``mask``: none, keys (padding), rows (one sees nothing), heads (one each), added."""

    n: int
    m: int
    d: int
    heads: int = 2
    kv_heads: int = 2
    mask: str = "none"
    batch: int = 2

    def draw(
        self, dtype: torch.dtype, device: torch.device
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
        """Query, key and value, their tangents, the output's gradient, and the mask."""
        generator = torch.Generator().manual_seed(self.n * 1000 + self.m + self.d)
        sizes = [(self.heads, self.n), (self.kv_heads, self.m), (self.kv_heads, self.m), (self.heads, self.n)]
        # Heads are cut out of [B, tokens, heads D], as networks do it.
        drawn = [
            torch.randn(self.batch, tokens, heads, self.d, generator=generator)
            .to(device, dtype)
            .transpose(1, 2)
            for heads, tokens in (*sizes, *sizes)
        ]
        shape = {
            "keys": (self.batch, 1, 1, self.m),
            "rows": (1, 1, self.n, self.m),
            "heads": (self.batch, self.heads, self.n, self.m),
            "added": (self.batch, 1, 1, self.m),
        }.get(self.mask)
        mask = None
        if shape is not None:
            mask = torch.rand(shape, generator=generator) > 0.3
            if self.mask == "rows":
                mask[:, :, -1] = False
            if self.mask == "added":
                mask = torch.randn(shape, generator=generator).masked_fill(~mask, -torch.inf)
            mask = mask.to(device)
        return drawn[:3], drawn[4:7], drawn[3], mask


CASES = (
    Case(5, 7, 8),
    Case(1, 1, 16),
    Case(33, 1, 40),
    Case(65, 129, 64, mask="keys"),
    Case(131, 77, 40, mask="rows"),
    Case(77, 131, 72, heads=4, kv_heads=2, mask="heads"),
    Case(130, 130, 80, heads=2, kv_heads=1, batch=1),
    Case(257, 255, 128, mask="rows"),
    Case(64, 256, 112, heads=4, kv_heads=1, mask="rows"),
    Case(100, 90, 160, mask="heads"),
    Case(47, 65, 256, heads=4, kv_heads=2, mask="keys"),
    Case(35, 90, 24, heads=4, kv_heads=2, mask="added"),
    Case(300, 520, 64),
)
"""Odd lengths, one key, hidden rows, grouped heads, and heads from 8 to 256 dimensions."""


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by its definition; zeros where a query sees nothing."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    logits = query.shape[-1] ** -0.5 * query @ key.mT
    if mask is None:
        return logits.softmax(-1) @ value
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    if mask.dtype != torch.bool:
        logits = logits + mask.masked_fill(~seen, 0)
    return (logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen) @ value


def errors(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Relative errors of the fused kernel's output, tangent and gradients against float64's of the same inputs."""
    inputs, tangents, grad, mask = case.draw(dtype, device)

    def found(attend: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        primals = [x.to(kind) for x in inputs]
        out, rate = torch.func.jvp(
            lambda *x: attend(*x, mask), tuple(primals), tuple(x.to(kind) for x in tangents)
        )
        leaves = [x.detach().requires_grad_() for x in primals]
        return [out, rate, *torch.autograd.grad(attend(*leaves, mask), leaves, grad.to(kind))]

    names = ("output", "tangent", "query", "key", "value")
    pairs = zip(found(fused_attention, dtype), found(plain, torch.float64), strict=True)
    result = {}
    for name, (a, b) in zip(names, pairs, strict=True):
        # With one key, gradients of query and key are zero: an error is then one of the whole.
        whole = b.numel() ** 0.5 if case.m == 1 else 1e-30
        result[name] = float((a.double() - b).norm() / b.norm().clamp_min(whole))
    return result


INSIDE = {
    "attention": tiled.forward,
    "attention_backward": tiled.backward,
    "attention_tangent": tiled.tangent,
}
"""What our own operators do on a CPU: its tensors count, too."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations within it make; ``peak`` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "stepdistill":
            with self:
                return INSIDE[func.overloadpacket.__name__](*args)
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self._hold(x)
        return out

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if self.live.setdefault(place, 0) == 0:
            self.held += size
            self.peak = max(self.peak, self.held)
        self.live[place] += 1
        weakref.finalize(x, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self.live[place] -= 1
        if not self.live[place]:
            del self.live[place]
            self.held -= size


def math(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's plain kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The kernel that torch picks."""
    return F.scaled_dot_product_attention(query, key, value)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "math": math,
    "sdpa": sdpa,
    "fused": fused_attention,
}
WORK = ("forward", "backward", "derivative")
"""Output alone; output and gradients; output and tangent."""


def measure(
    kernel: str,
    work: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """``ms``, the median of a call, and ``mib``, its peak memory; or ``error``. ``shape`` is [B, heads, N, D]."""
    attend = KERNELS[kernel]
    drawn = [torch.randn(shape, device=device, dtype=dtype) for _ in range(7)]
    inputs, tangents, grad = tuple(drawn[:3]), tuple(drawn[3:6]), drawn[6]

    def call() -> Any:
        if work == "backward":
            leaves = [x.requires_grad_() for x in inputs]
            return torch.autograd.grad(attend(*leaves), leaves, grad)
        with torch.no_grad():
            return attend(*inputs) if work == "forward" else torch.func.jvp(attend, inputs, tangents)

    try:
        call()
        mib = _peak(call, device)
        return {"ms": statistics.median(_seconds(call, device) for _ in range(repeats)) * 1000, "mib": mib}
    except (NotImplementedError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:120]}


def _peak(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with PeakMemory() as memory:
        call()
    return memory.peak / 2**20


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low = "bfloat16" if device.type == "cuda" else "float32"
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=[low])
    parser.add_argument("--kernels", choices=tuple(KERNELS), nargs="+", default=list(KERNELS))
    parser.add_argument("--work", choices=WORK, nargs="+", default=list(WORK))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a processor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--errors", action="store_true", help="the fused kernel against float64, and nothing else"
    )
    parser.add_argument("--cases", type=int, nargs="+", help="of --errors: which of CASES")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for dtype in (getattr(torch, name) for name in chosen.dtype):
        if chosen.errors:
            cases = [CASES[i] for i in chosen.cases] if chosen.cases else CASES
            print(json.dumps([{"case": str(case), **errors(case, dtype, device)} for case in cases]))
        else:
            _table(chosen, dtype, device)


def _table(chosen: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
    heads = f"batch {chosen.batch}, {chosen.heads} heads of {chosen.dim}, {str(dtype)[6:]}"
    print(f"{heads}; {provenance(device)['hardware']}")
    print(f"{'tokens':>7}  {'work':<10}" + "".join(f"  {x:>9} ms  {'MiB':>7}" for x in chosen.kernels))
    for tokens in chosen.tokens:
        shape = (chosen.batch, chosen.heads, tokens, chosen.dim)
        for work in chosen.work:
            row = [measure(name, work, shape, dtype, device, chosen.repeats) for name in chosen.kernels]
            cells = "".join(
                f"  {x['ms']:>12.2f}  {x['mib']:>7.0f}" if "ms" in x else f"  {'-':>12}  {'-':>7}"
                for x in row
            )
            print(f"{tokens:>7}  {work:<10}{cells}", flush=True)


if __name__ == "__main__":
    main()
