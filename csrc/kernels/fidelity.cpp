#include "kernels/fidelity.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/check.h"
#include "core/convert.h"
#include "core/keys.h"
#include "core/parallel.h"
#include "core/prefetch.h"
#include "core/shuffle.h"
#include "core/vectorize.h"
#include "kernels/bitmask.h"
#include "kernels/lut_assign.h"
#include "kernels/pack.h"
#include "kernels/quantize.h"
#include "kernels/vector_assign.h"

namespace milpress {
namespace {

constexpr std::size_t kChunk = 1024;     // weights compared at a time, in the L1 cache
constexpr std::size_t kGrain = 131'072;  // weights a thread takes at a time; a multiple of kChunk
constexpr std::size_t kLanes = 32;       // sums side by side, added up in a fixed order in the end

using Chunk = std::array<float, kChunk>;

// Squares of halves neither overflow nor vanish in a float, and a chunk's sum of them is good to
// six digits, far more than a ratio in dB shows. Squares of floats need doubles.
template <typename T>
using Sum = std::conditional_t<sizeof(T) == 2, float, double>;

// Fills both chunks up with zeros to whole lanes, which add nothing.
template <typename T>
MILPRESS_VECTORIZE void add_errors(Chunk& source, Chunk& decoded, std::size_t n, Fidelity& total) {
  std::array<Sum<T>, kLanes> signal{};
  std::array<Sum<T>, kLanes> noise{};
  for (; n % kLanes != 0; ++n) {
    source[n] = 0;
    decoded[n] = 0;
  }
  for (std::size_t i = 0; i < n; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const Sum<T> weight = source[i + lane];
      const Sum<T> error = weight - static_cast<Sum<T>>(decoded[i + lane]);
      signal[lane] += weight * weight;
      noise[lane] += error * error;
    }
  }
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    total.signal += static_cast<double>(signal[lane]);
    total.noise += static_cast<double>(noise[lane]);
  }
}

// NaN is never within its bound, nor is an infinite weight, whose bound is infinite too.
template <typename T>
MILPRESS_VECTORIZE std::size_t count_beyond_half_step(const Chunk& source, const Chunk& decoded,
                                                      std::size_t n_rows, std::size_t n_cols,
                                                      const T* scales) {
  std::uint32_t within = 0;
  for (std::size_t row = 0; row < n_rows; ++row) {
    const float scale = to_float(scales[row]);
    for (std::size_t i = row * n_cols; i < (row + 1) * n_cols; ++i) {
      const float bound = half_step_bound<T>(source[i], decoded[i], scale);
      const float error = magnitude(source[i] - decoded[i]);
      within += static_cast<std::uint32_t>((error <= bound) &
                                           (bound < std::numeric_limits<float>::infinity()));
    }
  }
  return n_rows * n_cols - within;
}

template <typename T>
MILPRESS_VECTORIZE std::size_t count_different(const T* source, const T* decoded, std::size_t n) {
  std::uint32_t count = 0;
  for (std::size_t i = 0; i < n; ++i) {
    count += order_key(source[i]) != order_key(decoded[i]) ? 1U : 0U;
  }
  return count;
}

// `offsets` may be null, for zero.
template <typename T, typename Code>
MILPRESS_VECTORIZE void decode(const Code* codes, std::size_t n_rows, std::size_t n_cols,
                               const T* scales, const Code* offsets, Chunk& out) {
  for (std::size_t row = 0; row < n_rows; ++row) {
    const float scale = to_float(scales[row]);
    const float offset = offsets == nullptr ? 0.0F : static_cast<float>(offsets[row]);
    for (std::size_t i = row * n_cols; i < (row + 1) * n_cols; ++i) {
      out[i] = scale * (static_cast<float>(codes[i]) - offset);
    }
  }
}

void round_in_place(Chunk& values, std::size_t n, Half /*precision*/) {
  std::array<Half, kChunk> rounded;
  narrow(values.data(), n, rounded.data());
  widen(rounded.data(), n, values.data());
}

void round_in_place(Chunk& /*values*/, std::size_t /*n*/, float /*precision*/) {}

void add(Fidelity& total, const Fidelity& piece) {
  total.signal += piece.signal;
  total.noise += piece.noise;
  total.n_outside += piece.n_outside;
}

