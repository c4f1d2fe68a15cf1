#include "kernels/vector_grid.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kBins = 8192;

// The cell of each of equal bins from the least to the greatest of an element's values.
struct Cells {
  float least = 0;
  float scale = 0;  // bins per unit
  std::array<std::uint32_t, kBins> cell;
};

// Where some of the vectors are, drawn as evenly as shares are.
std::vector<std::size_t> sample(const Vectors& vectors) {
  constexpr std::size_t kSample = 2048;
  const auto end = vectors.shares.begin() + static_cast<std::ptrdiff_t>(vectors.count);
  const double step = std::accumulate(vectors.shares.begin(), end, 0.0) / kSample;
  std::vector<std::size_t> places;
  double sum = 0;
  for (std::size_t i = 0; i < vectors.count; ++i) {
    sum += vectors.shares[i];
    while (sum > (static_cast<double>(places.size()) + 0.5) * step && places.size() < kSample) {
      places.push_back(i);
    }
  }
  return places;
}

// The density of the cells is about the root of that of the values: between values of the sorted
// sample, as many each, there are cells as the root of what lies between.
Cells cut(const float* values, std::size_t n, const std::vector<std::size_t>& places,
          std::size_t n_cells) {
  constexpr std::size_t kStretches = 256;
  const auto [low, high] = std::minmax_element(values, values + n);
  std::vector<float> sample{*low, *high};
  for (const std::size_t place : places) {
    sample.push_back(values[place]);
  }
  std::sort(sample.begin(), sample.end());
  std::array<double, kStretches + 1> edge;
  std::array<double, kStretches + 1> n_below{};  // in units of their own
  for (std::size_t s = 0; s <= kStretches; ++s) {
    edge[s] = sample[s * (sample.size() - 1) / kStretches];
    n_below[s] = s == 0 ? 0 : n_below[s - 1] + std::sqrt(edge[s] - edge[s - 1]);
  }
  Cells cells;
  const double width = (edge[kStretches] - edge[0]) / kBins;
  cells.least = *low;
  cells.scale = static_cast<float>(width > 0 ? 1 / width : 0);
  std::size_t s = 0;
  for (std::size_t bin = 0; bin < kBins; ++bin) {
    const double middle = edge[0] + (static_cast<double>(bin) + 0.5) * width;
    while (s + 1 < kStretches && edge[s + 1] <= middle) {
      ++s;
    }
    const double length = edge[s + 1] - edge[s];
    const double share = length > 0 ? (middle - edge[s]) / length : 0;
    const double place = n_below[s] + share * (n_below[s + 1] - n_below[s]);
    const double all = n_below[kStretches] > 0 ? n_below[kStretches] : 1;
    const double cell = place / all * static_cast<double>(n_cells);
    cells.cell[bin] =
        static_cast<std::uint32_t>(std::clamp(cell, 0.0, static_cast<double>(n_cells - 1)));
  }
  return cells;
}

// The cells along a curve that goes from each to one beside it: in ascending order for one element,
// along Hilbert's curve for two. Interleaved bits in ascending order would jump.
std::vector<std::uint32_t> curve(std::size_t dim, std::size_t n_bits) {
  static_assert(kMaxGridDim == 2);
  if (dim == 1) {
    std::vector<std::uint32_t> cells(std::size_t{1} << n_bits);
    std::iota(cells.begin(), cells.end(), 0U);
    return cells;
  }
  struct Quadrant {
    std::uint8_t bits;
    std::uint8_t way;  // on which the curve goes through it
  };
  // The ways: up, right and down; the same mirrored at either diagonal; and turned around.
  constexpr Quadrant kQuadrants[4][4] = {{{0, 1}, {2, 0}, {3, 0}, {1, 2}},
                                         {{0, 0}, {1, 1}, {3, 1}, {2, 3}},
                                         {{3, 3}, {2, 2}, {0, 2}, {1, 0}},
                                         {{3, 2}, {1, 3}, {0, 3}, {2, 1}}};
  std::vector<std::uint32_t> cells{0};
  std::vector<std::uint8_t> ways{0};
  for (std::size_t bit = 0; bit < n_bits; ++bit) {
    std::vector<std::uint32_t> finer;
    std::vector<std::uint8_t> finer_ways;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      for (const Quadrant& quadrant : kQuadrants[ways[i]]) {
        finer.push_back(cells[i] << 2 | quadrant.bits);
        finer_ways.push_back(quadrant.way);
      }
    }
    cells = std::move(finer);
    ways = std::move(finer_ways);
  }
  return cells;
}

