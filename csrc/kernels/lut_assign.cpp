#include "kernels/lut_assign.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/keys.h"
#include "core/parallel.h"
#include "core/prefetch.h"
#include "core/shuffle.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kMaxCounted = 16;  // entries whose midpoints are compared one by one
constexpr std::size_t kTableMin = 4096;  // weights that pay for a table of all the halves
constexpr std::size_t kPiece = 262'144;  // weights a thread takes at a time
constexpr std::size_t kChunk = 1024;     // and how many while the next are fetched

// Largest float that is not nearer to `upper` than to `lower`.
float midpoint(float lower, float upper) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (std::isinf(lower) || std::isinf(upper)) {
    return upper < kInfinity || lower == kInfinity ? lower : std::numeric_limits<float>::max();
  }
  // `sum + rest` is the exact sum (Knuth's two-sum).
  const double a = lower;
  const double b = upper;
  const double sum = a + b;
  const double b_part = sum - a;
  const double rest = (a - (sum - b_part)) + (b - b_part);
  const double half = sum / 2;
  const auto rounded = static_cast<float>(half);
  return rounded > half || (rounded == half && rest < 0) ? std::nextafter(rounded, -kInfinity)
                                                         : rounded;
}

// What weights are compared as: integers for halves, so that twice as many fit a register. In both
// types zeros are equal and NaN is above nothing.
inline float key_of(float weight) { return weight; }
inline std::int16_t key_of(Half weight) { return compare_key(weight); }

template <typename T>
using WeightKey = decltype(key_of(T{}));

// Ascending; a weight's code is the number of thresholds below its key. Unused ones are above all.
template <typename T>
struct Thresholds {
  using Limits = std::numeric_limits<WeightKey<T>>;

  std::array<WeightKey<T>, kMaxEntries> keys;
  std::size_t count;

  explicit Thresholds(std::span<const T> lut) : count(lut.size() - 1) {
    keys.fill(Limits::has_infinity ? Limits::infinity() : Limits::max());
    for (std::size_t j = 0; j < count; ++j) {
      const float limit = midpoint(to_float(lut[j]), to_float(lut[j + 1]));
      if constexpr (Limits::has_infinity) {
        keys[j] = limit;
      } else {
        keys[j] = key_up_to<T>(limit);
      }
    }
  }
};

template <std::size_t N, typename T>
inline void count_below(const Thresholds<T>& thresholds, std::span<const T> weights,
                        std::span<std::uint8_t> codes) {
  using Count = std::conditional_t<sizeof(WeightKey<T>) == 2, std::int16_t, std::int32_t>;
  std::array<WeightKey<T>, N> keys;  // a copy, which no store to a code can change
  std::copy_n(thresholds.keys.begin(), N, keys.begin());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const WeightKey<T> key = key_of(weights[i]);
    Count below = 0;
    for (std::size_t j = 0; j < N; ++j) {
      below = static_cast<Count>(below + (keys[j] < key));
    }
    codes[i] = static_cast<std::uint8_t>(below);
  }
}

// Every weight takes the same steps, so the loop has no branch to mispredict on random data.
template <typename T>
inline void search(const Thresholds<T>& thresholds, std::span<const T> weights,
                   std::span<std::uint8_t> codes) {
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const WeightKey<T> key = key_of(weights[i]);
    std::size_t below = 0;
    for (int bit = 7; bit >= 0; --bit) {
      const std::size_t step = std::size_t{1} << bit;
      below += std::size_t{thresholds.keys[below + step - 1] < key} << bit;
    }
    codes[i] = static_cast<std::uint8_t>(below);
  }
}

template <typename T>
MILPRESS_VECTORIZE void assign_chunk(const Thresholds<T>& thresholds, std::span<const T> weights,
                                     std::span<std::uint8_t> codes) {
  if (thresholds.count <= 3) {
    count_below<3>(thresholds, weights, codes);
  } else if (thresholds.count < kMaxCounted) {
    count_below<kMaxCounted - 1>(thresholds, weights, codes);
  } else {
    search(thresholds, weights, codes);
  }
}

