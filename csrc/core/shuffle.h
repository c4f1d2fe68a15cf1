#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"

namespace milpress {

/// Elements rearranged 16 bytes at a time by the processor's table lookup. Each function has a
/// plain twin, fallback and oracle.

/// What `compact_eights` may write, and `expand_eights` read, behind the last element.
constexpr std::size_t kShuffleSlack = 8;

/// Writes to `out` the weights whose bit is set, in order; returns how many those are. Each byte of
/// `mask` stands for eight weights, least significant bit first.
template <typename T>
std::size_t compact_eights(const T* weights, const std::uint8_t* mask, std::size_t n_bytes, T* out);

/// The inverse: writes the next of `values` where a bit is set and zero elsewhere; returns how many
/// values were taken.
template <typename T>
std::size_t expand_eights(const T* values, const std::uint8_t* mask, std::size_t n_bytes, T* out);

/// Entries of a table that `look_up_sixteen` takes.
constexpr std::size_t kShuffleEntries = 16;

/// Writes `lut[codes[i]]`; codes are below 16.
void look_up_sixteen(const Half* lut, const std::uint8_t* codes, std::size_t n, Half* out);

template <typename T>
std::size_t compact_eights_plain(const T* weights, const std::uint8_t* mask, std::size_t n_bytes,
                                 T* out);
template <typename T>
std::size_t expand_eights_plain(const T* values, const std::uint8_t* mask, std::size_t n_bytes,
                                T* out);
void look_up_sixteen_plain(const Half* lut, const std::uint8_t* codes, std::size_t n, Half* out);

}  // namespace milpress