// Sums `body(begin, end, partial)` over pieces of kGrain weights, in their order.
template <typename Body>
Fidelity sum_pieces(std::size_t n, const Body& body) {
  const auto of_piece = [&](std::size_t begin, std::size_t end) {
    Fidelity piece;
    body(begin, end, piece);
    return piece;
  };
  Fidelity total;
  for (const Fidelity& piece : parallel_map(n, kGrain, of_piece)) {
    add(total, piece);
  }
  return total;
}

}  // namespace

template <typename T>
Fidelity compare(std::span<const T> source, std::span<const T> decoded) {
  check(source.size() == decoded.size(), "decoded must have ", source.size(),
        " elements like source, got ", decoded.size());
  return sum_pieces(source.size(), [&](std::size_t begin, std::size_t end, Fidelity& total) {
    Chunk weights;
    Chunk values;
    for (; begin < end; begin += std::min(kChunk, end - begin)) {
      const std::size_t n = std::min(kChunk, end - begin);
      prefetch(source, begin + kChunk, kChunk);
      prefetch(decoded, begin + kChunk, kChunk);
      widen(source.data() + begin, n, weights.data());
      widen(decoded.data() + begin, n, values.data());
      add_errors<T>(weights, values, n, total);
      total.n_outside += count_different(source.data() + begin, decoded.data() + begin, n);
    }
  });
}

template <typename T, typename Code>
Fidelity compare_quantized(MatrixView<const T> source, MatrixView<const Code> codes,
                           std::span<const T> scales, std::span<const Code> offsets) {
  check_shape("codes", codes, "source", source.n_rows, source.n_cols);
  check_steps(source.n_rows, scales.size(), offsets.size());
  const std::size_t n_cols = source.n_cols;
  // Several short rows at a time, or a part of one.
  const auto judge = [&](std::size_t row, std::size_t n_rows, std::size_t begin, std::size_t count,
                         Fidelity& total) {
    Chunk weights;
    Chunk values;
    const std::size_t first = row * n_cols + begin;
    const std::size_t n = n_rows * count;
    const Code* const row_offsets = offsets.empty() ? nullptr : offsets.data() + row;
    prefetch(source.flat(), first + n, kChunk);
    prefetch(codes.flat(), first + n, kChunk);
    widen(source.data + first, n, weights.data());
    decode(codes.data + first, n_rows, count, scales.data() + row, row_offsets, values);
    round_in_place(values, n, T{});
    total.n_outside +=
        count_beyond_half_step<T>(weights, values, n_rows, count, scales.data() + row);
    add_errors<T>(weights, values, n, total);
  };
  if (n_cols > kChunk) {
    return sum_pieces(source.size(), [&](std::size_t begin, std::size_t end, Fidelity& total) {
      while (begin < end) {
        const std::size_t row = begin / n_cols;
        const std::size_t n = std::min({kChunk, end - begin, (row + 1) * n_cols - begin});
        judge(row, 1, begin - row * n_cols, n, total);
        begin += n;
      }
    });
  }
  const std::size_t at_once = kChunk / std::max<std::size_t>(1, n_cols);
  const std::size_t n_blocks = (source.n_rows + at_once - 1) / at_once;
  return sum_pieces(n_blocks * kChunk, [&](std::size_t begin, std::size_t end, Fidelity& total) {
    for (std::size_t block = begin / kChunk; block < end / kChunk; ++block) {
      const std::size_t row = block * at_once;
      judge(row, std::min(at_once, source.n_rows - row), 0, n_cols, total);
    }
  });
}

namespace {

// Whether every key lies above `lower` and not above `upper` of the code that goes with it.
MILPRESS_VECTORIZE bool lies_within(const Half* weights, const Half* lower, const Half* upper,
                                    std::size_t n) {
  std::uint16_t n_outside = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::int16_t key = compare_key(weights[i]);
    const auto low = static_cast<std::int16_t>(lower[i].bits);
    const auto high = static_cast<std::int16_t>(upper[i].bits);
    n_outside = static_cast<std::uint16_t>(n_outside | ((key <= low) | (key > high)));
  }
  return n_outside == 0;
}

