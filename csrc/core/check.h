#pragma once

#include <sstream>
#include <stdexcept>

namespace milpress {

/// Throws `std::invalid_argument` with the `parts` written one after the other, unless `holds`.
template <typename... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
  }
}

}  // namespace milpress