MILPRESS_VECTORIZE
void find_bins(const float* values, std::size_t n, float least, float scale, std::int32_t* bins) {
  for (std::size_t i = 0; i < n; ++i) {
    const float place = (values[i] - least) * scale;
    constexpr auto kLast = static_cast<float>(kBins - 1);
    bins[i] = static_cast<std::int32_t>(place < kLast ? place : kLast);
  }
}

}  // namespace

Grid merge(const Vectors& vectors, std::size_t n_bits) {
  const std::size_t dim = vectors.dim;
  const std::size_t n = vectors.count;
  const std::size_t n_cells = std::size_t{1} << n_bits * dim;
  const std::vector<std::size_t> places = sample(vectors);
  // A cell is numbered by the bits of its place along each element, interleaved.
  std::vector<std::uint32_t> cells(n);
  std::vector<std::int32_t> bins(n);
  for (std::size_t d = 0; d < dim; ++d) {
    const float* const values = &vectors.values[d * vectors.stride];
    Cells of_element = cut(values, n, places, std::size_t{1} << n_bits);
    for (std::uint32_t& cell : of_element.cell) {
      std::uint32_t spread = 0;
      for (std::size_t bit = 0; bit < n_bits; ++bit) {
        spread |= (cell >> bit & 1) << (bit * dim + d);
      }
      cell = spread;
    }
    find_bins(values, n, of_element.least, of_element.scale, bins.data());
    for (std::size_t i = 0; i < n; ++i) {
      cells[i] |= of_element.cell[static_cast<std::size_t>(bins[i])];
    }
  }
  std::vector<std::uint32_t> ends(n_cells);
  for (const std::uint32_t cell : cells) {
    ++ends[cell];
  }
  const auto n_merged =
      ends.size() - static_cast<std::size_t>(std::count(ends.begin(), ends.end(), 0U));
  const std::vector<std::uint32_t> order = curve(dim, n_bits);
  std::uint32_t n_before = 0;
  for (const std::uint32_t cell : order) {
    n_before += std::exchange(ends[cell], n_before);
  }
  Grid grid{Vectors(dim, n), std::vector<std::uint32_t>(n), Vectors(dim, n_merged), {}};
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint32_t place = ends[cells[i]]++;
    grid.places[place] = static_cast<std::uint32_t>(i);
    grid.sorted.shares[place] = vectors.shares[i];
    for (std::size_t d = 0; d < dim; ++d) {
      grid.sorted.at(place, d) = vectors.at(i, d);
    }
  }
  std::vector<double> sums(dim);
  std::size_t begin = 0;
  for (const std::uint32_t cell : order) {
    const std::size_t end = ends[cell];
    if (begin == end) {
      continue;
    }
    std::fill(sums.begin(), sums.end(), 0);
    double shares = 0;
    for (std::size_t i = begin; i < end; ++i) {
      const double share = grid.sorted.shares[i];
      shares += share;
      for (std::size_t d = 0; d < dim; ++d) {
        sums[d] += share * grid.sorted.at(i, d);
      }
    }
    const std::size_t merged = grid.ends.size();
    grid.merged.shares[merged] = static_cast<float>(shares);
    for (std::size_t d = 0; d < dim; ++d) {
      grid.merged.at(merged, d) = static_cast<float>(sums[d] / shares);
    }
    grid.ends.push_back(static_cast<std::uint32_t>(end));
    begin = end;
  }
  return grid;
}

}  // namespace milpress
