#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/check.h"
#include "core/half.h"
#include "kernels/bitmask.h"

namespace milpress {

/// Writes to `bitmask` which weights stay when the `n_zeros` of least magnitude become zero, those
/// that are zero already among them. Of equal magnitudes the earlier go first; NaN counts as
/// greater than any number. Throws `std::invalid_argument` if `n_zeros` exceeds the weights.
template <typename T>
void keep_largest(std::span<const T> weights, std::size_t n_zeros, std::span<std::uint8_t> bitmask);

/// Writes to `bitmask` which weights have a magnitude above `threshold`, which is not negative.
template <typename T>
void keep_above(std::span<const T> weights, T threshold, std::span<std::uint8_t> bitmask);

/// A flat weight seen as `(n_outer, n_channels, n_inner)`: the axis that is pruned, and what lies
/// before and behind it.
struct ChannelShape {
  std::size_t n_outer = 1;
  std::size_t n_channels = 1;
  std::size_t n_inner = 1;
};

/// Writes to `bitmask` which weights stay when, of every `m` consecutive channels, the `n` of least
/// magnitude become zero. Of equal magnitudes the earlier channel goes first; NaN counts as greater
/// than any number.
///
/// Runs start at channel 0 of each outer and inner position. A last run of fewer than `m` channels
/// counts as filled up with zeros, which go before any weight that isn't zero.
template <typename T>
void keep_n_m(std::span<const T> weights, ChannelShape shape, std::size_t n, std::size_t m,
              std::span<std::uint8_t> bitmask);

/// Writes to `bitmask` which weights stay when blocks of `block_size` consecutive channels, each at
/// one outer and one inner position, become zero in the ascending order of their Euclidean norms
/// until the next would make it more than `n_zeros` weights, those that are zero already among
/// them.
///
/// The last block of a column may be shorter. Squares are added up in double, channel by channel.
/// Of equal norms the earlier block goes first, in the order outer, block, inner; a norm of NaN
/// counts as greater than any number. Throws `std::invalid_argument` if `n_zeros` exceeds the
/// weights.
template <typename T>
void keep_blocks(std::span<const T> weights, ChannelShape shape, std::size_t block_size,
                 std::size_t n_zeros, std::span<std::uint8_t> bitmask);

/// The checks of these kernels throw `std::invalid_argument` unless sizes and numbers are as above.
void check_channels(std::size_t n_weights, ChannelShape shape);

template <typename T>
void check_keep_largest(std::span<const T> weights, std::size_t n_zeros,
                        std::span<std::uint8_t> bitmask) {
  check(n_zeros <= weights.size(), "n_zeros must be at most ", weights.size(), ", got ", n_zeros);
  check_bitmask(weights.size(), bitmask.size());
}

template <typename T>
void check_keep_above(std::span<const T> weights, T threshold, std::span<std::uint8_t> bitmask) {
  check(to_float(threshold) >= 0, "threshold must not be negative, got ", to_float(threshold));
  check_bitmask(weights.size(), bitmask.size());
}

template <typename T>
void check_keep_n_m(std::span<const T> weights, ChannelShape shape, std::size_t n, std::size_t m,
                    std::span<std::uint8_t> bitmask) {
  check_channels(weights.size(), shape);
  check_bitmask(weights.size(), bitmask.size());
  check(m > 0 && n <= m, "n must be at most m, and m at least 1, got ", n, " and ", m);
}

}  // namespace milpress
