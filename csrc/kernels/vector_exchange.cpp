#include "kernels/vector_exchange.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace milpress {
namespace {

// Of an entry's vectors.
struct Cluster {
  double weight = 0;
  double error = 0;
  double loss = 0;  // what the error would grow by without the entry, at most
};

std::vector<std::size_t> sorted_by(std::size_t n, const auto& is_before) {
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), is_before);
  return order;
}

}  // namespace

std::size_t exchange(const Vectors& vectors, const Lloyd& lloyd, double least, std::size_t n_most,
                     Entries& entries) {
  const std::size_t dim = vectors.dim;
  std::vector<Cluster> clusters(entries.size() / dim);
  std::vector<double> sums(entries.size());
  std::vector<double> squares(entries.size());
  for (std::size_t i = 0; i < vectors.count; ++i) {
    const std::size_t code = lloyd.codes()[i];
    const double share = vectors.shares[i];
    const double distance = lloyd.distances()[i];
    const double other = lloyd.others()[i];
    Cluster& cluster = clusters[code];
    cluster.weight += share;
    cluster.error += share * distance;
    cluster.loss += share * std::max(0.0, other * other - distance);
    for (std::size_t d = 0; d < dim; ++d) {
      const double away = double{vectors.at(i, d)} - entries[code * dim + d];
      sums[code * dim + d] += share * away;
      squares[code * dim + d] += share * away * away;
    }
  }
  const std::vector<std::size_t> idle = sorted_by(
      clusters.size(), [&](auto a, auto b) { return clusters[a].loss < clusters[b].loss; });
  const std::vector<std::size_t> busy = sorted_by(
      clusters.size(), [&](auto a, auto b) { return clusters[a].error > clusters[b].error; });
  std::vector<bool> is_taken(clusters.size());
  std::size_t n_moved = 0;
  for (std::size_t i = 0, j = 0; n_moved < n_most && i < idle.size(); ++i) {
    if (is_taken[idle[i]]) {
      continue;
    }
    while (j < busy.size() && is_taken[busy[j]]) {
      ++j;
    }
    if (j == busy.size() || busy[j] == idle[i] ||
        !(clusters[idle[i]].loss < least * clusters[busy[j]].error)) {
      break;
    }
    const std::size_t from = idle[i] * dim;
    const std::size_t to = busy[j] * dim;
    const double weight = clusters[busy[j]].weight;
    std::size_t widest = 0;
    double variance = 0;
    for (std::size_t d = 0; d < dim; ++d) {
      const double mean = sums[to + d] / weight;
      const double own = squares[to + d] / weight - mean * mean;
      if (own > variance) {
        variance = own;
        widest = d;
      }
      entries[to + d] = static_cast<float>(entries[to + d] + mean);
      entries[from + d] = entries[to + d];
    }
    // The means of the halves of a normal distribution.
    const double away = 0.8 * std::sqrt(variance);
    entries[from + widest] = static_cast<float>(entries[from + widest] + away);
    entries[to + widest] = static_cast<float>(entries[to + widest] - away);
    is_taken[idle[i]] = true;
    is_taken[busy[j]] = true;
    ++n_moved;
  }
  return n_moved;
}

}  // namespace milpress
