"""Where code runs on fake tensors: they have shapes and types and no numbers, and every operator works on them.

They are a CPU's, as torch makes no graphs of fake tensors of a GPU that is not there. Of CUDA's arithmetic what matters
to memory is then done here: under autocast it computes norms, sums and losses in float32 where a CPU stays in bfloat16,
and keeps their inputs so for the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map_only

from stepdistill.diffusion import philox
from stepdistill.diffusion.draws import Draws
from stepdistill.diffusion.remembered import forget
from stepdistill.networks.derivative import Derivative
from stepdistill.planning.live_bytes import DEVICE, LiveBytes
from stepdistill.planning.remembered_operators import ANEW, HasNumbers, Result, argument, recipe_of, told

aten = torch.ops.aten

KNOWN = 4096
"""So many numbers a tensor may have that are known all the same: of those code asks for some."""

MADE = frozenset(
    {
        *(aten.full, aten.zeros, aten.ones, aten.eye, aten.arange, aten.linspace, aten.logspace),
        *(
            aten.scalar_tensor,
            philox.uniform._opoverload.overloadpacket,
            philox.integers._opoverload.overloadpacket,
            philox.normal._opoverload.overloadpacket,
        ),
    }
)
"""Operators that make known tensors of plain numbers."""


class _Mode(FakeTensorMode):
    """Is one for all copies of its tensors: a copy of the mode would free again what it looks at. Small tensors on the
    processor that follow from numbers alone, such as times and tables of them, have numbers, too.

    What an operator made of tensors without numbers, of their shapes and types, it makes again without being asked:
    torch's own memory of that is slower than most operators.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._remembered: dict[tuple[Any, ...], Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mode:
        return self

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper takes longer than an operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].device
        try:
            asked = (func, torch.get_default_dtype(), told(args), *map(told, (kwargs or {}).items()))
        except HasNumbers:
            return self.dispatch(func, types, args, kwargs)
        recipe = self._remembered.get(asked)
        if recipe is None:
            made = self.dispatch(func, types, args, kwargs)
            self._remembered[asked] = recipe_of(func, made, args, kwargs or {})
            return made
        return self.dispatch(func, types, args, kwargs) if recipe is ANEW else self._made(recipe, args)

    def _made(self, recipe: Any, args: Any) -> Any:
        """What such an operator makes."""
        if type(recipe) is not Result:
            return type(recipe)(self._made(each, args) for each in recipe)
        if recipe.given is not None and recipe.shape is None:
            return argument(args, recipe.given)
        if recipe.shape is None:
            return None
        if recipe.given is None:
            plain = torch.empty_strided(recipe.shape, recipe.stride, dtype=recipe.dtype, device="meta")
        else:
            plain = torch.empty_strided((), (), dtype=recipe.dtype, device="meta")
            storage = argument(args, recipe.given).untyped_storage()
            plain.set_(storage, recipe.offset, recipe.shape, recipe.stride)
        # FakeTensor(self, plain, recipe.device), without looking at each attribute anew.
        made = Tensor._make_subclass(
            FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=recipe.device
        )
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)  # as a copy asks for it
        vars(made).update(recipe.attributes)
        return made

    def may_turn_const(self, t: Tensor) -> bool:
        return t.numel() <= KNOWN and t.device.type == "cpu" and not self.is_our_fake(t)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.lift_fns:
            args, kwargs = tree_map_only(Tensor, self._known, (args, kwargs))
        made: Any = super().dispatch(func, types, args, kwargs)
        if (
            getattr(func, "overloadpacket", None) in MADE
            and made.numel() <= KNOWN
            and made.device.type == "cpu"
        ):
            with no_dispatch():
                real = func(*args, **kwargs)
            return self._known(real)
        return made

    def _known(self, value: Tensor) -> Tensor:
        """A tensor in this mode, with its numbers where they are few; a tensor of this mode as it is."""
        if type(value) is not Tensor or not self.may_turn_const(value):
            return value
        known: Tensor = self.fake_tensor_converter.from_real_tensor(self, value, make_constant=True)
        return known


@contextmanager
def fake_tensors(exits: dict[str, int], live: LiveBytes) -> Iterator[FakeTensorMode]:
    """Inside the ``with`` modules of fake tensors can be moved and cast. Gives the mode in which what is made is fake.

    Args:
        exits: gets every choice that is made for a whole batch, with the number of its outcomes; 0 is taken.
        live: is told of storages that change their size.
    """
    plain: Any = nn.Module._apply

    def apply(module: nn.Module, change: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
        if not any(isinstance(value, FakeTensor) for value in (*module.parameters(), *module.buffers())):
            found: nn.Module = plain(module, change, recurse)
            return found
        # torch's own swaps tensors, which it does not do while anybody watches them, as we do.
        for child in module.children() if recurse else ():
            child._apply(change)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    changed = change(parameter)
                if changed.device != parameter.device:
                    module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
                elif changed is not parameter:
                    parameter.data = changed
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = change(value)
        return module

    def chosen(draws: Draws, stream: str, high: int) -> int:
        exits[stream] = high
        return 0

    copied: Any = Tensor.__deepcopy__

    def copied_without_numbers(value: Tensor, memo: dict[int, Any]) -> Tensor:
        if not isinstance(value, FakeTensor):
            return copied(value, memo)  # type: ignore[no-any-return]
        numbers, value.constant = value.constant, None
        copy: Tensor = copied(value, memo)
        value.constant = numbers
        return copy

    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        live.resized(storage)
        return storage

    forget()
    with (
        warnings.catch_warnings(),
        patch.object(nn.Module, "_apply", apply),
        patch.object(Draws, "shared_integer", chosen),
        patch.object(Tensor, "__deepcopy__", copied_without_numbers),
        patch.object(torch.UntypedStorage, "resize_", resized),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        try:
            yield _Mode()
        finally:
            forget()


@contextmanager
def derivatives_uncompared() -> Iterator[None]:
    """Exact derivatives where they can be had, without the look at differences beside the first, which has numbers."""
    plain = Derivative.exact

    def exact(self: Derivative, fn: Any, primals: Any, tangents: Any) -> Tensor | None:
        if self.way != "auto":
            return plain(self, fn, primals, tangents)
        self.way = "exact"
        try:
            return plain(self, fn, primals, tangents)
        except (NotImplementedError, RuntimeError):
            self.way = "difference"
            return None

    with patch.object(Derivative, "exact", exact):
        yield


IN_FLOAT32 = frozenset(
    {
        *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.mse_loss, F.l1_loss, F.smooth_l1_loss),
        *(F.huber_loss, F.softplus, F.interpolate, F.normalize, F.cosine_similarity),
        *(F.binary_cross_entropy_with_logits, torch.softmax, torch.sum, torch.prod, torch.cumsum, torch.norm),
        *(torch.pow, torch.exp, torch.log, torch.rsqrt, torch.reciprocal, torch.logsumexp),
        *(torch.linalg.vector_norm, Tensor.softmax, Tensor.sum, Tensor.prod, Tensor.cumsum, Tensor.norm),
        *(Tensor.pow, Tensor.exp, Tensor.log, Tensor.rsqrt, Tensor.reciprocal, Tensor.__pow__),
    }
)
"""Of what CUDA's autocast computes in float32 (torch's "CUDA Ops that can autocast to float32"), what networks and
losses call."""


class ArithmeticOfCuda(TorchFunctionMode):
    """Within it, autocast on a CPU casts as autocast on CUDA does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(
                Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs)
            )
        return func(*args, **kwargs)
