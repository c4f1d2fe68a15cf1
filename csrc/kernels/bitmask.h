#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace milpress {

/// A bitmask has one bit a weight, least significant bit first, set where a weight is stored. A
/// weight that equals zero never is. Spare bits of the last byte are 0.

/// The number of bits set.
std::size_t count_kept(std::span<const std::uint8_t> bitmask);

/// The number of bits set before each piece of `piece` weights, a multiple of 8.
std::vector<std::size_t> kept_before(std::span<const std::uint8_t> bitmask, std::size_t piece);

/// Writes the weights whose bit is set to `nonzeros`, in order; its size must be their number.
template <typename T>
void compact(std::span<const T> weights, std::span<const std::uint8_t> bitmask,
             std::span<T> nonzeros);

/// The inverse: writes `nonzeros` to the `weights` whose bit is set and zero to the others.
template <typename T>
void expand(std::span<const std::uint8_t> bitmask, std::span<const T> nonzeros,
            std::span<T> weights);

/// The checks of these kernels throw `std::invalid_argument`: unless there is a bit for each
/// weight, unless as many are set as there are non-zeros, and for `expand` unless spare ones are 0.
void check_bitmask(std::size_t n_weights, std::size_t n_bytes);
void check_compact(std::size_t n_weights, std::span<const std::uint8_t> bitmask,
                   std::size_t n_nonzeros);
void check_expand(std::size_t n_weights, std::span<const std::uint8_t> bitmask,
                  std::size_t n_nonzeros);

}  // namespace milpress
