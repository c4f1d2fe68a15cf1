#pragma once

#include <cstdint>

namespace milpress {

/// SplitMix64 (Steele, Lea, Flood 2014): the standard library's distributions differ between
/// platforms.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  /// In [0, 1).
  double unit() {
    state_ += 0x9e3779b97f4a7c15;
    std::uint64_t bits = state_;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return static_cast<double>((bits ^ bits >> 31) >> 11) * 0x1p-53;
  }

 private:
  std::uint64_t state_;
};

}  // namespace milpress
