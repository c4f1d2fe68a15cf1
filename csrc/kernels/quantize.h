#pragma once

#include <bit>
#include <cstdint>
#include <span>

#include "core/half.h"
#include "core/matrix.h"

namespace milpress {

/// The codes that a block may use, `code_min` to `code_max`, within the range of a byte.
struct CodeRange {
  int code_min = -127;
  int code_max = 127;
};

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
template <typename T, typename Code>
void quantize_mse(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
                  std::span<Code> offsets, MatrixView<Code> codes);

/// Does what `quantize_mse` does, where the squared error of each weight is multiplied by its
/// `importance`: finite, not negative, of the shape of `weights`.
template <typename T, typename Code>
void quantize_mse_weighted(MatrixView<const T> weights, MatrixView<const float> importance,
                           CodeRange range, std::span<T> scales, std::span<Code> offsets,
                           MatrixView<Code> codes);

/// Writes `scale * (code - offset)` to `weights`, rounded to `T` once. One scale a row; one offset
/// a row, or none for zero.
template <typename T, typename Code>
void dequantize(MatrixView<const Code> codes, std::span<const T> scales,
                std::span<const Code> offsets, MatrixView<T> weights);

constexpr float magnitude(float value) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & 0x7fffffffU);
}

/// The largest error that `quantize` promises for `weight` restored as `decoded`: half a step,
/// half a last place of the quotient and of the product, and the spacing of subnormals.
template <typename T>
constexpr float half_step_bound(float weight, float decoded, float scale) {
  constexpr float kHalfPlace = sizeof(T) == 2 ? 0x1.01p-11F : 0x1.01p-24F;
  constexpr float kSubnormal = sizeof(T) == 2 ? 0x1p-25F : 0x1p-149F;
  // Multiplied apart: the sum of two large magnitudes may overflow.
  const float places = kHalfPlace * magnitude(weight) + kHalfPlace * magnitude(decoded);
  return 0.5F * scale + places + kSubnormal;
}

}  // namespace milpress
