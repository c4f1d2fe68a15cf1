#pragma once

#include <cstddef>
#include <span>

#include "core/half.h"

namespace milpress {

/// The position of the first weight that is NaN or infinite; the number of weights if none is.
template <typename T>
std::size_t first_nonfinite(std::span<const T> weights);

}  // namespace milpress
