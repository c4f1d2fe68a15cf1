#include "kernels/kmeans_vector.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "core/parallel.h"
#include "core/random.h"
#include "kernels/kmeans1d.h"
#include "kernels/lut_assign.h"
#include "kernels/vector_assign.h"
#include "kernels/vector_exchange.h"
#include "kernels/vector_grid.h"
#include "kernels/vector_lloyd.h"
#include "kernels/vector_nearest.h"
#include "kernels/vectors.h"

namespace milpress {
namespace {

struct Fit {
  Entries entries;
  double error = std::numeric_limits<double>::infinity();
};

constexpr int kMaxTurns = 100;

// Takes turns until one gains less than `least_gain` of the error.
Fit refine(Lloyd& lloyd, Entries entries, double least_gain) {
  // Entries go beyond the means of their vectors, and on the way of the turn before (Polyak 1964,
  // "Some methods of speeding up the convergence of iteration methods"): half as many turns, and
  // better minima.
  constexpr double kStride = 1.8;
  constexpr double kMomentum = 0.6;
  Fit best;
  Entries moves(entries.size());
  for (int turn = 0; turn < kMaxTurns; ++turn) {
    const double error = lloyd.assign(entries);
    const bool is_settled = error > (1 - least_gain) * best.error;
    const bool is_best = error < best.error;
    if (is_best) {
      best = {entries, error};
    }
    const Entries before = entries;
    const std::size_t n_empty = lloyd.move(entries, kStride);
    if (error == 0 || (is_settled && n_empty == 0)) {
      break;
    }
    const double momentum = is_best && n_empty == 0 ? kMomentum : 0;
    for (std::size_t i = 0; i < entries.size(); ++i) {
      entries[i] = static_cast<float>(entries[i] + momentum * moves[i]);
      moves[i] = n_empty == 0 ? entries[i] - before[i] : 0;
    }
  }
  return best;
}

// Refines roughly, then again and again with some entries exchanged, while that helps.
Fit search(Lloyd& lloyd, const Vectors& vectors, Entries entries) {
  constexpr int kRounds = 10;
  constexpr double kRoughGain = 4e-3;
  constexpr double kLittle = 1.2;  // see `exchange`
  constexpr double kStricter = 0.85;
  constexpr std::size_t kPerMove = 16;
  const std::size_t n_most = std::max<std::size_t>(1, entries.size() / vectors.dim / kPerMove);
  Fit best = refine(lloyd, std::move(entries), kRoughGain);
  double little = kLittle;
  for (int round = 1; round < kRounds && best.error > 0; ++round) {
    entries = best.entries;
    lloyd.forget();
    lloyd.assign(entries);
    if (exchange(vectors, lloyd, little, n_most, entries) == 0) {
      break;
    }
    Fit fit = refine(lloyd, std::move(entries), kRoughGain);
    if (fit.error < best.error) {
      best = std::move(fit);
    } else {
      little *= kStricter;
    }
  }
  return best;
}

// Entries rounded to `T` as they are without `factor`, in ascending order, which `lloyd` follows.
template <typename T>
Entries rounded(const Entries& entries, std::size_t dim, float factor, Lloyd& lloyd) {
  Entries result(entries.size());
  std::transform(entries.begin(), entries.end(), result.begin(), [factor](float element) {
    return (round_to<T>(element / factor) + 0.0F) * factor;  // -0 becomes 0
  });
  const auto entry = [&](std::size_t j) { return std::span(result).subspan(j * dim, dim); };
  std::vector<std::size_t> order(entries.size() / dim);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::ranges::lexicographical_compare(entry(a), entry(b));
  });
  Entries sorted;
  std::vector<std::size_t> places(order.size());
  for (std::size_t j = 0; j < order.size(); ++j) {
    const auto next = entry(order[j]);
    sorted.insert(sorted.end(), next.begin(), next.end());
    places[order[j]] = j;
  }
  lloyd.reorder(places);
  return sorted;
}

struct Table {
  Entries entries;
  std::vector<std::uint8_t> codes;
};

// Rounding moves entries, and sorting them gives vectors halfway between two to the other one: both
// may leave entries away from their means. So table and assignment are improved in turn again, of
// the table as it will be stored, while that gains much: the rest is a matter of entries that go to
// their means.
template <typename T>
Table settle(Lloyd& lloyd, std::size_t dim, Entries entries, float factor) {
  constexpr double kGain = 1e-3;
  Table best;
  double least = std::numeric_limits<double>::infinity();
  for (int turn = 0; turn < kMaxTurns; ++turn) {
    entries = rounded<T>(entries, dim, factor, lloyd);
    const double error = lloyd.assign(entries);
    const bool is_settled = error > (1 - kGain) * least;
    if (error < least) {
      best.entries = entries;
      best.codes = lloyd.codes();
      least = error;
    }
    if (is_settled || error == 0) {
      break;
    }
    lloyd.move(entries);
  }
  return best;
}

