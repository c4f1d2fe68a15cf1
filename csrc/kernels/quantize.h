#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "core/half.h"
#include "core/matrix.h"
#include "kernels/linear_step.h"

namespace milpress {

/// Writes to `codes` each weight divided by the scale of its row, rounded half to even, plus the
/// offset of its row, so that `scale * (code - offset)` restores the weight within half a step
/// (plus the rounding of quotient and product to `T`).
///
/// The range of a row is symmetric about zero and the offset the middle of `range` if `offsets` is
/// empty; otherwise the range runs from the least to the greatest weight, widened to hold zero,
/// and `offsets` receives the code of zero. `Code` is `std::int8_t` or `std::uint8_t`.
///
/// Every step is rounded to `T`, as coremltools 9.0 computes, wherever that keeps the extremes of
/// the row within half a step and finite; elsewhere (range above the largest half, scale below the
/// smallest) the nearest scale that does is taken and the quotient is not rounded to `T`. A row of
/// zeros gets scale 1 and codes at the offset; a row with a weight that is not finite gets a scale
/// of NaN, by which the caller knows it, and codes within the range.
template <typename T, typename Code>
void quantize(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
              std::span<Code> offsets, MatrixView<Code> codes);

/// Writes codes like `quantize`, but for the scale, and the offset if there is one, that were found
/// to restore the row with the least squared error: extremes that few weights reach may be clipped.
///
/// Tried are ranges from a little wider than the weights' own down to two fifths of it, with an
/// offset also with ends that shrink apart, the best of them refined by least squares, and what
/// `quantize` takes; so the error is never above that of `quantize`. A symmetric range of signed
/// codes that reaches further down than up is tried with negative scales too, so that the greatest
/// magnitude may take `code_min` whatever its sign. Quotients are not rounded to `T`. Rows of zeros
/// and rows that are not finite fare as with `quantize`; every other decodes to finite weights.
///
/// The squared error of each weight is multiplied by its `importance`: finite, not negative, of the
/// shape of `weights`, or no rows at all for equal importance.
template <typename T, typename Code>
void quantize_mse(MatrixView<const T> weights, MatrixView<const float> importance, CodeRange range,
                  std::span<T> scales, std::span<Code> offsets, MatrixView<Code> codes);

/// Writes `scale * (code - offset)` to `weights`, rounded to `T` once. One scale a row; one offset
/// a row, or none for zero.
template <typename T, typename Code>
void dequantize(MatrixView<const Code> codes, std::span<const T> scales,
                std::span<const Code> offsets, MatrixView<T> weights);

/// Throws `std::invalid_argument` unless there is one scale a row, and one offset or none at all.
void check_steps(std::size_t n_rows, std::size_t n_scales, std::size_t n_offsets);

/// Throws `std::invalid_argument` unless range and shapes are those that `quantize` takes.
template <typename T, typename Code>
void check_quantize(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
                    std::span<Code> offsets, MatrixView<Code> codes) {
  check(range.code_min < range.code_max && range.code_min >= std::numeric_limits<Code>::min() &&
            range.code_max <= std::numeric_limits<Code>::max(),
        "code range must ascend within a byte, got ", range.code_min, " to ", range.code_max);
  check_steps(weights.n_rows, scales.size(), offsets.size());
  check_shape("codes", codes, "weights", weights.n_rows, weights.n_cols);
}

}  // namespace milpress
