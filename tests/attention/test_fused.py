"""Fused attention gives the plain product's output, tangents and gradients, in memory linear in the tokens."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_prompts
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from stepdistill.attention import forward_mode, fused_attention, operators, rerouted
from stepdistill.attention.forward_mode import ForwardMode
from stepdistill.attention.kernels import check_attention, why_not
from stepdistill.attention.rerouted import FusedMode
from stepdistill.errors import UserError
from stepdistill.losses.batch import Examples
from stepdistill.methods.scm import SCM
from stepdistill.networks.checkpointing import checkpointed
from stepdistill.networks.derivative import directional_derivative, takes_exact
from stepdistill.networks.roles import Copies
from stepdistill.networks.student import Student
from stepdistill.networks.teacher import PipelineTeacher
from stepdistill.testing.toys import loss_of, toy_batch

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "eval" / "bench" / "attention.py"
CPU = torch.device("cpu")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def _bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_attention", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


bench = _bench()


def three(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, *shape, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", bench.CASES, ids=str)
def test_output_tangent_and_gradients_are_those_of_float64(case: Any, dtype: torch.dtype) -> None:
    found = bench.errors(case, dtype, CPU)
    assert max(found.values()) < BOUND[dtype], found


@pytest.mark.skipif(
    not torch.cuda.is_available() or not HAS_TRITON, reason="Triton's kernels need a CUDA device"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", bench.CASES, ids=str)
def test_triton_on_a_gpu(case: Any, dtype: torch.dtype) -> None:
    found = bench.errors(case, dtype, torch.device("cuda"))
    assert max(found.values()) < BOUND[dtype], found


@pytest.mark.slow
@needs_triton
def test_triton_in_its_interpreter() -> None:
    """One key, hidden rows, grouped heads, an added mask, several tiles of rows and columns."""
    cases = ["0", "2", "4", "6", "11"]
    done = subprocess.run(
        [sys.executable, BENCH, "--errors", "--dtype", "float32", "bfloat16", "--cases", *cases],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    for rows, bound in zip(done.stdout.splitlines(), BOUND.values(), strict=True):
        found = json.loads(rows)
        assert len(found) == len(cases)
        for row in found:
            assert max(v for k, v in row.items() if k != "case") < bound, row


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("name", ["forward", "tangent", "of_queries", "of_keys"])
def test_triton_kernels_compile_for_a_gpu(
    name: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter takes what the compiler refuses: every kernel makes machine code for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from stepdistill.attention import triton_kernels
    from stepdistill.attention.triton_launch import SHAPES

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, shape = getattr(triton_kernels, name), SHAPES[name, bits, 64]
    kind, pointer = ("bfloat16", "*bf16") if bits == 16 else ("float32", "*fp32")
    fixed: dict[str, Any] = {
        "D": 40,
        "WIDTH": 64,
        "ROWS": shape.rows,
        "COLUMNS": shape.columns,
        "MASKED": True,
    }
    fixed |= {
        "ADDED": False,
        "WHOLE": False,
        "TYPE": getattr(triton.language, kind),
        "PRECISION": shape.precision,
    }
    fixed |= {f"ALONG_{x}": True for x in "QKV"}
    kinds = {"LOGSUM": "*fp32", "MEAN": "*fp32", "MASK": "*u8", "scale": "fp32", "N": "i32", "M": "i32"}
    names = [parameter.name for parameter in kernel.params]
    signature = {
        x: "constexpr" if x in fixed else kinds.get(x, pointer if x.isupper() else "i32") for x in names
    }
    constants = {(i,): fixed[x] for i, x in enumerate(names) if x in fixed}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": shape.warps, "num_stages": shape.stages},
    )
    assert compiled.metadata.shared <= 227 * 1024
    assert len(compiled.asm["cubin"]) > 1000


@needs_triton
def test_a_kernel_shrinks_until_a_card_can_hold_it() -> None:
    """By tf32x3 only in tiles in which every warp has 16 rows of its products, and those have 32 columns."""
    from stepdistill.attention.triton_launch import SHAPES, Shape

    for (name, _, _), shape in SHAPES.items():
        seen = [shape]
        while (smaller := seen[-1].smaller()) is not None:
            assert smaller.stages * smaller.rows * smaller.columns <= (
                seen[-1].stages * seen[-1].rows * seen[-1].columns
            )
            assert smaller not in seen
            seen.append(smaller)
        assert seen[-1] == Shape(16, 16, seen[-1].warps, 1)
        for one in seen:
            tall, wide = (one.columns, one.rows) if name == "of_keys" else (one.rows, one.columns)
            assert one.precision == "ieee" or (tall >= 16 * one.warps and wide >= 32)
    assert {key[1:] for key in SHAPES} == {(bits, head) for bits in (16, 32) for head in (64, 128, 256)}


@needs_triton
@pytest.mark.parametrize(
    ("d", "tf32", "precision"), [(16, True, "ieee"), (17, True, "tf32x3"), (128, False, "ieee")]
)
def test_float32_takes_tensor_cores_where_they_are_and_heads_fill_them(
    d: int, tf32: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepdistill.attention import triton_launch

    monkeypatch.setattr(triton_launch, "_has_tf32", lambda device: tf32)
    query = torch.zeros(1, 1, 5, d)
    shape = triton_launch._Launch(query, query, None, 1.0).shape("forward")
    assert shape.precision == precision


def test_a_query_that_sees_nothing_gives_zeros_and_moves_nothing() -> None:
    query, key, value = (x.requires_grad_() for x in three(1, 2, 5, 8))
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    mask[:, 3] = False
    out, rate = torch.func.jvp(
        lambda *x: fused_attention(*x, mask), (query, key, value), three(1, 2, 5, 8, seed=1)
    )
    assert not out[:, :, 3].any() and not rate[:, :, 3].any() and out[:, :, 2].all()
    gradients = torch.autograd.grad(out[:, :, 3].sum(), (query, key, value))
    assert not any(x.any() for x in gradients)


def test_forward_mode_of_torch_and_a_tangent_of_one_input() -> None:
    query, key, value = three(1, 2, 9, 8)
    along = torch.ones_like(key)
    wanted = torch.func.jvp(lambda key: bench.plain(query, key, value, None), (key,), (along,))[1]
    with forward_ad.dual_level():
        out = fused_attention(query, forward_ad.make_dual(key, along), value)
        assert torch.allclose(forward_ad.unpack_dual(out).tangent, wanted, rtol=0, atol=1e-14)
    found = torch.func.jvp(lambda key: fused_attention(query, key, value), (key,), (along,))[1]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-14)


def test_a_gradient_through_a_tangent_is_the_plain_products() -> None:
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[0] = False
    query, key, value = three(1, 2, 9, 8)

    def squares(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of(query: Tensor, along: Tensor) -> Tensor:
            return torch.func.jvp(lambda q: attend(q, key, value, mask), (query,), (along,))[1].square().sum()

        return of

    pair = (query, three(1, 2, 9, 8, seed=1)[0])
    wanted = torch.func.grad(squares(bench.plain), (0, 1))(*pair)
    found = torch.func.grad(squares(fused_attention), (0, 1))(*pair)
    for a, b in zip(found, wanted, strict=True):
        assert b.any() and torch.allclose(a, b, rtol=0, atol=1e-12)


def test_second_derivatives_are_refused() -> None:
    query, key, value = (x.requires_grad_() for x in three(1, 1, 4, 8))
    (gradient,) = torch.autograd.grad(
        fused_attention(query, key, value).square().sum(), query, create_graph=True
    )
    with pytest.raises(NotImplementedError, match=r"no derivative of its gradients.*math"):
        gradient.sum().backward()
    of = torch.func.grad(lambda q: fused_attention(q, key, value).sum())
    with pytest.raises(NotImplementedError, match="no derivative of its gradients"):
        torch.func.jvp(of, (query.detach(),), (torch.ones_like(query),))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_give_the_same_gradients(reentrant: bool) -> None:
    query, key, value = (x.requires_grad_() for x in three(1, 2, 9, 8))
    attend = lambda x: fused_attention(2 * x, key, value)  # noqa: E731
    (plain,) = torch.autograd.grad(attend(query).square().sum(), query)
    checkpoint(attend, query, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(query.grad, plain)


def test_scale_broadcast_masks_and_autocast() -> None:
    query, key, value = (x.float() for x in three(2, 2, 9, 8))
    seen = torch.rand(9, generator=torch.Generator().manual_seed(0)) > 0.3
    wanted = F.scaled_dot_product_attention(query, key, value, seen.expand(9, 9), scale=0.7)
    assert torch.allclose(fused_attention(query, key, value, seen, 0.7), wanted, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        low = fused_attention(query, key, value, seen, 0.7)
    assert low.dtype == torch.bfloat16 and relative(low.float(), wanted) < BOUND[torch.bfloat16]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


ZEROS = torch.zeros(1, 2, 4, 8)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((ZEROS[0], ZEROS, ZEROS), r"4 dimensions .*query \[2, 4, 8\]"),
        ((ZEROS, ZEROS, ZEROS[:, :, :3]), "as many values as keys"),
        ((ZEROS, ZEROS[..., :4], ZEROS[..., :4]), "one batch size and head size"),
        ((ZEROS[:, :1], ZEROS, ZEROS), "multiple of the key's"),
        ((ZEROS, ZEROS[:, :, :0], ZEROS[:, :, :0]), "none empty"),
        ((torch.zeros(1, 1, 2, 264),) * 3, "at most 256 dimensions, not 264"),
        ((ZEROS, ZEROS.double(), ZEROS), "one floating type"),
        ((ZEROS, ZEROS.to("meta"), ZEROS), "on one device, not cpu, meta, cpu"),
        (
            (ZEROS, ZEROS, ZEROS, torch.zeros(4, 4, dtype=torch.long)),
            r"mask without gradient.*\[1, 2, 4, 4\], not torch.int64 of shape \[4, 4\]",
        ),
        ((ZEROS, ZEROS, ZEROS, torch.ones(4, 1) > 0), r"not torch.bool of shape \[4, 1\]"),
        ((ZEROS, ZEROS, ZEROS, torch.ones(3, 4) > 0), r"not torch.bool of shape \[3, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fused_attention(*inputs)


@pytest.mark.parametrize("work", ["forward", "backward", "derivative"])
def test_memory_is_linear_in_the_tokens(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepdistill.attention.tiled.TILE", 2**12)
    half, whole = (
        bench.measure("fused", work, (1, 1, n, 8), torch.float32, CPU, 1)["mib"] for n in (512, 1024)
    )
    assert whole < 2.05 * half
    assert whole < 0.2 * bench.measure("math", work, (1, 1, 1024, 8), torch.float32, CPU, 1)["mib"]


@pytest.mark.parametrize("name", ["dit", "sd3", "sd"])
def test_a_networks_exact_derivative_is_that_of_the_plain_product(
    name: str, teacher_of: Callable[[str], PipelineTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of(name)
    student = Student.from_teacher(teacher)
    x, w = torch.randn(2, 2, *teacher.codec.shape, generator=torch.Generator().manual_seed(3))
    t, cond = torch.tensor([0.8, 0.3]), teacher.codec.encode(tiny_prompts(name, 2))
    calls = []

    def counted(*inputs: Any) -> Tensor:
        calls.append(inputs[0].shape)
        return fused_attention(*inputs)

    def derivative() -> Tensor:
        return directional_derivative(lambda x, t: student.raw(x, t, cond), (x, t), (w, torch.ones_like(t)))

    monkeypatch.setattr(rerouted, "fused_attention", counted)
    plain = derivative()
    assert not calls  # few tokens: the plain product is left
    monkeypatch.setattr(forward_mode, "TILES_PAY", 1)
    fused = derivative()
    assert calls
    assert relative(fused, plain) < 1e-5


@pytest.mark.parametrize("name", ["dit", "sd"])
def test_a_network_trains_through_fused_attention(
    name: str, teacher_of: Callable[[str], PipelineTeacher]
) -> None:
    teacher = teacher_of(name)
    student = Student.from_teacher(teacher)
    x = torch.randn(2, *teacher.codec.shape, generator=torch.Generator().manual_seed(3))
    t, cond = torch.tensor([0.8, 0.3]), teacher.codec.encode(tiny_prompts(name, 2))

    def gradients() -> Tensor:
        student.net.zero_grad()
        student.raw(x, t, cond).square().mean().backward()
        return torch.cat([v.grad.flatten() for v in student.net.parameters() if v.grad is not None])

    plain = gradients()
    with FusedMode():
        fused = gradients()
        with checkpointed([student.net]):  # blocks run again in the backward pass take it, too
            again = gradients()
    assert 0 < relative(fused, plain) < 1e-5
    assert torch.equal(again, fused)


@pytest.mark.parametrize("name", ["attention", "attention_backward", "attention_tangent"])
def test_operators_keep_torchs_rules(name: str) -> None:
    """Schema, shapes and strides without data, gradients, and all of it in a traced graph."""
    query, key, value = (x.float() for x in three(1, 2, 5, 8))
    mask = torch.ones(1, 1, 5, 5).tril() > 0
    out, logsum = operators.attention(query, key, value, mask, 0.3)
    inputs: dict[str, tuple[Any, ...]] = {
        "attention": (query.clone().requires_grad_(), key, value, mask, 0.3),
        "attention_backward": (query, key, value, mask, 0.3, out, logsum, out.mT.contiguous().mT),
        "attention_tangent": (query, key, value, mask, 0.3, out, logsum, out, None, out),
    }
    torch.library.opcheck(getattr(operators, name), inputs[name])


def test_compiled_in_one_graph_it_has_the_same_output_gradients_and_tangents() -> None:
    """An operator alone would have a tangent of zeros."""
    inputs, along = [x.float().requires_grad_() for x in three(1, 2, 5, 8)], three(1, 2, 5, 8, seed=1)

    def work(*inputs: Tensor) -> tuple[Tensor, ...]:
        primals = tuple(x.detach() for x in inputs)
        tangents = tuple(x.float() for x in along)
        rate = torch.func.jvp(lambda *x: fused_attention(*x).sin(), primals, tangents)[1]
        one = torch.func.jvp(lambda x: fused_attention(*primals[:2], x), primals[2:], tangents[2:])[1]
        return fused_attention(*inputs).sin(), rate, one

    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for plain, traced in zip(work(*inputs), compiled(*inputs), strict=True):
        assert plain.any() and torch.equal(plain, traced)
    wanted, found = (torch.autograd.grad(of(*inputs)[0].sum(), inputs) for of in (work, compiled))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_scm_with_the_exact_derivative_through_fused_attention_is_that_of_the_plain_product(
    teacher_of: Callable[[str], PipelineTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teacher_of("dit")
    student = Student.from_teacher(teacher)
    differences, method = (
        SCM(Copies(teacher, student), (1.0,), SCM.Options(guidance=2.0, tangent_warmup=0, derivative=way))
        for way in ("difference", "exact")
    )
    assert takes_exact(method) and not takes_exact(differences)
    batch, cond = toy_batch(2, 1), teacher.codec.encode(tiny_prompts("dit", 2))
    x0 = batch.draws.normal("x0", teacher.codec.shape)
    batch = replace(batch, shape=teacher.codec.shape, cond=cond, pairs=Examples(x0, cond))

    def found() -> tuple[float, float, Tensor]:
        student.net.zero_grad()
        loss, logs = loss_of(method, "student", batch)
        loss.backward()
        gradient = [v.grad.flatten() for v in student.net.parameters() if v.grad is not None]
        return loss.item(), logs["tangent"].item(), torch.cat(gradient)

    plain = found()
    monkeypatch.setattr(forward_mode, "TILES_PAY", 1)
    fused = found()
    assert fused[:2] == pytest.approx(plain[:2], rel=1e-5)
    assert plain[2].any() and 0 < relative(fused[2], plain[2]) < 1e-5


def test_calls_that_fused_attention_does_not_take_stay_torchs() -> None:
    query, key, value = (x.float() for x in three(1, 2, 5, 8))
    for told in (
        {"is_causal": True},
        {"attn_mask": torch.randn(5, 5, requires_grad=True)},
        {"attn_mask": torch.zeros(1, 2, 5, 5, dtype=torch.bool).logical_not(), "dropout_p": 0.5},
    ):
        assert rerouted.fused_call(query, key, value, **told) is None
    assert rerouted.fused_call(query, key[:, :1], value[:, :1]) is None  # grouped without being told so
    assert rerouted.fused_call(query, key[:, :1], value[:, :1], enable_gqa=True) is not None
    assert rerouted.fused_call(query[0], key[0], value[0]) is None
    assert rerouted.fused_call(query, key, value[..., :4]) is None
    with FusedMode():
        causal = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(causal, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    bias = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    with ForwardMode():
        biased = F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=bias)
    assert torch.allclose(
        biased, F.scaled_dot_product_attention(query, key, value, attn_mask=bias), atol=1e-6
    )


def test_triton_is_refused_on_a_cpu_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "no kernel for cpu, only for cuda" if HAS_TRITON else "Triton is not installed"
    with pytest.raises(
        UserError, match=f"train.attention is triton, but .*{reason}.*one of auto, sdpa, math"
    ):
        check_attention("triton", CPU)
    if HAS_TRITON:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert why_not("triton", CPU) is None
