"""What coremltools' configs ask for each weight, in milpress' own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from milpress.compression.requests import Request, settled_request
from milpress.compression.settling import Asked, settle
from milpress.coreml.op_config import (
    CompressionGranularity,
    OpCompressorConfig,
    OpLinearQuantizerConfig,
    OpPalettizerConfig,
    OpThresholdPrunerConfig,
)
from milpress.coreml.optimization_config import OptimizationConfig, advice
from milpress.errors import CompressionError, UnsupportedError
from milpress.formats import (
    Blocks,
    Custom,
    Granularity,
    KMeans,
    PalettizeConfig,
    PerBlock,
    PerChannel,
    PerTensor,
    PruneConfig,
    QuantizeConfig,
    Table,
    Treatment,
    Uniform,
    Unique,
)
from milpress.formats.palette import Bits
from milpress.formats.quantized import IntDType
from milpress.mil.opset import Opset
from milpress.mil.program import Weight

_SINCE = (
    "{} is supported since iOS18. Please re-convert your model with minimum_deployment_target "
    "set to at least ct.target.iOS18."
)
_NEEDS = {
    "blocks": "The per_block quantization",
    "4 bits": "The 4-bit quantization",
    "groups of channels": "The per_grouped_channel palettization",
    "vectors": "The vector palettization",
    "3 bits": "The 3-bit palettization",
    "scales of channels": "Palettization with per-channel-scale",
}

# Like coremltools, whatever the size of a group or block: 0 makes it a whole axis.
_GRANULARITY_NEEDS: dict[Any, str] = {
    CompressionGranularity.PER_GROUPED_CHANNEL: "groups of channels",
    CompressionGranularity.PER_BLOCK: "blocks",
}


class UnsupportedCombinationError(UnsupportedError, NotImplementedError):
    """A combination of settings that has no meaning in Core ML."""


def joint_needs_ios18() -> CompressionError:
    """Return the error that says that joint compression takes an iOS18 model."""
    return UnsupportedError(_SINCE.format("Joint compression").replace("is supp", "is only supp"))


@dataclass(frozen=True, slots=True)
class ConfigRequests:
    """What an `OptimizationConfig` asks for.

    Like coremltools, it compresses a weight even if that makes it larger.
    """

    config: OptimizationConfig
    joint: bool
    seed: int = 0
    may_grow: bool = True

    def request(self, weight: Weight) -> Request:
        """Return what the configs that hold for the weight ask for."""
        name = weight.node.op_name
        children = [(use.node.op_name, use.node.op.type) for use in weight.node.uses]
        configs = self.config.configs_for(name, children)
        requests = [self._request(weight, config) for config in configs]
        asked = [request.for_size(weight.size) for request in requests]
        if len(set(asked)) < 2:
            return _of_alike(requests)
        by = [f"{kind} {op_name}" for op_name, kind in children]
        settled = settle(weight, list(map(Asked, by, asked)))
        other = next(i for i, treatments in enumerate(asked) if treatments != asked[0])
        conflict = self.config.conflict(name, children, 0, other)
        compressing = [
            (request, treatments)
            for request, treatments in zip(requests, asked, strict=True)
            if treatments
        ]
        winners = [request for request, t in compressing if t == settled.treatments]
        winner = _of_alike(winners) if winners else None
        return settled_request(compressing[0][0], winner, settled.note, conflict)

    def _request(self, weight: Weight, config: OpCompressorConfig | None) -> Request:
        """Return what one config asks for a weight."""
        if config is None:
            return Request()
        if isinstance(config, OpPalettizerConfig):
            treatment: Treatment = _palettize(config, self.seed)
        elif isinstance(config, OpLinearQuantizerConfig):
            treatment = _quantize(config)
            self._check_table(weight, treatment)
        else:
            treatment = _prune(config)
        return Request(
            treatments=(treatment,),
            min_size=config.weight_threshold + 1,
            on_indivisible=getattr(config, "on_indivisible", "leave"),
            reason=self._reason(weight, config),
            needs=_GRANULARITY_NEEDS.get(getattr(config, "granularity", None), ""),
        )

    def too_early(
        self,
        name: str,  # noqa: ARG002
        treatment: Treatment,  # noqa: ARG002
        needs: str,
        current: Opset,  # noqa: ARG002
    ) -> CompressionError:
        """Return coremltools' error for a treatment that takes an iOS18 model."""
        if needs not in _NEEDS:
            return joint_needs_ios18()
        return UnsupportedError(_SINCE.format(_NEEDS[needs]))

    def advice(self, weights: Sequence[Weight]) -> str:
        """Return the configs that say what holds for weights by their names."""
        return advice(list(dict.fromkeys(weight.node.op_name for weight in weights)))

    def _reason(self, weight: Weight, config: OpCompressorConfig) -> str:
        """Return why blocks or runs of channels can't be pruned here; empty if they can."""
        uses = weight.node.uses
        if all(config.supports(use.node.op.type, use.parameter) for use in uses):
            return ""
        if self.config.is_explicit(weight.node.op_name):
            return ""
        return "blocks and n:m are pruned in the weights of conv and linear only"

    def _check_table(self, weight: Weight, treatment: QuantizeConfig) -> None:
        is_palette = any("_lut_to_" in kind for kind in weight.decoded_by)
        if self.joint and is_palette and not isinstance(treatment.granularity, PerTensor):
            msg = (
                f"{weight.name}: When use joint compression for palettization-quantization, "
                "please make sure to use per-tensor quantization"
            )
            raise UnsupportedCombinationError(msg)


def _of_alike(requests: Sequence[Request]) -> Request:
    """Return one of requests that come to the same, which says what any of them says."""
    request = next((request for request in requests if request.treatments), Request())
    is_left = any(each.treatments and each.on_indivisible == "leave" for each in requests)
    return replace(request, on_indivisible="leave") if is_left else request


def _palettize(config: OpPalettizerConfig, seed: int) -> PalettizeConfig:
    tables: dict[str, Table] = {"KMEANS": KMeans(seed), "UNIFORM": Uniform(), "UNIQUE": Unique()}
    if config.lut_function is not None:
        tables["CUSTOM"] = Custom(config.lut_function)
    in_groups = config.granularity is CompressionGranularity.PER_GROUPED_CHANNEL
    return PalettizeConfig(
        bits=cast("Bits | None", config.nbits),
        group_size=(config.group_size or None) if in_groups else None,
        channel_axis=config.channel_axis if in_groups else None,
        vector_size=config.cluster_dim,
        channel_scale=config.enable_per_channel_scale,
        table=tables[config.mode],
    )


def _quantize(config: OpLinearQuantizerConfig) -> QuantizeConfig:
    granularity: Granularity = PerChannel()
    if config.granularity is CompressionGranularity.PER_TENSOR:
        granularity = PerTensor()
    elif config.granularity is CompressionGranularity.PER_BLOCK:
        size = config.block_size
        if not isinstance(size, int):
            granularity = Blocks(tuple(size))
        elif size > 0:
            granularity = PerBlock(size)
    return QuantizeConfig(
        dtype=cast("IntDType", config.dtype),
        granularity=granularity,
        offset=config.mode == "LINEAR",
        range=config.range,
    )


def _prune(config: Any) -> PruneConfig:
    if isinstance(config, OpThresholdPrunerConfig):
        return PruneConfig(
            threshold=config.threshold, min_sparsity=config.minimum_sparsity_percentile
        )
    return PruneConfig(
        sparsity=config.target_sparsity,
        n_m=config.n_m_ratio,
        block_size=config.block_size,
        axis=config.dim,
    )
