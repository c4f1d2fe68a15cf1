#include "kernels/kmeans_vector.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include "core/check.h"
#include "core/convert.h"
#include "core/parallel.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kMaxEntries = 256;       // a code is one byte
constexpr std::size_t kLanes = 256;            // vectors compared with an entry at a time
constexpr std::size_t kGrain = 64 * kLanes;    // vectors a thread takes at a time
constexpr std::size_t kMaxDrawnFrom = 32'768;  // vectors that the first entries are drawn from
constexpr int kMaxTurns = 100;
constexpr double kLeastGain = 1e-4;

// splitmix64 (Steele, Lea and Flood 2014): the same draws wherever it is compiled.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  // From 0 to below 1.
  double draw() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15U);
    z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
    return static_cast<double>((z ^ (z >> 31U)) >> 11U) * 0x1p-53;
  }

 private:
  std::uint64_t state_;
};

// Vectors, one array for each of their values.
struct Points {
  std::size_t n = 0;
  std::size_t dim = 0;
  std::vector<float> values;  // (dim, n)
  std::vector<float> shares;  // (n)

  const float* axis(std::size_t j) const { return values.data() + j * n; }
};

using Entries = std::vector<float>;  // (n_entries, dim)

MILPRESS_VECTORIZE
void add_squares(const float* values, float centre, std::size_t n, float* distances) {
  for (std::size_t i = 0; i < n; ++i) {
    const float difference = values[i] - centre;
    distances[i] += difference * difference;
  }
}

MILPRESS_VECTORIZE
void keep_nearer(const float* distances, std::size_t n, std::int32_t code, float* nearest,
                 std::int32_t* codes) {
  for (std::size_t i = 0; i < n; ++i) {
    const bool nearer = distances[i] < nearest[i];
    nearest[i] = nearer ? distances[i] : nearest[i];
    codes[i] = nearer ? code : codes[i];
  }
}

// Writes squared distances from `count` points to one entry.
void distances_to(const Points& points, std::size_t begin, std::size_t count, const float* entry,
                  float* distances) {
  std::fill(distances, distances + count, 0.0F);
  for (std::size_t j = 0; j < points.dim; ++j) {
    add_squares(points.axis(j) + begin, entry[j], count, distances);
  }
}

void assign(const Points& points, const Entries& entries, std::size_t begin, std::size_t end,
            float* nearest, std::int32_t* codes) {
  std::array<float, kLanes> distances;
  for (; begin < end; begin += kLanes) {
    const std::size_t count = std::min(kLanes, end - begin);
    std::fill(nearest, nearest + count, std::numeric_limits<float>::infinity());
    std::fill(codes, codes + count, 0);
    for (std::size_t c = 0; c * points.dim < entries.size(); ++c) {
      distances_to(points, begin, count, entries.data() + c * points.dim, distances.data());
      keep_nearer(distances.data(), count, static_cast<std::int32_t>(c), nearest, codes);
    }
    nearest += count;
    codes += count;
  }
}

void append(const Points& points, std::size_t i, Entries& entries) {
  for (std::size_t j = 0; j < points.dim; ++j) {
    entries.push_back(points.axis(j)[i]);
  }
}

// The point at which the running sum of shares passes a draw.
std::size_t pick(const std::vector<double>& sums, double draw) {
  const auto found = std::upper_bound(sums.begin(), sums.end(), draw * sums.back());
  return std::min<std::size_t>(found - sums.begin(), sums.size() - 1);
}

std::vector<double> running_sums(const std::vector<float>& shares,
                                 const std::vector<float>& distances) {
  std::vector<double> sums(shares.size());
  double sum = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    sum += static_cast<double>(shares[i]) * (distances.empty() ? 1.0 : distances[i]);
    sums[i] = sum;
  }
  return sums;
}

// Every `stride`-th point, so that drawing does not cost more than clustering.
Points thinned(const Points& points) {
  const std::size_t stride = (points.n - 1) / kMaxDrawnFrom + 1;
  Points few{(points.n - 1) / stride + 1, points.dim, {}, {}};
  for (std::size_t j = 0; j < points.dim; ++j) {
    for (std::size_t i = 0; i < points.n; i += stride) {
      few.values.push_back(points.axis(j)[i]);
    }
  }
  for (std::size_t i = 0; i < points.n; i += stride) {
    few.shares.push_back(points.shares[i]);
  }
  return few;
}

// Greedy k-means++: of a few points drawn by their share of the error, the one that lowers it most.
Entries first_entries(const Points& points, std::size_t n_entries, std::uint64_t seed) {
  Random random(seed);
  const std::size_t n_candidates = 2 + static_cast<std::size_t>(std::log2(n_entries));
  Entries entries;
  append(points, pick(running_sums(points.shares, {}), random.draw()), entries);
  std::vector<float> nearest(points.n);
  distances_to(points, 0, points.n, entries.data(), nearest.data());
  std::vector<float> distances(points.n);
  while (entries.size() < n_entries * points.dim) {
    const std::vector<double> sums = running_sums(points.shares, nearest);
    std::vector<float> best;
    std::size_t best_point = 0;
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t candidate = 0; candidate < n_candidates; ++candidate) {
      const std::size_t i = pick(sums, random.draw());
      Entries entry;
      append(points, i, entry);
      distances_to(points, 0, points.n, entry.data(), distances.data());
      double error = 0;
      for (std::size_t p = 0; p < points.n; ++p) {
        distances[p] = std::min(distances[p], nearest[p]);
        error += static_cast<double>(points.shares[p]) * distances[p];
      }
      if (error < least) {
        least = error;
        best = distances;
        best_point = i;
      }
    }
    append(points, best_point, entries);
    nearest = std::move(best);
  }
  return entries;
}

// Sums of one piece of the points; pieces are added up in their order.
struct Sums {
  std::vector<double> values;  // (n_entries, dim)
  std::vector<double> shares;  // (n_entries)
  double error = 0;
  std::size_t furthest = 0;  // the point with the greatest error, for an entry that nobody uses
  double furthest_error = -1;
};

Sums sums_of(const Points& points, const Entries& entries) {
  const std::size_t dim = points.dim;
  std::vector<Sums> pieces((points.n - 1) / kGrain + 1);
  parallel_for(points.n, kGrain, [&](std::size_t begin, std::size_t end) {
    std::vector<float> nearest(end - begin);
    std::vector<std::int32_t> codes(end - begin);
    assign(points, entries, begin, end, nearest.data(), codes.data());
    Sums& sums = pieces[begin / kGrain];
    sums.values.resize(entries.size());
    sums.shares.resize(entries.size() / dim);
    for (std::size_t i = begin; i < end; ++i) {
      const double share = points.shares[i];
      const auto code = static_cast<std::size_t>(codes[i - begin]);
      for (std::size_t j = 0; j < dim; ++j) {
        sums.values[code * dim + j] += share * points.axis(j)[i];
      }
      sums.shares[code] += share;
      const double error = share * nearest[i - begin];
      sums.error += error;
      if (error > sums.furthest_error) {
        sums.furthest = i;
        sums.furthest_error = error;
      }
    }
  });
  Sums total = std::move(pieces.front());
  for (std::size_t piece = 1; piece < pieces.size(); ++piece) {
    const Sums& sums = pieces[piece];
    std::transform(total.values.begin(), total.values.end(), sums.values.begin(),
                   total.values.begin(), std::plus<>());
    std::transform(total.shares.begin(), total.shares.end(), sums.shares.begin(),
                   total.shares.begin(), std::plus<>());
    total.error += sums.error;
    if (sums.furthest_error > total.furthest_error) {
      total.furthest = sums.furthest;
      total.furthest_error = sums.furthest_error;
    }
  }
  return total;
}

Entries improved(const Points& points, Entries entries) {
  const std::size_t dim = points.dim;
  double before = std::numeric_limits<double>::infinity();
  for (int turn = 0; turn < kMaxTurns; ++turn) {
    const Sums sums = sums_of(points, entries);
    if (sums.error >= before * (1 - kLeastGain)) {
      break;
    }
    before = sums.error;
    bool relocated = false;
    for (std::size_t c = 0; c < sums.shares.size(); ++c) {
      for (std::size_t j = 0; j < dim; ++j) {
        if (sums.shares[c] > 0) {
          entries[c * dim + j] = static_cast<float>(sums.values[c * dim + j] / sums.shares[c]);
        } else if (!relocated) {
          entries[c * dim + j] = points.axis(j)[sums.furthest];
        }
      }
      relocated = relocated || !(sums.shares[c] > 0);
    }
  }
  return entries;
}

// All distinct vectors that count, if there are no more than `most`; else one more than that.
std::set<std::vector<float>> distinct(const Points& points, std::size_t most) {
  std::set<std::vector<float>> found;
  for (std::size_t i = 0; i < points.n && found.size() <= most; ++i) {
    if (points.shares[i] > 0) {
      std::vector<float> vector;
      append(points, i, vector);
      found.insert(std::move(vector));
    }
  }
  return found;
}