// Some vectors, drawn half by their shares and half by what they would add to the error of one
// entry at the mean, so that those far out are among them; shares make up for the chances (Bachem,
// Lucic, Krause 2018, "Scalable k-means clustering via lightweight coresets").
Vectors sample(const Vectors& vectors, std::size_t n, Random& random) {
  const std::size_t dim = vectors.dim;
  double shares = 0;
  std::vector<double> mean(dim);
  for (std::size_t i = 0; i < vectors.count; ++i) {
    shares += vectors.shares[i];
    for (std::size_t d = 0; d < dim; ++d) {
      mean[d] += double{vectors.shares[i]} * vectors.at(i, d);
    }
  }
  for (double& element : mean) {
    element /= shares;
  }
  double error = 0;
  std::vector<double> parts(vectors.count);
  for (std::size_t i = 0; i < vectors.count; ++i) {
    for (std::size_t d = 0; d < dim; ++d) {
      const double away = vectors.at(i, d) - mean[d];
      parts[i] += vectors.shares[i] * away * away;
    }
    error += parts[i];
  }
  const auto chance_of = [&](std::size_t i) {
    return (vectors.shares[i] / shares + parts[i] / error) / 2;
  };
  Vectors result(dim, n);
  std::size_t drawn = 0;
  double chance = chance_of(0);
  double sum = chance;
  for (std::size_t i = 0; i < n; ++i) {
    const double place = (static_cast<double>(i) + random.unit()) / static_cast<double>(n);
    while (sum <= place && drawn + 1 < vectors.count) {
      chance = chance_of(++drawn);
      sum += chance;
    }
    for (std::size_t d = 0; d < dim; ++d) {
      result.at(i, d) = vectors.at(drawn, d);
    }
    result.shares[i] =
        static_cast<float>(vectors.shares[drawn] / (chance * static_cast<double>(n)));
  }
  return result;
}

// The best of a few starts, of which only the best third is searched from. The starts are drawn
// from `drawn`, which stand for `vectors`.
Entries cluster_some(const Vectors& vectors, const Vectors& drawn, std::size_t n_entries,
                     std::uint64_t seed) {
  constexpr std::size_t kRoom = 4096;
  constexpr std::size_t kShare = 3;
  constexpr double kRoughGain = 0.01;  // shows which starts are good
  // Starts differ the less the more entries there are. Few vectors have room for more of them.
  constexpr std::size_t kMost = 32;
  const std::size_t n_least = n_entries < kMaxEntries ? 8 : 1;
  const std::size_t n_roomy = n_least * kRoom / std::max<std::size_t>(1, vectors.count);
  std::vector<Fit> fits(std::clamp(n_roomy, n_least, kMost));
  const auto for_each = [&](const auto& body) {
    parallel_for(fits.size(), 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) {
        Lloyd lloyd(vectors);
        body(i, lloyd);
      }
    });
  };
  for_each([&](std::size_t i, Lloyd& lloyd) {
    Random own(seed + (std::uint64_t{i} << 56));  // no start of a near seed
    fits[i] = refine(lloyd, random_start(drawn, n_entries, own), kRoughGain);
  });
  const auto is_better = [](const Fit& a, const Fit& b) { return a.error < b.error; };
  std::stable_sort(fits.begin(), fits.end(), is_better);
  fits.resize((fits.size() + kShare - 1) / kShare);
  for_each([&](std::size_t i, Lloyd& lloyd) {
    fits[i] = search(lloyd, vectors, std::move(fits[i].entries));
  });
  return std::min_element(fits.begin(), fits.end(), is_better)->entries;
}

// The same for the cells of a grid, with starts drawn from the cells of a coarser one.
Entries cluster_cells(const Vectors& cells, std::size_t n_entries, std::size_t n_bits,
                      std::uint64_t seed) {
  return cluster_some(cells, merge(cells, n_bits).merged, n_entries, seed);
}

// What is nearest to the vectors of a cell hardly differs from what is nearest to their mean.
void guess_by_cells(const Grid& grid, const Entries& entries, Lloyd& lloyd) {
  const std::size_t dim = grid.sorted.dim;
  const float more = 1 + distance_slack(dim);
  Lloyd of_cells(grid.merged);
  of_cells.assign(entries);
  std::vector<std::uint8_t> codes(grid.sorted.stride);
  std::vector<float> others(grid.sorted.stride);
  for (std::size_t cell = 0, i = 0; cell < grid.ends.size(); ++cell) {
    for (; i < grid.ends[cell]; ++i) {
      float away = 0;
      for (std::size_t d = 0; d < dim; ++d) {
        const float difference = grid.sorted.at(i, d) - grid.merged.at(cell, d);
        away += difference * difference;
      }
      codes[i] = of_cells.codes()[cell];
      others[i] = of_cells.others()[cell] - std::sqrt(away) * more;
    }
  }
  lloyd.guess(entries, std::move(codes), std::move(others));
}

constexpr std::size_t kPerEntry = 64;  // vectors, or cells of a grid, that are searched at first

template <typename T>
Table cluster_by_grid(const Vectors& vectors, std::size_t n_entries, std::uint64_t seed,
                      float factor) {
  constexpr std::size_t kLeastBits = 5;
  constexpr std::size_t kCoarser = 2;      // bits, for starts from many cells
  constexpr std::size_t kPerFineCell = 2;  // vectors, for a finer grid between search and vectors
  constexpr double kLeastGain = 1.5e-4;
  const std::size_t n_bits =
      std::max<std::size_t>(kLeastBits, (std::bit_width(kPerEntry * n_entries) - 1) / vectors.dim);
  const std::size_t n_start_bits = n_bits > kLeastBits ? n_bits - kCoarser : n_bits;
  const bool is_finer = vectors.count > kPerFineCell << (n_bits + 1) * vectors.dim;
  const Grid grid = merge(vectors, is_finer ? n_bits + 1 : n_bits);
  Entries entries;
  if (is_finer) {
    const Grid coarser = merge(grid.merged, n_bits);
    Lloyd of_cells(grid.merged);
    entries = cluster_cells(coarser.merged, n_entries, n_start_bits, seed);
    entries = refine(of_cells, std::move(entries), kLeastGain).entries;
  } else {
    entries = cluster_cells(grid.merged, n_entries, n_start_bits, seed);
  }
  Lloyd lloyd(grid.sorted);
  guess_by_cells(grid, entries, lloyd);
  entries = refine(lloyd, std::move(entries), kLeastGain).entries;
  const Table sorted = settle<T>(lloyd, vectors.dim, std::move(entries), factor);
  Table table{sorted.entries, std::vector<std::uint8_t>(vectors.count)};
  for (std::size_t i = 0; i < vectors.count; ++i) {
    table.codes[grid.places[i]] = sorted.codes[i];
  }
  return table;
}

// Searched with the cells of a grid or a sample, refined with all the vectors.
template <typename T>
Table cluster(const Vectors& vectors, std::size_t n_entries, std::uint64_t seed, float factor) {
  constexpr std::size_t kLeast = 8192;
  constexpr double kLeastGain = 1e-4;
  const std::size_t n_some = std::max(kLeast, kPerEntry * n_entries);
  if (vectors.dim <= kMaxGridDim && vectors.count > 2 * n_some) {
    return cluster_by_grid<T>(vectors, n_entries, seed, factor);
  }
  const bool is_sampled = vectors.count > n_some;
  Random random(~seed);
  const Vectors sampled = is_sampled ? sample(vectors, n_some, random) : Vectors(0, 0);
  const Vectors& some = is_sampled ? sampled : vectors;
  Lloyd lloyd(vectors);
  Entries entries = cluster_some(some, some, n_entries, seed);
  entries = refine(lloyd, std::move(entries), kLeastGain).entries;
  return settle<T>(lloyd, vectors.dim, std::move(entries), factor);
}

// ---------------------------------------------------------------------------------------------
// Rows

void multiply(std::vector<float>& values, float factor) {
  std::transform(values.begin(), values.end(), values.begin(),
                 [factor](float value) { return value * factor; });
}

template <typename T>
struct Row {
  std::span<const T> weights;
  std::span<const float> importance;
  VectorSettings settings;

  std::size_t n_vectors() const { return weights.size() / settings.dim; }

  // Where the finite vectors of some importance are; if none has any, all the finite ones.
  std::vector<std::uint32_t> places_that_count(bool& equal) const {
    const std::size_t dim = settings.dim;
    std::vector<std::uint32_t> places;
    places.reserve(n_vectors());
    const auto collect = [&](bool all) {
      for (std::size_t i = 0; i < n_vectors(); ++i) {
        const std::span<const T> vector = weights.subspan(i * dim, dim);
        if ((all || importance[i] > 0) && std::all_of(vector.begin(), vector.end(), [](T weight) {
              return std::isfinite(to_float(weight));
            })) {
          places.push_back(static_cast<std::uint32_t>(i));
        }
      }
    };
    collect(importance.empty());
    equal = importance.empty() || places.empty();
    if (places.empty() && !importance.empty()) {
      collect(true);
    }
    return places;
  }

