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
#include "core/order.h"
#include "core/parallel.h"
#include "core/vectorize.h"
#include "kernels/lut_assign.h"
#include "kernels/pack.h"
#include "kernels/quantize.h"
#include "kernels/sparsify.h"

namespace milpress {
namespace {

constexpr std::size_t kChunk = 1024;     // weights compared at a time, in the L1 cache
constexpr std::size_t kGrain = 131'072;  // weights a thread takes at a time
constexpr std::size_t kLanes = 8;

using Chunk = std::array<float, kChunk>;

// Squares of halves neither overflow nor vanish in a float, and a chunk's sum of them is good to
// six digits, far more than a ratio in dB shows. Squares of floats need doubles.
template <typename T>
using Sum = std::conditional_t<sizeof(T) == 2, float, double>;

// Eight sums side by side, added up in a fixed order in the end.
template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};

template <typename T>
MILPRESS_VECTORIZE void add_errors(const float* source, const float* decoded, std::size_t n,
                                   Fidelity& total) {
  using Wide = typename Lanes<Sum<T>>::type;
  typename Lanes<float>::type weights;
  typename Lanes<float>::type values;
  Wide signal{};
  Wide noise{};
  for (std::size_t i = 0; i + kLanes <= n; i += kLanes) {
    std::memcpy(&weights, source + i, sizeof weights);
    std::memcpy(&values, decoded + i, sizeof values);
    const Wide weight = __builtin_convertvector(weights, Wide);
    const Wide error = weight - __builtin_convertvector(values, Wide);
    signal += weight * weight;
    noise += error * error;
  }
  for (std::size_t i = n / kLanes * kLanes; i < n; ++i) {
    const Sum<T> weight = source[i];
    const Sum<T> error = weight - static_cast<Sum<T>>(decoded[i]);
    signal[i % kLanes] += weight * weight;
    noise[i % kLanes] += error * error;
  }
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    total.signal += static_cast<double>(signal[lane]);
    total.noise += static_cast<double>(noise[lane]);
  }
}

// NaN is never within its bound, nor is an infinite weight, whose bound is infinite too.
template <typename T>
MILPRESS_VECTORIZE std::size_t count_beyond_half_step(const float* source, const float* decoded,
                                                      std::size_t n, float scale) {
  std::uint32_t within = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const float bound = half_step_bound<T>(source[i], decoded[i], scale);
    const float error = source[i] - decoded[i];
    within += static_cast<std::uint32_t>((error <= bound) & (-error <= bound) &
                                         (bound < std::numeric_limits<float>::infinity()));
  }
  return n - within;
}

template <typename T>
MILPRESS_VECTORIZE std::size_t count_different(const T* source, const T* decoded, std::size_t n) {
  std::uint32_t count = 0;
  for (std::size_t i = 0; i < n; ++i) {
    count += order_key(source[i]) != order_key(decoded[i]) ? 1U : 0U;
  }
  return count;
}

template <typename Code>
MILPRESS_VECTORIZE void decode(const Code* codes, std::size_t n, float scale, float offset,
                               float* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = scale * (static_cast<float>(codes[i]) - offset);
  }
}

// Sums `body(begin, end, partial)` over pieces of kGrain weights, in their order.
template <typename Body>
Fidelity sum_pieces(std::size_t n, const Body& body) {
  std::vector<Fidelity> partial((n + kGrain - 1) / kGrain);
  parallel_for(n, kGrain, [&](std::size_t begin, std::size_t end) {
    body(begin, end, partial[begin / kGrain]);
  });
  Fidelity total;
  for (const Fidelity& piece : partial) {
    total.signal += piece.signal;
    total.noise += piece.noise;
    total.n_outside += piece.n_outside;
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
      widen(source.data() + begin, n, weights.data());
      widen(decoded.data() + begin, n, values.data());
      add_errors<T>(weights.data(), values.data(), n, total);
      total.n_outside += count_different(source.data() + begin, decoded.data() + begin, n);
    }
  });
}

template <typename T, typename Code>
Fidelity compare_quantized(MatrixView<const T> source, MatrixView<const Code> codes,
                           std::span<const T> scales, std::span<const Code> offsets) {
  check(codes.n_rows == source.n_rows && codes.n_cols == source.n_cols,
        "codes must have the shape of source");
  check(scales.size() == source.n_rows, "scales must have one element a row, ", source.n_rows,
        ", got ", scales.size());
  check(offsets.empty() || offsets.size() == source.n_rows,
        "offsets must be empty or have one element a row, ", source.n_rows, ", got ",
        offsets.size());
  const std::size_t n_cols = source.n_cols;
  return sum_pieces(source.size(), [&](std::size_t begin, std::size_t end, Fidelity& total) {
    Chunk weights;
    Chunk values;
    std::array<T, kChunk> rounded;
    while (begin < end) {
      const std::size_t n = std::min(kChunk, end - begin);
      widen(source.data + begin, n, weights.data());
      // A chunk may span many short rows, or lie within one.
      for (std::size_t i = begin; i < begin + n;) {
        const std::size_t row = i / n_cols;
        const std::size_t count = std::min(begin + n, (row + 1) * n_cols) - i;
        const float offset = offsets.empty() ? 0.0F : static_cast<float>(offsets[row]);
        decode(codes.data + i, count, to_float(scales[row]), offset, values.data() + (i - begin));
        i += count;
      }
      narrow(values.data(), n, rounded.data());
      widen(rounded.data(), n, values.data());
      add_errors<T>(weights.data(), values.data(), n, total);
      for (std::size_t i = begin; i < begin + n;) {
        const std::size_t row = i / n_cols;
        const std::size_t count = std::min(begin + n, (row + 1) * n_cols) - i;
        total.n_outside +=
            count_beyond_half_step<T>(weights.data() + (i - begin), values.data() + (i - begin),
                                      count, to_float(scales[row]));
        i += count;
      }
      begin += n;
    }
  });
}

