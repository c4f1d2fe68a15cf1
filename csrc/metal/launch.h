#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "../../metal/params.h"
#include "metal/runtime.h"

namespace milpress::metal {

// What the kernels' hosts share.

constexpr std::size_t kSimdWidth = 32;
constexpr std::size_t kMaxElements = std::size_t{1} << 31;  // a thread's place has 32 bits

/// A size as kernels take it.
inline std::uint32_t narrow(std::size_t n) {
  if (n >= kMaxElements) {
    throw DeviceError("a weight must have fewer than 2^31 elements for the GPU, got " +
                      std::to_string(n));
  }
  return static_cast<std::uint32_t>(n);
}

/// The name of a kernel for weights of a type.
template <typename T>
std::string name_of(const char* kernel) {
  return std::string(kernel) + (sizeof(T) == 2 ? "_half" : "_float");
}

template <typename T>
void copy_out(const Buffer& buffer, std::span<T> out) {
  const std::span<const T> contents = buffer.as<const T>(out.size());
  std::copy(contents.begin(), contents.end(), out.begin());
}

}  // namespace milpress::metal