template <typename T>
Entries table_of(const Points& points, std::size_t n_entries, std::uint64_t seed) {
  std::set<std::vector<float>> vectors = distinct(points, n_entries);
  if (vectors.size() > n_entries) {
    Entries entries = improved(points, first_entries(thinned(points), n_entries, seed));
    vectors.clear();
    for (std::size_t c = 0; c < n_entries; ++c) {
      std::vector<float> vector(
          entries.begin() + static_cast<std::ptrdiff_t>(c * points.dim),
          entries.begin() + static_cast<std::ptrdiff_t>((c + 1) * points.dim));
      for (float& value : vector) {
        value = round_to<T>(value);
      }
      vectors.insert(std::move(vector));
    }
  }
  Entries table;
  for (const std::vector<float>& vector : vectors) {
    table.insert(table.end(), vector.begin(), vector.end());
  }
  if (table.empty()) {
    table.resize(points.dim);
  }
  while (table.size() < n_entries * points.dim) {
    table.push_back(table[table.size() - points.dim]);
  }
  return table;
}

template <typename T>
Points points_of(std::span<const T> row, std::span<const float> importance, std::size_t dim) {
  std::vector<float> values(row.size());
  widen(row.data(), row.size(), values.data());
  Points points{row.size() / dim, dim, std::vector<float>(row.size()), {}};
  for (std::size_t i = 0; i < points.n; ++i) {
    for (std::size_t j = 0; j < dim; ++j) {
      points.values[j * points.n + i] = values[i * dim + j];
    }
  }
  points.shares.assign(importance.begin(), importance.end());
  const bool all_count =
      std::none_of(points.shares.begin(), points.shares.end(), [](float s) { return s > 0; });
  if (all_count) {
    points.shares.assign(points.n, 1.0F);
  }
  return points;
}

}  // namespace

template <typename T>
void kmeans_vector(MatrixView<const T> weights, const VectorClustering& settings,
                   MatrixView<const float> importance, MatrixView<T> luts,
                   MatrixView<std::uint8_t> codes) {
  const std::size_t dim = settings.dim;
  check(dim > 0 && weights.n_cols % dim == 0, "dim must divide the ", weights.n_cols,
        " values of a row, got ", dim);
  const std::size_t n_vectors = weights.n_cols / dim;
  check(luts.n_rows == weights.n_rows && luts.n_cols % dim == 0 && luts.n_cols > 0 &&
            luts.n_cols / dim <= kMaxEntries,
        "luts must have ", weights.n_rows, " rows of 1 to 256 vectors, got ", luts.n_rows, " x ",
        luts.n_cols);
  check(codes.n_rows == weights.n_rows && codes.n_cols == n_vectors, "codes must have ",
        weights.n_rows, " x ", n_vectors, " elements, got ", codes.n_rows, " x ", codes.n_cols);
  check(importance.n_rows == 0 ||
            (importance.n_rows == weights.n_rows && importance.n_cols == n_vectors),
        "importance must have one element a vector, ", weights.n_rows, " x ", n_vectors, ", got ",
        importance.n_rows, " x ", importance.n_cols);
  const std::size_t at_once = kGrain / std::max<std::size_t>(1, n_vectors);
  parallel_for(weights.n_rows, at_once, [&](std::size_t first, std::size_t last) {
    for (std::size_t row = first; row < last; ++row) {
      if (n_vectors == 0) {
        std::fill(luts.row(row).begin(), luts.row(row).end(), T{});
        continue;
      }
      const Points points = points_of<T>(
          weights.row(row), importance.n_rows == 0 ? std::span<const float>() : importance.row(row),
          dim);
      const Entries table = table_of<T>(points, luts.n_cols / dim, settings.seed);
      narrow(table.data(), table.size(), luts.row(row).data());
      const std::span<std::uint8_t> out = codes.row(row);
      parallel_for(points.n, kGrain, [&](std::size_t begin, std::size_t end) {
        std::vector<float> nearest(end - begin);
        std::vector<std::int32_t> found(end - begin);
        assign(points, table, begin, end, nearest.data(), found.data());
        std::transform(found.begin(), found.end(), out.begin() + static_cast<std::ptrdiff_t>(begin),
                       [](std::int32_t code) { return static_cast<std::uint8_t>(code); });
      });
    }
  });
}

template void kmeans_vector(MatrixView<const Half>, const VectorClustering&,
                            MatrixView<const float>, MatrixView<Half>, MatrixView<std::uint8_t>);
template void kmeans_vector(MatrixView<const float>, const VectorClustering&,
                            MatrixView<const float>, MatrixView<float>, MatrixView<std::uint8_t>);

}  // namespace milpress
