"""Proof: the bytes of a compressed package against those of its source."""

from __future__ import annotations

import contextlib
import filecmp
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from milpress import _core
from milpress._parallel import in_order
from milpress.errors import VerificationError
from milpress.formats import Compressed, Masked, Palette, Quantized, Sparse
from milpress.formats._layout import to_rows
from milpress.formats.sparse import n_pruned
from milpress.mil import activations, opset, treatments, values
from milpress.mil.constexpr import Decoder, is_compressed, is_constexpr
from milpress.mil.package import Package, system_errors
from milpress.mil.program import Graph, Node, Scope
from milpress.mil.treatments import Promise, Records, Step, bias_digest, promise_of
from milpress.mil.weights import Site, sites, weight_files
from milpress.report import decibels, escaped, human_snr, named_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCheck:
    """What was found of one weight that is stored otherwise than in the source.

    Parameters
    ----------
    name
        Name of the weight in the source.
    promise
        What was checked of every element: ``nearest`` (each index names the nearest entry of its
        table), ``half_step`` (each element within half a step), ``pruned`` (zeros exactly where
        pruned, the rest equal), ``equal`` (same value, stored otherwise), or ``none``.
    snr_db
        Signal-to-noise ratio.
    signal, noise
        Sums of squares of source and error.
    """

    name: str
    promise: str
    signal: float
    noise: float

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB, infinite where the weight is equal."""
        return decibels(self.signal, self.noise) or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` found: every weight that is stored otherwise, and how much is unchanged.

    Parameters
    ----------
    weights
        The weights that are stored otherwise, in the order of the graph.
    n_unchanged
        Stored values that are the same, byte for byte.
    n_corrected
        Biases that were to be corrected, and are as recorded.
    n_quantized
        Quantized activations: pairs of ops that one package has beyond the other, as recorded.
    """

    weights: tuple[WeightCheck, ...]
    n_unchanged: int
    n_corrected: int = 0
    n_quantized: int = 0

    @property
    def signal(self) -> float:
        """Sum of squares of the source's weights."""
        return sum(check.signal for check in self.weights)

    @property
    def noise(self) -> float:
        """Sum of squares of the errors."""
        return sum(check.noise for check in self.weights)

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio of all weights together."""
        return decibels(self.signal, self.noise) if self.weights else None

    @property
    def summary(self) -> str:
        """One line."""
        snr = "" if self.snr_db is None else f", SNR {human_snr(self.snr_db)} dB"
        pairs = f"; {self.n_quantized} quantized activations" if self.n_quantized else ""
        biases = f"; {self.n_corrected} biases corrected" if self.n_corrected else ""
        return (
            f"verified: {len(self.weights)} weights decoded{snr}{pairs}{biases}; "
            f"{self.n_unchanged} stored values and the graph unchanged"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON can hold them."""
        return {
            "version": 1,
            "n_unchanged": self.n_unchanged,
            "n_corrected": self.n_corrected,
            "n_quantized": self.n_quantized,
            "weights": [
                {
                    "name": check.name,
                    "promise": check.promise,
                    "snr_db": "inf" if check.noise == 0 else check.snr_db,
                }
                for check in self.weights
            ],
        }

    def __rich__(self) -> Table:
        """Return the weights as a table."""
        table = named_table("weight", "checked")
        table.add_column("SNR dB", justify="right")
        for check in self.weights:
            table.add_row(escaped(check.name), check.promise, human_snr(check.snr_db))
        return table


def verify(original: str | os.PathLike[str], compressed: str | os.PathLike[str]) -> Verification:
    """Compare a compressed package with its source, from the bytes of both.

    Parameters
    ----------
    original, compressed
        Paths of the two packages. Either may be the compressed one.

    Returns
    -------
    Verification
        The weights that are stored otherwise, each with its signal-to-noise ratio.

    Raises
    ------
    VerificationError
        If the graph differs by more than compressed weights, something that was not treated
        changed, or a weight does not keep what its treatment promises.
    PackageError
        If one of them is damaged.
    """
    return compare_packages(Package(original), Package(compressed))


