#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/half.h"
#include "core/matrix.h"

namespace milpress {

/// Writes to `codes` the index of the entry of the same row of `luts` nearest to each weight.
///
/// A row of `luts` is ascending, 1 to 256 entries, infinite ones allowed. A weight halfway between
/// two entries takes the lower one; NaN takes entry 0. Of equal entries, the weights above them
/// take the last and the others the first. The result does not depend on the core count.
template <typename T>
void lut_assign(MatrixView<const T> weights, MatrixView<const T> luts,
                MatrixView<std::uint8_t> codes);

/// Writes to `weights` the entry of the same row of `luts` that each code names.
///
/// Throws `std::invalid_argument` if a code is not below the number of entries.
template <typename T>
void lut_to_dense(MatrixView<const std::uint8_t> codes, MatrixView<const T> luts,
                  MatrixView<T> weights);

/// Entries of a table that `names_nearest` takes.
constexpr std::size_t kMaxFewEntries = 16;

/// Whether each code is what `lut_assign` writes for its weight. `lut` is ascending and has up to
/// `kMaxFewEntries` entries; codes are below their number.
bool names_nearest(std::span<const Half> weights, std::span<const Half> lut,
                   std::span<const std::uint8_t> codes);

/// The greatest of `codes`, 0 if there are none.
std::uint8_t greatest_code(std::span<const std::uint8_t> codes);

/// For each pair of neighbours in `lut`, the largest float that is not nearer to the upper one. A
/// weight's nearest entry is the number of midpoints below it.
std::vector<float> midpoint_table(std::span<const float> lut);

}  // namespace milpress