// Whether each code is what `lut_assign` writes for its weight, by a table that can be looked up.
bool names_nearest(std::span<const Half> weights, std::span<const Half> lut,
                   std::span<const std::uint8_t> codes) {
  const std::vector<float> midpoints = midpoint_table(lut);
  const auto half_of = [](std::int16_t key) { return std::bit_cast<Half>(key); };
  // NaN has the least key of all and takes entry 0, so the first limit is checked by itself.
  std::array<Half, kShuffleEntries> limits_below{half_of(std::numeric_limits<std::int16_t>::min())};
  std::array<Half, kShuffleEntries> limits_above{};
  for (std::size_t j = 0; j < midpoints.size(); ++j) {
    limits_above[j] = limits_below[j + 1] = half_of(key_up_to<Half>(midpoints[j]));
  }
  limits_above[midpoints.size()] = half_of(std::numeric_limits<std::int16_t>::max());
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

// Whether codes are what `lut_assign` makes of the weights; `nearest` receives that if it has to be
// worked out.
template <typename T>
bool is_assigned(std::span<const T> weights, std::span<const T> lut,
                 std::span<const std::uint8_t> codes, std::vector<std::uint8_t>& nearest) {
  if constexpr (sizeof(T) == 2) {
    if (lut.size() <= kShuffleEntries && names_nearest(weights, lut, codes)) {
      return true;
    }
  }
  nearest.resize(weights.size());
  lut_assign<T>({weights.data(), 1, weights.size()}, {lut.data(), 1, lut.size()},
                {nearest.data(), 1, weights.size()});
  return std::equal(codes.begin(), codes.end(), nearest.begin());
}

// Codes for which the entry of `nearest` is nearer. Equal entries and ties are as good.
template <typename T>
std::size_t count_not_nearest(std::span<const T> weights, std::span<const T> lut,
                              std::span<const std::uint8_t> codes,
                              std::span<const std::uint8_t> nearest) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const double weight = to_float(weights[i]);
    const double best = std::abs(weight - static_cast<double>(to_float(lut[nearest[i]])));
    const double mine = std::abs(weight - static_cast<double>(to_float(lut[codes[i]])));
    count += mine <= best ? 0U : 1U;
  }
  return count;
}

}  // namespace

template <typename T>
Fidelity compare_palette(MatrixView<const T> source, MatrixView<const std::uint8_t> codes,
                         MatrixView<const T> luts) {
  check_shape("codes", codes, "source", source.n_rows, source.n_cols);
  check_luts(luts, source.n_rows);
  const std::size_t n_cols = source.n_cols;
  return sum_pieces(source.size(), [&](std::size_t begin, std::size_t end, Fidelity& total) {
    std::vector<std::uint8_t> nearest;
    std::array<T, kChunk> decoded;
    Chunk weights;
    Chunk values;
    while (begin < end) {
      const std::size_t row = begin / n_cols;
      const std::size_t n_in_row = std::min(end, (row + 1) * n_cols) - begin;
      const std::span<const T> lut = luts.row(row);
      const auto piece = source.flat().subspan(begin, n_in_row);
      const auto names = codes.flat().subspan(begin, n_in_row);
      check_codes(names, luts.n_cols);
      if (!is_assigned(piece, lut, names, nearest)) {
        total.n_outside += count_not_nearest(piece, lut, names, nearest);
      }
      for (std::size_t i = 0; i < n_in_row; i += kChunk) {
        const std::size_t n = std::min(kChunk, n_in_row - i);
        lut_to_dense<T>({names.data() + i, 1, n}, {lut.data(), 1, lut.size()},
                        {decoded.data(), 1, n});
        widen(piece.data() + i, n, weights.data());
        widen(decoded.data(), n, values.data());
        add_errors<T>(weights, values, n, total);
      }
      begin += n_in_row;
    }
  });
}

