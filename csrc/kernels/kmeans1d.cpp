#include "kernels/kmeans1d.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

#include "core/check.h"
#include "core/parallel.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

using Ends = std::vector<std::size_t>;

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr std::size_t kGrain = 65'536;  // weights a thread takes at a time, in whole rows

// ---------------------------------------------------------------------------------------------
// Distinct values

constexpr std::uint32_t kZeroKey = 0x80000000;
constexpr std::uint32_t kInfinityKey = 0x7f800000;  // above and below zero's

// Keys compare as the values do, and both zeros have the same key.
std::uint32_t order_key(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  return bits == magnitude ? kZeroKey + magnitude : kZeroKey - magnitude;
}

float value_of(std::uint32_t key) {
  return key < kZeroKey ? -std::bit_cast<float>(kZeroKey - key)
                        : std::bit_cast<float>(key - kZeroKey);
}

bool is_finite_key(std::uint32_t key) { return key - kZeroKey + kInfinityKey - 1 < 0xfeffffffU; }

// An order key above the bits of the importance, so that one word is sorted.
using Item = std::uint64_t;

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
    const std::uint32_t key = order_key(to_float(weights[i]));
    const float share = importance.empty() ? 1.0F : importance[i];
    if (is_finite_key(key) && share > 0) {
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
    data.values.push_back(value_of(static_cast<std::uint32_t>(key)));
    data.weights.push_back(total);
  }
  return data;
}

// The total importance of each half. Pieces are cut by size, so that the order of the additions is
// fixed.
template <typename Bin>
std::vector<double> histogram(std::span<const Half> weights, std::span<const float> importance) {
  constexpr std::size_t kBins = 1U << 16;
  constexpr std::size_t kMinPiece = std::size_t{1} << 20;
  constexpr std::size_t kMaxPieces = 16;
  const std::size_t piece = std::max(kMinPiece, weights.size() / kMaxPieces + 1);
  std::array<std::vector<Bin>, kMaxPieces> partial;
  parallel_for(weights.size(), piece, [&](std::size_t begin, std::size_t end) {
    std::vector<Bin> bins(kBins);
    for (std::size_t i = begin; i < end; ++i) {
      if constexpr (std::is_integral_v<Bin>) {
        ++bins[weights[i].bits];
      } else {
        bins[weights[i].bits] += importance[i];
      }
    }
    partial[begin / piece] = std::move(bins);
  });
  std::vector<double> totals(kBins);
  for (const std::vector<Bin>& bins : partial) {
    std::transform(bins.begin(), bins.end(), totals.begin(), totals.begin(), std::plus<double>());
  }
  return totals;
}

WeightedValues counted_values(std::span<const Half> weights, std::span<const float> importance) {
  constexpr std::size_t kNegative = 0x8000;
  constexpr std::size_t kInfinity = 0x7c00;
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
  for (std::size_t bits = kNegative + kInfinity - 1; bits > kNegative; --bits) {
    append(bits);
  }
  for (std::size_t bits = 0; bits < kInfinity; ++bits) {
    append(bits);
  }
  return data;
}

// The total importance of each half of a row, in the order of their values, and a bit for each bin
// and for each word of bits that isn't zero. All zero between two rows.
class Bins {
 public:
  WeightedValues collect(std::span<const Half> weights, std::span<const float> importance) {
    return importance.empty()
               ? collect(weights, counts_, [](std::size_t) { return 1U; })
               : collect(weights, totals_, [&](std::size_t i) -> double { return importance[i]; });
  }

 private:
  static constexpr std::size_t kBins = std::size_t{1} << 16;
  static constexpr std::size_t kWord = 64;
  static constexpr std::size_t kZero = 0x8000;      // bin of both zeros
  static constexpr std::size_t kInfinity = 0x7c00;  // above and below it

  template <typename Bin, typename Share>
  WeightedValues collect(std::span<const Half> weights, std::vector<Bin>& bins,
                         const Share& share_of) {
    bins.resize(kBins);
    occupied_.resize(kBins / kWord);
    std::size_t n = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const std::size_t magnitude = weights[i].bits & 0x7fffU;
      const std::size_t bin = weights[i].bits == magnitude ? kZero + magnitude : kZero - magnitude;
      const Bin share = share_of(i);
      if (magnitude < kInfinity && share > 0) {
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
        const std::size_t bits = bin < kZero ? kZero + (kZero - bin) : bin - kZero;
        data.values[next] = to_float(Half{static_cast<std::uint16_t>(bits)});
        data.weights[next] = std::exchange(bins[bin], Bin{});
        ++next;
      }
    }
    return data;
  }

  std::vector<std::uint32_t> counts_;
  std::vector<double> totals_;
  std::vector<std::uint64_t> occupied_;
};

WeightedValues distinct_values(std::span<const float> weights, std::span<const float> importance,
                               Bins& /*bins*/) {
  return sorted_values(weights, importance);
}

WeightedValues distinct_values(std::span<const Half> weights, std::span<const float> importance,
                               Bins& bins) {
  constexpr std::size_t kSortMax = 256;         // below, a row sorts faster than bins are made
  constexpr std::size_t kPiecesMin = 1U << 20;  // above, the pieces of a row can be counted at once
  if (weights.size() <= kSortMax) {
    return sorted_values(weights, importance);
  }
  return weights.size() < kPiecesMin ? bins.collect(weights, importance)
                                     : counted_values(weights, importance);
}

// ---------------------------------------------------------------------------------------------
// Cost of a cluster: the squared error of the values [begin, end) around their mean
//
// A cost also settles duels: which of two starts is the better one for the last cluster, as a
// function of its end. The cheaper a start's partition of what comes before, the greater its lead.

// The sum of `term(i)` for i in [0, n), eight terms side by side.
template <typename Term>
double lane_sum(std::size_t n, const Term& term) {
  constexpr std::size_t kLanes = 8;
  std::array<double, kLanes> sums{};
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += term(i + lane);
    }
  }
  for (std::size_t lane = 0; i < n; ++i, ++lane) {
    sums[lane] += term(i);
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

struct CompensatedSum {
  double sum = 0;
  double excess = 0;

  void add(double term) {
    term -= excess;
    const double next = sum + term;
    excess = (next - sum) - term;
    sum = next;
  }
};

// Differences of prefix sums: fast, with an absolute error that scales with the whole row.
class PrefixCost {
 public:
  explicit PrefixCost(const WeightedValues& data) : PrefixCost(data.values.size()) {
    const std::size_t n = size();
    const std::vector<double>& weights = data.weights;
    const std::vector<double>& values = data.values;
    const double centre = lane_sum(n, [&](std::size_t i) { return weights[i] * values[i]; }) /
                          lane_sum(n, [&](std::size_t i) { return weights[i]; });
    // A compensated sum waits for itself at every step: a few stretches are added up side by side.
    constexpr std::size_t kStretches = 4;
    const std::size_t length = n / kStretches;
    std::array<Sums, kStretches> sums;
    const auto add = [&](Sums& sum, std::size_t i) {
      const double value = values[i] - centre;
      const double moment = weights[i] * value;
      sum.weight.add(weights[i]);
      sum.first.add(moment);
      sum.second.add(moment * value);
      weight_[i + 1] = sum.weight.sum;
      first_[i + 1] = sum.first.sum;
      second_[i + 1] = sum.second.sum;
    };
    for (std::size_t i = 0; i < length; ++i) {
      for (std::size_t stretch = 0; stretch < kStretches; ++stretch) {
        add(sums[stretch], stretch * length + i);
      }
    }
    for (std::size_t i = kStretches * length; i < n; ++i) {
      add(sums[kStretches - 1], i);
    }
    Sums before = sums[0];
    for (std::size_t stretch = 1; stretch < kStretches; ++stretch) {
      const std::size_t begin = stretch * length + 1;
      const std::size_t end = stretch + 1 < kStretches ? begin + length : n + 1;
      raise(weight_, begin, end, before.weight, sums[stretch].weight);
      raise(first_, begin, end, before.first, sums[stretch].first);
      raise(second_, begin, end, before.second, sums[stretch].second);
    }
    // A weight too small to count would make a cluster of none and its mean 0 / 0.
    for (std::size_t i = 1; i <= n; ++i) {
      if (!(weight_[i] > weight_[i - 1])) {
        weight_[i] = weight_[i - 1] * (1 + kEpsilon);
      }
    }
    pad();
  }

  std::size_t size() const { return second_.size() - 1; }

  double operator()(std::size_t begin, std::size_t end) const {
    const double first = first_[end] - first_[begin];
    return (second_[end] - second_[begin]) - first * first / (weight_[end] - weight_[begin]);
  }

  // With second moments left out where they cancel, and no division.
  struct Duel {
    static constexpr std::size_t kAtOnce = 4;
    using Lanes [[gnu::vector_size(kAtOnce * sizeof(double))]] = double;
    const double* weight;
    const double* first;
    double later_weight;
    double later_first;
    double earlier_weight;
    double earlier_first;
    double handicap;

    /// The number of the first of the ends [end, end + kAtOnce) that the later start loses.
    [[gnu::always_inline]] std::size_t losses(std::size_t end) const {
      Lanes a;
      Lanes weight_a;
      std::memcpy(&a, first + end, sizeof(a));
      std::memcpy(&weight_a, weight + end, sizeof(weight_a));
      const Lanes b = a - earlier_first;
      const Lanes weight_b = weight_a - earlier_weight;
      a -= later_first;
      weight_a -= later_weight;
      const auto won = weight_a * (handicap * weight_b + b * b) < weight_b * (a * a);  // -1 if so
      return static_cast<std::size_t>(4 + (won[0] + won[1]) + (won[2] + won[3]));
    }
  };

  Duel duel(std::size_t later, std::size_t earlier, double lead) const {
    return {weight_.data(),
            first_.data(),
            weight_[later],
            first_[later],
            weight_[earlier],
            first_[earlier],
            -lead - (second_[later] - second_[earlier])};
  }

  /// What a start adds to the cost of every last cluster, if all before it costs `before`.
  double offset(std::size_t start, double before) const { return before - second_[start]; }

  /// Which of the starts [low, high) is the best for a cluster [start, end), given their offsets;
  /// the first of equals.
  [[gnu::always_inline]] std::size_t best_start(std::size_t low, std::size_t high, std::size_t end,
                                                const double* offsets) const {
    using Lanes = Duel::Lanes;
    const double infinity = std::numeric_limits<double>::infinity();
    const auto start = static_cast<double>(low);
    Lanes index = {start, start + 1, start + 2, start + 3};
    Lanes least = {infinity, infinity, infinity, infinity};
    Lanes best = index;
    for (std::size_t i = low; i < high; i += Duel::kAtOnce) {
      Lanes weight;
      Lanes first;
      Lanes value;
      std::memcpy(&weight, &weight_[i], sizeof(weight));
      std::memcpy(&first, &first_[i], sizeof(first));
      std::memcpy(&value, offsets + i, sizeof(value));
      first -= first_[end];
      value += first * first / (weight - weight_[end]);
      const auto is_better = (value < least) & (index < static_cast<double>(high));
      least = is_better ? value : least;
      best = is_better ? index : best;
      index += static_cast<double>(Duel::kAtOnce);
    }
    const auto merge = [&](const Lanes& other_least, const Lanes& other_best) {
      const auto is_better = (other_least < least) | ((other_least == least) & (other_best < best));
      least = is_better ? other_least : least;
      best = is_better ? other_best : best;
    };
    merge(__builtin_shufflevector(least, least, 2, 3, 0, 1),
          __builtin_shufflevector(best, best, 2, 3, 0, 1));
    merge(__builtin_shufflevector(least, least, 1, 0, 3, 2),
          __builtin_shufflevector(best, best, 1, 0, 3, 2));
    return static_cast<std::size_t>(static_cast<std::int64_t>(best[0]));
  }

  /// The same with only every `step`-th value able to end a cluster.
  PrefixCost coarse(std::size_t step) const {
    const std::size_t n = size();
    PrefixCost result((n + step - 1) / step);
    for (std::size_t i = 0; i <= result.size(); ++i) {
      const std::size_t from = std::min(i * step, n);
      result.weight_[i] = weight_[from];
      result.first_[i] = first_[from];
      result.second_[i] = second_[from];
    }
    result.pad();
    return result;
  }

  /// Bounds the rounding error of the cost of all clusters: each sum is off by its own epsilon, and
  /// the formula passes that on times 1, 2 * mean and mean^2.
  double error_bound(const Ends& ends) const {
    const double weight = weight_.back();
    const double second = second_.back();
    const double first = std::sqrt(weight * second);  // no less than any first moment
    double bound = 0;
    std::size_t begin = 0;
    for (const std::size_t end : ends) {
      const double mean = std::abs((first_[end] - first_[begin]) / (weight_[end] - weight_[begin]));
      bound += second + mean * (2 * first + mean * weight);
      begin = end;
    }
    return 4 * kEpsilon * bound;
  }

 private:
  struct Sums {
    CompensatedSum weight;
    CompensatedSum first;   // of weight * value
    CompensatedSum second;  // of weight * value^2
  };

  explicit PrefixCost(std::size_t n)
      : weight_(n + Duel::kAtOnce), first_(n + Duel::kAtOnce), second_(n + 1) {}

  // Adds `before` to the sums of a stretch, then the total of the stretch to `before`.
  static void raise(std::vector<double>& sums, std::size_t begin, std::size_t end,
                    CompensatedSum& before, const CompensatedSum& total) {
    for (std::size_t i = begin; i < end; ++i) {
      sums[i] = before.sum + (sums[i] - before.excess);
    }
    before.add(total.sum);
    before.add(-total.excess);
  }

  // A duel looks past the last value, and finds it again.
  void pad() {
    std::fill(weight_.begin() + static_cast<std::ptrdiff_t>(size()), weight_.end(),
              weight_[size()]);
    std::fill(first_.begin() + static_cast<std::ptrdiff_t>(size()), first_.end(), first_[size()]);
  }

  // One more than values, and padding.
  std::vector<double> weight_;
  std::vector<double> first_;
  std::vector<double> second_;
};

// A tree of merged neighbours: every term is positive, so the error is relative to the cost itself.
class TreeCost {
 public:
  explicit TreeCost(const WeightedValues& data) {
    std::vector<Cluster> leaves;
    for (std::size_t i = 0; i < data.values.size(); ++i) {
      leaves.push_back({data.weights[i], data.values[i], 0});
    }
    grow(leaves);
  }

  std::size_t size() const { return tree_.size() / 2; }

  double operator()(std::size_t begin, std::size_t end) const { return cluster(begin, end).error; }

  struct Duel {
    static constexpr std::size_t kAtOnce = 1;
    const TreeCost& cost;
    std::size_t later;
    std::size_t earlier;
    double lead;

    std::size_t losses(std::size_t end) const {
      return cost(later, end) - cost(earlier, end) < lead ? 0 : 1;
    }
  };

  Duel duel(std::size_t later, std::size_t earlier, double lead) const {
    return {*this, later, earlier, lead};
  }

  TreeCost coarse(std::size_t step) const {
    std::vector<Cluster> leaves;
    for (std::size_t i = 0; i < size(); i += step) {
      leaves.push_back(cluster(i, std::min(i + step, size())));
    }
    TreeCost result;
    result.grow(leaves);
    return result;
  }

 private:
  struct Cluster {
    double weight = 0;
    double mean = 0;
    double error = 0;
  };

  TreeCost() = default;

  static Cluster merge(const Cluster& a, const Cluster& b) {
    const double weight = a.weight + b.weight;
    const double gap = b.mean - a.mean;
    // Counted from the heavier mean, or a light one far away would round it off.
    const double mean = a.weight < b.weight ? b.mean - gap * (a.weight / weight)
                                            : a.mean + gap * (b.weight / weight);
    return {weight, mean, a.error + b.error + a.weight * (b.weight / weight) * gap * gap};
  }

  // Node i has the children 2i and 2i + 1; the leaves are the second half.
  void grow(const std::vector<Cluster>& leaves) {
    tree_.resize(leaves.size());
    tree_.insert(tree_.end(), leaves.begin(), leaves.end());
    for (std::size_t i = leaves.size(); i-- > 1;) {
      tree_[i] = merge(tree_[2 * i], tree_[2 * i + 1]);
    }
  }

  Cluster cluster(std::size_t begin, std::size_t end) const {
    Cluster left;
    Cluster right;
    for (begin += size(), end += size(); begin < end; begin /= 2, end /= 2) {
      if (begin % 2 == 1) {
        left = merge(left, tree_[begin++]);
      }
      if (end % 2 == 1) {
        right = merge(tree_[--end], right);
      }
    }
    return merge(left, right);
  }

  std::vector<Cluster> tree_;
};

// ---------------------------------------------------------------------------------------------
// Solvers

struct Partition {
  Ends ends;
  double error = 0;
  double penalty = 0;  // it minimises error + penalty * clusters
};

// The nodes and the queue of `cheapest_partition`, kept from one pass to the next.
struct Scratch {
  struct Node {
    double error;  // kept apart from the count, or a large penalty would round it away
    std::uint32_t count;
    std::uint32_t start;  // of the last cluster
  };
  struct Candidate {
    std::uint32_t start;
    std::uint32_t first_end;
  };
  struct Block {
    std::size_t before;  // its first end
    std::size_t high;    // past the starts it looked at
  };
  double penalty = 0;  // of the nodes
  std::vector<Node> nodes;
  std::vector<Candidate> queue;
  std::vector<double> offsets;
  std::vector<Block> blocks;
};

// The first of the ends [low, n] that the later start wins, else n + 1. It is near in smooth data:
// gallop.
template <typename Duel>
[[gnu::always_inline]] inline std::size_t first_win(const Duel& duel, std::size_t low,
                                                    std::size_t n) {
  std::size_t high = low;
  for (std::size_t step = 1; high <= n; step *= 2) {
    const std::size_t losses = duel.losses(high);
    if (losses == 0) {
      break;
    }
    low = high + losses;
    if (losses < Duel::kAtOnce) {
      return low;
    }
    high = low + step - 1;
  }
  high = std::min(high, n + 1);
  while (low < high) {
    const std::size_t middle = low + (high - low) / 2;
    const std::size_t losses = duel.losses(middle);
    if (losses == 0) {
      high = middle;
    } else {
      low = middle + losses;
      if (losses < Duel::kAtOnce) {
        return low;
      }
    }
  }
  return std::min(low, n + 1);
}

Partition traced(Scratch& scratch, std::size_t n, double penalty) {
  scratch.penalty = penalty;
  const std::vector<Scratch::Node>& nodes = scratch.nodes;
  Partition result{Ends(nodes[n].count), nodes[n].error, penalty};
  std::size_t end = n;
  for (std::size_t j = result.ends.size(); j-- > 0; end = nodes[end].start) {
    result.ends[j] = end;
  }
  return result;
}

// The least error + penalty * clusters in one pass. A cluster costs more the further it starts from
// its end, and increasingly so; hence once a later start beats an earlier one it stays ahead, and
// a queue holds the starts in the order of the ends from which each is the best.
template <typename Cost>
[[gnu::always_inline]] inline Partition one_pass(const Cost& cost, double penalty,
                                                 Scratch& scratch) {
  const std::size_t n = cost.size();
  scratch.nodes.resize(std::max(scratch.nodes.size(), n + 1));
  scratch.queue.resize(std::max(scratch.queue.size(), n));
  Scratch::Node* const nodes = scratch.nodes.data();
  Scratch::Candidate* const queue = scratch.queue.data();
  nodes[0] = {0, 0, 0};
  queue[0] = {0, 1};
  std::size_t head = 0;
  std::size_t tail = 1;
  const auto reach = [&](std::size_t end) {
    head += head + 1 < tail && queue[head + 1].first_end <= end ? 1U : 0U;
    const std::uint32_t start = queue[head].start;
    nodes[end] = {nodes[start].error + cost(start, end), nodes[start].count + 1, start};
  };
  // Starts that `start` beats from the first of their ends are done for. Where one never beats the
  // others, the next won't either.
  bool hopeless = false;
  const auto enqueue = [&](std::size_t start, std::size_t next_end) {
    const Scratch::Node& node = nodes[start];
    std::size_t first = next_end;
    for (; tail > head; --tail) {
      const Scratch::Candidate& last = queue[tail - 1];
      const Scratch::Node& earlier = nodes[last.start];
      const double lead =
          penalty * (static_cast<double>(earlier.count) - static_cast<double>(node.count)) -
          (node.error - earlier.error);
      const std::size_t from = last.first_end;
      const auto duel = cost.duel(start, last.start, lead);
      const std::size_t win = hopeless && duel.losses(n) > 0 ? n + 1 : first_win(duel, from, n);
      if (win > from) {
        first = win;
        break;
      }
    }
    hopeless = first > n;
    if (first <= n) {
      queue[tail++] = {static_cast<std::uint32_t>(start), static_cast<std::uint32_t>(first)};
    }
  };
  for (std::size_t i = 1; i < n; ++i) {
    reach(i);
    queue[head].first_end = static_cast<std::uint32_t>(i + 1);
    enqueue(i, i + 1);
  }
  reach(n);

  return traced(scratch, n, penalty);
}

MILPRESS_VECTORIZE
Partition cheapest_partition(const PrefixCost& cost, double penalty, Scratch& scratch) {
  return one_pass(cost, penalty, scratch);
}

Partition cheapest_partition(const TreeCost& cost, double penalty, Scratch& scratch) {
  return one_pass(cost, penalty, scratch);
}

// The same, guided by the starts found with every `step`-th end. Each block of ends looks for its
// starts between the one of the end before and a little past the guide's. That nothing further on
// is better shows from the block after it: where the best start of an end is no further than the
// block looked, all starts further on lose to it there and so do they before. If it is further, the
// gap is searched; and if something turns up, the block is done again, an end at a time if clusters
// are shorter than blocks. Returns no ends if that happens too often.
MILPRESS_VECTORIZE
Partition guided_partition(const PrefixCost& cost, double penalty, const Scratch& guide,
                           std::size_t step, Scratch& scratch) {
  constexpr std::size_t kBlock = 8;
  constexpr std::size_t kMargin = 8;
  const std::size_t n = cost.size();
  scratch.nodes.resize(std::max(scratch.nodes.size(), n + 1));
  scratch.offsets.resize(std::max(scratch.offsets.size(), n + 1 + PrefixCost::Duel::kAtOnce));
  scratch.blocks.resize(std::max(scratch.blocks.size(), n));
  Scratch::Node* const nodes = scratch.nodes.data();
  double* const offsets = scratch.offsets.data();
  nodes[0] = {0, 0, 0};
  offsets[0] = 0;
  const auto reach = [&](std::size_t end, std::size_t start) {
    nodes[end] = {nodes[start].error + cost(start, end), nodes[start].count + 1,
                  static_cast<std::uint32_t>(start)};
    offsets[end] = cost.offset(end, nodes[end].error + penalty * nodes[end].count);
  };
  std::size_t n_blocks = 0;
  std::size_t before = 0;  // the last end that was reached
  std::size_t n_repairs = 0;
  std::size_t careful = 0;  // up to this end a block is a single end
  std::size_t least_high = 0;
  while (before < n) {
    const std::size_t last = std::min(n, before < careful ? before + 1 : before + kBlock);
    const std::size_t low = nodes[before].start;
    const std::size_t guided = guide.nodes[(last + step - 1) / step].start * step;
    const std::size_t high =
        std::min(before + 1, std::max({low + kMargin, guided + kMargin, least_high}));
    scratch.blocks[n_blocks] = {before, high};
    std::size_t start = cost.best_start(low, high, last, offsets);
    reach(last, start);
    for (std::size_t end = before + 1; end < last; ++end) {
      reach(end, cost.best_start(low, start + 1, end, offsets));
    }
    // The first end of the block shows whether the one before looked far enough; and if there is no
    // more block, everything left is looked through.
    const auto missed = [&](std::size_t end, std::size_t past) {
      const std::size_t found =
          cost.best_start(nodes[end].start, std::min(past, end), end, offsets);
      return found == nodes[end].start ? 0 : found + 1;
    };
    std::size_t wrong = n_blocks;
    least_high = 0;
    if (n_blocks > 0 && nodes[before + 1].start >= scratch.blocks[n_blocks - 1].high) {
      least_high = missed(before, nodes[before + 1].start + 1);
      wrong = n_blocks - 1;
    }
    if (least_high == 0 && last == n) {
      least_high = missed(n, n);
      wrong = n_blocks;
    }
    if (least_high == 0) {
      before = last;
      ++n_blocks;
    } else if (++n_repairs > n / kBlock) {
      return {};
    } else {
      n_blocks = wrong;
      before = scratch.blocks[wrong].before;
      careful = least_high > before + 1 ? before + 3 * kBlock : careful;
    }
  }
  return traced(scratch, n, penalty);
}

Ends each_alone(std::size_t n) {
  Ends ends(n);
  std::iota(ends.begin(), ends.end(), std::size_t{1});
  return ends;
}

// A partition into `k` clusters that begins as `many` does and ends as `few` does. If both are
// optimal for `penalty`, then so is the best of these (Aggarwal, Schieber, Tokuyama 1994).
template <typename Cost>
Partition splice(const Cost& cost, const Partition& few, const Partition& many, double penalty,
                 std::size_t k) {
  const std::size_t extra = k - few.ends.size();
  Partition best;
  for (std::size_t i = 0; i < few.ends.size(); ++i) {
    if (many.ends[i + extra - 1] < few.ends[i]) {
      Partition next{{}, 0, penalty};
      next.ends.assign(many.ends.begin(), many.ends.begin() + i + extra);
      next.ends.insert(next.ends.end(), few.ends.begin() + i, few.ends.end());
      for (std::size_t j = 0; j < k; ++j) {
        next.error += cost(j == 0 ? 0 : next.ends[j - 1], next.ends[j]);
      }
      if (best.ends.empty() || next.error < best.error) {
        best = std::move(next);
      }
    }
  }
  return best;
}

// The same data coarser and coarser: every level lets only some of the values of the one before end
// a cluster.
template <typename Cost>
class Levels {
 public:
  Levels(const Cost& cost, std::size_t k, std::vector<Scratch>& scratch)
      : finest_(cost), scratch_(scratch) {
    constexpr std::size_t kCoarseMin = 4;  // values per cluster that give a good first penalty
    for (;;) {
      const Cost& last = cost_of(steps_.size());
      const std::size_t step = std::min(kStep, std::bit_floor(last.size() / (kCoarseMin * k)));
      if (step < 2) {
        break;
      }
      coarser_.push_back(last.coarse(step));
      steps_.push_back(step);
    }
    scratch_.resize(std::max(scratch_.size(), steps_.size() + 1));
    for (Scratch& level : scratch_) {
      level.penalty = -1;
    }
  }

  /// Finds the penalty whose cheapest partition has `k` clusters, beginning with `penalty` or, if
  /// that is 0, with a rule of thumb. The count falls as the penalty rises, for smooth data with
  /// its cube root: that gives the next guess. Where the guess fails, the penalty at which both
  /// ends of the bracket cost the same either narrows the bracket or shows that everything between
  /// them costs the same as well.
  Partition search(std::size_t k, double penalty, std::size_t level = 0) {
    constexpr int kMaxGuesses = 12;
    const Cost& cost = cost_of(level);
    const std::size_t n = cost.size();
    const auto cube = [](double x) { return x * x * x; };

    Partition few{{n}, cost(0, n), std::numeric_limits<double>::infinity()};
    Partition many;  // without ends, a cluster for each value
    if (penalty == 0) {
      penalty = 2 * few.error / cube(static_cast<double>(k));
    }
    if (level < steps_.size()) {
      penalty = search(k, penalty, level + 1).penalty;
    }
    bool stalled = false;
    for (int guess = 0;; ++guess) {
      const std::size_t n_many = many.ends.empty() ? n : many.ends.size();
      const bool last_resort =
          stalled || guess >= kMaxGuesses || !(penalty > many.penalty) || !(penalty < few.penalty);
      if (last_resort) {
        penalty = (few.error - many.error) / static_cast<double>(n_many - few.ends.size());
      }
      Partition next = cheapest(penalty, level);
      const std::size_t count = next.ends.size();
      if (count == k) {
        return next;
      }
      stalled = count <= few.ends.size() || count >= n_many;
      if (stalled && last_resort) {
        if (many.ends.empty()) {
          many.ends = each_alone(n);
        }
        return splice(cost, few, many, penalty, k);
      }
      if (!stalled) {
        penalty *= cube(static_cast<double>(count) / static_cast<double>(k));
        (count < k ? few : many) = std::move(next);
      }
    }
  }

 private:
  static constexpr std::size_t kStep = 8;  // a smaller one leaves clusters too short for a guide

  const Cost& cost_of(std::size_t level) const {
    return level == 0 ? finest_ : coarser_[level - 1];
  }

  Partition cheapest(double penalty, std::size_t level) {
    if constexpr (std::is_same_v<Cost, PrefixCost>) {
      if (level < steps_.size() && steps_[level] == kStep) {
        if (scratch_[level + 1].penalty != penalty) {
          cheapest(penalty, level + 1);
        }
        Partition result = guided_partition(cost_of(level), penalty, scratch_[level + 1],
                                            steps_[level], scratch_[level]);
        if (!result.ends.empty()) {
          return result;
        }
      }
    }
    return cheapest_partition(cost_of(level), penalty, scratch_[level]);
  }

  const Cost& finest_;
  std::vector<Cost> coarser_;
  std::vector<std::size_t> steps_;  // from each level to the next
  std::vector<Scratch>& scratch_;
};

// Fills `best[i]` and `start[i]` for i in [low, high): the least error of [0, i) if the last
// cluster starts in [from, to]. The best start never falls as i rises, so the middle i bounds both
// halves.
template <typename Cost>
void fill_layer(const Cost& cost, std::span<const double> before, std::span<double> best,
                std::span<std::uint32_t> start, std::size_t low, std::size_t high, std::size_t from,
                std::size_t to) {
  if (low >= high) {
    return;
  }
  const std::size_t middle = low + (high - low) / 2;
  best[middle] = std::numeric_limits<double>::infinity();
  for (std::size_t j = from; j <= std::min(to, middle - 1); ++j) {
    const double error = before[j] + cost(j, middle);
    if (error < best[middle]) {
      best[middle] = error;
      start[middle] = static_cast<std::uint32_t>(j);
    }
  }
  fill_layer(cost, before, best, start, low, middle, from, start[middle]);
  fill_layer(cost, before, best, start, middle + 1, high, start[middle], to);
}

template <typename Cost>
Partition dynamic_program(const Cost& cost, std::size_t k) {
  const std::size_t n = cost.size();
  std::vector<double> before(n + 1);
  std::vector<double> best(n + 1);
  for (std::size_t i = 1; i <= n; ++i) {
    best[i] = cost(0, i);
  }
  std::vector<std::vector<std::uint32_t>> start(k, std::vector<std::uint32_t>(n + 1));
  for (std::size_t layer = 1; layer < k; ++layer) {
    before.swap(best);
    const std::size_t low = layer + 1 < k ? layer + 1 : n;  // only n matters in the last
    fill_layer(cost, before, best, start[layer], low, n + 1, layer, n - 1);
  }
  Partition result{Ends(k), best[n], 0};
  std::size_t end = n;
  for (std::size_t j = k; j-- > 0; end = start[j][end]) {
    result.ends[j] = end;
  }
  return result;
}

// Solves with the fast cost, and again with the accurate one if rounding could have misled it.
template <typename Solve>
Partition solve(const WeightedValues& data, std::size_t k, const Solve& partition) {
  constexpr double kTolerance = 1e-7;
  const std::size_t n = data.values.size();
  if (n <= k) {
    return {each_alone(n), 0, 0};
  }
  const PrefixCost cost(data);
  Partition result = partition(cost, k);
  const double bound = cost.error_bound(result.ends);
  if (bound <= kTolerance * (result.error - bound)) {
    return result;
  }
  return partition(TreeCost(data), k);
}

// Solves for one row after another. Rows of one weight resemble each other, and so do the
// penalties, as a share of the error of a single cluster: a row's search starts at the last one's.
class Solver {
 public:
  Ends clusters(const WeightedValues& data, std::size_t k) {
    constexpr std::size_t kFewClusters = 2;
    const auto partition = [this](const auto& cost, std::size_t n_clusters) {
      if (n_clusters <= kFewClusters) {
        return dynamic_program(cost, n_clusters);
      }
      const double whole = cost(0, cost.size());
      Partition result = Levels(cost, n_clusters, scratch_).search(n_clusters, share_ * whole);
      share_ = result.penalty > 0 && whole > 0 ? result.penalty / whole : 0;
      return result;
    };
    return solve(data, k, partition).ends;
  }

 private:
  double share_ = 0;
  std::vector<Scratch> scratch_;
};

// ---------------------------------------------------------------------------------------------
// Entries

// The rounding error of the mean is that of the mean distance from it, however far both are from
// zero.
double mean(const WeightedValues& data, std::size_t begin, std::size_t end) {
  const double* const weights = data.weights.data() + begin;
  const double* const values = data.values.data() + begin;
  const std::size_t n = end - begin;
  const double weight = lane_sum(n, [&](std::size_t i) { return weights[i]; });
  const double rough = lane_sum(n, [&](std::size_t i) { return weights[i] * values[i]; }) / weight;
  const double pivot = std::clamp(rough, values[0], values[n - 1]);
  return pivot +
         lane_sum(n, [&](std::size_t i) { return weights[i] * (values[i] - pivot); }) / weight;
}

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
// raise the error, so taking turns is never worse than rounding the means once.
template <typename T>
std::vector<float> rounded_entries(const WeightedValues& data, Ends ends) {
  constexpr int kMaxTurns = 100;
  std::vector<float> entries(ends.size());
  Ends before(ends.size());
  for (int turn = 0; turn < kMaxTurns && ends != before; ++turn) {
    for (std::size_t j = 0; j < ends.size(); ++j) {
      const std::size_t begin = j == 0 ? 0 : ends[j - 1];
      const bool changed = ends[j] != before[j] || (j > 0 && begin != before[j - 1]);
      if (changed && begin < ends[j]) {
        entries[j] = nearest<T>(mean(data, begin, ends[j]));
      }
    }
    before = ends;
    for (std::size_t j = 0; j + 1 < ends.size(); ++j) {
      const double midpoint = (double{entries[j]} + entries[j + 1]) / 2;
      ends[j] =
          std::upper_bound(data.values.begin(), data.values.end(), midpoint) - data.values.begin();
    }
  }
  return entries;
}

template <typename T>
void fit_row(std::span<const T> weights, std::span<const float> importance, std::span<T> lut,
             Bins& bins, Solver& solver) {
  check(std::all_of(
            importance.begin(), importance.end(),
            [](float share) { return share >= 0 && share <= std::numeric_limits<float>::max(); }),
        "importance must be finite and not negative");
  WeightedValues data = distinct_values(weights, importance, bins);
  if (data.values.empty()) {
    data = distinct_values(weights, {}, bins);
  }
  std::vector<float> entries = rounded_entries<T>(data, solver.clusters(data, lut.size()));
  entries.resize(lut.size(), entries.empty() ? 0.0F : entries.back());
  std::transform(entries.begin(), entries.end(), lut.begin(), from_float<T>);
}

}  // namespace

