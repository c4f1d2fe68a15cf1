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

// Keys alone, or a key above the bits of the importance, so that one word is sorted.
constexpr std::uint32_t kSign = 0x80000000;  // keys are signed, items are not

std::uint32_t item_key(std::uint32_t item) { return item; }
std::uint32_t item_key(std::uint64_t item) { return static_cast<std::uint32_t>(item >> 32); }

double item_share(std::uint32_t) { return 1; }
double item_share(std::uint64_t item) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(item));
}

template <typename Item>
void sort(std::vector<Item>& items) {
  constexpr std::size_t kSmall = 512;  // below, clearing the counters costs more than it saves
  constexpr int kDigitBits = 11;
  constexpr std::size_t kDigits = 3;
  if (items.size() < kSmall) {
    std::sort(items.begin(), items.end());
    return;
  }
  const auto digit = [](Item item, std::size_t i) {
    return (item_key(item) >> (i * kDigitBits)) & ((1U << kDigitBits) - 1);
  };
  std::array<std::array<std::uint32_t, 1U << kDigitBits>, kDigits> positions{};
  for (const Item item : items) {
    for (std::size_t i = 0; i < kDigits; ++i) {
      ++positions[i][digit(item, i)];
    }
  }
  std::vector<Item> sorted(items.size());
  for (std::size_t i = 0; i < kDigits; ++i) {
    if (positions[i][digit(items[0], i)] == items.size()) {
      continue;  // the low digit of a half's key is always zero
    }
    std::array<std::uint32_t, 1U << kDigitBits>& position = positions[i];
    std::exclusive_scan(position.begin(), position.end(), position.begin(), 0U);
    for (const Item item : items) {
      sorted[position[digit(item, i)]++] = item;
    }
    items.swap(sorted);
  }
}

template <typename Item, typename T>
std::vector<Item> items_of(std::span<const T> weights, std::span<const float> importance) {
  std::vector<Item> items(weights.size());
  std::size_t n = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const float weight = to_float(weights[i]);
    const float share = importance.empty() ? 1.0F : importance[i];
    Item item = static_cast<std::uint32_t>(compare_key(weight)) ^ kSign;
    if constexpr (sizeof(Item) > sizeof(std::uint32_t)) {
      item = item << 32 | std::bit_cast<std::uint32_t>(share);
    }
    items[n] = item;
    n += magnitude_bits(weight) < kInfinityBits<float> && share > 0 ? 1 : 0;
  }
  items.resize(n);
  return items;
}

template <typename Item>
WeightedValues merged(std::vector<Item> items) {
  sort(items);
  WeightedValues data{std::vector<double>(items.size()), std::vector<double>(items.size()), {}};
  std::size_t n = 0;
  for (std::size_t i = 0; i < items.size(); ++n) {
    const std::uint32_t key = item_key(items[i]);
    double total = 0;
    for (; i < items.size() && item_key(items[i]) == key; ++i) {
      total += item_share(items[i]);
    }
    data.values[n] = value_of<float>(static_cast<std::int32_t>(key ^ kSign));
    data.weights[n] = total;
  }
  data.values.resize(n);
  data.weights.resize(n);
  return data;
}

template <typename T>
WeightedValues sorted_values(std::span<const T> weights, std::span<const float> importance) {
  return importance.empty() ? merged(items_of<std::uint32_t>(weights, importance))
                            : merged(items_of<std::uint64_t>(weights, importance));
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
  WeightedValues data{std::vector<double>(n), std::vector<double>(n), {}};
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