namespace {

template <typename T>
double squared_distance(std::span<const T> vector, std::span<const T> lut, std::size_t code) {
  double sum = 0;
  for (std::size_t d = 0; d < vector.size(); ++d) {
    const double entry = to_float(lut[code * vector.size() + d]);
    const double difference = static_cast<double>(to_float(vector[d])) - entry;
    sum += difference * difference;
  }
  return sum;
}

// Vectors of a row to which the entry of `nearest` is nearer than that of `codes`.
template <typename T>
std::size_t count_not_nearest(std::span<const T> row, std::size_t dim, std::span<const T> lut,
                              std::span<const std::uint8_t> codes,
                              std::span<const std::uint8_t> nearest) {
  if (std::equal(codes.begin(), codes.end(), nearest.begin())) {
    return 0;
  }
  double greatest = 0;
  for (const T weight : row) {
    greatest = std::max(greatest, std::abs(static_cast<double>(to_float(weight))));
  }
  const auto n_sums = static_cast<double>(dim);
  const double vanishing = n_sums * 0x1p-126 * 4 * greatest * greatest;
  const double rounding = 1 + (n_sums + 3) * 0x1p-23;
  std::size_t count = 0;
  for (std::size_t i = 0; i < codes.size(); ++i) {
    if (codes[i] != nearest[i]) {
      const std::span<const T> vector = row.subspan(i * dim, dim);
      const double mine = squared_distance(vector, lut, codes[i]);
      const double best = squared_distance(vector, lut, nearest[i]);
      count += mine <= best * rounding + vanishing ? 0U : 1U;
    }
  }
  return count;
}

}  // namespace

template <typename T>
Fidelity compare_vectors(MatrixView<const T> source, std::size_t dim,
                         MatrixView<const std::uint8_t> codes, MatrixView<const T> luts) {
  std::vector<std::uint8_t> nearest(codes.size());
  const MatrixView<std::uint8_t> nearest_rows{nearest.data(), codes.n_rows, codes.n_cols};
  vector_assign<T>(source, dim, luts, nearest_rows);  // checks the shapes
  check_codes(codes.flat(), luts.n_cols / dim);
  std::vector<T> decoded(source.size());
  std::size_t n_outside = 0;
  for (std::size_t row = 0; row < source.n_rows; ++row) {
    const std::span<const std::uint8_t> names = codes.row(row);
    for (std::size_t i = 0; i < names.size(); ++i) {
      std::copy_n(luts.row(row).data() + names[i] * dim, dim,
                  decoded.data() + row * source.n_cols + i * dim);
    }
    const MatrixView<const std::uint8_t> found{nearest.data(), codes.n_rows, codes.n_cols};
    n_outside += count_not_nearest(source.row(row), dim, luts.row(row), names, found.row(row));
  }
  Fidelity fidelity = compare<T>(source.flat(), decoded);
  fidelity.n_outside = n_outside;
  return fidelity;
}

namespace {

// The greatest magnitude dropped and the least kept, as bits, which order as magnitudes do.
template <typename T>
struct Split {
  Magnitude<T> greatest_pruned = 0;
  Magnitude<T> least_kept = std::numeric_limits<Magnitude<T>>::max();
};

// Updates `split` and tells whether any weight that is kept differs from its source.
template <typename T>
MILPRESS_VECTORIZE bool split_magnitudes(const T* source, const T* decoded,
                                         const std::uint8_t* is_kept, std::size_t n,
                                         Split<T>& split) {
  using Bits = Magnitude<T>;
  Bits pruned = split.greatest_pruned;
  Bits kept = split.least_kept;
  Bits changed = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const Bits bits = magnitude_bits(source[i]);
    const auto everything = static_cast<Bits>(-static_cast<Bits>(is_kept[i]));  // all ones if kept
    const auto if_pruned = static_cast<Bits>(bits & ~everything);
    const auto if_kept = static_cast<Bits>(bits | ~everything);
    const auto difference = static_cast<Bits>(order_key(source[i]) ^ order_key(decoded[i]));
    pruned = if_pruned > pruned ? if_pruned : pruned;
    kept = if_kept < kept ? if_kept : kept;
    changed = static_cast<Bits>(changed | (difference & everything));
  }
  split = {pruned, kept};
  return changed != 0;
}

template <typename T>
struct SparsePiece {
  Fidelity fidelity;
  Split<T> split;
  std::size_t n_source_zeros = 0;
};

template <typename T>
MILPRESS_VECTORIZE std::size_t count_zeros(const T* weights, std::size_t n) {
  std::uint32_t count = 0;
  for (std::size_t i = 0; i < n; ++i) {
    count += magnitude_bits(weights[i]) == 0 ? 1U : 0U;
  }
  return count;
}

template <typename T>
std::size_t count_all_zeros(std::span<const T> weights) {
  std::size_t count = 0;
  for (std::size_t begin = 0; begin < weights.size(); begin += kGrain) {
    count += count_zeros(weights.data() + begin, std::min(kGrain, weights.size() - begin));
  }
  return count;
}