def compare_packages(original: Package, compressed: Package) -> Verification:
    """Do what `verify` does. The original's programs are raised to the other's opset in memory."""
    _compare_files(original, compressed)
    records = treatments.read(compressed.model)
    before = treatments.read(original.model)
    _raise_like(original, compressed)
    n_pairs = _without_pairs(original, compressed)
    _compare_rest(original, compressed)
    checks: list[WeightCheck] = []
    n_unchanged = n_corrected = 0
    pairs = _paired(list(sites(original)), list(sites(compressed)), "blocks of functions")
    for left, right in pairs:
        comparison = _Comparison(left, right, original, compressed, records, before)
        checks.extend(comparison.run())
        n_unchanged += comparison.n_unchanged
        n_corrected += comparison.n_corrected
    checked = {check.name for check in checks}
    for source, record in records.by_source.items():
        known = before.by_source.get(source)
        named = source if known is None else known.result
        if record != known and named not in checked:
            _fail(f"{named}: the weight must be compressed as recorded, got it unchanged")
    n_recorded = len(records.biases.items() - before.biases.items())
    if n_corrected != n_recorded:
        _fail(f"{n_recorded} layers must have a corrected bias as recorded, got {n_corrected}")
    return Verification(
        weights=tuple(checks),
        n_unchanged=n_unchanged,
        n_corrected=n_corrected,
        n_quantized=n_pairs,
    )


def _without_pairs(original: Package, compressed: Package) -> int:
    """Take out of one model, in memory, the recorded pairs that the other does not have.

    Returns how many quantized activations these were.
    """
    records = [activations.read(package.model).pairs for package in (original, compressed)]
    n_pairs = 0
    for package, mine, other in zip((original, compressed), records, records[::-1], strict=True):
        pairs = {name: codes for name, codes in mine.items() if name not in other}
        found = (
            [name for site in sites(package) for name, _ in activations.strip(site, pairs, package)]
            if pairs
            else []
        )
        missing = sorted(pairs.keys() - set(found))
        if missing:
            _fail(f"{missing[0]}: the model must have this dequantize, as recorded, got none")
        n_pairs += len(found)
    return n_pairs


def _fail(message: str) -> NoReturn:
    raise VerificationError(message)


def _paired(left: list[Any], right: list[Any], what: str) -> Iterator[tuple[Any, Any]]:
    if len(left) != len(right):
        _fail(f"the packages must have equally many {what}, got {len(left)} and {len(right)}")
    return zip(left, right, strict=True)


def _compare_files(original: Package, compressed: Package) -> None:
    """Check that all but the model and the weight files is the same, byte for byte."""
    listed = []
    for package in (original, compressed):
        replaced = {package.weight_path(name) for name in weight_files(package)}
        replaced.add(package.model_path)
        with system_errors(package.path):
            files = {
                path.relative_to(package.path)
                for path in package.path.rglob("*")
                if not path.is_dir() and path not in replaced
            }
        listed.append(files)
    weight_paths = {
        original.weight_path(name).relative_to(original.path) for name in weight_files(original)
    }
    for path in sorted(listed[0] ^ listed[1]):
        if path not in weight_paths:
            _fail(f"{path}: both packages must have this file, got one without")
    for path in sorted(listed[0] & listed[1]):
        with system_errors(original.path / path):
            if not filecmp.cmp(original.path / path, compressed.path / path, shallow=False):
                _fail(f"{path}: the file must be unchanged, got another")


def _raise_like(original: Package, compressed: Package) -> None:
    for left, right in _paired(list(original.programs), list(compressed.programs), "ML programs"):
        if left.place != right.place or list(left.functions) != list(right.functions):
            _fail("the packages must have the same models and functions, got others")
        for name, function in left.functions.items():
            target = opset.by_name(right.functions[name].opset)
            if target > opset.by_name(function.opset):
                opset.raise_to(left.model, function, target, original)
    root = compressed.model.specificationVersion
    if original.model.specificationVersion < root:
        original.model.specificationVersion = min(
            root,
            max(program.model.specificationVersion for program in original.programs),
        )


