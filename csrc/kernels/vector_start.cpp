#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "core/lanes.h"
#include "core/random.h"
#include "core/vectorize.h"
#include "kernels/vectors.h"

namespace milpress {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <std::size_t kDim>
[[gnu::always_inline]] inline double lower_distances(const Vectors& vectors, const float* entry,
                                                     std::span<const float> before, float* after,
                                                     double* sums) {
  double total = 0;
  for (std::size_t i = 0; i < vectors.stride; i += kLanes) {
    std::array<float, kLanes> distance;
    distances_from<kDim>(entry, vectors.dim, vectors.values.data() + i, vectors.stride, distance);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      distance[lane] = before[i + lane] < distance[lane] ? before[i + lane] : distance[lane];
    }
    if (after != nullptr) {
      std::copy(distance.begin(), distance.end(), after + i);
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      distance[lane] *= vectors.shares[i + lane];
    }
    const float sum = sum_lanes(distance);
    if (sums != nullptr) {
      sums[i / kLanes] = sum;
    }
    total += sum;
  }
  return total;
}

// The error if `entry` joins those that are `before` away. Writes distances to `after`, and the
// error of every kLanes vectors to `sums`, unless these are null.
MILPRESS_VECTORIZE
double error_with(const Vectors& vectors, const float* entry, std::span<const float> before,
                  float* after, double* sums) {
  switch (vectors.dim) {
    case 2:
      return lower_distances<2>(vectors, entry, before, after, sums);
    case 4:
      return lower_distances<4>(vectors, entry, before, after, sums);
    case 8:
      return lower_distances<8>(vectors, entry, before, after, sums);
    default:
      return lower_distances<0>(vectors, entry, before, after, sums);
  }
}

// The vector at `place`, in [0, 1), of the error that `sums` cut into kLanes vectors each.
std::size_t draw(double place, double total, std::span<const double> sums,
                 std::span<const float> distances, std::span<const float> shares) {
  double left = place * total;
  std::size_t last = 0;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    if (sums[i] > 0) {
      last = i;
      if (left < sums[i]) {
        break;
      }
      left -= sums[i];
    }
  }
  std::size_t drawn = last * kLanes;
  for (std::size_t i = last * kLanes; i < (last + 1) * kLanes; ++i) {
    const double part = double{distances[i]} * shares[i];
    if (part > 0) {
      drawn = i;
      if (left < part) {
        break;
      }
      left -= part;
    }
  }
  return drawn;
}

}  // namespace

Entries random_start(const Vectors& vectors, std::size_t n_entries, Random& random) {
  const std::size_t dim = vectors.dim;
  std::size_t n_draws = 2;
  for (std::size_t n = n_entries; n > 2; n = n * 3 / 8) {
    ++n_draws;  // about 2 + log(n_entries)
  }
  const auto entry_at = [&](std::size_t i) {
    Entries entry(dim);
    for (std::size_t d = 0; d < dim; ++d) {
      entry[d] = vectors.at(i, d);
    }
    return entry;
  };
  // For the first entry all vectors are equally far.
  std::vector<float> distances(vectors.stride, 1.0F);
  std::vector<double> sums(vectors.stride / kLanes);
  double total = 0;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const auto first = vectors.shares.begin() + static_cast<std::ptrdiff_t>(i * kLanes);
    sums[i] = std::accumulate(first, first + kLanes, 0.0);
    total += sums[i];
  }
  Entries entries = entry_at(draw(random.unit(), total, sums, distances, vectors.shares));
  std::fill(distances.begin(), distances.end(), kInfinity);
  total = error_with(vectors, entries.data(), distances, distances.data(), sums.data());
  while (entries.size() < n_entries * dim && total > 0) {
    Entries best;
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < n_draws; ++i) {
      Entries entry = entry_at(draw(random.unit(), total, sums, distances, vectors.shares));
      const double error = error_with(vectors, entry.data(), distances, nullptr, nullptr);
      if (error < least) {
        least = error;
        best = std::move(entry);
      }
    }
    if (best.empty()) {
      break;
    }
    entries.insert(entries.end(), best.begin(), best.end());
    total = error_with(vectors, best.data(), distances, distances.data(), sums.data());
  }
  // Distances too small for a float leave some over.
  while (entries.size() < n_entries * dim) {
    entries.push_back(entries[entries.size() - dim]);
  }
  return entries;
}

}  // namespace milpress