template <typename T>
void count_or_search(const Thresholds<T>& thresholds, std::span<const T> weights,
                     std::span<std::uint8_t> codes) {
  for (std::size_t begin = 0; begin < weights.size(); begin += kChunk) {
    const std::size_t n = std::min(kChunk, weights.size() - begin);
    prefetch(weights, begin + kChunk, kChunk);
    assign_chunk(thresholds, weights.subspan(begin, n), codes.subspan(begin, n));
  }
}

// The code of every key, counted from the lowest.
std::vector<std::uint8_t> code_table(const Thresholds<Half>& thresholds) {
  std::vector<std::uint8_t> table(std::size_t{1} << 16);
  for (std::size_t j = 0; j < thresholds.count; ++j) {
    const auto end =
        j + 1 < thresholds.count ? table.begin() + (thresholds.keys[j + 1] + 0x8001) : table.end();
    std::fill(table.begin() + (thresholds.keys[j] + 0x8001), end, static_cast<std::uint8_t>(j + 1));
  }
  return table;
}

MILPRESS_VECTORIZE void look_up_keys(std::span<const std::uint8_t> table,
                                     std::span<const Half> weights, std::span<std::uint8_t> codes) {
  std::array<std::uint16_t, kChunk> positions;
  for (std::size_t begin = 0; begin < weights.size(); begin += kChunk) {
    const std::size_t n = std::min(kChunk, weights.size() - begin);
    prefetch(weights, begin + kChunk, kChunk);
    for (std::size_t i = 0; i < n; ++i) {
      positions[i] = static_cast<std::uint16_t>(key_of(weights[begin + i]) + 0x8000);
    }
    for (std::size_t i = 0; i < n; ++i) {
      codes[begin + i] = table[positions[i]];
    }
  }
}

// The upper half of a float's key, counted from the lowest.
inline std::uint16_t prefix_of(float weight) {
  return static_cast<std::uint16_t>((compare_key(weight) >> 16) + 0x8000);
}

// For each prefix, how many thresholds lie below all floats that have it.
struct PrefixTable {
  std::vector<std::uint8_t> below = std::vector<std::uint8_t>(std::size_t{1} << 16);
  std::size_t most_within = 0;  // thresholds that one prefix has

  explicit PrefixTable(const Thresholds<float>& thresholds) {
    std::size_t begin = 0;
    std::size_t within = 0;
    for (std::size_t j = 0; j < thresholds.count; ++j) {
      const std::size_t prefix = prefix_of(thresholds.keys[j]);
      within = j > 0 && prefix + 1 == begin ? within + 1 : 1;
      most_within = std::max(most_within, within);
      std::fill(below.begin() + begin, below.begin() + prefix + 1, static_cast<std::uint8_t>(j));
      begin = prefix + 1;
    }
    std::fill(below.begin() + begin, below.end(), static_cast<std::uint8_t>(thresholds.count));
  }
};

template <std::size_t N>
MILPRESS_VECTORIZE void look_up_prefixes(const PrefixTable& table,
                                         const Thresholds<float>& thresholds,
                                         std::span<const float> weights,
                                         std::span<std::uint8_t> codes) {
  std::array<std::uint16_t, kChunk> prefixes;
  for (std::size_t begin = 0; begin < weights.size(); begin += kChunk) {
    const std::size_t n = std::min(kChunk, weights.size() - begin);
    prefetch(weights, begin + kChunk, kChunk);
    for (std::size_t i = 0; i < n; ++i) {
      prefixes[i] = prefix_of(weights[begin + i]);
    }
    for (std::size_t i = 0; i < n; ++i) {
      std::size_t below = table.below[prefixes[i]];
      for (std::size_t j = 0; j < N; ++j) {
        below += thresholds.keys[below] < weights[begin + i] ? 1 : 0;
      }
      codes[begin + i] = static_cast<std::uint8_t>(below);
    }
  }
}

void assign(std::span<const float> lut, std::span<const float> weights,
            std::span<std::uint8_t> codes) {
  constexpr std::size_t kPrefixesMin = 65'536;  // weights that pay for a table of prefixes
  const Thresholds<float> thresholds(lut);
  if (lut.size() > kMaxCounted && weights.size() >= kPrefixesMin) {
    const PrefixTable table(thresholds);
    if (table.most_within <= 2) {
      return look_up_prefixes<2>(table, thresholds, weights, codes);
    }
    if (table.most_within <= 6) {
      return look_up_prefixes<6>(table, thresholds, weights, codes);
    }
  }
  count_or_search(thresholds, weights, codes);
}

