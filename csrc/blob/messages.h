#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/matrix.h"

namespace milpress {

/// Counts the messages of each kind in the bytes of a protobuf message, without building any.
///
/// `kinds` has a row for each kind of message, that of the whole first, and a column for each field
/// number. Its entry is 0 for a field that is not counted; k + 1 for one that holds a message of
/// the kind in row k, or, where k is the number of rows, what is counted and not entered, such as a
/// name in a list. Returns a count for each row and, last, that of what is not entered.
///
/// Nothing in `data` is trusted. Throws `std::invalid_argument` where it breaks the wire format or
/// nests messages deeper than 100 levels.
std::vector<std::uint64_t> count_messages(std::span<const std::uint8_t> data,
                                          MatrixView<const std::uint8_t> kinds);

}  // namespace milpress
