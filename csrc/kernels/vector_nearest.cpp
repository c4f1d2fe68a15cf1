#include "kernels/vector_nearest.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::size_t kTogether = 32;  // vectors compared with the same entries

// Some vectors of a batch and some entries, whose indices are found.
struct Comparison {
  const float* entries;
  std::size_t n_entries;
  std::size_t dim;
  std::size_t begin;
  std::size_t end;
  Batch& batch;
};

// What is nearest is kept for as many vectors side by side as the registers allow; `kDim` is 0 if
// it isn't known.
template <std::size_t kDim>
[[gnu::always_inline]] inline void find_two(const Comparison& comparison) {
  constexpr std::size_t kSide = 16;
  constexpr std::size_t kKept = kDim > 0 ? kDim : 1;
  Batch& batch = comparison.batch;
  for (std::size_t i = comparison.begin; i < comparison.end; i += kSide) {
    std::array<std::array<float, kSide>, kKept> values;
    std::array<float, kSide> least;
    std::array<float, kSide> second;
    std::array<std::int32_t, kSide> code{};
    least.fill(kInfinity);
    second.fill(kInfinity);
    for (std::size_t d = 0; d < kKept; ++d) {
      for (std::size_t lane = 0; lane < kSide; ++lane) {
        values[d][lane] = batch.values[d * Batch::kSize + i + lane];
      }
    }
    const std::size_t dim = kDim > 0 ? kDim : comparison.dim;
    const float* entry = comparison.entries;
    const auto n_entries = static_cast<std::int32_t>(comparison.n_entries);
    for (std::int32_t j = 0; j < n_entries; ++j, entry += dim) {
      std::array<float, kSide> sum{};
      if constexpr (kDim == 0) {
        for (std::size_t d = 0; d < dim; ++d) {
          for (std::size_t lane = 0; lane < kSide; ++lane) {
            const float difference = batch.values[d * Batch::kSize + i + lane] - entry[d];
            sum[lane] += difference * difference;
          }
        }
      }
      for (std::size_t lane = 0; lane < kSide; ++lane) {
        float distance = sum[lane];
        if constexpr (kDim > 0) {
          const float first = values[0][lane] - entry[0];
          distance = first * first;
          for (std::size_t d = 1; d < kDim; ++d) {
            const float difference = values[d][lane] - entry[d];
            distance += difference * difference;
          }
        }
        const float other = least[lane] < distance ? distance : least[lane];
        second[lane] = other < second[lane] ? other : second[lane];
        // Without a branch, which `?:` would become.
        const std::int32_t is_nearer = -static_cast<std::int32_t>(distance < least[lane]);
        code[lane] ^= (code[lane] ^ j) & is_nearer;
        least[lane] = distance < least[lane] ? distance : least[lane];
      }
    }
    for (std::size_t lane = 0; lane < kSide; ++lane) {
      batch.codes[i + lane] = static_cast<std::uint8_t>(code[lane]);
      batch.distances[i + lane] = least[lane];
      batch.others[i + lane] = second[lane];
    }
  }
}

MILPRESS_VECTORIZE
void compare(const Comparison& comparison) {
  switch (comparison.dim) {
    case 1:
      return find_two<1>(comparison);
    case 2:
      return find_two<2>(comparison);
    case 3:
      return find_two<3>(comparison);
    case 4:
      return find_two<4>(comparison);
    case 8:
      return find_two<8>(comparison);
    default:
      return find_two<0>(comparison);
  }
}

// Whether entries are within the root of `limit` of the box around some vectors of a batch.
MILPRESS_VECTORIZE
void find_near(const float* by_element, std::size_t dim, const Batch& batch, std::size_t begin,
               std::size_t end, float limit, std::array<std::uint8_t, kEntryStride>& is_near) {
  std::array<float, kEntryStride> away{};
  for (std::size_t d = 0; d < dim; ++d) {
    const float* const values = &batch.values[d * Batch::kSize];
    float low = values[begin];
    float high = values[begin];
    for (std::size_t i = begin + 1; i < end; ++i) {
      low = values[i] < low ? values[i] : low;
      high = values[i] > high ? values[i] : high;
    }
    const float* const elements = &by_element[d * kEntryStride];
    for (std::size_t j = 0; j < kEntryStride; ++j) {
      const float below = low - elements[j];
      const float above = elements[j] - high;
      const float outside = below > above ? below : above;
      const float difference = outside > 0 ? outside : 0.0F;
      away[j] += difference * difference;
    }
  }
  for (std::size_t j = 0; j < kEntryStride; ++j) {
    is_near[j] = away[j] <= limit ? 1 : 0;
  }
}

}  // namespace

std::vector<float> by_element(const Entries& entries, std::size_t dim) {
  std::vector<float> result(dim * kEntryStride, kInfinity);
  for (std::size_t j = 0; j < entries.size() / dim; ++j) {
    for (std::size_t d = 0; d < dim; ++d) {
      result[d * kEntryStride + j] = entries[j * dim + d];
    }
  }
  return result;
}

NearestTwo::NearestTwo(const Entries& entries, std::size_t dim)
    : entries_(entries), dim_(dim), by_element_(by_element(entries, dim)) {}

void NearestTwo::find(std::size_t n, Batch& batch) const {
  constexpr std::size_t kWorthwhile = 32;  // entries from which some are picked
  const std::size_t n_entries = entries_.size() / dim_;
  for (std::size_t begin = 0; begin < n; begin += kTogether) {
    const std::size_t end = std::min(begin + kTogether, n);
    if (n_entries <= kWorthwhile) {
      compare({entries_.data(), n_entries, dim_, begin, end, batch});
      continue;
    }
    // The nearest entry is as near as the one known, so what is twice as far needn't be looked at.
    const float limit =
        4 * *std::max_element(&batch.known[begin], &batch.known[begin] + (end - begin));
    std::array<std::uint8_t, kEntryStride> is_near;
    find_near(by_element_.data(), dim_, batch, begin, end, limit, is_near);
    std::array<std::uint8_t, kEntryStride + 1> codes;
    std::size_t n_near = 0;
    for (std::size_t j = 0; j < n_entries; j += sizeof(std::uint64_t)) {
      std::uint64_t some;
      std::memcpy(&some, &is_near[j], sizeof some);
      for (std::size_t next = j; some != 0; ++next, some >>= 8) {
        codes[n_near] = static_cast<std::uint8_t>(next);
        n_near += some & 1;
      }
    }
    for (std::size_t j = 0; j < n_near; ++j) {
      for (std::size_t d = 0; d < dim_; ++d) {
        batch.near[j * dim_ + d] = entries_[codes[j] * dim_ + d];
      }
    }
    compare({batch.near.data(), n_near, dim_, begin, end, batch});
    const float beyond = limit * (1 - distance_slack(dim_));
    for (std::size_t i = begin; i < end; ++i) {
      batch.codes[i] = codes[batch.codes[i]];
      batch.others[i] = n_near < n_entries ? std::min(batch.others[i], beyond) : batch.others[i];
    }
  }
}

}  // namespace milpress
