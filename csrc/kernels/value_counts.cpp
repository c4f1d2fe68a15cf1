#include "kernels/value_counts.h"

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <numeric>
#include <type_traits>
#include <utility>

#include "core/keys.h"
#include "core/parallel.h"

namespace milpress {
namespace {

constexpr std::size_t kBins = std::size_t{1} << 16;

// A key above the bits of the importance, so that one word is sorted.
using Item = std::uint64_t;
constexpr std::uint32_t kSign = 0x80000000;  // keys are signed, items are not

void sort(std::vector<Item>& items) {
  constexpr std::size_t kSmall = 512;  // below, clearing the counters costs more than it saves
  constexpr int kDigitBits = 11;
  if (items.size() < kSmall) {
    std::sort(items.begin(), items.end());
    return;
  }
  std::vector<Item> sorted(items.size());
  for (int shift = 32; shift < 64; shift += kDigitBits) {
    const auto digit = [shift](Item item) { return (item >> shift) & ((1U << kDigitBits) - 1); };
    std::array<std::size_t, 1U << kDigitBits> position{};
    for (const Item item : items) {
      ++position[digit(item)];
    }
    if (position[digit(items[0])] == items.size()) {
      continue;  // the low digit of a half's key is always zero
    }
    std::exclusive_scan(position.begin(), position.end(), position.begin(), std::size_t{0});
    for (const Item item : items) {
      sorted[position[digit(item)]++] = item;
    }
    items.swap(sorted);
  }
}

template <typename T>
WeightedValues sorted_values(std::span<const T> weights, std::span<const float> importance) {
  std::vector<Item> items;
  items.reserve(weights.size());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const float weight = to_float(weights[i]);
    const float share = importance.empty() ? 1.0F : importance[i];
    if (magnitude_bits(weight) < kInfinityBits<float> && share > 0) {
      const auto key = static_cast<std::uint32_t>(compare_key(weight)) ^ kSign;
      items.push_back(Item{key} << 32 | std::bit_cast<std::uint32_t>(share));
    }
  }
  sort(items);
  WeightedValues data;
  data.values.reserve(items.size());
  data.weights.reserve(items.size());
  for (std::size_t i = 0; i < items.size();) {
    const Item key = items[i] >> 32;
    double total = 0;
    for (; i < items.size() && items[i] >> 32 == key; ++i) {
      total += std::bit_cast<float>(static_cast<std::uint32_t>(items[i]));
    }
    data.values.push_back(
        value_of<float>(static_cast<std::int32_t>(static_cast<std::uint32_t>(key) ^ kSign)));
    data.weights.push_back(total);
  }
  return data;
}

// The total importance of each half. Pieces are cut by size, so that the order of the additions is
// fixed.
template <typename Bin>
std::vector<double> histogram(std::span<const Half> weights, std::span<const float> importance) {
  constexpr std::size_t kMinPiece = std::size_t{1} << 20;
  constexpr std::size_t kMaxPieces = 16;
  const std::size_t piece = std::max(kMinPiece, weights.size() / kMaxPieces + 1);
  const auto partial = parallel_map(weights.size(), piece, [&](std::size_t begin, std::size_t end) {
    std::vector<Bin> bins(kBins);
    for (std::size_t i = begin; i < end; ++i) {
      if constexpr (std::is_integral_v<Bin>) {
        ++bins[weights[i].bits];
      } else {
        bins[weights[i].bits] += importance[i];
      }
    }
    return bins;
  });
  std::vector<double> totals(kBins);
  for (const std::vector<Bin>& bins : partial) {
    std::transform(bins.begin(), bins.end(), totals.begin(), totals.begin(), std::plus<double>());
  }
  return totals;
}

WeightedValues counted_values(std::span<const Half> weights, std::span<const float> importance) {
  constexpr std::size_t kNegative = 0x8000;
  std::vector<double> totals = importance.empty() ? histogram<std::uint32_t>(weights, importance)
                                                  : histogram<double>(weights, importance);
  totals[0] += totals[kNegative];
  WeightedValues data;
  const auto append = [&](std::size_t bits) {
    if (totals[bits] > 0) {
      data.values.push_back(to_float(Half{static_cast<std::uint16_t>(bits)}));
      data.weights.push_back(totals[bits]);
    }
  };
  for (std::size_t bits = kNegative + kInfinityBits<Half> - 1; bits > kNegative; --bits) {
    append(bits);
  }
  for (std::size_t bits = 0; bits < kInfinityBits<Half>; ++bits) {
    append(bits);
  }
  return data;
}

}  // namespace

WeightedValues value_counts(std::span<const Half> weights) { return counted_values(weights, {}); }

template <typename Bin, typename Share>
WeightedValues DistinctValues::collect(std::span<const Half> weights, std::vector<Bin>& bins,
                                       const Share& share_of) {
  constexpr std::size_t kWord = 64;
  constexpr int kZero = 0x8000;  // bin of both zeros
  bins.resize(kBins);
  occupied_.resize(kBins / kWord);
  std::size_t n = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto bin = static_cast<std::size_t>(kZero + compare_key(weights[i]));
    const Bin share = share_of(i);
    if (magnitude_bits(weights[i]) < kInfinityBits<Half> && share > 0) {
      bins[bin] += share;
      std::uint64_t& word = occupied_[bin / kWord];
      const std::uint64_t bit = std::uint64_t{1} << bin % kWord;
      n += (word & bit) == 0 ? 1U : 0U;
      word |= bit;
    }
  }
  WeightedValues data{std::vector<double>(n), std::vector<double>(n)};
  std::size_t next = 0;
  for (std::size_t i = 0; i < occupied_.size(); ++i) {
    for (std::uint64_t word = std::exchange(occupied_[i], 0); word != 0; word &= word - 1) {
      const std::size_t bin = i * kWord + static_cast<std::size_t>(std::countr_zero(word));
      data.values[next] = value_of<Half>(static_cast<std::int16_t>(static_cast<int>(bin) - kZero));
      data.weights[next] = std::exchange(bins[bin], Bin{});
      ++next;
    }
  }
  return data;
}

WeightedValues DistinctValues::of(std::span<const float> weights,
                                  std::span<const float> importance) {
  return sorted_values(weights, importance);
}

WeightedValues DistinctValues::of(std::span<const Half> weights,
                                  std::span<const float> importance) {
  constexpr std::size_t kSortMax = 256;         // below, a row sorts faster than bins are made
  constexpr std::size_t kPiecesMin = 1U << 20;  // above, the pieces of a row can be counted at once
  if (weights.size() <= kSortMax) {
    return sorted_values(weights, importance);
  }
  if (weights.size() >= kPiecesMin) {
    return counted_values(weights, importance);
  }
  return importance.empty()
             ? collect(weights, counts_, [](std::size_t) { return 1U; })
             : collect(weights, totals_, [&](std::size_t i) -> double { return importance[i]; });
}

}  // namespace milpress
