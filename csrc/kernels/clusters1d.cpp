#include "kernels/clusters1d.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

#include "core/vectorize.h"
#include "kernels/cluster_cost.h"

namespace milpress {
namespace {

using Ends = std::vector<std::size_t>;

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
  Scratch::Node* const nodes = scratch.nodes.data();
  double* const offsets = scratch.offsets.data();
  nodes[0] = {0, 0, 0};
  offsets[0] = cost.offset(0, 0);
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
    scratch.blocks.resize(n_blocks);
    scratch.blocks.push_back({before, high});
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

// Logarithms that are straight between powers of two: those of the standard library are rounded in
// other ways on other systems, and equal penalties must make equal tables.
double rough_log2(double value) {
  int exponent = 0;
  const double fraction = std::frexp(value, &exponent);
  return exponent + (2 * fraction - 2);
}

double rough_exp2(double logarithm) {
  const double whole = std::floor(logarithm);
  return std::ldexp(1 + (logarithm - whole), static_cast<int>(whole));
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

  /// The cheapest partition into `k` clusters, if little is known of its penalty: each level begins
  /// with that of the coarser one, and the coarsest with `penalty`.
  Partition search(std::size_t k, double penalty, std::size_t level = 0) {
    if (level < steps_.size()) {
      penalty = search(k, penalty, level + 1).penalty;
    }
    return settle(k, penalty, level);
  }

  /// Finds the penalty whose cheapest partition has `k` clusters, beginning with `penalty` or, if
  /// that is 0, with a rule of thumb. The count falls as the penalty rises, for smooth data with
  /// its cube root: that gives the next guess, until the penalty lies between two that were tried.
  /// Where guesses fail, the penalty at which both ends of the bracket cost the same either narrows
  /// the bracket or shows that everything between them costs the same as well.
  Partition settle(std::size_t k, double penalty, std::size_t level = 0) {
    constexpr int kMaxGuesses = 12;
    constexpr std::size_t kNarrow = 4;  // clusters between the ends of a bracket
    const Cost& cost = cost_of(level);
    const std::size_t n = cost.size();
    const auto wanted = static_cast<double>(k);

    Partition few{{n}, cost(0, n), std::numeric_limits<double>::infinity()};
    Partition many;  // without ends, a cluster for each value
    if (penalty == 0) {
      penalty = 2 * few.error / (wanted * wanted * wanted);
    }
    bool narrow = false;
    for (int guess = 0;; ++guess) {
      const std::size_t n_many = many.ends.empty() ? n : many.ends.size();
      const bool last_resort =
          narrow || guess >= kMaxGuesses || !(penalty > many.penalty) || !(penalty < few.penalty);
      if (last_resort) {
        penalty = (few.error - many.error) / static_cast<double>(n_many - few.ends.size());
      }
      Partition next = cheapest(penalty, level);
      const std::size_t count = next.ends.size();
      if (count == k) {
        return next;
      }
      if (last_resort && (count <= few.ends.size() || count >= n_many)) {
        if (many.ends.empty()) {
          many.ends = each_alone(n);
        }
        return splice(cost, few, many, penalty, k);
      }
      (count < k ? few : many) = std::move(next);
      if (few.penalty < std::numeric_limits<double>::infinity() && !many.ends.empty()) {
        const auto fewest = static_cast<double>(few.ends.size());
        const auto most = static_cast<double>(many.ends.size());
        narrow = many.ends.size() - few.ends.size() <= kNarrow;
        const double low = rough_log2(many.penalty);
        const double share = rough_log2(most / wanted) / rough_log2(most / fewest);
        penalty = rough_exp2(low + share * (rough_log2(few.penalty) - low));
      } else {
        const double ratio = static_cast<double>(count) / wanted;
        double factor = ratio * ratio * ratio;
        for (int i = 0; i < guess; ++i) {
          factor *= factor;  // a step too short is followed by a longer one
        }
        penalty *= factor;
      }
    }
  }

  /// The least error + penalty * clusters of what comes before each end.
  std::vector<double> least_costs(double penalty) {
    if (scratch_[0].penalty != penalty) {
      cheapest(penalty, 0);
    }
    std::vector<double> costs(finest_.size() + 1);
    for (std::size_t i = 0; i < costs.size(); ++i) {
      costs[i] = scratch_[0].nodes[i].error + penalty * scratch_[0].nodes[i].count;
    }
    return costs;
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

// What rounding may make of an error, as a share of it.
constexpr double kTolerance = 1e-7;

// Solves with the fast cost, and again with the accurate one if rounding could have misled it.
template <typename Solve>
Partition solve(const WeightedValues& data, std::size_t k, const Solve& partition) {
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

}  // namespace

// Penalties too resemble each other from row to row, as a share of the error of a single cluster.
struct ClusterSearch::State {
  double share = 0;
  std::vector<Scratch> scratch;
};

ClusterSearch::ClusterSearch() : state_(std::make_unique<State>()) {}
ClusterSearch::~ClusterSearch() = default;

Ends ClusterSearch::best(const WeightedValues& data, std::size_t k) {
  constexpr std::size_t kFewClusters = 2;
  const auto partition = [&](const auto& cost, std::size_t n_clusters) {
    if (n_clusters <= kFewClusters) {
      return dynamic_program(cost, n_clusters);
    }
    auto& [share, scratch] = *state_;
    const double whole = cost(0, cost.size());
    Partition result = Levels(cost, n_clusters, scratch).search(n_clusters, share * whole);
    share = result.penalty > 0 && whole > 0 ? result.penalty / whole : 0;
    return result;
  };
  return solve(data, k, partition).ends;
}

Ends ClusterSearch::best(const WeightedValues& data, std::size_t k, double penalty) {
  const auto partition = [&](const auto& cost, std::size_t n_clusters) {
    return Levels(cost, n_clusters, state_->scratch).settle(n_clusters, penalty);
  };
  return solve(data, k, partition).ends;
}

// The best clusters of the single values have centres that ascend, and a border between two of them
// lies where their distances are equal. Let every clump go as a whole to the centre nearest to its
// mean. What that adds for a border that cuts a clump is the distance of the two centres times at
// most `sum_i weight_i * |value_i - mean|` of the clump, which is at most `sqrt(weight * spread)`.
// These distances add up to `range` at most. So a border cuts a clump, or lies next to it, only if
// some clusters of whole clumps that end on one of its two sides are, beside the best of them, no
// worse than `range` times the greatest of these roots.
Outline ClusterSearch::outline(const WeightedValues& clumps, std::size_t k, double range) {
  const std::size_t n = clumps.values.size();
  double greatest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    greatest = std::max(greatest, clumps.weights[i] * clumps.spread(i));
  }
  const double slack = range * std::sqrt(greatest);
  Outline result{std::vector<bool>(n, true), 0};
  const auto partition = [&](const auto& cost, std::size_t n_clusters) {
    auto& [share, scratch] = *state_;
    const double whole = cost(0, n);
    Levels levels(cost, n_clusters, scratch);
    Partition found = levels.search(n_clusters, share * whole);
    share = found.penalty > 0 && whole > 0 ? found.penalty / whole : 0;
    const std::vector<double> before = levels.least_costs(found.penalty);
    const auto mirror = cost.mirrored();
    const std::vector<double> after =
        Levels(mirror, n_clusters, scratch).least_costs(found.penalty);
    const double least = found.error + found.penalty * static_cast<double>(n_clusters);
    const double limit = std::max(least, before[n]) + slack + 2 * kTolerance * found.error;
    const auto may_end = [&](std::size_t i) {
      return i == 0 || i == n || !(before[i] + after[n - i] > limit);
    };
    for (std::size_t i = 0; i < n; ++i) {
      result.may_be_cut[i] = may_end(i) || may_end(i + 1);
    }
    result.penalty = found.penalty;
    return found;
  };
  solve(clumps, k, partition);
  return result;
}

std::vector<std::size_t> optimal_clusters_by_dynamic_program(const WeightedValues& data,
                                                             std::size_t k) {
  const auto partition = [](const auto& cost, std::size_t n) { return dynamic_program(cost, n); };
  return solve(data, k, partition).ends;
}

double squared_error(const WeightedValues& data, std::span<const std::size_t> ends) {
  double error = 0;
  std::size_t begin = 0;
  for (const std::size_t end : ends) {
    const double centre = begin < end ? mean_of(data, begin, end) : 0;
    for (; begin < end; ++begin) {
      const double distance = data.values[begin] - centre;
      error += data.weights[begin] * distance * distance;
    }
  }
  return error;
}

// The rounding error of the mean is that of the mean distance from it, however far both are from
// zero.
double mean_of(const WeightedValues& data, std::size_t begin, std::size_t end) {
  const double* const weights = data.weights.data() + begin;
  const double* const values = data.values.data() + begin;
  const std::size_t n = end - begin;
  const double weight = lane_sum(n, [&](std::size_t i) { return weights[i]; });
  const double rough = lane_sum(n, [&](std::size_t i) { return weights[i] * values[i]; }) / weight;
  const double pivot = std::clamp(rough, values[0], values[n - 1]);
  return pivot +
         lane_sum(n, [&](std::size_t i) { return weights[i] * (values[i] - pivot); }) / weight;
}

}  // namespace milpress