WeightedValues value_counts(std::span<const Half> weights) { return counted_values(weights, {}); }

std::vector<std::size_t> optimal_clusters(const WeightedValues& data, std::size_t k) {
  return Solver().clusters(data, k);
}

std::vector<std::size_t> optimal_clusters_by_dynamic_program(const WeightedValues& data,
                                                             std::size_t k) {
  return solve(data, k,
               [](const auto& cost, std::size_t n_clusters) {
                 return dynamic_program(cost, n_clusters);
               })
      .ends;
}

double squared_error(const WeightedValues& data, std::span<const std::size_t> ends) {
  double error = 0;
  std::size_t begin = 0;
  for (const std::size_t end : ends) {
    const double centre = begin < end ? mean(data, begin, end) : 0;
    for (; begin < end; ++begin) {
      const double distance = data.values[begin] - centre;
      error += data.weights[begin] * distance * distance;
    }
  }
  return error;
}

template <typename T>
void kmeans1d(MatrixView<const T> weights, MatrixView<const float> importance, MatrixView<T> luts) {
  check(luts.n_rows == weights.n_rows, "luts must have ", weights.n_rows,
        " rows like weights, got ", luts.n_rows);
  check(luts.n_rows == 0 || luts.n_cols > 0, "luts must have at least 1 entry a row");
  check(importance.n_rows == 0 ||
            (importance.n_rows == weights.n_rows && importance.n_cols == weights.n_cols),
        "importance must have the shape of weights, ", weights.n_rows, " x ", weights.n_cols,
        ", got ", importance.n_rows, " x ", importance.n_cols);
  const std::size_t rows = kGrain / std::max<std::size_t>(1, weights.n_cols);
  parallel_for(weights.n_rows, rows, [&](std::size_t begin, std::size_t end) {
    Bins bins;
    Solver solver;
    for (std::size_t row = begin; row < end; ++row) {
      fit_row(weights.row(row),
              importance.n_rows == 0 ? std::span<const float>() : importance.row(row),
              luts.row(row), bins, solver);
    }
  });
}

template void kmeans1d(MatrixView<const Half>, MatrixView<const float>, MatrixView<Half>);
template void kmeans1d(MatrixView<const float>, MatrixView<const float>, MatrixView<float>);

}  // namespace milpress
