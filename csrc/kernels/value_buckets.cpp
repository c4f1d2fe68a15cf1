#include "kernels/value_buckets.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "core/keys.h"
#include "core/parallel.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kPiece = std::size_t{1} << 20;  // weights a thread takes at a time
constexpr std::size_t kMaxPieces = 16;
constexpr std::size_t kChunk = 1024;

// Sums of the values of a bucket, counted from a point in it so that nothing cancels.
struct Bucket {
  double weight = 0;
  double first = 0;
  double second = 0;
  double origin = 0;
};

// From 0 to 1.
inline float farness_of(float width, float distance) { return 1 - width / (width + distance); }

// Every step rounds, and none changes the order: a difference, a sum, a quotient of positive
// numbers, a product with one.
inline std::int32_t bucket_of(const BucketScale& scale, float value) {
  const float distance = value - scale.centre;
  const float farness = farness_of(scale.width, std::abs(distance));
  const auto steps = std::min(static_cast<std::int32_t>(farness * scale.n_steps), scale.n_half - 1);
  return scale.n_half + (distance < 0 ? -1 - steps : steps);
}

MILPRESS_VECTORIZE void find_buckets(const BucketScale& scale, const float* values, std::size_t n,
                                     std::int32_t* buckets) {
  const BucketScale local = scale;  // which no store to a bucket can change
  for (std::size_t i = 0; i < n; ++i) {
    buckets[i] = bucket_of(local, values[i]);
  }
}

struct Range {
  std::int32_t least = std::numeric_limits<std::int32_t>::max();  // order keys
  std::int32_t greatest = std::numeric_limits<std::int32_t>::min();
};

MILPRESS_VECTORIZE Range range_of(const float* values, std::size_t n) {
  auto [least, greatest] = Range();
  for (std::size_t i = 0; i < n; ++i) {
    const std::int32_t key = order_key(values[i]);
    least = key < least ? key : least;
    greatest = key > greatest ? key : greatest;
  }
  return {least, greatest};
}

// The middle of a sample, and the width that suits the distances of its members from there.
BucketScale fitting_scale(std::span<const float> weights, std::span<const float> importance,
                          float least, float greatest, std::size_t n_buckets) {
  constexpr std::size_t kSample = 512;
  constexpr float kWidth = 4;  // times the median distance; leaves the least open in normal data
  constexpr float kMinWidth = std::numeric_limits<float>::min();
  constexpr float kMaxWidth = 0x1p120F;
  std::vector<float> sample;
  for (std::size_t i = 0; i < weights.size(); i += weights.size() / kSample + 1) {
    if (importance.empty() || importance[i] > 0) {
      sample.push_back(weights[i]);
    }
  }
  sample.resize(std::max<std::size_t>(1, sample.size()));
  const auto middle = sample.begin() + static_cast<std::ptrdiff_t>(sample.size() / 2);
  std::nth_element(sample.begin(), middle, sample.end());
  BucketScale scale;
  scale.centre = *middle;
  for (float& value : sample) {
    value = std::abs(value - scale.centre);
  }
  std::nth_element(sample.begin(), middle, sample.end());
  scale.width = std::clamp(kWidth * *middle, kMinWidth, kMaxWidth);
  scale.n_half = static_cast<std::int32_t>(n_buckets / 2);
  const float farthest = std::max(greatest - scale.centre, scale.centre - least);
  scale.n_steps =
      static_cast<float>(scale.n_half) /
      std::max(farness_of(scale.width, farthest), std::numeric_limits<float>::epsilon());
  return scale;
}

// A point in the middle of a bucket.
double origin_of(const BucketScale& scale, std::size_t bucket) {
  const double steps = static_cast<double>(bucket) + 0.5 - scale.n_half;
  const double farness = std::min(std::abs(steps) / scale.n_steps, 1 - 0x1p-24);
  return scale.centre + std::copysign(scale.width * farness / (1 - farness), steps);
}

WeightedValues with_room(std::size_t n) {
  WeightedValues data;
  data.values.reserve(n);
  data.weights.reserve(n);
  data.spreads.reserve(n);
  return data;
}

void append(WeightedValues& data, double value, double weight, double spread) {
  data.values.push_back(value);
  data.weights.push_back(weight);
  data.spreads.push_back(spread);
}

// Makes the last clump of `data` hold another one as well, which is above it.
void merge(WeightedValues& data, double value, double weight, double spread) {
  double& mean = data.values.back();
  double& total = data.weights.back();
  const double gap = value - mean;
  const double both = total + weight;
  data.spreads.back() += spread + total * (weight / both) * gap * gap;
  // Counted from the heavier mean, or a light one far away would round it off.
  mean = total < weight ? value - gap * (total / both) : mean + gap * (weight / both);
  total = both;
}

