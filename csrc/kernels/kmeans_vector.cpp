#include "kernels/kmeans_vector.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <set>
#include <span>
#include <vector>

#include "core/parallel.h"
#include "core/random.h"
#include "core/vectorize.h"
#include "kernels/kmeans1d.h"
#include "kernels/lut_assign.h"
#include "kernels/vector_assign.h"
#include "kernels/vectors.h"

namespace milpress {
namespace {

struct Fit {
  Entries entries;
  double error = std::numeric_limits<double>::infinity();  // before their last move
};

// What a piece of the vectors adds to the entries they are nearest to.
struct Moments {
  std::vector<double> sums;         // of share * vector
  std::vector<double> weights;      // of shares
  std::vector<std::size_t> n_near;  // vectors
  double error = 0;
  std::size_t n_changed = 0;

  // Adds a vector to the entry `code`, or with `sign` -1 takes it away.
  void add(const Vectors& vectors, std::size_t i, std::size_t code, int sign) {
    const double share = sign * double{vectors.shares[i]};
    for (std::size_t d = 0; d < vectors.dim; ++d) {
      sums[code * vectors.dim + d] += share * vectors.at(i, d);
    }
    weights[code] += share;
    n_near[code] += static_cast<std::size_t>(sign);
  }
};

// The sum of share * distance; `n` is a multiple of kLanes.
MILPRESS_VECTORIZE
double weighted_sum(const float* shares, const float* distances, std::size_t n) {
  constexpr std::size_t kSums = 8;
  std::array<double, kSums> sums{};
  for (std::size_t i = 0; i < n; i += kSums) {
    for (std::size_t lane = 0; lane < kSums; ++lane) {
      sums[lane] += double{shares[i + lane]} * double{distances[i + lane]};
    }
  }
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// Empty clusters take over the vectors that add most to the error.
void move_empty(const Vectors& vectors, std::span<const float> distances,
                std::span<const std::size_t> empty, Entries& entries) {
  std::vector<std::size_t> order(vectors.count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto part = [&](std::size_t i) { return double{distances[i]} * vectors.shares[i]; };
  const std::size_t n_moved = std::min(empty.size(), order.size());
  std::partial_sort(
      order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n_moved), order.end(),
      [&](std::size_t a, std::size_t b) { return part(a) != part(b) ? part(a) > part(b) : a < b; });
  for (std::size_t j = 0; j < n_moved && part(order[j]) > 0; ++j) {
    for (std::size_t d = 0; d < vectors.dim; ++d) {
      entries[empty[j] * vectors.dim + d] = vectors.at(order[j], d);
    }
  }
}

constexpr int kMaxTurns = 100;
constexpr double kLeastGain = 1e-4;  // of the error, for another turn

class Lloyd {
 public:
  explicit Lloyd(const Vectors& vectors)
      : vectors_(vectors),
        codes_(vectors.stride),
        codes_before_(vectors.stride),
        distances_(vectors.stride),
        pieces_((vectors.stride + kPiece - 1) / kPiece) {
    constexpr float kEven = 0x1p20F;
    const auto end = vectors.shares.begin() + static_cast<std::ptrdiff_t>(vectors.count);
    const auto [least, most] = std::minmax_element(vectors.shares.begin(), end);
    is_even_ = least != end && *most <= kEven * *least;
  }

  // Finds the entry nearest to each vector. Only vectors that change entries change the sums, so
  // that late turns cost little more than the distances; unless some count so much more than others
  // that they would leave a rounding error that hides those. Pieces are added up in their order.
  Moments assign(const Entries& entries) {
    const std::size_t dim = vectors_.dim;
    const bool is_anew = pieces_[0].sums.empty() || !is_even_;
    codes_.swap(codes_before_);
    parallel_for(vectors_.stride, kPiece, [&](std::size_t begin, std::size_t end) {
      nearest_entries(entries, dim, vectors_.values.data() + begin, vectors_.stride, end - begin,
                      codes_.data() + begin, distances_.data() + begin);
      Moments& piece = pieces_[begin / kPiece];
      piece.error =
          weighted_sum(vectors_.shares.data() + begin, distances_.data() + begin, end - begin);
      if (is_anew) {
        piece.sums.assign(entries.size(), 0);
        piece.weights.assign(entries.size() / dim, 0);
        piece.n_near.assign(entries.size() / dim, 0);
        piece.n_changed = 0;
        for (std::size_t i = begin; i < std::min(end, vectors_.count); ++i) {
          piece.add(vectors_, i, codes_[i], 1);
          piece.n_changed += codes_[i] != codes_before_[i] ? 1U : 0U;
        }
      } else {
        update(piece, begin, std::min(end, vectors_.count));
      }
    });
    Moments total = pieces_[0];
    const auto add = [](auto& sum, const auto& piece) {
      std::transform(sum.begin(), sum.end(), piece.begin(), sum.begin(), std::plus<>());
    };
    for (std::size_t p = 1; p < pieces_.size(); ++p) {
      add(total.sums, pieces_[p].sums);
      add(total.weights, pieces_[p].weights);
      add(total.n_near, pieces_[p].n_near);
      total.error += pieces_[p].error;
      total.n_changed += pieces_[p].n_changed;
    }
    return total;
  }

  // Moves each entry to the mean of its vectors, and those without any to where they help most.
  // Returns how many had none.
  std::size_t move(const Moments& moments, Entries& entries) const {
    const std::size_t dim = vectors_.dim;
    std::vector<std::size_t> empty;
    for (std::size_t j = 0; j < moments.weights.size(); ++j) {
      if (moments.n_near[j] > 0 && moments.weights[j] > 0) {
        for (std::size_t d = 0; d < dim; ++d) {
          entries[j * dim + d] = static_cast<float>(moments.sums[j * dim + d] / moments.weights[j]);
        }
      } else {
        empty.push_back(j);
      }
    }
    if (!empty.empty()) {
      move_empty(vectors_, distances_, empty, entries);
    }
    return empty.size();
  }

 private:
  void update(Moments& piece, std::size_t begin, std::size_t end) const {
    piece.n_changed = 0;
    const auto update_one = [&](std::size_t i) {
      if (codes_[i] != codes_before_[i]) {
        piece.add(vectors_, i, codes_before_[i], -1);
        piece.add(vectors_, i, codes_[i], 1);
        ++piece.n_changed;
      }
    };
    for (std::size_t i = begin; i < end; i += kLanes) {
      if (std::memcmp(&codes_[i], &codes_before_[i], kLanes) != 0) {
        for (std::size_t lane = 0; lane < std::min(kLanes, end - i); ++lane) {
          update_one(i + lane);
        }
      }
    }
  }

  const Vectors& vectors_;
  std::vector<std::uint8_t> codes_;
  std::vector<std::uint8_t> codes_before_;
  std::vector<float> distances_;
  std::vector<Moments> pieces_;
  bool is_even_ = false;  // no vector counts far more than another
};

// Takes turns until one gains less than `least_gain` of the error.
Fit refine(const Vectors& vectors, Entries entries, double least_gain = kLeastGain) {
  Lloyd lloyd(vectors);
  Fit fit;
  for (int turn = 0; turn < kMaxTurns; ++turn) {
    const Moments moments = lloyd.assign(entries);
    const bool is_settled =
        (turn > 0 && moments.n_changed == 0) || moments.error > (1 - least_gain) * fit.error;
    const std::size_t n_empty = lloyd.move(moments, entries);
    fit.error = moments.error;
    if (moments.error == 0 || (is_settled && n_empty == 0)) {
      break;
    }
  }
  fit.entries = std::move(entries);
  return fit;
}

// Sorted, and rounded to `T` as they are without `factor`.
template <typename T>
Entries rounded(const Entries& entries, std::size_t dim, float factor) {
  std::vector<std::vector<float>> sorted;
  for (std::size_t begin = 0; begin < entries.size(); begin += dim) {
    std::vector<float>& entry = sorted.emplace_back(dim);
    for (std::size_t d = 0; d < dim; ++d) {
      entry[d] = (round_to<T>(entries[begin + d] / factor) + 0.0F) * factor;  // -0 becomes 0
    }
  }
  std::sort(sorted.begin(), sorted.end());
  Entries result;
  for (const std::vector<float>& entry : sorted) {
    result.insert(result.end(), entry.begin(), entry.end());
  }
  return result;
}

// Rounding moves entries, and sorting them gives vectors halfway between two to the other one: both
// may leave entries away from their means. So table and assignment are improved in turn again, of
// the table as it will be stored, while that gains enough.
template <typename T>
Entries settle(const Vectors& vectors, Entries entries, float factor) {
  Lloyd lloyd(vectors);
  Fit best;
  for (int turn = 0; turn < kMaxTurns; ++turn) {
    entries = rounded<T>(entries, vectors.dim, factor);
    const Moments moments = lloyd.assign(entries);
    const bool is_settled = moments.error > (1 - kLeastGain) * best.error;
    if (moments.error < best.error) {
      best = {entries, moments.error};
    }
    if (is_settled || moments.error == 0) {
      break;
    }
    lloyd.move(moments, entries);
  }
  return best.entries;
}

// One vector of each of `n` equal stretches.
Vectors sample(const Vectors& vectors, std::size_t n, Random& random) {
  Vectors result(vectors.dim, n);
  for (std::size_t i = 0; i < n; ++i) {
    const double place = (static_cast<double>(i) + random.unit()) / static_cast<double>(n);
    const std::size_t from = std::min(
        static_cast<std::size_t>(place * static_cast<double>(vectors.count)), vectors.count - 1);
    for (std::size_t d = 0; d < vectors.dim; ++d) {
      result.at(i, d) = vectors.at(from, d);
    }
    result.shares[i] = vectors.shares[from];
  }
  return result;
}

// The best of a few starts on a sample, of which only the best third is refined to the end, is
// refined on all the vectors.
Entries cluster(const Vectors& vectors, std::size_t n_entries, std::uint64_t seed) {
  constexpr std::size_t kPerEntry = 64;
  constexpr std::size_t kLeast = 8192;
  constexpr std::size_t kShare = 3;
  constexpr double kRoughGain = 0.01;  // shows which starts are good
  // Starts differ the less the more entries there are. Few vectors have room for more of them.
  constexpr std::size_t kMost = 32;
  const std::size_t n_least = n_entries < 64 ? 8 : n_entries < kMaxEntries ? 2 : 1;
  const std::size_t n_roomy = n_least * kLeast / 2 / std::max<std::size_t>(1, vectors.count);
  const std::size_t n_starts = std::clamp(n_roomy, n_least, kMost);
  const std::size_t n_sampled = std::max(kLeast, kPerEntry * n_entries);
  const bool is_sampled = vectors.count > n_sampled;
  Random random(seed + (std::uint64_t{n_starts} << 56));
  const Vectors sampled = is_sampled ? sample(vectors, n_sampled, random) : Vectors(0, 0);
  const Vectors& some = is_sampled ? sampled : vectors;
  std::vector<Fit> fits(n_starts);
  parallel_for(n_starts, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      Random own(seed + (std::uint64_t{i} << 56));  // no start of a near seed
      fits[i] =
          refine(some, random_start(some, n_entries, own), n_starts > 1 ? kRoughGain : kLeastGain);
    }
  });
  const auto is_better = [](const Fit& a, const Fit& b) { return a.error < b.error; };
  std::stable_sort(fits.begin(), fits.end(), is_better);
  fits.resize((n_starts + kShare - 1) / kShare);
  if (n_starts > 1) {
    parallel_for(fits.size(), 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) {
        fits[i] = refine(some, std::move(fits[i].entries));
      }
    });
  }
  const Fit& best = *std::min_element(fits.begin(), fits.end(), is_better);
  return is_sampled ? refine(vectors, best.entries).entries : best.entries;
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

  // The finite vectors of some importance; if none has any, all the finite ones.
  Vectors vectors_that_count() const {
    const std::size_t dim = settings.dim;
    std::vector<std::size_t> places;
    const auto collect = [&](bool all) {
      for (std::size_t i = 0; i < n_vectors(); ++i) {
        const std::span<const T> vector = weights.subspan(i * dim, dim);
        if ((all || importance[i] > 0) && std::all_of(vector.begin(), vector.end(), [](T weight) {
              return std::isfinite(to_float(weight));
            })) {
          places.push_back(i);
        }
      }
    };
    collect(importance.empty());
    const bool equal = importance.empty() || places.empty();
    if (places.empty() && !importance.empty()) {
      collect(true);
    }
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
  Vectors vectors = row.vectors_that_count();
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
    const Entries entries =
        settle<T>(vectors, cluster(vectors, n_entries, row.settings.seed), factor);
    std::transform(entries.begin(), entries.end(), lut.begin(),
                   [factor](float entry) { return from_float<T>(entry / factor); });
  }
  assign_row<T>(row.weights, dim, lut, factor, codes);
}

}  // namespace

template <typename T>
void kmeans_vector(MatrixView<const T> weights, MatrixView<const float> importance,
                   VectorSettings settings, MatrixView<T> luts, MatrixView<std::uint8_t> codes) {
  check_vectors(weights, settings.dim, luts.n_rows, luts.n_cols, codes);
  const std::size_t n_vectors = codes.n_cols;
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