def _compare_rest(original: Package, compressed: Package) -> None:
    """Check that models and functions agree in all but their blocks."""
    stripped = []
    for package in (original, compressed):
        model = type(package.model)()
        model.CopyFrom(package.model)
        treatments.forget(model)
        activations.forget(model)
        _strip(model)
        stripped.append(model.SerializeToString(deterministic=True))
    if stripped[0] != stripped[1]:
        _fail("the description of the model must be unchanged, got another")


def _strip(model: Any) -> None:
    kind = model.WhichOneof("choice")
    if kind == "mlProgram":
        for function in model.mlProgram.functions.values():
            for block in function.block_specializations.values():
                del block.operations[:]
                del block.outputs[:]
    elif kind is not None:
        pipeline = model.pipeline if kind == "pipeline" else getattr(model, kind).pipeline
        for part in pipeline.models:
            _strip(part)


class _Comparison:
    """Compares one block of a function, nested blocks included, with its counterpart.

    Ops that compute must be the same one by one; what they use is compared by who makes it. Stored
    values are matched through the ops that use them.
    """

    def __init__(
        self,
        left: Site,
        right: Site,
        original: Package,
        compressed: Package,
        records: Records,
        before: Records,
    ) -> None:
        self._prefix = left.prefix
        self._graphs = (left.graph, right.graph)
        self._packages = (original, compressed)
        self._decoders = (Decoder(left.graph, original), Decoder(right.graph, compressed))
        self._records = records
        self._before = before
        self._matches: dict[Node, Node] = {}
        self._sources: dict[Node, Node] = {}
        self._biases: set[Node] = set()
        self.n_unchanged = 0
        self.n_corrected = 0

    def run(self) -> list[WeightCheck]:
        left, right = self._graphs
        for one, other in _paired(left.scopes, right.scopes, "blocks"):
            self._match_blocks(one, other)
        computing = [[n for n in graph.nodes if not n.is_stored] for graph in self._graphs]
        for one, other in _paired(computing[0], computing[1], "ops"):
            self.n_unchanged += self._match_ops(one, other)
        self._match_unused(left, right)
        to_check = self._matches.keys() - self._biases
        pairs = [(node, self._matches[node]) for node in left.nodes if node in to_check]
        checks = in_order(lambda pair: self._check_stored(*pair), pairs)
        with contextlib.closing(checks):
            found = list(checks)
        self.n_unchanged += sum(check for check in found if isinstance(check, int))
        return [check for check in found if isinstance(check, WeightCheck)]

    def _match_blocks(self, one: Scope, other: Scope) -> None:
        if one.block is None or other.block is None:
            return
        same = [
            [item.SerializeToString(deterministic=True) for item in scope.block.inputs]
            + [
                f"{key}={value.SerializeToString(deterministic=True)!r}".encode()
                for key, value in sorted(scope.block.attributes.items())
            ]
            for scope in (one, other)
        ]
        if same[0] != same[1]:
            _fail("a block must keep its inputs and attributes, got others")
        for name, other_name in _paired(
            list(one.block.outputs), list(other.block.outputs), "outputs of a block"
        ):
            self._match_names(name, one, other_name, other, "a block's output")

    def _match_names(
        self, name: str, scope: Scope, other_name: str, other_scope: Scope, where: str
    ) -> None:
        found, other_found = scope.find(name), other_scope.find(other_name)
        node = None if found is None else found[0]
        other = None if other_found is None else other_found[0]
        if node is not None and other is not None and node.is_stored and other.is_stored:
            same = self._matches.setdefault(node, other) is other
            if not same or self._sources.setdefault(other, node) is not node:
                _fail(f"{where}: {name} must have one counterpart, got {other_name} as another")
        elif name != other_name or (node is None) != (other is None):
            _fail(f"{where} must use {name}, got {other_name}")

    def _match_ops(self, one: Node, other: Node) -> int:
        """Check that two ops are the same; return how many values they hold."""
        n_values = 0
        where = f"{self._prefix}{one.name}"
        kept = [self._kept_parts(node) for node in (one, other)]
        keys = [set(node.op.inputs) for node in (one, other)]
        digest = self._records.biases.get(where)
        if digest is not None and digest != self._before.biases.get(where):
            self._check_bias(one, other, digest)
            keys = [key - {"bias"} for key in keys]
        if kept[0] != kept[1] or keys[0] != keys[1]:
            _fail(f"{where}: the op {one.op.type} must be unchanged, got another")
        for key in sorted(set(one.op.attributes) | set(other.op.attributes)):
            if key not in one.op.attributes or key not in other.op.attributes:
                _fail(f"{where}: the attribute {key} must be unchanged")
            self._same_value(one.op.attributes[key], other.op.attributes[key], where)
            n_values += 1
        for key in sorted(keys[0]):
            bindings = _paired(
                list(one.op.inputs[key].arguments),
                list(other.op.inputs[key].arguments),
                f"values of {key}",
            )
            for binding, other_binding in bindings:
                kinds = binding.WhichOneof("choice"), other_binding.WhichOneof("choice")
                if kinds == ("name", "name"):
                    self._match_names(
                        binding.name, one.scope, other_binding.name, other.scope, where
                    )
                elif kinds == ("value", "value"):
                    self._same_value(binding.value, other_binding.value, where)
                    n_values += 1
                else:
                    _fail(f"{where}: {key} must be given in the same way")
        return n_values

    def _check_bias(self, one: Node, other: Node, digest: str) -> None:
        """Check that a layer's bias is as recorded, and that no other op uses it."""
        where = f"{self._prefix}{one.name}"
        before, after = (
            graph.producer(node, "bias")
            for graph, node in zip(self._graphs, (one, other), strict=True)
        )
        if after is None or after[0].op.type != "const":
            _fail(f"{where}: the corrected bias must be a constant, got another")
        node = after[0]
        tensor = self._decoders[1].dense(node)
        if bias_digest(tensor.values) != digest:
            _fail(f"{where}: the corrected bias must be as recorded, got another")
        if before is not None and before[0].type != node.type:
            _fail(f"{where}: the corrected bias must be {before[0].type}, got {node.type}")
        if len(node.uses) != 1 or node.is_block_output:
            _fail(f"{where}: the corrected bias must be used once, got {len(node.uses)} uses")
        self._biases.add(node)
        if before is not None and before[0].name == node.name:
            self._biases.add(before[0])
            self._matches[before[0]] = node
        self.n_corrected += 1

    def _kept_parts(self, node: Node) -> list[Any]:
        outputs = [item.SerializeToString(deterministic=True) for item in node.op.outputs]
        return [node.op.type, outputs, len(node.op.blocks)]

    def _same_value(self, one: Any, other: Any, where: str) -> None:
        if not values.is_blob(one) or not values.is_blob(other):
            same = one.SerializeToString(deterministic=True) == other.SerializeToString(
                deterministic=True
            )
        else:
            types = [value.type.SerializeToString(deterministic=True) for value in (one, other)]
            payloads = [
                values.read_payload(value, package)
                for value, package in zip((one, other), self._packages, strict=True)
            ]
            same = types[0] == types[1] and np.array_equal(payloads[0], payloads[1])
        if not same:
            _fail(f"{where}: a value that was not treated must be unchanged, got another")

    def _match_unused(self, left: Graph, right: Graph) -> None:
        """Match what no computing op uses by name, and refuse what has no counterpart."""
        reached = {id(node) for node in self._matches.values()}
        for node in list(self._matches.values()):
            reached.update(id(part) for part in self._parts(node, 1))
        reached.update(id(node) for node in self._biases)
        by_name = {
            node.name: node for node in right.nodes if node.is_stored and id(node) not in reached
        }
        own = {id(part) for node in self._matches for part in self._parts(node, 0)}
        for node in left.nodes:
            if node.is_stored and node not in self._matches and id(node) not in own:
                other = by_name.pop(node.name, None)
                if other is None:
                    _fail(f"{self._prefix}{node.name}: the value must be kept, got none")
                else:
                    self._matches[node] = other
        for name in by_name:
            _fail(f"{self._prefix}{name}: no value must be added, got this one")

    def _parts(self, node: Node, side: int) -> Iterator[Node]:
        """Yield the stored ops that an op decodes from."""
        for key in sorted(node.op.inputs):
            found = self._graphs[side].producer(node, key)
            if found is not None:
                yield found[0]
                yield from self._parts(found[0], side)

    def _check_stored(self, one: Node, other: Node) -> WeightCheck | int:
        """Return what was found of a weight, or how many values are unchanged."""
        name = f"{self._prefix}{one.name}"
        before, steps = self._steps(name)
        if is_constexpr(one) == is_constexpr(other) and not (is_constexpr(one) and steps):
            return self._check_unchanged(one, other, name)
        if one.type != other.type:
            _fail(f"{name}: the decoded weight must be {one.type}, got {other.type}")
        source = self._decoders[0].dense(one).values
        if not is_constexpr(other):
            return self._check_equal(source, other, name)
        if not self._records.by_source:
            return self._check_unpromised(source, other, name)
        if not steps:
            _fail(f"{name}: a weight that was not treated must be unchanged, got another")
        promise = promise_of(steps)
        was_pruned = len(before) == 1 and "prune" in before[0]
        if is_compressed(one, self._graphs[0]) and not was_pruned:
            promise = "none"
        return self._check_promise(source, other, name, promise, steps)

    def _steps(self, name: str) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
        """Return what had been done to a weight of the source, and what was done beyond that."""
        known = self._before.find(name)
        before = () if known is None else known[1].steps
        record = self._records.by_source.get(name if known is None else known[0])
        if record is None:
            return before, ()
        if record.steps[: len(before)] != before:
            _fail(f"{name}: the record must go on where that of the source ends, got another")
        return before, record.steps[len(before) :]

    def _check_unchanged(self, one: Node, other: Node, name: str) -> int:
        if one.op.type != other.op.type or one.name != other.name or one.type != other.type:
            _fail(f"{name}: a value that was not treated must be unchanged, got another")
        parts = _paired(list(self._parts(one, 0)), list(self._parts(other, 1)), f"parts of {name}")
        return self._match_ops(one, other) + sum(
            self._match_ops(part, other_part) for part, other_part in parts
        )

    def _check_equal(self, source: Any, other: Node, name: str) -> WeightCheck:
        decoded = self._decoders[1].dense(other).values
        if source.dtype != decoded.dtype or source.tobytes() != decoded.tobytes():
            _fail(f"{name}: the decompressed weight must be equal, got another")
        signal, noise, _ = _core.compare(source.reshape(-1), source.reshape(-1))
        return WeightCheck(name=name, promise="equal", signal=signal, noise=noise)

    def _check_unpromised(self, source: Any, other: Node, name: str) -> WeightCheck:
        decoded = self._decoders[1].dense(other).values
        signal, noise, _ = _core.compare(source.reshape(-1), decoded.reshape(-1))
        return WeightCheck(name=name, promise="none", signal=signal, noise=noise)

    def _check_promise(
        self, source: Any, other: Node, name: str, promise: Promise, steps: tuple[Step, ...]
    ) -> WeightCheck:
        value = self._decoders[1].value(other)
        if value is None:
            _fail(f"{name}: the weight must be compressed as recorded, got {other.op.type}")
        if promise == "none":
            check = self._check_unpromised(source, other, name)
            signal, noise, wrong = check.signal, check.noise, ""
        else:
            signal, noise, wrong = _judge(source, value, promise, steps)
        if wrong:
            _fail(f"{name}: {wrong}")
        return WeightCheck(name=name, promise=promise, signal=signal, noise=noise)


