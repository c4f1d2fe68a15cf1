#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace milpress {

/// Bytes that `n_codes` codes of `bits` bits take.
constexpr std::size_t packed_size(std::size_t n_codes, int bits) {
  return n_codes / 8 * static_cast<std::size_t>(bits) +
         (n_codes % 8 * static_cast<std::size_t>(bits) + 7) / 8;
}

/// Throws `std::invalid_argument` unless there is such a width, and bytes for the codes.
void check_pack(std::size_t n_codes, int bits, std::size_t n_bytes);

/// Writes the low `bits` (1, 2, 3, 4, 6 or 8) bits of each code to `packed`, one after the other in
/// a stream whose first bit is the least significant of the first byte. Spare bits are 0.
void pack(std::span<const std::uint8_t> codes, int bits, std::span<std::uint8_t> packed);

/// The inverse. A signed code is extended from its highest bit (two's complement).
template <typename Code>
void unpack(std::span<const std::uint8_t> packed, int bits, std::span<Code> codes);

}  // namespace milpress