// Empty if `elements` are.
template <typename T>
std::span<T> part_of(std::span<T> elements, std::size_t begin, std::size_t end) {
  return elements.empty() ? elements : elements.subspan(begin, end - begin);
}

std::size_t piece_length(std::size_t n) { return std::max(kPiece, n / kMaxPieces + 1); }

Range range_of(std::span<const float> weights) {
  Range range;
  for (const Range& piece : parallel_map(weights.size(), piece_length(weights.size()),
                                         [&](std::size_t begin, std::size_t end) {
                                           return range_of(weights.data() + begin, end - begin);
                                         })) {
    range.least = std::min(range.least, piece.least);
    range.greatest = std::max(range.greatest, piece.greatest);
  }
  return range;
}

// Adds values to their buckets, which begin with that of index `first`.
void fill(const BucketScale& scale, std::span<const float> weights,
          std::span<const float> importance, std::size_t first, std::span<Bucket> buckets) {
  std::array<std::int32_t, kChunk> places;
  for (std::size_t begin = 0; begin < weights.size(); begin += kChunk) {
    const std::size_t n = std::min(kChunk, weights.size() - begin);
    find_buckets(scale, weights.data() + begin, n, places.data());
    for (std::size_t i = 0; i < n; ++i) {
      Bucket& bucket = buckets[static_cast<std::size_t>(places[i]) - first];
      const double share = importance.empty() ? 1 : importance[begin + i];
      const double distance = weights[begin + i] - bucket.origin;
      bucket.weight += share;
      bucket.first += share * distance;
      bucket.second += share * distance * distance;
    }
  }
}

// Pieces of the row have buckets of their own, which are added up in one order.
void fill_by_pieces(const BucketScale& scale, std::span<const float> weights,
                    std::span<const float> importance, std::span<Bucket> buckets) {
  const auto filled = [&](std::size_t begin, std::size_t end) {
    std::vector<Bucket> part(buckets.begin(), buckets.end());
    fill(scale, part_of(weights, begin, end), part_of(importance, begin, end), 0, part);
    return part;
  };
  for (const auto& part : parallel_map(weights.size(), piece_length(weights.size()), filled)) {
    for (std::size_t i = 0; i < buckets.size(); ++i) {
      buckets[i].weight += part[i].weight;
      buckets[i].first += part[i].first;
      buckets[i].second += part[i].second;
    }
  }
}

// Values are brought together first by groups of buckets that fit in a cache, in the order of the
// row.
void fill_by_groups(const BucketScale& scale, std::span<const float> weights,
                    std::span<const float> importance, std::span<Bucket> buckets) {
  constexpr std::size_t kGroups = 256;
  using Positions = std::array<std::size_t, kGroups>;
  const std::size_t group_size = std::bit_ceil((buckets.size() + kGroups - 1) / kGroups);
  const int shift = std::countr_zero(group_size);
  const std::size_t length = piece_length(weights.size());
  const auto each = [&](std::size_t first, std::size_t last, const auto& act) {
    std::array<std::int32_t, kChunk> places;
    for (std::size_t begin = first; begin < last; begin += kChunk) {
      const std::size_t n = std::min(kChunk, last - begin);
      find_buckets(scale, weights.data() + begin, n, places.data());
      for (std::size_t i = 0; i < n; ++i) {
        act(static_cast<std::size_t>(places[i]) >> shift, begin + i);
      }
    }
  };
  std::vector<Positions> positions =
      parallel_map(weights.size(), length, [&](std::size_t begin, std::size_t end) {
        Positions counts{};
        each(begin, end, [&](std::size_t group, std::size_t) { ++counts[group]; });
        return counts;
      });
  Positions ends;
  std::size_t next = 0;
  for (std::size_t group = 0; group < kGroups; ++group) {
    for (Positions& piece : positions) {
      next += std::exchange(piece[group], next);
    }
    ends[group] = next;
  }
  std::vector<float> grouped(weights.size());
  std::vector<float> grouped_importance(importance.size());
  parallel_for(weights.size(), length, [&](std::size_t begin, std::size_t end) {
    Positions& position = positions[begin / length];
    each(begin, end, [&](std::size_t group, std::size_t i) {
      const std::size_t place = position[group]++;
      grouped[place] = weights[i];
      if (!importance.empty()) {
        grouped_importance[place] = importance[i];
      }
    });
  });
  parallel_for(kGroups, 1, [&](std::size_t group, std::size_t) {
    const std::size_t begin = group == 0 ? 0 : ends[group - 1];
    const std::size_t first = std::min(group * group_size, buckets.size());
    fill(scale, part_of(std::span<const float>(grouped), begin, ends[group]),
         part_of(std::span<const float>(grouped_importance), begin, ends[group]), first,
         part_of(buckets, first, std::min(first + group_size, buckets.size())));
  });
}