def _judge(
    source: Any, value: Compressed, promise: Promise, steps: tuple[Step, ...]
) -> tuple[float, float, str]:
    """Return signal, noise, and in words which promise is broken, if one is."""
    if isinstance(value, Masked):
        return _judge_masked(source, value, promise, steps)
    if isinstance(value, Palette) and promise == "nearest" and value.vector_size > 1:
        signal, noise, n_outside = _core.compare_vectors(
            value.vector_rows(source), value.vector_size, *value.rows()
        )
        wrong = f"{n_outside} indices don't name the nearest vector of their table"
        return signal, noise, wrong if n_outside else ""
    if isinstance(value, Palette) and promise == "nearest":
        codes, luts = value.rows()
        if (np.diff(luts.astype(np.float32), axis=1) < 0).any():
            return 0.0, 0.0, "a table must ascend, got one that does not"
        signal, noise, n_outside = _core.compare_palette(
            to_rows(source, value.group_shape), codes, luts
        )
        wrong = f"{n_outside} indices don't name the nearest entry of their table"
        return signal, noise, wrong if n_outside else ""
    if isinstance(value, Quantized) and promise == "half_step":
        signal, noise, n_outside = _core.compare_quantized(
            to_rows(source, value.block_shape), *value.rows()
        )
        wrong = f"{n_outside} weights are more than half a step off"
        return signal, noise, wrong if n_outside else ""
    if isinstance(value, Sparse) and promise == "pruned":
        settings = steps[-1].get("prune", {})
        flat = source.reshape(-1)
        return _judge_sparse(flat, value.bitmask, value.nonzeros, settings)
    return 0.0, 0.0, f"the weight must be compressed as recorded, got {type(value).__name__}"


