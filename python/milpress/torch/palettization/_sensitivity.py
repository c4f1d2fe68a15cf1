"""How much a loss depends on each weight: the diagonal of its empirical Fisher information."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import distributed, nn

from milpress.errors import ConfigError, ConfigTypeError, UnsupportedError
from milpress.plain.files import draft_in_place_of
from milpress.progress import Progress, shown
from milpress.torch._modes import evaluating
from milpress.torch._module_weights import is_spread, whole

LossFunction: TypeAlias = Callable[[nn.Module, Any], torch.Tensor]

_LEAST = 1e-12
_N_SAVES = 8  # along a run that can be resumed


@dataclass(slots=True)
class GradientSums:
    """Sums of squared gradients.

    Parameters
    ----------
    squares
        For each weight, by its name, of its shape; in float32.
    n_samples
        How many samples were seen, by all processes together.
    n_whole
        How many of them were batches that could not be split.
    notes
        What the report is to say.
    kept
        The file they are in along the way; to be deleted once what is made of them is safe.
    """

    squares: dict[str, torch.Tensor]
    n_samples: int = 0
    n_whole: int = 0
    notes: list[str] = field(default_factory=list)
    kept: Path | None = None


def sum_squared_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    dataloader: Iterable[Any],
    loss_fn: LossFunction,
    *,
    n_samples: int,
    per_sample: bool,
    path: Path | None = None,
    progress: Progress | bool | None = None,
) -> GradientSums:
    """Sum the squares of the gradients that samples give.

    The model is in evaluation mode meanwhile; its gradients, flags and modes are as before
    afterwards. Of the gradients, only those of one layer are kept at a time. In a process group,
    each process takes its share of the samples, or, if the model is sharded, its share of all.

    Parameters
    ----------
    model, weights
        The model, and what of it to differentiate by, also if it is frozen.
    dataloader, n_samples
        Batches, and where to stop. Every process gives the same ones.
    loss_fn
        Takes the model and a batch, returns the loss.
    per_sample
        Whether batches are split into samples.
    path
        Where to keep the sums along the way; if a run was interrupted, go on from there.
    progress
        As of `SKMPalettizer.compute_sensitivity`.

    Raises
    ------
    ConfigError
        If there is no sample, the loss is none, or the sums that were kept are of other weights.
    UnsupportedError
        If a loss is not finite.
    """
    sharded = any(is_spread(weight) for weight in weights.values())
    rank, n_ranks = rank_and_size()
    sums = GradientSums(
        {
            name: torch.zeros_like(weight, dtype=torch.float32).detach()
            for name, weight in weights.items()
        }
    )
    if path is not None:
        sums.kept = path.with_name(f"{path.name}.partial{rank or ''}")
        if sums.kept.exists():
            _resume(sums, sums.kept, n_ranks)
    save_every = max(1, n_samples // _N_SAVES)
    seen = 0
    with (
        shown(None if rank else progress) as note,
        _prepared(model, weights),
        _squaring(weights, sums.squares),
        torch.enable_grad(),
    ):
        samples = islice(_samples(dataloader, per_sample=per_sample), n_samples)
        for seen, (sample, is_whole) in enumerate(samples, start=1):
            if seen <= sums.n_samples:
                continue
            note(seen - 1, n_samples, f"sample {seen}")
            if sharded or seen % n_ranks == rank:
                _backward(model, sample, loss_fn, seen)
            sums.n_samples = seen
            sums.n_whole += is_whole
            if sums.kept is not None and seen % save_every == 0:
                _save(sums, sums.kept, n_ranks)
        note(seen, seen, "")
    if seen == 0:
        msg = "dataloader gives no sample"
        raise ConfigError(msg)
    if n_ranks > 1 and not sharded:
        for total in sums.squares.values():
            distributed.all_reduce(total)
    if sums.n_whole and per_sample:
        sums.notes.append(
            f"{sums.n_whole} of {sums.n_samples} batches were used as given: "
            "their tensors don't share their first dimension"
        )
    return sums


def normalized(squares: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return sensitivities from 0 to 1, none of them 0, and whether the loss depends on any.

    Where it does not, all are 1.
    """
    values = whole(squares)
    greatest = values.max()
    if greatest == 0:
        return torch.ones_like(values), False
    values = values / greatest
    least = torch.where(values > 0, values, 1.0).min()
    return values.clamp_(min=max(float(least), _LEAST)), True


