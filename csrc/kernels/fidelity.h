#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/half.h"
#include "core/matrix.h"

namespace milpress {

/// How close decoded weights are to their source. Sums are in double and in a fixed order, so they
/// don't depend on the core count; weights that are not finite make them not finite.
struct Fidelity {
  double signal = 0;          // sum of source^2
  double noise = 0;           // sum of (source - decoded)^2
  std::size_t n_outside = 0;  // weights further off than the treatment promises
};

/// Compares `decoded` with `source`; `n_outside` counts weights that differ in any bit.
template <typename T>
Fidelity compare(std::span<const T> source, std::span<const T> decoded);

/// Compares what `dequantize` makes of `codes` with `source`; `n_outside` counts the weights that
/// are not within `half_step_bound`.
template <typename T, typename Code>
Fidelity compare_quantized(MatrixView<const T> source, MatrixView<const Code> codes,
                           std::span<const T> scales, std::span<const Code> offsets);

/// Compares what `lut_to_dense` makes of `codes` with `source`; `n_outside` counts the weights for
/// which another entry of the row's table is nearer. Rows of `luts` ascend.
template <typename T>
Fidelity compare_palette(MatrixView<const T> source, MatrixView<const std::uint8_t> codes,
                         MatrixView<const T> luts);

/// Compares vectors of `dim` weights with the entries of their row's table that `codes` name;
/// `n_outside` counts the vectors to which another entry is nearer, by more than the rounding of
/// sums of `dim` squares in float, and of squares that vanish beside the row's greatest weight.
template <typename T>
Fidelity compare_vectors(MatrixView<const T> source, std::size_t dim,
                         MatrixView<const std::uint8_t> codes, MatrixView<const T> luts);

/// What a pruned weight kept and dropped.
struct SparseFidelity {
  Fidelity fidelity;        // n_outside: stored weights that differ from their source in any bit
  std::size_t n_zeros = 0;  // decoded weights that are zero
  std::size_t n_source_zeros = 0;  // weights of the source that are
  float greatest_pruned = 0;       // magnitude, 0 if nothing was
  float least_kept = 0;            // magnitude of a stored weight, infinite if there is none
};

/// Compares what `expand` makes of `bitmask` and `nonzeros` with `source`.
template <typename T>
SparseFidelity compare_sparse(std::span<const T> source, std::span<const std::uint8_t> bitmask,
                              std::span<const T> nonzeros);

}  // namespace milpress
