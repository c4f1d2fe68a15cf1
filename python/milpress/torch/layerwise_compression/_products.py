"""Products of weights and values, wherever a program multiplies them.

A mode of torch sees each function that a program calls, whoever calls it: a module, or a forward
that multiplies by a parameter, or by a part of one, itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

from milpress.errors import ConfigError
from milpress.torch.layerwise_compression._parts import Part, part_of, storage_of
from milpress.torch.registration import CONVOLUTIONS, axes_of_weights, products_of

_IsWeight: TypeAlias = Callable[[Any], bool]
_Sizes: TypeAlias = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Product:
    """A product of a weight and a value.

    Parameters
    ----------
    weight
        What is multiplied by, a parameter or a view of one: a matrix of the shape ``(output,
        inputs)``, or the kernel of a convolution.
    value
        What is multiplied, as a linear layer or a convolution takes it.
    kernel
        Stride, padding, dilation and groups of a convolution.
    """

    weight: Tensor
    value: Tensor
    kernel: Mapping[str, Any] = field(default_factory=dict)


def layer_with(weight: Tensor, kernel: Mapping[str, Any]) -> nn.Module:
    """Return a layer that makes such products as one of a kernel, with a weight that is given."""
    n_outputs, n_inputs, *size = weight.shape
    layer: Any
    if size:
        kind: Any = CONVOLUTIONS[len(size) - 1]
        settings = {"groups": 1, **kernel}
        n_inputs *= settings["groups"]
        layer = kind(n_inputs, n_outputs, size, bias=False, device="meta", **settings)
    else:
        layer = nn.Linear(n_inputs, n_outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return cast("nn.Module", layer.eval())


def told_products(module: nn.Module, name: str, args: Any, kwargs: Any) -> Iterator[Product]:
    """Yield the products of a parameter that `register_module` was told how to find.

    Raises
    ------
    ConfigError
        If the function that was registered gives something else.
    """
    parameter = module.get_parameter(name)
    axes = axes_of_weights(module)[name]
    if parameter.ndim != max(axes) + 1:
        msg = f"the products of {type(module).__name__}.{name}, a kernel, can't be given"
        raise ConfigError(msg)
    values = products_of(module)[name](module, *args, **kwargs)
    values = [values] if min(axes) == 0 else list(values)
    indices = list(np.ndindex(*parameter.shape[: min(axes)]))
    n_inputs = parameter.shape[axes[1]]
    are_right = len(values) == len(indices) and all(
        value is None or (isinstance(value, Tensor) and value.shape[-1:] == (n_inputs,))
        for value in values
    )
    if not are_right:
        each = f", for each of {len(indices)} matrices or None" if min(axes) else ""
        msg = (
            f"the products of {type(module).__name__}.{name} must be given as a tensor whose last "
            f"axis has its {n_inputs} input channels{each}"
        )
        raise ConfigError(msg)
    for index, value in zip(indices, values, strict=True):
        if value is not None:
            part = Part(index, 0, parameter.shape[axes[0]], axes)
            yield Product(part.of(parameter), value)


@dataclass(frozen=True, slots=True)
class _Copies:
    """Matrices of a stack that an index has picked, such as the expert of each token."""

    parameter: Tensor
    index: Tensor
    version: int | None  # of the parameter; torch does not count it in inference mode

    @property
    def are_old(self) -> bool:
        """Whether the parameter may have changed since."""
        return self.version is None or self.version != self.parameter._version

    def original(self, part: Part) -> Part:
        """Return the part of the parameter that a part of the copies is."""
        n = self.index.ndim
        number = int(self.index[part.index[:n]]) % self.parameter.shape[0]
        output, inputs = (axis - n + 1 for axis in part.axes)
        return replace(part, index=(number, *part.index[n:]), axes=(output, inputs))


class Watch(TorchFunctionMode):
    """A mode that shows the products that a program is about to make.

    Matrices that a program picks out of a stack are copies of them: they are shown as what they
    are copies of, and hold what that holds when the product is made.

    Parameters
    ----------
    is_weight
        Whether something is a parameter of interest, or a view of one.
    show
        Called with each product before it is made.
    """

    def __init__(self, is_weight: _IsWeight, show: Callable[[Product], None]) -> None:
        super().__init__()
        self._is_weight = is_weight
        self._show = show
        self._copies: dict[int | None, tuple[TensorWeakRef, _Copies]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        copied: dict[int, tuple[Tensor, _Copies]] = {}
        products = list(_products(func, args, kwargs, lambda value: self._counts(value, copied)))
        for product in self._of_originals(products) if copied else products:
            self._show(product)
        for tensor, copies in copied.values():
            if copies.are_old:
                with torch.no_grad():
                    tensor.copy_(copies.parameter[copies.index])
        result = func(*args, **kwargs)
        names = _PICKING.get(func, ())
        if names and args and self._is_weight(args[0]):
            self._note(result, args[0], **dict(zip(names, args[1:], strict=False)), **kwargs)
        return result

    def _note(self, result: Tensor, stack: Tensor, dim: int = 0, *, index: Any) -> None:
        is_whole = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
        if is_whole and dim == 0 and stack.ndim > 2:
            version = None if stack.is_inference() else stack._version
            live = {key: each for key, each in self._copies.items() if each[0]() is not None}
            copies = _Copies(stack, index.clone(), version)
            self._copies = {**live, storage_of(result): (TensorWeakRef(result), copies)}

    def _copies_with(self, value: Any) -> tuple[Tensor, _Copies] | None:
        """Return copies that something is, or is a view of."""
        if not self._copies or not isinstance(value, Tensor):
            return None
        reference, copies = self._copies.get(storage_of(value), (None, None))
        whole = None if reference is None else reference()
        return None if whole is None or copies is None else (whole, copies)

    def _counts(self, value: Any, copied: dict[int, tuple[Tensor, _Copies]]) -> bool:
        """Whether products with a value are to be shown; copies among them are noted."""
        found = self._copies_with(value)
        if found is None:
            return self._is_weight(value)
        copied[id(found[0])] = found
        return True

    def _of_originals(self, products: Iterable[Product]) -> Iterator[Product]:
        """Yield a product for each part of a parameter, of all that its copies multiply."""
        values: dict[tuple[int, Part], list[Tensor]] = {}
        parameters: dict[int, Tensor] = {}
        for product in products:
            found = self._copies_with(product.weight)
            part = None if found is None else part_of(found[0], product.weight)
            if found is not None and part is not None:
                copies = found[1]
                parameters[id(copies.parameter)] = copies.parameter
                key = id(copies.parameter), copies.original(part)
                rows = product.value.reshape(-1, product.value.shape[-1])
                values.setdefault(key, []).append(rows)
        for number, part in sorted(values, key=lambda key: key[1]):
            yield Product(part.of(parameters[number]), torch.cat(values[number, part]))


def _in_modes(function: Any) -> Any:
    """Return a function of torch that does not hand itself over to modes, but what it calls."""
    names = {name: _no for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _no(*_: Any) -> bool:
    return False


_attention = _in_modes(F.multi_head_attention_forward)


def _products(func: Any, args: Any, kwargs: Any, is_weight: _IsWeight) -> Iterator[Product]:
    """Yield the products of weights that a function is about to make."""
    if func is torch.einsum:
        equation, *operands = args
        if len(operands) == 1 and not isinstance(operands[0], Tensor):
            operands = operands[0]
        if isinstance(equation, str) and len(operands) == 2:
            yield from _of_einsum(is_weight, equation, operands)
    elif func in _FUNCTIONS or getattr(func, "_qualified_op_name", None) in _FUNCTIONS:
        products, names = _FUNCTIONS.get(func) or _FUNCTIONS[func._qualified_op_name]
        given = dict(zip(names, args, strict=False)) | kwargs
        yield from products(is_weight, *(given.get(name) for name in names))


def _of_linear(is_weight: _IsWeight, value: Tensor, weight: Tensor) -> Iterator[Product]:
    if is_weight(weight):
        yield Product(weight, value)


def _of_convolution(
    is_weight: _IsWeight,
    value: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    stride: _Sizes | None,
    padding: _Sizes | str | None,
    dilation: _Sizes | None,
    groups: int | None,
) -> Iterator[Product]:
    if is_weight(weight):
        kernel = {
            "stride": _of_rank(stride or 1, weight),
            "padding": padding if isinstance(padding, str) else _of_rank(padding or 0, weight),
            "dilation": _of_rank(dilation or 1, weight),
            "groups": groups or 1,
        }
        yield Product(weight, value, kernel)


def _of_rank(size: _Sizes, weight: Tensor) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes if len(sizes) > 1 else sizes * (weight.ndim - 2)


def _of_matrices(is_weight: _IsWeight, *operands: Tensor) -> Iterator[Product]:
    left, right = operands[-2:]
    is_left = is_weight(left)
    if is_left != is_weight(right) and (left if is_left else right).ndim > 1:
        if not is_left:
            yield from _of_stack(right.mT, left)
        else:
            yield from _of_stack(left, right.mT if right.ndim > 1 else right[None])


def _of_stack(weight: Tensor, value: Tensor) -> Iterator[Product]:
    """Yield the products of each matrix of a stack, or of a single one, and what it multiplies."""
    shape, steps = weight.shape[:-2], weight.stride()
    # What is expanded is one matrix.
    for index in np.ndindex(*(n if step else 1 for n, step in zip(shape, steps, strict=False))):
        where: list[Any] = [slice(None)] * max(value.ndim - 2, 0)
        for axis in range(1, min(len(shape), len(where)) + 1):
            if steps[-2 - axis] and shape[-axis] > 1:
                where[-axis] = index[-axis] if value.shape[-2 - axis] > 1 else 0
        yield Product(weight[index], value[tuple(where)])


def _of_groups(
    is_weight: _IsWeight, rows: Tensor, weight: Tensor, ends: Tensor | None
) -> Iterator[Product]:
    """Yield the products of stretches of rows, each with a matrix of its own."""
    if is_weight(weight) and ends is not None and (rows.ndim, weight.ndim) == (2, 3):
        for i, (begin, end) in enumerate(pairwise([0, *ends.tolist()])):
            if begin < end:
                yield Product(weight[i].mT, rows[begin:end])


def _of_einsum(
    is_weight: _IsWeight, equation: str, operands: Sequence[Tensor]
) -> Iterator[Product]:
    are_weights = [is_weight(operand) for operand in operands]
    terms, _, result = equation.replace(" ", "").partition("->")
    if sum(are_weights) != 1 or "." in terms or not result:
        return
    i = are_weights.index(True)
    weight, value = operands[i], operands[1 - i]
    of_weight, of_value = (terms.split(",")[j] for j in (i, 1 - i))
    stack = [label for label in of_weight if label in of_value and label in result]
    inputs = [label for label in of_weight if label in of_value and label not in result]
    outputs = [label for label in of_weight if label not in of_value and label in result]
    rows = [label for label in of_value if label not in of_weight and label in result]
    axes_of_weight, axes_of_value = [*stack, *outputs, *inputs], [*stack, *rows, *inputs]
    is_product = sorted(axes_of_weight) == sorted(of_weight) and sorted(axes_of_value) == sorted(
        of_value
    )
    if is_product and len(inputs) == len(outputs) == 1:
        weight = weight.permute([of_weight.index(label) for label in axes_of_weight])
        value = value.permute([of_value.index(label) for label in axes_of_value])
        for index in np.ndindex(*weight.shape[:-2]):
            yield Product(weight[index], value[index])


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

# What picks matrices of a stack, and what its further arguments are called.
_PICKING: dict[Any, tuple[str, ...]] = {
    Tensor.__getitem__: ("index",),
    **dict.fromkeys((Tensor.index_select, torch.index_select), ("dim", "index")),
}

# What each function multiplies, and what its arguments are called.
_FUNCTIONS: dict[Any, tuple[Callable[..., Iterator[Product]], tuple[str, ...]]] = {
    F.linear: (_of_linear, ("input", "weight")),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), (_of_convolution, _CONVOLUTION)),
    torch.matmul: (_of_matrices, ("input", "other")),
    Tensor.matmul: (_of_matrices, ("self", "other")),
    **dict.fromkeys((torch.mm, torch.bmm), (_of_matrices, ("input", "mat2"))),
    **dict.fromkeys((Tensor.mm, Tensor.bmm), (_of_matrices, ("self", "mat2"))),
    torch.mv: (_of_matrices, ("input", "vec")),
    Tensor.mv: (_of_matrices, ("self", "vec")),
    torch.addmm: (_of_matrices, ("input", "mat1", "mat2")),
    Tensor.addmm: (_of_matrices, ("self", "mat1", "mat2")),
    torch.baddbmm: (_of_matrices, ("input", "batch1", "batch2")),
    Tensor.baddbmm: (_of_matrices, ("self", "batch1", "batch2")),
    getattr(torch, "_grouped_mm", None): (_of_groups, ("self", "mat2", "offs")),
    "transformers::grouped_mm_fallback": (_of_groups, ("input", "weight", "offs")),
}