template <typename T>
Fidelity compare_palette(MatrixView<const T> source, MatrixView<const std::uint8_t> codes,
                         MatrixView<const T> luts) {
  check(codes.n_rows == source.n_rows && codes.n_cols == source.n_cols,
        "codes must have the shape of source");
  check(luts.n_rows == source.n_rows, "luts must have one row a row of source, ", source.n_rows,
        ", got ", luts.n_rows);
  std::vector<std::uint8_t> nearest(source.size());
  lut_assign(source, luts, MatrixView<std::uint8_t>{nearest.data(), source.n_rows, source.n_cols});
  std::vector<float> entries(luts.size());
  widen(luts.data, luts.size(), entries.data());
  const std::size_t n_cols = source.n_cols;
  const std::size_t n_entries = luts.n_cols;
  return sum_pieces(source.size(), [&](std::size_t begin, std::size_t end, Fidelity& total) {
    Chunk weights;
    Chunk values;
    while (begin < end) {
      const std::size_t row = begin / n_cols;
      const std::size_t n = std::min({kChunk, end - begin, (row + 1) * n_cols - begin});
      const float* const lut = entries.data() + row * n_entries;
      widen(source.data + begin, n, weights.data());
      const std::uint8_t* const chunk = codes.data + begin;
      check(*std::max_element(chunk, chunk + n) < n_entries, "codes must be below ", n_entries);
      for (std::size_t i = 0; i < n; ++i) {
        values[i] = lut[chunk[i]];
      }
      add_errors<T>(weights.data(), values.data(), n, total);
      if (std::memcmp(chunk, nearest.data() + begin, n) != 0) {
        for (std::size_t i = 0; i < n; ++i) {
          const double weight = weights[i];
          const double best = std::abs(weight - static_cast<double>(lut[nearest[begin + i]]));
          const double mine = std::abs(weight - static_cast<double>(values[i]));
          total.n_outside += mine <= best ? 0U : 1U;
        }
      }
      begin += n;
    }
  });
}

namespace {

// The greatest magnitude dropped and the least kept, as bits, which order as magnitudes do.
template <typename T>
struct Split {
  using Bits = decltype(magnitude_bits(T{}));
  Bits greatest_pruned = 0;
  Bits least_kept = std::numeric_limits<Bits>::max();
};

// Updates `split` and tells whether any weight that is kept differs from its source.
template <typename T>
MILPRESS_VECTORIZE bool split_magnitudes(const T* source, const T* decoded,
                                         const std::uint8_t* is_kept, std::size_t n,
                                         Split<T>& split) {
  using Bits = typename Split<T>::Bits;
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
float magnitude_at(std::uint32_t bits) {
  if constexpr (sizeof(T) == 2) {
    return to_float(Half{static_cast<std::uint16_t>(bits)});
  } else {
    return std::bit_cast<float>(bits);
  }
}

}  // namespace

template <typename T>
SparseFidelity compare_sparse(std::span<const T> source, std::span<const std::uint8_t> bitmask,
                              std::span<const T> nonzeros) {
  std::vector<T> decoded(source.size());
  expand(bitmask, nonzeros, std::span(decoded));
  SparseFidelity result;
  result.fidelity = compare(source, std::span<const T>(decoded));
  result.fidelity.n_outside = 0;
  struct Piece {
    Split<T> split;
    std::size_t n_changed = 0;
  };
  std::vector<Piece> pieces((source.size() + kGrain - 1) / kGrain);
  parallel_for(source.size(), kGrain, [&](std::size_t begin, std::size_t end) {
    std::array<std::uint8_t, kChunk> is_kept;
    Piece& piece = pieces[begin / kGrain];
    for (; begin < end; begin += std::min(kChunk, end - begin)) {
      const std::size_t n = std::min(kChunk, end - begin);
      unpack(bitmask.subspan(begin / 8, (n + 7) / 8), 1, std::span(is_kept).first(n));
      if (split_magnitudes(source.data() + begin, decoded.data() + begin, is_kept.data(), n,
                           piece.split)) {
        for (std::size_t i = 0; i < n; ++i) {
          const bool differs = order_key(source[begin + i]) != order_key(decoded[begin + i]);
          piece.n_changed += differs && is_kept[i] != 0 ? 1U : 0U;
        }
      }
    }
  });
  Split<T> split;
  for (const Piece& piece : pieces) {
    split.greatest_pruned = std::max(split.greatest_pruned, piece.split.greatest_pruned);
    split.least_kept = std::min(split.least_kept, piece.split.least_kept);
    result.fidelity.n_outside += piece.n_changed;
  }
  const auto n_stored_zeros = std::count_if(nonzeros.begin(), nonzeros.end(),
                                            [](T weight) { return magnitude_bits(weight) == 0; });
  result.n_zeros = source.size() - nonzeros.size() + static_cast<std::size_t>(n_stored_zeros);
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
  template SparseFidelity compare_sparse(std::span<const T>, std::span<const std::uint8_t>, \
                                         std::span<const T>);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress
