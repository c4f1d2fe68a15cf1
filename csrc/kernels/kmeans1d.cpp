#include "kernels/kmeans1d.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/parallel.h"
#include "kernels/clusters1d.h"
#include "kernels/value_buckets.h"
#include "kernels/value_counts.h"

namespace milpress {
namespace {

constexpr std::size_t kGrain = 65'536;  // weights a thread takes at a time, in whole rows

// `value` rounded once to the nearest `T`.
template <typename T>
float nearest(double value) {
  return static_cast<float>(value);
}

template <>
float nearest<Half>(double value) {
  // Rounded to odd, a float still tells a tie between halves from its neighbourhood.
  auto rounded = static_cast<float>(value);
  if (rounded != value) {
    rounded = std::abs(rounded) > std::abs(value) ? std::nextafter(rounded, 0.0F) : rounded;
    rounded = std::bit_cast<float>(std::bit_cast<std::uint32_t>(rounded) | 1U);
  }
  return round_to<Half>(rounded);
}

// Neither the rounded mean of the weights nearest to an entry nor the entry nearest to a weight can
// raise the error, so taking turns is never worse than rounding the means once. Returns nothing
// if a border meets a clump, which it may have to cut.
template <typename T>
std::optional<std::vector<float>> rounded_entries(const WeightedValues& data,
                                                  std::vector<std::size_t> ends) {
  constexpr int kMaxTurns = 100;
  std::vector<float> entries(ends.size());
  std::vector<std::size_t> before(ends.size());
  for (int turn = 0; turn < kMaxTurns && ends != before; ++turn) {
    for (std::size_t j = 0; j < ends.size(); ++j) {
      const std::size_t begin = j == 0 ? 0 : ends[j - 1];
      const bool changed = ends[j] != before[j] || (j > 0 && begin != before[j - 1]);
      if (changed && begin < ends[j]) {
        entries[j] = nearest<T>(mean_of(data, begin, ends[j]));
      }
    }
    before = ends;
    for (std::size_t j = 0; j + 1 < ends.size(); ++j) {
      const double midpoint = (double{entries[j]} + entries[j + 1]) / 2;
      ends[j] =
          std::upper_bound(data.values.begin(), data.values.end(), midpoint) - data.values.begin();
      if ((ends[j] > 0 && data.spread(ends[j] - 1) > 0) ||
          (ends[j] < data.values.size() && data.spread(ends[j]) > 0)) {
        return std::nullopt;
      }
    }
  }
  return entries;
}

// The number of buckets that makes about as much work as the values that are left to be sorted; 0
// if it is less work to sort all of them.
std::size_t n_buckets(std::size_t n_weights, std::size_t k) {
  constexpr std::size_t kMost = std::size_t{1} << 20;
  constexpr double kOpen = 14;  // times k^1.5 / buckets is the share to be sorted of normal data
  constexpr double kMostOpen = 0.25;
  constexpr std::size_t kLeastFill = 4;
  const double open = kOpen * static_cast<double>(k) * std::sqrt(static_cast<double>(k));
  const double ideal = std::sqrt(open * static_cast<double>(n_weights));
  const std::size_t n = std::min(std::bit_ceil(static_cast<std::size_t>(ideal)), kMost);
  const bool pays = n * kLeastFill <= n_weights && open <= kMostOpen * static_cast<double>(n);
  return pays ? n : 0;
}

std::optional<std::vector<float>> entries_from_buckets(std::span<const float> weights,
                                                       std::span<const float> importance,
                                                       std::size_t k, ClusterSearch& search) {
  const std::size_t n = n_buckets(weights.size(), k);
  if (n == 0) {
    return std::nullopt;
  }
  const ValueBuckets buckets(weights, importance, n);
  if (buckets.clumps().values.empty()) {
    return std::nullopt;
  }
  const Outline outline = search.outline(buckets.clumps(), k, buckets.range());
  const WeightedValues data = buckets.opened(outline.may_be_cut);
  return rounded_entries<float>(data, search.best(data, k, outline.penalty));
}

// Halves have few distinct values, which are counted in less time.
std::optional<std::vector<float>> entries_from_buckets(std::span<const Half>,
                                                       std::span<const float>, std::size_t,
                                                       ClusterSearch&) {
  return std::nullopt;
}

template <typename T>
std::vector<float> entries_from_values(std::span<const T> weights,
                                       std::span<const float> importance, std::size_t k,
                                       DistinctValues& values, ClusterSearch& search) {
  WeightedValues data = values.of(weights, importance);
  if (data.values.empty()) {
    data = values.of(weights, {});
  }
  return *rounded_entries<T>(data, search.best(data, k));
}

template <typename T>
void fit_row(std::span<const T> weights, std::span<const float> importance, std::span<T> lut,
             DistinctValues& values, ClusterSearch& search) {
  check_importance(importance);
  std::optional<std::vector<float>> found =
      entries_from_buckets(weights, importance, lut.size(), search);
  std::vector<float> entries =
      found ? *std::move(found)
            : entries_from_values(weights, importance, lut.size(), values, search);
  entries.resize(lut.size(), entries.empty() ? 0.0F : entries.back());
  std::transform(entries.begin(), entries.end(), lut.begin(), from_float<T>);
}

}  // namespace

void check_importance(std::span<const float> importance) {
  check(std::all_of(
            importance.begin(), importance.end(),
            [](float share) { return share >= 0 && share <= std::numeric_limits<float>::max(); }),
        "importance must be finite and not negative");
}

template <typename T>
void kmeans1d(MatrixView<const T> weights, MatrixView<const float> importance, MatrixView<T> luts) {
  check_kmeans1d(weights, importance, luts);
  const std::size_t rows = kGrain / std::max<std::size_t>(1, weights.n_cols);
  parallel_for(weights.n_rows, rows, [&](std::size_t begin, std::size_t end) {
    DistinctValues values;
    ClusterSearch search;
    for (std::size_t row = begin; row < end; ++row) {
      fit_row(weights.row(row),
              importance.n_rows == 0 ? std::span<const float>() : importance.row(row),
              luts.row(row), values, search);
    }
  });
}

template void kmeans1d(MatrixView<const Half>, MatrixView<const float>, MatrixView<Half>);
template void kmeans1d(MatrixView<const float>, MatrixView<const float>, MatrixView<float>);

}  // namespace milpress