std::vector<Bucket> filled_buckets(const BucketScale& scale, std::span<const float> weights,
                                   std::span<const float> importance) {
  constexpr std::size_t kCached = std::size_t{1} << 14;  // buckets
  std::vector<Bucket> buckets(2 * static_cast<std::size_t>(scale.n_half));
  for (std::size_t i = 0; i < buckets.size(); ++i) {
    buckets[i].origin = origin_of(scale, i);
  }
  const auto fill_all = buckets.size() <= kCached ? fill_by_pieces : fill_by_groups;
  fill_all(scale, weights, importance, buckets);
  return buckets;
}

struct Taken {
  std::vector<float> values;
  std::vector<float> importance;

  void append(const Taken& more) {
    values.insert(values.end(), more.values.begin(), more.values.end());
    importance.insert(importance.end(), more.importance.begin(), more.importance.end());
  }
};

// The values whose buckets `takes` marks, in their order in the row.
Taken taken(const BucketScale& scale, std::span<const float> weights,
            std::span<const float> importance, std::span<const std::uint8_t> takes) {
  const auto take = [&](std::size_t first, std::size_t last) {
    Taken result;
    std::array<std::int32_t, kChunk> buckets;
    std::array<std::uint16_t, kChunk> places;
    for (std::size_t begin = first; begin < last; begin += kChunk) {
      const std::size_t n = std::min(kChunk, last - begin);
      find_buckets(scale, weights.data() + begin, n, buckets.data());
      std::size_t n_taken = 0;
      for (std::size_t i = 0; i < n; ++i) {
        places[n_taken] = static_cast<std::uint16_t>(i);
        n_taken += takes[static_cast<std::size_t>(buckets[i])];
      }
      for (std::size_t i = 0; i < n_taken; ++i) {
        result.values.push_back(weights[begin + places[i]]);
        if (!importance.empty()) {
          result.importance.push_back(importance[begin + places[i]]);
        }
      }
    }
    return result;
  };
  Taken all;
  for (const Taken& piece : parallel_map(weights.size(), piece_length(weights.size()), take)) {
    all.append(piece);
  }
  return all;
}

}  // namespace

ValueBuckets::ValueBuckets(std::span<const float> weights, std::span<const float> importance,
                           std::size_t n_buckets)
    : weights_(weights), importance_(importance) {
  const Range range = range_of(weights);
  const float least = value_at(range.least);
  const float greatest = value_at(range.greatest);
  if (!std::isfinite(least) || !std::isfinite(greatest)) {
    return;
  }
  range_ = double{greatest} - least;
  scale_ = fitting_scale(weights, importance, least, greatest, n_buckets);
  clumps_ = with_room(n_buckets);
  clump_of_.reserve(n_buckets);
  for (const Bucket& bucket : filled_buckets(scale_, weights, importance)) {
    clump_of_.push_back(static_cast<std::uint32_t>(clumps_.values.size()));
    if (bucket.weight > 0) {
      const double mean = bucket.first / bucket.weight;
      append(clumps_, bucket.origin + mean, bucket.weight,
             std::max(bucket.second - bucket.first * mean, 0.0));
    }
  }
}

WeightedValues ValueBuckets::opened(const std::vector<bool>& is_open) const {
  std::vector<std::uint8_t> takes;
  for (const std::size_t clump : clump_of_) {
    takes.push_back(clump < is_open.size() && is_open[clump] ? 1 : 0);
  }
  const Taken singles = taken(scale_, weights_, importance_, takes);
  const WeightedValues sorted = DistinctValues().of(singles.values, singles.importance);

  WeightedValues data = with_room(sorted.values.size() + is_open.size());
  std::size_t next = 0;
  for (std::size_t i = 0; i < clumps_.values.size(); ++i) {
    if (!is_open[i]) {
      // However little its values differ, a clump must not pass for one of them.
      const double spread = std::max(clumps_.spreads[i], std::numeric_limits<double>::min());
      const auto add = i > 0 && !is_open[i - 1] ? merge : append;
      add(data, clumps_.values[i], clumps_.weights[i], spread);
      continue;
    }
    const auto is_here = [&](double value) {
      const std::int32_t bucket = bucket_of(scale_, static_cast<float>(value));
      return clump_of_[static_cast<std::size_t>(bucket)] == i;
    };
    for (; next < sorted.values.size() && is_here(sorted.values[next]); ++next) {
      append(data, sorted.values[next], sorted.weights[next], 0);
    }
  }
  return data;
}

}  // namespace milpress
