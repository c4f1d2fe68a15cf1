#pragma once

#include <span>

#include "kernels/linear_step.h"

namespace milpress {

/// The step that was found to restore a row with the least squared error, each weight's multiplied
/// by its `importance` unless that is empty; `plain` if none is better. See `quantize_mse`.
///
/// `extremes` are those of the row, finite and not both zero.
template <typename T>
Step search_range(std::span<const T> row, std::span<const float> importance, Extremes extremes,
                  CodeRange range, bool fitted_offset, const Step& plain);

}  // namespace milpress