  Vectors vectors_at(std::span<const std::uint32_t> places, bool equal) const {
    const std::size_t dim = settings.dim;
    Vectors vectors(dim, places.size());
    for (std::size_t i = 0; i < places.size(); ++i) {
      for (std::size_t d = 0; d < dim; ++d) {
        vectors.at(i, d) = to_float(weights[places[i] * dim + d]) + 0.0F;  // -0 becomes 0
      }
      vectors.shares[i] = equal ? 1.0F : importance[places[i]];
    }
    return vectors;
  }
};

using Distinct = std::set<std::vector<float>>;

// In ascending order; one more than `n_entries` if there are more.
Distinct distinct_vectors(const Vectors& vectors, std::size_t n_entries) {
  Distinct distinct;
  std::vector<float> vector(vectors.dim);
  for (std::size_t i = 0; i < vectors.count && distinct.size() <= n_entries; ++i) {
    for (std::size_t d = 0; d < vectors.dim; ++d) {
      vector[d] = vectors.at(i, d);
    }
    distinct.insert(vector);
  }
  return distinct;
}

template <typename T>
void fit_row(const Row<T>& row, std::span<T> lut, std::span<std::uint8_t> codes) {
  const std::size_t dim = row.settings.dim;
  const std::size_t n_entries = lut.size() / dim;
  bool equal = false;
  const std::vector<std::uint32_t> places = row.places_that_count(equal);
  Vectors vectors = row.vectors_at(places, equal);
  const Distinct distinct = distinct_vectors(vectors, n_entries);
  const float factor = factor_for<float>(vectors.values);
  if (distinct.size() <= n_entries) {
    std::size_t j = 0;
    for (const std::vector<float>& entry : distinct) {
      j = static_cast<std::size_t>(std::transform(entry.begin(), entry.end(),
                                                  lut.begin() + static_cast<std::ptrdiff_t>(j),
                                                  from_float<T>) -
                                   lut.begin());
    }
    for (; j < lut.size(); ++j) {
      lut[j] = distinct.empty() ? T{} : lut[j - dim];
    }
  } else {
    multiply(vectors.values, factor);
    multiply(vectors.shares, factor_for<float>(vectors.shares));
    const Table table = cluster<T>(vectors, n_entries, row.settings.seed, factor);
    std::transform(table.entries.begin(), table.entries.end(), lut.begin(),
                   [factor](float entry) { return from_float<T>(entry / factor); });
    if (places.size() == codes.size()) {
      std::copy_n(table.codes.begin(), codes.size(), codes.begin());
      return;
    }
  }
  assign_row<T>(row.weights, dim, lut, factor, codes);
}

}  // namespace

template <typename T>
void kmeans_vector(MatrixView<const T> weights, MatrixView<const float> importance,
                   VectorSettings settings, MatrixView<T> luts, MatrixView<std::uint8_t> codes) {
  check_vectors(weights, settings.dim, luts.n_rows, luts.n_cols, codes);
  const std::size_t n_vectors = codes.n_cols;
  check(n_vectors <= std::numeric_limits<std::uint32_t>::max(), "a row must have less than 2^32 ",
        "vectors, got ", n_vectors);
  check(importance.n_rows == 0 ||
            (importance.n_rows == weights.n_rows && importance.n_cols == n_vectors),
        "importance must have one element a vector, ", weights.n_rows, " x ", n_vectors, ", got ",
        importance.n_rows, " x ", importance.n_cols);
  check_importance(importance.flat());
  const auto fit = [&](std::size_t row) {
    const auto share = importance.n_rows == 0 ? std::span<const float>() : importance.row(row);
    fit_row(Row<T>{weights.row(row), share, settings}, luts.row(row), codes.row(row));
  };
  if (n_vectors > 4 * kPiece) {
    for (std::size_t row = 0; row < weights.n_rows; ++row) {
      fit(row);
    }
    return;
  }
  const std::size_t grain = kPiece / 4 / std::max<std::size_t>(1, n_vectors);
  parallel_for(weights.n_rows, grain, [&](std::size_t begin, std::size_t end) {
    for (std::size_t row = begin; row < end; ++row) {
      fit(row);
    }
  });
}

template void kmeans_vector(MatrixView<const Half>, MatrixView<const float>, VectorSettings,
                            MatrixView<Half>, MatrixView<std::uint8_t>);
template void kmeans_vector(MatrixView<const float>, MatrixView<const float>, VectorSettings,
                            MatrixView<float>, MatrixView<std::uint8_t>);

}  // namespace milpress
