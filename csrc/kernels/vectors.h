#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/convert.h"
#include "core/half.h"
#include "core/random.h"

namespace milpress {

// What finding tables for vectors and assigning their entries share.

constexpr std::size_t kLanes = 32;    // vectors handled side by side
constexpr std::size_t kPiece = 8192;  // vectors a thread takes at a time; a multiple of kLanes

/// Vectors as a structure of arrays: element d of vector i is `values[d * stride + i]`. Those past
/// the `count`-th, up to a multiple of kLanes, are zeros without importance.
struct Vectors {
  std::size_t dim;
  std::size_t count;
  std::size_t stride;
  std::vector<float> values;
  std::vector<float> shares;  // importance

  Vectors(std::size_t n_elements, std::size_t n)
      : dim(n_elements),
        count(n),
        stride((n + kLanes - 1) / kLanes * kLanes),
        values(dim * stride),
        shares(stride) {}

  float& at(std::size_t i, std::size_t d) { return values[d * stride + i]; }
  float at(std::size_t i, std::size_t d) const { return values[d * stride + i]; }
};

using Entries = std::vector<float>;  // one after the other, `dim` floats each

/// The squared distances of kLanes vectors from `entry`; `kDim` is 0 if it isn't known.
template <std::size_t kDim>
[[gnu::always_inline]] inline void distances_from(const float* entry, std::size_t dim,
                                                  const float* values, std::size_t stride,
                                                  std::array<float, kLanes>& out) {
  if constexpr (kDim > 0) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float first = values[lane] - entry[0];
      float sum = first * first;
      for (std::size_t d = 1; d < kDim; ++d) {
        const float difference = values[d * stride + lane] - entry[d];
        sum += difference * difference;
      }
      out[lane] = sum;
    }
  } else {
    out.fill(0);
    for (std::size_t d = 0; d < dim; ++d) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        const float difference = values[d * stride + lane] - entry[d];
        out[lane] += difference * difference;
      }
    }
  }
}

/// Writes code and squared distance of the first of the nearest entries; `n` is a multiple of
/// kLanes.
void nearest_entries(const Entries& entries, std::size_t dim, const float* values,
                     std::size_t stride, std::size_t n, std::uint8_t* codes, float* distances);

/// Entries to start from, of vectors not all equal: greedy k-means++ (Arthur, Vassilvitskii 2007),
/// each the best of a few vectors drawn in proportion to their share of the error so far.
Entries random_start(const Vectors& vectors, std::size_t n_entries, Random& random);

/// `vector_assign` of a row whose weights are multiplied by `factor`.
template <typename T>
void assign_row(std::span<const T> weights, std::size_t dim, std::span<const T> lut, float factor,
                std::span<std::uint8_t> codes);

/// The factor by which the greatest magnitude comes near 1.
template <typename T>
float factor_for(std::span<const T> values) {
  float limit = 0;
  for (const T value : values) {
    limit = std::max(limit, std::abs(to_float(value)));
  }
  return factor_to_one(limit);
}

}  // namespace milpress