// `bitmask` may go on behind the piece; `nonzeros` are exactly those of the piece.
template <typename T>
SparsePiece<T> judge_piece(std::span<const T> source, std::span<const std::uint8_t> bitmask,
                           std::span<const T> nonzeros) {
  SparsePiece<T> piece;
  Chunk weights;
  Chunk values;
  std::array<T, kChunk> decoded;
  std::array<std::uint8_t, kChunk> is_kept;
  for (std::size_t begin = 0; begin < source.size(); begin += kChunk) {
    const std::size_t n = std::min(kChunk, source.size() - begin);
    const T* const chunk = source.data() + begin;
    const auto mask = bitmask.subspan(begin / 8, (n + 7) / 8);
    const std::size_t n_kept = count_kept(mask);
    prefetch(source, begin + kChunk, kChunk);
    prefetch(nonzeros, n_kept, kChunk);
    expand<T>(mask, nonzeros.first(n_kept), std::span(decoded).first(n));
    nonzeros = nonzeros.subspan(n_kept);
    unpack(mask, 1, std::span(is_kept).first(n));
    if (split_magnitudes(chunk, decoded.data(), is_kept.data(), n, piece.split)) {
      for (std::size_t i = 0; i < n; ++i) {
        const bool differs = order_key(chunk[i]) != order_key(decoded[i]);
        piece.fidelity.n_outside += differs && is_kept[i] != 0 ? 1U : 0U;
      }
    }
    piece.n_source_zeros += count_zeros(chunk, n);
    widen(chunk, n, weights.data());
    widen(decoded.data(), n, values.data());
    add_errors<T>(weights, values, n, piece.fidelity);
  }
  return piece;
}

}  // namespace

template <typename T>
SparseFidelity compare_sparse(std::span<const T> source, std::span<const std::uint8_t> bitmask,
                              std::span<const T> nonzeros) {
  const std::vector<std::size_t> starts = kept_before(bitmask, kGrain);
  check_expand(source.size(), bitmask, nonzeros.size());
  const auto of_piece = [&](std::size_t begin, std::size_t end) {
    const std::size_t piece = begin / kGrain;
    const std::size_t next = piece + 1 < starts.size() ? starts[piece + 1] : nonzeros.size();
    return judge_piece(source.subspan(begin, end - begin), bitmask.subspan(begin / 8),
                       nonzeros.subspan(starts[piece], next - starts[piece]));
  };
  SparseFidelity result;
  Split<T> split;
  for (const SparsePiece<T>& piece : parallel_map(source.size(), kGrain, of_piece)) {
    add(result.fidelity, piece.fidelity);
    result.n_source_zeros += piece.n_source_zeros;
    split.greatest_pruned = std::max(split.greatest_pruned, piece.split.greatest_pruned);
    split.least_kept = std::min(split.least_kept, piece.split.least_kept);
  }
  result.n_zeros = source.size() - nonzeros.size() + count_all_zeros(nonzeros);
  result.greatest_pruned = magnitude_at<T>(split.greatest_pruned);
  result.least_kept =
      nonzeros.empty() ? std::numeric_limits<float>::infinity() : magnitude_at<T>(split.least_kept);
  return result;
}

#define MILPRESS_INSTANTIATE(T)                                                             \
  template Fidelity compare(std::span<const T>, std::span<const T>);                        \
  template Fidelity compare_quantized(MatrixView<const T>, MatrixView<const std::int8_t>,   \
                                      std::span<const T>, std::span<const std::int8_t>);    \
  template Fidelity compare_quantized(MatrixView<const T>, MatrixView<const std::uint8_t>,  \
                                      std::span<const T>, std::span<const std::uint8_t>);   \
  template Fidelity compare_palette(MatrixView<const T>, MatrixView<const std::uint8_t>,    \
                                    MatrixView<const T>);                                   \
  template Fidelity compare_vectors(MatrixView<const T>, std::size_t,                       \
                                    MatrixView<const std::uint8_t>, MatrixView<const T>);   \
  template SparseFidelity compare_sparse(std::span<const T>, std::span<const std::uint8_t>, \
                                         std::span<const T>);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress
