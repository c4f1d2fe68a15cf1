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
from milpress.torch.palettization._tensor_file import TensorFile

LossFunction: TypeAlias = Callable[[nn.Module, Any], torch.Tensor]

_LEAST = 1e-12
_N_SAVES = 8  # along a run that can be resumed


@dataclass(slots=True)
class GradientSums(Mapping[str, torch.Tensor]):
    """Sums of squared gradients, by the names of weights, in a file.

    Parameters
    ----------
    weights
        The weights.
    squares
        For each of them, of its shape, or that of this process' part of it.
    n_samples
        How many samples were seen, by all processes together.
    n_whole
        How many of them were batches that could not be split.
    notes
        What the report is to say.
    kept
        The file they are in along the way; to be deleted once what is made of them is safe.
    """

    weights: Mapping[str, nn.Parameter]
    squares: TensorFile
    n_samples: int = 0
    n_whole: int = 0
    notes: list[str] = field(default_factory=list)
    kept: Path | None = None

    @classmethod
    def create(cls, path: Path, weights: Mapping[str, nn.Parameter]) -> GradientSums:
        """Make a file of sums that are zero."""
        shapes = {name: tuple(_local(weight).shape) for name, weight in weights.items()}
        return cls(weights, TensorFile.create(path, shapes))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the sums of a weight, of all processes together."""
        weight = self.weights[name]
        if not is_spread(weight):
            return self.squares[name]
        total = torch.zeros_like(weight, dtype=torch.float32).detach()
        _local(total).copy_(self.squares[name])
        return whole(total)

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @torch.no_grad()
    def add(self, name: str, weight: Any) -> None:
        """Add the square of a weight's gradient, and drop the gradient."""
        gradient: Any = weight.grad
        weight.grad = None
        if gradient is None:
            return
        if is_spread(gradient):
            gradient = gradient.redistribute(placements=weight.placements).to_local()
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        gradient = gradient.float().cpu()
        self.squares[name] = self.squares[name].addcmul_(gradient, gradient)

    def add_up(self) -> None:
        """Add the sums of all processes."""
        for name, weight in self.weights.items():
            total = self.squares[name].to(weight.device)
            distributed.all_reduce(total)
            self.squares[name] = total.cpu()

    def keep(self, n_ranks: int) -> None:
        """Copy the sums to where they are kept."""
        if self.kept is None:
            return
        counts = {"n_samples": self.n_samples, "n_whole": self.n_whole, "n_ranks": n_ranks}
        with draft_in_place_of(self.kept) as draft:
            copy = TensorFile.create(
                draft, self.squares.shapes, lambda tensors: {**counts, "squares": tensors}
            )
            for name in self.squares:
                copy[name] = self.squares[name]

    def resume(self, n_ranks: int) -> None:
        """Go on from the sums that are kept, if any are.

        Raises
        ------
        ConfigError
            If they are of other weights or another number of processes, or no sums.
        """
        if self.kept is None or not self.kept.exists():
            return
        state = _loaded(self.kept)
        squares = state.get("squares") if isinstance(state, dict) else None
        squares = squares if isinstance(squares, dict) else {}
        shapes = {name: tuple(tensor.shape) for name, tensor in squares.items()}
        if shapes != self.squares.shapes or state["n_ranks"] != n_ranks:
            msg = (
                f"{self.kept}: of an interrupted run with other weights or another number of "
                "processes; delete the file to begin anew"
            )
            raise ConfigError(msg)
        kept = TensorFile(self.kept, shapes)
        for name in kept:
            self.squares[name] = kept[name]
        self.n_samples, self.n_whole = state["n_samples"], state["n_whole"]


def sum_squared_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    dataloader: Iterable[Any],
    loss_fn: LossFunction,
    file: Path,
    *,
    n_samples: int,
    per_sample: bool,
    path: Path | None = None,
    progress: Progress | bool | None = None,
) -> GradientSums:
    """Sum the squares of the gradients that samples give.

    The model is in evaluation mode meanwhile; its gradients, flags and modes are as before
    afterwards. Memory holds the gradient and the sums of one weight at a time. In a process group,
    each process takes its share of the samples, or, if the model is sharded, its share of all.

    Parameters
    ----------
    model, weights
        The model, and what of it to differentiate by, also if it is frozen.
    dataloader, n_samples
        Batches, and where to stop. Every process gives the same ones.
    loss_fn
        Takes the model and a batch, returns the loss.
    file
        Where to have the sums; each process in a file of its own.
    per_sample
        Whether batches are split into samples.
    path
        The file that the sums are kept beside along the way; if a run was interrupted, go on from
        there.
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
    sums = GradientSums.create(file, weights)
    if path is not None:
        sums.kept = path.with_name(f"{path.name}.partial{rank or ''}")
    sums.resume(n_ranks)
    save_every = max(1, n_samples // _N_SAVES)
    seen = 0
    with (
        shown(None if rank else progress) as note,
        _prepared(model, weights),
        _squaring(sums),
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
            if seen % save_every == 0:
                sums.keep(n_ranks)
        note(seen, seen, "")
    if seen == 0:
        msg = "dataloader gives no sample"
        raise ConfigError(msg)
    if n_ranks > 1 and not sharded:
        sums.add_up()
    if sums.n_whole and per_sample:
        sums.notes.append(
            f"{sums.n_whole} of {sums.n_samples} batches were used as given: "
            "their tensors don't share their first dimension"
        )
    return sums


def normalized(values: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return sensitivities from 0 to 1, none of them 0, and whether the loss depends on any.

    Where it does not, all are 1.
    """
    greatest = values.max()
    if greatest == 0:
        return torch.ones_like(values), False
    values = values / greatest
    least = torch.where(values > 0, values, 1.0).min()
    return values.clamp_(min=max(float(least), _LEAST)), True


class Saved(Mapping[str, torch.Tensor]):
    """Sensitivities in a file, of which memory holds those of one weight at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._names = list(load(path))

    def __getitem__(self, name: str) -> torch.Tensor:
        return load(self._path)[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return sensitivities from a file; they stay there until they are used.

    Raises
    ------
    ConfigError
        If it is no file of named tensors.
    """
    sensitivities = _loaded(path)
    if not isinstance(sensitivities, dict) or not all(map(torch.is_tensor, sensitivities.values())):
        kind = type(sensitivities).__name__
        msg = f"{path}: sensitivities must be a dictionary of tensors, got {kind}"
        raise ConfigTypeError(msg)
    return sensitivities


def save(sums: GradientSums, path: Path) -> None:
    """Write the sensitivities that sums amount to, one weight after the other."""
    shapes = {name: tuple(weight.shape) for name, weight in sums.weights.items()}
    with draft_in_place_of(path) as draft:
        file = TensorFile.create(draft, shapes)
        for name in sums:
            file[name] = normalized(sums[name])[0]


def _loaded(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:
        msg = f"{path}: sensitivities must be a dictionary of tensors that torch saved, got {error}"
        raise ConfigError(msg) from error


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

    def sample(i: int) -> Any:
        return _changed(batch, lambda tensor: tensor[i : i + 1])

    return None if size is None else [sample(i) for i in range(size)]


def moved(batch: Any, device: str | torch.device) -> Any:
    """Return a batch with its tensors on a device."""
    return _changed(batch, lambda tensor: tensor.to(device))


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)


def _changed(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a batch of the same kind with each of its tensors changed."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    kind: Any = type(batch)
    if isinstance(batch, Mapping):
        return kind({key: _changed(item, change) for key, item in batch.items()})
    if isinstance(batch, (tuple, list)):
        items = [_changed(item, change) for item in batch]
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
def _squaring(sums: GradientSums) -> Iterator[None]:
    """Add the square of each gradient to its sum as soon as it is complete."""
    with contextlib.ExitStack() as stack:
        for name, weight in sums.weights.items():
            hook = partial(sums.add, name)
            stack.enter_context(weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        yield


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if is_spread(tensor) else tensor
    return local