def load(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return sensitivities from a file; they stay there until they are used.

    Raises
    ------
    ConfigError
        If it is no file of named tensors.
    """
    try:
        sensitivities = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:
        msg = f"{path}: sensitivities must be a dictionary of tensors that torch saved, got {error}"
        raise ConfigError(msg) from error
    if not isinstance(sensitivities, dict) or not all(map(torch.is_tensor, sensitivities.values())):
        kind = type(sensitivities).__name__
        msg = f"{path}: sensitivities must be a dictionary of tensors, got {kind}"
        raise ConfigTypeError(msg)
    return sensitivities


def save(content: Any, path: Path) -> None:
    """Write a file by torch, as a whole or not at all."""
    with draft_in_place_of(path) as draft:
        torch.save(content, draft)


def split(batch: Any) -> list[Any] | None:
    """Return the samples of a batch, whose tensors share their first dimension; else ``None``.

    Examples
    --------
    >>> split({"x": torch.tensor([[1, 2], [3, 4]]), "y": torch.tensor([5, 6])})[1]
    {'x': tensor([[3, 4]]), 'y': tensor([6])}
    """
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in _tensors(batch)}
    if len(sizes) != 1:
        return None
    size = sizes.pop()
    return None if size is None else [_part(batch, i) for i in range(size)]


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)


def _part(batch: Any, i: int) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[i : i + 1]
    kind: Any = type(batch)
    if isinstance(batch, Mapping):
        return kind({key: _part(item, i) for key, item in batch.items()})
    if isinstance(batch, (tuple, list)):
        items = [_part(item, i) for item in batch]
        return kind(*items) if hasattr(batch, "_fields") else kind(items)
    return batch


def _samples(dataloader: Iterable[Any], *, per_sample: bool) -> Iterator[tuple[Any, bool]]:
    """Yield samples, and whether each is a batch that could not be split."""
    for batch in dataloader:
        parts = split(batch) if per_sample else None
        if parts is None:
            yield batch, True
        else:
            for part in parts:
                yield part, False


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process in its group, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _backward(model: nn.Module, sample: Any, loss_fn: LossFunction, number: int) -> None:
    loss = loss_fn(model, sample)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        msg = f"loss_fn must return one number that depends on the weights, got {loss!r}"
        raise ConfigTypeError(msg)
    if not torch.isfinite(loss):
        msg = f"the loss of sample {number} must be finite, got {loss.item()}"
        raise UnsupportedError(msg)
    loss.sum().backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _prepared(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put a model into evaluation mode, such that its weights alone get gradients."""
    wanted = {id(weight) for weight in weights.values()}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        with evaluating(model):
            yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextlib.contextmanager
def _squaring(
    weights: Mapping[str, nn.Parameter], squares: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Add the square of each gradient to a sum as soon as it is complete, and drop it."""
    with contextlib.ExitStack() as stack:
        for name, weight in weights.items():
            hook = partial(_add_square, squares[name])
            stack.enter_context(weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        yield


@torch.no_grad()
def _add_square(total: torch.Tensor, parameter: torch.Tensor) -> None:
    gradient = parameter.grad
    parameter.grad = None
    if gradient is not None:
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        gradient = gradient.float()
        total.addcmul_(gradient, gradient)


def _save(sums: GradientSums, path: Path, n_ranks: int) -> None:
    local = {name: _local(total) for name, total in sums.squares.items()}
    counts = {"n_samples": sums.n_samples, "n_whole": sums.n_whole, "n_ranks": n_ranks}
    save({**counts, "squares": local}, path)


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if is_spread(tensor) else tensor
    return local


def _resume(sums: GradientSums, path: Path, n_ranks: int) -> None:
    state = torch.load(path, weights_only=True, map_location="cpu")
    squares = state.get("squares", {}) if isinstance(state, dict) else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in squares.items()}
    expected = {name: tuple(_local(total).shape) for name, total in sums.squares.items()}
    if shapes != expected or state["n_ranks"] != n_ranks:
        msg = (
            f"{path}: of an interrupted run with other weights or another number of processes; "
            "delete the file to begin anew"
        )
        raise ConfigError(msg)
    for name, total in sums.squares.items():
        _local(total).copy_(squares[name])
    sums.n_samples, sums.n_whole = state["n_samples"], state["n_whole"]
