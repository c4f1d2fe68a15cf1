#include "kernels/kmeans1d.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <type_traits>

#include "core/check.h"
#include "core/parallel.h"

namespace milpress {
namespace {

using Ends = std::vector<std::size_t>;

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
constexpr std::size_t kGrain = 4096;  // weights a thread takes at a time, in whole rows

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

WeightedValues distinct_values(std::span<const float> weights, std::span<const float> importance) {
  return sorted_values(weights, importance);
}

WeightedValues distinct_values(std::span<const Half> weights, std::span<const float> importance) {
  constexpr std::size_t kHistogramMin = 16'384;  // above, visiting all the bins is the lesser cost
  return weights.size() < kHistogramMin ? sorted_values(weights, importance)
                                        : counted_values(weights, importance);
}

// ---------------------------------------------------------------------------------------------
// Cost of a cluster: the squared error of the values [begin, end) around their mean

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
  explicit PrefixCost(const WeightedValues& data) {
    const std::size_t n = data.values.size();
    const double centre =
        std::inner_product(data.weights.begin(), data.weights.end(), data.values.begin(), 0.0) /
        std::accumulate(data.weights.begin(), data.weights.end(), 0.0);
    CompensatedSum weight;
    CompensatedSum first;
    CompensatedSum second;
    sums_.reserve(n + 1);
    sums_.emplace_back();
    for (std::size_t i = 0; i < n; ++i) {
      const double value = data.values[i] - centre;
      weight.add(data.weights[i]);
      first.add(data.weights[i] * value);
      second.add(data.weights[i] * value * value);
      // A weight too small to count would make a cluster of none and its mean 0 / 0.
      const double least = sums_.back().weight * (1 + kEpsilon);
      sums_.push_back({std::max(weight.sum, least), first.sum, second.sum});
    }
  }

  std::size_t size() const { return sums_.size() - 1; }

  double operator()(std::size_t begin, std::size_t end) const {
    const Sums& a = sums_[begin];
    const Sums& b = sums_[end];
    const double first = b.first - a.first;
    return (b.second - a.second) - first * first / (b.weight - a.weight);
  }

  /// The same with only every `step`-th value able to end a cluster.
  PrefixCost coarse(std::size_t step) const {
    PrefixCost result;
    for (std::size_t i = 0; i < size(); i += step) {
      result.sums_.push_back(sums_[i]);
    }
    result.sums_.push_back(sums_.back());
    return result;
  }

  /// Bounds the rounding error of the cost of all clusters: each sum is off by its own epsilon, and
  /// the formula passes that on times 1, 2 * mean and mean^2.
  double error_bound(const Ends& ends) const {
    double largest = 0;
    for (const Sums& sums : sums_) {
      largest = std::max(largest, std::abs(sums.first));
    }
    double bound = 0;
    std::size_t begin = 0;
    for (const std::size_t end : ends) {
      const double mean = std::abs((sums_[end].first - sums_[begin].first) /
                                   (sums_[end].weight - sums_[begin].weight));
      bound += sums_.back().second + mean * (2 * largest + mean * sums_.back().weight);
      begin = end;
    }
    return 2 * kEpsilon * bound;
  }

 private:
  struct Sums {
    double weight = 0;
    double first = 0;   // of weight * value
    double second = 0;  // of weight * value^2
  };

  PrefixCost() = default;

  std::vector<Sums> sums_;  // one more than values
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

// The least error + penalty * clusters in one pass. A cluster costs more the further it starts from
// its end, and increasingly so; hence once a later start beats an earlier one it stays ahead, and
// a queue holds the starts in the order of the ends from which each is the best.
template <typename Cost>
Partition cheapest_partition(const Cost& cost, double penalty) {
  struct Node {
    double error;  // kept apart from the count, or a large penalty would round it away
    std::uint32_t count;
    std::uint32_t start;  // of the last cluster
  };
  struct Candidate {
    std::uint32_t start;
    std::uint32_t first_end;
  };
  const auto n = static_cast<std::uint32_t>(cost.size());
  std::vector<Node> nodes(n + 1);
  std::vector<Candidate> queue(n);
  queue[0] = {0, 1};
  std::size_t head = 0;
  std::size_t tail = 1;

  const auto beats = [&](std::uint32_t later, std::uint32_t earlier, std::uint32_t end) {
    const Node& a = nodes[later];
    const Node& b = nodes[earlier];
    return (a.error + cost(later, end)) - (b.error + cost(earlier, end)) <
           penalty * (static_cast<double>(b.count) - static_cast<double>(a.count));
  };
  // The first end in [low, n] that `later` wins, else n + 1. It is near in smooth data: gallop.
  const auto first_win = [&](std::uint32_t later, std::uint32_t earlier, std::uint32_t low) {
    std::uint32_t step = 1;
    std::uint32_t high = low;
    while (high <= n && !beats(later, earlier, high)) {
      low = high + 1;
      high += step;
      step *= 2;
    }
    high = std::min(high, n + 1);
    while (low < high) {
      const std::uint32_t middle = low + (high - low) / 2;
      if (beats(later, earlier, middle)) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return high;
  };

  for (std::uint32_t i = 1; i <= n; ++i) {
    while (head + 1 < tail && queue[head + 1].first_end <= i) {
      ++head;
    }
    const std::uint32_t start = queue[head].start;
    nodes[i] = {nodes[start].error + cost(start, i), nodes[start].count + 1, start};
    if (i == n) {
      break;
    }
    queue[head].first_end = i + 1;
    while (tail > head && beats(i, queue[tail - 1].start, queue[tail - 1].first_end)) {
      --tail;
    }
    const std::uint32_t first =
        tail == head ? i + 1 : first_win(i, queue[tail - 1].start, queue[tail - 1].first_end + 1);
    if (first <= n) {
      queue[tail++] = {i, first};
    }
  }

  Partition result{Ends(nodes[n].count), nodes[n].error, penalty};
  std::size_t end = n;
  for (std::size_t j = result.ends.size(); j-- > 0; end = nodes[end].start) {
    result.ends[j] = end;
  }
  return result;
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

// Finds the penalty whose cheapest partition has `k` clusters. The count falls as the penalty
// rises, for smooth data with its cube root: that gives the next guess. Where the guess fails, the
// penalty at which both ends of the bracket cost the same either narrows the bracket or shows that
// everything between them costs the same as well.
template <typename Cost>
Partition search_partition(const Cost& cost, std::size_t k) {
  constexpr std::size_t kStep = 8;
  constexpr std::size_t kCoarseMin = 4;  // values per cluster that give a good first penalty
  constexpr int kMaxGuesses = 12;
  const std::size_t n = cost.size();
  const auto cube = [](double x) { return x * x * x; };

  Partition few{{n}, cost(0, n), std::numeric_limits<double>::infinity()};
  Partition many{Ends(n), 0, 0};
  std::iota(many.ends.begin(), many.ends.end(), std::size_t{1});
  double penalty = n >= kStep * kCoarseMin * k ? search_partition(cost.coarse(kStep), k).penalty
                                               : 2 * few.error / cube(static_cast<double>(k));
  bool stalled = false;
  for (int guess = 0;; ++guess) {
    const bool last_resort =
        stalled || guess >= kMaxGuesses || !(penalty > many.penalty) || !(penalty < few.penalty);
    if (last_resort) {
      penalty = (few.error - many.error) / static_cast<double>(many.ends.size() - few.ends.size());
    }
    Partition next = cheapest_partition(cost, penalty);
    const std::size_t count = next.ends.size();
    if (count == k) {
      return next;
    }
    stalled = count <= few.ends.size() || count >= many.ends.size();
    if (stalled && last_resort) {
      return splice(cost, few, many, penalty, k);
    }
    if (!stalled) {
      penalty *= cube(static_cast<double>(count) / static_cast<double>(k));
      (count < k ? few : many) = std::move(next);
    }
  }
}

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
Ends solve(const WeightedValues& data, std::size_t k, const Solve& partition) {
  constexpr double kTolerance = 1e-7;
  const std::size_t n = data.values.size();
  if (n <= k) {
    Ends ends(n);
    std::iota(ends.begin(), ends.end(), std::size_t{1});
    return ends;
  }
  const PrefixCost cost(data);
  Ends ends = partition(cost, k).ends;
  if (cost.error_bound(ends) <= kTolerance * squared_error(data, ends)) {
    return ends;
  }
  return partition(TreeCost(data), k).ends;
}

// ---------------------------------------------------------------------------------------------
// Entries

// Counted from the heaviest value, or a light one far away would round the mean off.
double mean(const WeightedValues& data, std::size_t begin, std::size_t end) {
  const auto weights = data.weights.begin();
  const double pivot = data.values[std::max_element(weights + begin, weights + end) - weights];
  double weight = 0;
  double first = 0;
  for (std::size_t i = begin; i < end; ++i) {
    weight += data.weights[i];
    first += data.weights[i] * (data.values[i] - pivot);
  }
  return pivot + first / weight;
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
  for (int turn = 0; turn < kMaxTurns; ++turn) {
    for (std::size_t j = 0; j < ends.size(); ++j) {
      const std::size_t begin = j == 0 ? 0 : ends[j - 1];
      if (begin < ends[j]) {
        entries[j] = nearest<T>(mean(data, begin, ends[j]));
      }
    }
    Ends next = ends;
    for (std::size_t j = 0; j + 1 < ends.size(); ++j) {
      const double midpoint = (double{entries[j]} + entries[j + 1]) / 2;
      next[j] =
          std::upper_bound(data.values.begin(), data.values.end(), midpoint) - data.values.begin();
    }
    if (next == ends) {
      break;
    }
    ends = std::move(next);
  }
  return entries;
}

template <typename T>
void fit_row(std::span<const T> weights, std::span<const float> importance, std::span<T> lut) {
  check(std::all_of(
            importance.begin(), importance.end(),
            [](float share) { return share >= 0 && share <= std::numeric_limits<float>::max(); }),
        "importance must be finite and not negative");
  WeightedValues data = distinct_values(weights, importance);
  if (data.values.empty()) {
    data = distinct_values(weights, {});
  }
  std::vector<float> entries = rounded_entries<T>(data, optimal_clusters(data, lut.size()));
  entries.resize(lut.size(), entries.empty() ? 0.0F : entries.back());
  std::transform(entries.begin(), entries.end(), lut.begin(), from_float<T>);
}

}  // namespace

std::vector<std::size_t> optimal_clusters(const WeightedValues& data, std::size_t k) {
  constexpr std::size_t kFewClusters = 2;
  return solve(data, k, [](const auto& cost, std::size_t n_clusters) {
    return n_clusters <= kFewClusters ? dynamic_program(cost, n_clusters)
                                      : search_partition(cost, n_clusters);
  });
}

std::vector<std::size_t> optimal_clusters_by_dynamic_program(const WeightedValues& data,
                                                             std::size_t k) {
  return solve(data, k, [](const auto& cost, std::size_t n_clusters) {
    return dynamic_program(cost, n_clusters);
  });
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
    for (std::size_t row = begin; row < end; ++row) {
      fit_row(weights.row(row),
              importance.n_rows == 0 ? std::span<const float>() : importance.row(row),
              luts.row(row));
    }
  });
}

template void kmeans1d(MatrixView<const Half>, MatrixView<const float>, MatrixView<Half>);
template void kmeans1d(MatrixView<const float>, MatrixView<const float>, MatrixView<float>);

}  // namespace milpress