void assign(std::span<const Half> lut, std::span<const Half> weights,
            std::span<std::uint8_t> codes) {
  const Thresholds<Half> thresholds(lut);
  if (lut.size() > kMaxCounted && weights.size() >= kTableMin) {
    look_up_keys(code_table(thresholds), weights, codes);
  } else {
    count_or_search(thresholds, weights, codes);
  }
}

template <typename T>
void look_up(std::span<const T> lut, std::span<const std::uint8_t> codes, std::span<T> weights) {
  if constexpr (sizeof(T) == 2) {
    if (lut.size() <= kShuffleEntries) {
      std::array<T, kShuffleEntries> entries{};
      std::copy(lut.begin(), lut.end(), entries.begin());
      look_up_sixteen(entries.data(), codes.data(), codes.size(), weights.data());
      return;
    }
  }
  std::transform(codes.begin(), codes.end(), weights.begin(),
                 [lut](std::uint8_t code) { return lut[code]; });
}

template <typename T>
void check_ascending(std::span<const T> lut) {
  for (std::size_t j = 0; j < lut.size(); ++j) {
    check(to_float(lut[j == 0 ? 0 : j - 1]) <= to_float(lut[j]),
          "lut must be ascending and free of NaN, got ", to_float(lut[j]), " as entry ", j);
  }
}

MILPRESS_VECTORIZE std::uint8_t greatest_of(const std::uint8_t* codes, std::size_t n) {
  std::uint8_t greatest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    greatest = std::max(greatest, codes[i]);
  }
  return greatest;
}

}  // namespace

void check_codes(std::span<const std::uint8_t> codes, std::size_t n_entries) {
  for (std::size_t begin = 0; begin < codes.size(); begin += kChunk) {
    prefetch(codes, begin + kChunk, kChunk);
    const int greatest = greatest_of(codes.data() + begin, std::min(kChunk, codes.size() - begin));
    check(greatest < static_cast<int>(n_entries), "codes must be below ", n_entries, ", got ",
          greatest);
  }
}

template <typename T>
void lut_assign(MatrixView<const T> weights, MatrixView<const T> luts,
                MatrixView<std::uint8_t> codes) {
  check_lut_assign(weights, luts, codes);
  for (std::size_t row = 0; row < luts.n_rows; ++row) {
    check_ascending(luts.row(row));
  }
  parallel_for_rows(weights.n_rows, weights.n_cols, kPiece,
                    [&](std::size_t row, std::size_t begin, std::size_t end) {
                      assign(luts.row(row), weights.row(row).subspan(begin, end - begin),
                             codes.row(row).subspan(begin, end - begin));
                    });
}

template <typename T>
void lut_to_dense(MatrixView<const std::uint8_t> codes, MatrixView<const T> luts,
                  MatrixView<T> weights) {
  check_luts(luts, codes.n_rows);
  check_shape("weights", weights, "codes", codes.n_rows, codes.n_cols);
  parallel_for_rows(codes.n_rows, codes.n_cols, kPiece,
                    [&](std::size_t row, std::size_t begin, std::size_t end) {
                      const auto in = codes.row(row).subspan(begin, end - begin);
                      const auto out = weights.row(row).subspan(begin, end - begin);
                      check_codes(in, luts.n_cols);
                      look_up(luts.row(row), in, out);
                    });
}

template <typename T>
std::vector<float> midpoint_table(std::span<const T> lut) {
  check(!lut.empty() && lut.size() <= kMaxEntries, "lut must have 1 to ", kMaxEntries,
        " entries, got ", lut.size());
  check_ascending(lut);
  std::vector<float> table(lut.size() - 1);
  std::transform(lut.begin(), lut.end() - 1, lut.begin() + 1, table.begin(),
                 [](T lower, T upper) { return midpoint(to_float(lower), to_float(upper)); });
  return table;
}

#define MILPRESS_INSTANTIATE(T)                                                                   \
  template void lut_assign(MatrixView<const T>, MatrixView<const T>, MatrixView<std::uint8_t>);   \
  template void lut_to_dense(MatrixView<const std::uint8_t>, MatrixView<const T>, MatrixView<T>); \
  template std::vector<float> midpoint_table(std::span<const T>);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress
