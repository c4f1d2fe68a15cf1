#include "kernels/vector_assign.h"

#include <algorithm>
#include <array>
#include <limits>
#include <span>
#include <vector>

#include "core/parallel.h"
#include "core/vectorize.h"
#include "kernels/vectors.h"

namespace milpress {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Entries are compared a few at a time, so that what is nearest so far stays in registers;
// infinities make up the last few and are nearest to nothing.
template <std::size_t kDim>
[[gnu::always_inline]] inline void find_nearest(const Entries& entries, const float* values,
                                                std::size_t stride, std::size_t n,
                                                std::uint8_t* codes, float* distances) {
  constexpr std::size_t kAtOnce = kDim == 4 ? 4 : 2;  // as the registers allow
  std::array<float, kMaxEntries * kDim> padded;
  padded.fill(kInfinity);
  std::copy(entries.begin(), entries.end(), padded.begin());
  for (std::size_t i = 0; i < n; i += kLanes) {
    std::array<float, kLanes> least;
    std::array<std::int32_t, kLanes> nearest{};
    least.fill(kInfinity);
    for (std::size_t j = 0; j * kDim < entries.size(); j += kAtOnce) {
      const float* const few = padded.data() + j * kDim;
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        for (std::size_t other = 0; other < kAtOnce; ++other) {
          const float* const entry = few + other * kDim;
          const float first = values[i + lane] - entry[0];
          float distance = first * first;
          for (std::size_t d = 1; d < kDim; ++d) {
            const float difference = values[d * stride + i + lane] - entry[d];
            distance += difference * difference;
          }
          const bool is_nearer = distance < least[lane];
          least[lane] = is_nearer ? distance : least[lane];
          nearest[lane] = is_nearer ? static_cast<std::int32_t>(j + other) : nearest[lane];
        }
      }
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      codes[i + lane] = static_cast<std::uint8_t>(nearest[lane]);
      distances[i + lane] = least[lane];
    }
  }
}

// The same for vectors of any dimension.
[[gnu::always_inline]] inline void find_nearest_one_by_one(const Entries& entries, std::size_t dim,
                                                           const float* values, std::size_t stride,
                                                           std::size_t n, std::uint8_t* codes,
                                                           float* distances) {
  for (std::size_t i = 0; i < n; i += kLanes) {
    std::array<float, kLanes> distance;
    std::array<float, kLanes> least;
    std::array<std::int32_t, kLanes> nearest{};
    least.fill(kInfinity);
    for (std::size_t j = 0; j * dim < entries.size(); ++j) {
      distances_from<0>(entries.data() + j * dim, dim, values + i, stride, distance);
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        const bool is_nearer = distance[lane] < least[lane];
        least[lane] = is_nearer ? distance[lane] : least[lane];
        nearest[lane] = is_nearer ? static_cast<std::int32_t>(j) : nearest[lane];
      }
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      codes[i + lane] = static_cast<std::uint8_t>(nearest[lane]);
      distances[i + lane] = least[lane];
    }
  }
}

}  // namespace

MILPRESS_VECTORIZE
void nearest_entries(const Entries& entries, std::size_t dim, const float* values,
                     std::size_t stride, std::size_t n, std::uint8_t* codes, float* distances) {
  switch (dim) {
    case 1:
      return find_nearest<1>(entries, values, stride, n, codes, distances);
    case 2:
      return find_nearest<2>(entries, values, stride, n, codes, distances);
    case 3:
      return find_nearest<3>(entries, values, stride, n, codes, distances);
    case 4:
      return find_nearest<4>(entries, values, stride, n, codes, distances);
    case 8:
      return find_nearest<8>(entries, values, stride, n, codes, distances);
    default:
      return find_nearest_one_by_one(entries, dim, values, stride, n, codes, distances);
  }
}

template <typename T>
void assign_row(std::span<const T> weights, std::size_t dim, std::span<const T> lut, float factor,
                std::span<std::uint8_t> codes) {
  Entries entries(lut.size());
  std::transform(lut.begin(), lut.end(), entries.begin(),
                 [factor](T entry) { return to_float(entry) * factor; });
  parallel_for(codes.size(), kPiece, [&](std::size_t begin, std::size_t end) {
    Vectors vectors(dim, end - begin);
    for (std::size_t i = begin; i < end; ++i) {
      for (std::size_t d = 0; d < dim; ++d) {
        vectors.at(i - begin, d) = to_float(weights[i * dim + d]) * factor;
      }
    }
    std::vector<std::uint8_t> nearest(vectors.stride);
    std::vector<float> distances(vectors.stride);
    nearest_entries(entries, dim, vectors.values.data(), vectors.stride, vectors.stride,
                    nearest.data(), distances.data());
    std::copy_n(nearest.begin(), end - begin, codes.begin() + static_cast<std::ptrdiff_t>(begin));
  });
}

template <typename T>
void vector_assign(MatrixView<const T> weights, std::size_t dim, MatrixView<const T> luts,
                   MatrixView<std::uint8_t> codes) {
  check_vectors(weights, dim, luts.n_rows, luts.n_cols, codes);
  for (std::size_t row = 0; row < weights.n_rows; ++row) {
    const std::span<const T> in = weights.row(row);
    assign_row<T>(in, dim, luts.row(row), factor_for(in), codes.row(row));
  }
}

#define MILPRESS_INSTANTIATE(T)                                                        \
  template void assign_row(std::span<const T>, std::size_t, std::span<const T>, float, \
                           std::span<std::uint8_t>);                                   \
  template void vector_assign(MatrixView<const T>, std::size_t, MatrixView<const T>,   \
                              MatrixView<std::uint8_t>);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress
