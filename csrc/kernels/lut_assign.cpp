#include "kernels/lut_assign.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/check.h"
#include "core/parallel.h"
#include "core/prefetch.h"
#include "core/shuffle.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kMaxEntries = 256;             // a code is one byte
constexpr std::size_t kMaxCounted = kMaxFewEntries;  // whose midpoints are compared one by one
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

inline std::int16_t key_of(Half weight) {
  constexpr std::int16_t kInfinity = 0x7c00;
  const auto magnitude = static_cast<std::int16_t>(weight.bits & 0x7fff);
  const auto key = static_cast<std::int16_t>(weight.bits == magnitude ? magnitude : -magnitude);
  return magnitude > kInfinity ? std::numeric_limits<std::int16_t>::min() : key;
}

template <typename T>
using Key = decltype(key_of(T{}));

// The key of the largest `T` that is at most `limit`.
template <typename T>
Key<T> threshold(float limit) {
  return limit;
}

template <>
std::int16_t threshold<Half>(float limit) {
  const Half rounded = to_half(limit);
  const int key = key_of(rounded);
  return static_cast<std::int16_t>(to_float(rounded) > limit ? key - 1 : key);
}

// Ascending; a weight's code is the number of thresholds below its key. Unused ones are above all.
template <typename T>
struct Thresholds {
  using Limits = std::numeric_limits<Key<T>>;

  std::array<Key<T>, kMaxEntries - 1> keys;
  std::size_t count;

  explicit Thresholds(std::span<const T> lut) : count(lut.size() - 1) {
    keys.fill(Limits::has_infinity ? Limits::infinity() : Limits::max());
    for (std::size_t j = 0; j < count; ++j) {
      keys[j] = threshold<T>(midpoint(to_float(lut[j]), to_float(lut[j + 1])));
    }
  }
};

template <std::size_t N, typename T>
inline void count_below(const Thresholds<T>& thresholds, std::span<const T> weights,
                        std::span<std::uint8_t> codes) {
  using Count = std::conditional_t<sizeof(Key<T>) == 2, std::int16_t, std::int32_t>;
  std::array<Key<T>, N> keys;  // a copy, which no store to a code can change
  std::copy_n(thresholds.keys.begin(), N, keys.begin());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const Key<T> key = key_of(weights[i]);
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
    const Key<T> key = key_of(weights[i]);
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

void assign(std::span<const float> lut, std::span<const float> weights,
            std::span<std::uint8_t> codes) {
  count_or_search(Thresholds<float>(lut), weights, codes);
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

// Whether every key lies above `lower` and not above `upper` of the code that goes with it.
MILPRESS_VECTORIZE bool lies_within(const Half* weights, const Half* lower, const Half* upper,
                                    std::size_t n) {
  std::uint16_t n_outside = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::int16_t key = key_of(weights[i]);
    const auto low = static_cast<std::int16_t>(lower[i].bits);
    const auto high = static_cast<std::int16_t>(upper[i].bits);
    n_outside = static_cast<std::uint16_t>(n_outside | ((key <= low) | (key > high)));
  }
  return n_outside == 0;
}

// Calls `body(row, begin, end)` for pieces of rows: many short rows or few columns of a long one
// make a thread's share.
template <typename Body>
void for_each_piece(std::size_t n_rows, std::size_t n_cols, const Body& body) {
  const std::size_t pieces_per_row = (n_cols + kPiece - 1) / kPiece;
  const std::size_t grain = kPiece / std::max<std::size_t>(1, n_cols);
  parallel_for(n_rows * pieces_per_row, grain, [&](std::size_t first, std::size_t last) {
    for (std::size_t piece = first; piece < last; ++piece) {
      const std::size_t begin = piece % pieces_per_row * kPiece;
      body(piece / pieces_per_row, begin, std::min(begin + kPiece, n_cols));
    }
  });
}

template <typename T>
void look_up(std::span<const T> lut, std::span<const std::uint8_t> codes, std::span<T> weights) {
  if constexpr (sizeof(T) == 2) {
    if (lut.size() <= kMaxFewEntries) {
      std::array<T, kMaxFewEntries> entries{};
      std::copy(lut.begin(), lut.end(), entries.begin());
      look_up_sixteen(entries.data(), codes.data(), codes.size(), weights.data());
      return;
    }
  }
  std::transform(codes.begin(), codes.end(), weights.begin(),
                 [lut](std::uint8_t code) { return lut[code]; });
}

template <typename T>
void check_luts(MatrixView<const T> luts, std::size_t n_rows) {
  check(luts.n_rows == n_rows, "luts must have ", n_rows, " rows like weights, got ", luts.n_rows);
  check(n_rows == 0 || (luts.n_cols >= 1 && luts.n_cols <= kMaxEntries), "luts must have 1 to ",
        kMaxEntries, " entries a row, got ", luts.n_cols);
}

template <typename T>
void check_ascending(std::span<const T> lut) {
  for (std::size_t j = 0; j < lut.size(); ++j) {
    check(to_float(lut[j == 0 ? 0 : j - 1]) <= to_float(lut[j]),
          "lut must be ascending and free of NaN, got ", to_float(lut[j]), " as entry ", j);
  }
}

}  // namespace

template <typename T>
void lut_assign(MatrixView<const T> weights, MatrixView<const T> luts,
                MatrixView<std::uint8_t> codes) {
  check_luts(luts, weights.n_rows);
  check(codes.n_rows == weights.n_rows && codes.n_cols == weights.n_cols,
        "codes must have the shape of weights, ", weights.n_rows, " x ", weights.n_cols, ", got ",
        codes.n_rows, " x ", codes.n_cols);
  for (std::size_t row = 0; row < luts.n_rows; ++row) {
    check_ascending(luts.row(row));
  }
  for_each_piece(weights.n_rows, weights.n_cols,
                 [&](std::size_t row, std::size_t begin, std::size_t end) {
                   assign(luts.row(row), weights.row(row).subspan(begin, end - begin),
                          codes.row(row).subspan(begin, end - begin));
                 });
}

namespace {

MILPRESS_VECTORIZE std::uint8_t greatest_in(const std::uint8_t* codes, std::size_t n) {
  std::uint8_t result = 0;
  for (std::size_t i = 0; i < n; ++i) {
    result = std::max(result, codes[i]);
  }
  return result;
}

}  // namespace

std::uint8_t greatest_code(std::span<const std::uint8_t> codes) {
  std::uint8_t result = 0;
  for (std::size_t begin = 0; begin < codes.size(); begin += kChunk) {
    prefetch(codes, begin + kChunk, kChunk);
    result =
        std::max(result, greatest_in(codes.data() + begin, std::min(kChunk, codes.size() - begin)));
  }
  return result;
}

bool names_nearest(std::span<const Half> weights, std::span<const Half> lut,
                   std::span<const std::uint8_t> codes) {
  const Thresholds<Half> thresholds(lut);
  std::array<Half, kMaxFewEntries> limits_below{};
  std::array<Half, kMaxFewEntries> limits_above{};
  for (std::size_t j = 0; j < lut.size(); ++j) {
    // NaN has the least key of all and takes entry 0, so the first limit is checked by itself.
    const auto below = j == 0 ? std::numeric_limits<std::int16_t>::min() : thresholds.keys[j - 1];
    limits_below[j] = Half{static_cast<std::uint16_t>(below)};
    limits_above[j] = Half{static_cast<std::uint16_t>(thresholds.keys[j])};
  }
  std::array<Half, kChunk> lower;
  std::array<Half, kChunk> upper;
  for (std::size_t begin = 0; begin < weights.size(); begin += kChunk) {
    const std::size_t n = std::min(kChunk, weights.size() - begin);
    prefetch(weights, begin + kChunk, kChunk);
    look_up_sixteen(limits_below.data(), codes.data() + begin, n, lower.data());
    look_up_sixteen(limits_above.data(), codes.data() + begin, n, upper.data());
    if (!lies_within(weights.data() + begin, lower.data(), upper.data(), n)) {
      return false;
    }
  }
  return true;
}

template <typename T>
void lut_to_dense(MatrixView<const std::uint8_t> codes, MatrixView<const T> luts,
                  MatrixView<T> weights) {
  check_luts(luts, codes.n_rows);
  check(weights.n_rows == codes.n_rows && weights.n_cols == codes.n_cols,
        "weights must have the shape of codes, ", codes.n_rows, " x ", codes.n_cols, ", got ",
        weights.n_rows, " x ", weights.n_cols);
  for_each_piece(codes.n_rows, codes.n_cols,
                 [&](std::size_t row, std::size_t begin, std::size_t end) {
                   const auto in = codes.row(row).subspan(begin, end - begin);
                   const auto out = weights.row(row).subspan(begin, end - begin);
                   check(greatest_code(in) < luts.n_cols, "codes must be below ", luts.n_cols,
                         ", got ", int{greatest_code(in)}, " in row ", row);
                   look_up(luts.row(row), in, out);
                 });
}

std::vector<float> midpoint_table(std::span<const float> lut) {
  check(!lut.empty() && lut.size() <= kMaxEntries, "lut must have 1 to ", kMaxEntries,
        " entries, got ", lut.size());
  check_ascending(lut);
  std::vector<float> table(lut.size() - 1);
  std::transform(lut.begin(), lut.end() - 1, lut.begin() + 1, table.begin(), midpoint);
  return table;
}

template void lut_assign(MatrixView<const Half>, MatrixView<const Half>, MatrixView<std::uint8_t>);
template void lut_assign(MatrixView<const float>, MatrixView<const float>,
                         MatrixView<std::uint8_t>);
template void lut_to_dense(MatrixView<const std::uint8_t>, MatrixView<const Half>,
                           MatrixView<Half>);
template void lut_to_dense(MatrixView<const std::uint8_t>, MatrixView<const float>,
                           MatrixView<float>);

}  // namespace milpress
