#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/half.h"

namespace milpress {

/// A bitmask has one bit a weight, least significant bit first, set where a weight is stored. A
/// weight that equals zero never is. Spare bits of the last byte are 0.

/// Writes to `bitmask` which weights stay when the `n_zeros` of least magnitude become zero, those
/// that are zero already among them. Of equal magnitudes the earlier go first; NaN counts as
/// greater than any number. Throws `std::invalid_argument` if `n_zeros` exceeds the weights.
template <typename T>
void keep_largest(std::span<const T> weights, std::size_t n_zeros, std::span<std::uint8_t> bitmask);

/// Writes to `bitmask` which weights have a magnitude above `threshold`, which is not negative.
template <typename T>
void keep_above(std::span<const T> weights, T threshold, std::span<std::uint8_t> bitmask);

/// The number of bits set.
std::size_t count_kept(std::span<const std::uint8_t> bitmask);

/// Writes the weights whose bit is set to `nonzeros`, in order; its size must be their number.
template <typename T>
void compact(std::span<const T> weights, std::span<const std::uint8_t> bitmask,
             std::span<T> nonzeros);

/// The inverse: writes `nonzeros` to the `weights` whose bit is set and zero to the others.
template <typename T>
void expand(std::span<const std::uint8_t> bitmask, std::span<const T> nonzeros,
            std::span<T> weights);

}  // namespace milpress
