#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "kernels/value_counts.h"

namespace milpress {

/// Cost of a cluster: the squared error of the values [begin, end) around their mean.
///
/// A cost also settles duels: which of two starts is the better one for the last cluster, as a
/// function of its end. The cheaper a start's partition of what comes before, the greater its lead.

/// The sum of `term(i)` for i in [0, n), eight terms side by side.
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

/// Differences of prefix sums: fast, with an absolute error that scales with the whole row.
class PrefixCost {
 public:
  explicit PrefixCost(const WeightedValues& data) : PrefixCost(data.values.size()) {
    const std::size_t n = size();
    const std::vector<double>& weights = data.weights;
    const std::vector<double>& values = data.values;
    has_whole_weights_ = std::all_of(weights.begin(), weights.end(),
                                     [](double weight) { return weight == std::floor(weight); });
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
      sum.second.add(moment * value + data.spread(i));
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
        weight_[i] = weight_[i - 1] * (1 + std::numeric_limits<double>::epsilon());
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

  /// The cost of the same data with its values negated, and so in reverse order.
  PrefixCost mirrored() const {
    const std::size_t n = size();
    PrefixCost result(n);
    for (std::size_t i = 0; i <= n; ++i) {
      result.weight_[i] = -weight_[n - i];
      result.first_[i] = first_[n - i];
      result.second_[i] = -second_[n - i];
    }
    result.pad();
    return result;
  }

  /// Bounds the rounding error of the cost of all clusters: each sum is off by an epsilon of the
  /// greatest of its kind, one of whole weights by nothing, and the formula passes that on times 1,
  /// 2 * mean and mean^2.
  double error_bound(std::span<const std::size_t> ends) const {
    const double weight = has_whole_weights_ ? 0 : weight_.back();
    const double second = second_.back();
    double first = 0;
    for (const double moment : first_) {
      first = std::max(first, std::abs(moment));
    }
    double bound = 0;
    std::size_t begin = 0;
    for (const std::size_t end : ends) {
      const double mean = std::abs((first_[end] - first_[begin]) / (weight_[end] - weight_[begin]));
      bound += second + mean * (2 * first + mean * weight);
      begin = end;
    }
    return 2 * std::numeric_limits<double>::epsilon() * bound;
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
  bool has_whole_weights_ = false;  // whose sums are exact, as they are below 2^53
};

/// A tree of merged neighbours: every term is positive, so the error is relative to the cost
/// itself.
class TreeCost {
 public:
  explicit TreeCost(const WeightedValues& data) {
    std::vector<Cluster> leaves;
    for (std::size_t i = 0; i < data.values.size(); ++i) {
      leaves.push_back({data.weights[i], data.values[i], data.spread(i)});
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

  TreeCost mirrored() const {
    std::vector<Cluster> leaves;
    for (std::size_t i = size(); i-- > 0;) {
      const Cluster& leaf = tree_[size() + i];
      leaves.push_back({leaf.weight, -leaf.mean, leaf.error});
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

}  // namespace milpress
