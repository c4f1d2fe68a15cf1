#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/lut_assign.h"
#include "kernels/vectors.h"

namespace milpress {

/// A few vectors, and what `NearestTwo` finds of them.
struct Batch {
  static constexpr std::size_t kSize = 256;

  explicit Batch(std::size_t dim) : values(dim * kSize), near(dim * kMaxEntries) {}

  std::vector<float> values;         // element d of vector i is `values[d * kSize + i]`
  std::array<float, kSize> known{};  // squared distance from any entry, to look no farther for long

  std::array<std::uint8_t, kSize> codes;  // of the first of the nearest entries
  std::array<float, kSize> distances;     // squared, from that
  std::array<float, kSize> others;        // no other entry is nearer than that, squared

  Entries near;  // scratch
};

/// Compares vectors with entries: codes and distances are those of `nearest_entries`.
class NearestTwo {
 public:
  NearestTwo(const Entries& entries, std::size_t dim);

  /// Of the first `n` vectors of a batch. Those that stand together should be near one another.
  void find(std::size_t n, Batch& batch) const;

 private:
  const Entries& entries_;
  std::size_t dim_;
  std::vector<float> by_element_;
};

/// By how much, relatively, a squared distance in floats, or what is made of it, can be off; ample.
constexpr float distance_slack(std::size_t dim) { return static_cast<float>(dim + 8) * 0x1p-22F; }

/// Entries as a structure of arrays, each `kEntryStride` long, with infinities after the last.
std::vector<float> by_element(const Entries& entries, std::size_t dim);
constexpr std::size_t kEntryStride = kMaxEntries;

}  // namespace milpress