def _judge_masked(
    source: Any, value: Masked, promise: Promise, steps: tuple[Step, ...]
) -> tuple[float, float, str]:
    """Judge the mask as of a pruned weight, and the codes as if nothing had been pruned.

    Outside the mask the source is taken to be what the code there, 0, stands for.
    """
    kept = value.mask()
    inner = value.value
    signal, noise, _ = _core.compare(source.reshape(-1), value.dense().reshape(-1))
    if "prune" in steps[0]:
        nonzeros = np.ascontiguousarray(source[kept])
        bitmask = _core.pack(kept.view(np.uint8).reshape(-1), 1)
        _, _, wrong = _judge_sparse(source.reshape(-1), bitmask, nonzeros, steps[0]["prune"])
        if wrong:
            return signal, noise, wrong
    elif (source[~kept] != 0).any():
        return signal, noise, "weights that were not zero are dropped"
    _, _, wrong = _judge(np.where(kept, source, inner.dense()), inner, promise, steps)
    return signal, noise, wrong


def _judge_sparse(
    flat: Any, bitmask: Any, nonzeros: Any, settings: dict[str, Any]
) -> tuple[float, float, str]:
    signal, noise, n_changed, n_zeros, n_zeros_before, greatest_pruned, least_kept = (
        _core.compare_sparse(flat, bitmask, nonzeros)
    )
    if n_changed:
        return signal, noise, f"{n_changed} weights that were not pruned are changed"
    if settings.keys() & {"n_m", "block_size"}:
        return signal, noise, ""
    if greatest_pruned > least_kept:
        return signal, noise, f"{greatest_pruned} was pruned, {least_kept} was not"
    if "sparsity" in settings:
        expected = max(n_pruned(flat.size, settings["sparsity"]), n_zeros_before)
        if n_zeros != expected:
            return signal, noise, f"{expected} weights must be zero, got {n_zeros}"
    if "threshold" in settings:
        limit = float(flat.dtype.type(settings["threshold"]))
        if greatest_pruned > limit or least_kept <= limit:
            return signal, noise, f"weights up to {limit} must be zero, and no others"
    return signal, noise, ""
