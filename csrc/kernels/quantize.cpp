#include "kernels/quantize.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "core/convert.h"
#include "core/keys.h"
#include "core/parallel.h"
#include "core/prefetch.h"
#include "core/vectorize.h"
#include "kernels/range_search.h"

namespace milpress {
namespace {

constexpr std::size_t kChunk = 2048;     // weights widened at a time; they stay in the L1 cache
constexpr std::size_t kGrain = 131'072;  // weights a thread takes at a time

template <typename T>
MILPRESS_VECTORIZE Extremes extremes_of(const T* values, std::size_t n) {
  Key<T> low = std::numeric_limits<Key<T>>::max();
  Key<T> high = std::numeric_limits<Key<T>>::min();
  for (std::size_t i = 0; i < n; ++i) {
    const Key<T> key = order_key(values[i]);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  return {to_float(value_at(low)), to_float(value_at(high))};
}

// Rows are fitted and encoded several at a time, so that short ones cost no more than long ones.

// Steps of a few rows, field by field.
struct RowSteps {
  std::vector<float> scales;
  std::vector<float> offsets;
  std::vector<std::uint8_t> rounds_quotient;

  explicit RowSteps(std::size_t n) : scales(n), offsets(n), rounds_quotient(n) {}

  void set(std::size_t row, const Step& step) {
    scales[row] = step.scale;
    offsets[row] = static_cast<float>(step.offset);
    rounds_quotient[row] = step.quotient_in_weight_precision ? 1 : 0;
  }
};

template <typename T>
MILPRESS_VECTORIZE void find_limits(const T* weights, std::size_t n_rows, std::size_t n_cols,
                                    float* limits) {
  for (std::size_t row = 0; row < n_rows; ++row) {
    Magnitude<T> greatest = 0;
    for (std::size_t i = 0; i < n_cols; ++i) {
      const Magnitude<T> bits = magnitude_bits(weights[row * n_cols + i]);
      greatest = bits > greatest ? bits : greatest;
    }
    limits[row] = magnitude_at<T>(greatest);
  }
}

// The scales of symmetric rows by their limits, all at once; false if one is not plain.
template <typename T>
MILPRESS_VECTORIZE bool find_plain_scales(const float* limits, std::size_t n, CodeRange range,
                                          float* scales) {
  constexpr float kSmallest = smallest_normal<T>();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto n_steps = static_cast<float>(range.code_max - range.code_min);
  std::uint32_t n_plain = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const float scale = round_to<T>(round_to<T>(limits[i] + limits[i]) / n_steps);
    scales[i] = scale;
    n_plain += static_cast<std::uint32_t>((scale >= kSmallest) & (scale < kInfinity));
  }
  return n_plain == n;
}

// Codes of plain symmetric rows, which need no limits: the greatest magnitude divided by its scale
// is off the outermost code by half a last place. Adding 1.5 * 2^23 leaves the code in the low
// byte.
template <typename T>
MILPRESS_VECTORIZE void encode_plain(const float* weights, std::size_t n_rows, std::size_t n_cols,
                                     const float* scales, std::int32_t* codes) {
  for (std::size_t row = 0; row < n_rows; ++row) {
    const float scale = scales[row];
    const float inverse = 1.0F / scale;
    const float* const in = weights + row * n_cols;
    std::int32_t* const out = codes + row * n_cols;
    for (std::size_t i = 0; i < n_cols; ++i) {
      const float quotient = quotient_of<T, true>(in[i], scale, inverse);
      out[i] = std::bit_cast<std::int32_t>(quotient + 0x1.8p23F);
    }
  }
}

template <typename T, bool kRoundQuotient>
MILPRESS_VECTORIZE void encode_row(const float* weights, std::size_t n, float scale, float offset,
                                   CodeRange range, std::int32_t* codes) {
  const auto code_min = static_cast<float>(range.code_min);
  const auto code_max = static_cast<float>(range.code_max);
  const float inverse = 1.0F / scale;
  for (std::size_t i = 0; i < n; ++i) {
    codes[i] = static_cast<std::int32_t>(
        code_of<T, kRoundQuotient>(weights[i], scale, inverse, offset, code_min, code_max));
  }
}

template <typename Code>
MILPRESS_VECTORIZE void narrow_codes(const std::int32_t* codes, std::size_t n, int offset,
                                     Code* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = static_cast<Code>(codes[i] + offset);
  }
}

template <typename T, typename Code>
struct Quantizer {
  MatrixView<const T> weights;
  MatrixView<const float> importance;  // empty where all weights count alike
  CodeRange range;
  bool searches;  // for the range of least squared error
  std::span<T> scales;
  std::span<Code> offsets;
  MatrixView<Code> codes;

  // Whether rows may be plain: with as many codes on either side of the middle, none needs a limit.
  bool is_symmetric() const {
    return offsets.empty() && !searches && (range.code_max - range.code_min) % 2 == 0;
  }

  Step fit(std::size_t row, Extremes extremes) const {
    const bool fitted = !offsets.empty();
    const bool finite = std::isfinite(extremes.low) && std::isfinite(extremes.high);
    Step step = step_for<T>(finite ? widened(extremes, fitted) : extremes, range, fitted);
    if (searches && finite && (extremes.low != 0 || extremes.high != 0)) {
      const auto share = importance.size() > 0 ? importance.row(row) : std::span<const float>();
      step = search_range(weights.row(row), share, extremes, range, fitted, step);
    }
    return step;
  }

  // Fits `count` rows from `first` on and stores their scales and offsets; true if all are plain.
  bool fit_rows(std::size_t first, std::size_t count, RowSteps& steps) const {
    const std::size_t n_cols = weights.n_cols;
    const T* const begin = weights.row(first).data();
    bool all_plain = false;
    if (is_symmetric()) {
      find_limits(begin, count, n_cols, steps.offsets.data());
      const float* const limits = steps.offsets.data();
      all_plain = find_plain_scales<T>(limits, count, range, steps.scales.data());
      for (std::size_t i = 0; i < count && !all_plain; ++i) {
        steps.set(i, step_for<T>({-limits[i], limits[i]}, range, false));
      }
    } else {
      for (std::size_t i = 0; i < count; ++i) {
        const Step step = fit(first + i, extremes_of(begin + i * n_cols, n_cols));
        steps.set(i, step);
        if (!offsets.empty()) {
          offsets[first + i] = static_cast<Code>(step.offset);
        }
      }
    }
    narrow(steps.scales.data(), count, scales.data() + first);
    return all_plain;
  }

  // Encodes `n_rows` rows of `n_cols` weights, kChunk of them at most.
  void encode_rows(const T* in, std::size_t n_rows, std::size_t n_cols, const RowSteps& steps,
                   bool all_plain, Code* out) const {
    std::array<float, kChunk> values;
    std::array<std::int32_t, kChunk> wide_codes;
    const std::size_t n = n_rows * n_cols;
    widen(in, n, values.data());
    if (all_plain) {
      encode_plain<T>(values.data(), n_rows, n_cols, steps.scales.data(), wide_codes.data());
      narrow_codes(wide_codes.data(), n, middle(range), out);
      return;
    }
    for (std::size_t row = 0; row < n_rows; ++row) {
      const auto encode =
          steps.rounds_quotient[row] != 0 ? encode_row<T, true> : encode_row<T, false>;
      encode(values.data() + row * n_cols, n_cols, steps.scales[row], steps.offsets[row], range,
             wide_codes.data() + row * n_cols);
    }
    narrow_codes(wide_codes.data(), n, 0, out);
  }

  // Encodes a part of a row while what lies `ahead` is fetched.
  void encode_piece(std::size_t first, std::size_t n, const RowSteps& steps, bool is_plain,
                    std::size_t ahead) const {
    const std::span<const T> all = weights.flat();
    for (std::size_t begin = first; begin < first + n; begin += kChunk) {
      const std::size_t count = std::min(kChunk, first + n - begin);
      prefetch(all, begin + ahead, kChunk);
      encode_rows(all.data() + begin, 1, count, steps, is_plain, codes.data + begin);
    }
  }

  void short_rows(std::size_t begin, std::size_t end) const {
    const std::size_t n_cols = weights.n_cols;
    const std::size_t at_once = kChunk / n_cols;
    RowSteps steps(at_once);
    for (std::size_t first = begin; first < end; first += at_once) {
      const std::size_t count = std::min(at_once, end - first);
      prefetch(weights.flat(), (first + count) * n_cols, at_once * n_cols);
      const bool all_plain = fit_rows(first, count, steps);
      encode_rows(weights.row(first).data(), count, n_cols, steps, all_plain,
                  codes.row(first).data());
    }
  }

  void long_rows(std::size_t begin, std::size_t end) const {
    RowSteps steps(1);
    for (std::size_t i = begin; i < end; ++i) {
      const bool is_plain = fit_rows(i, 1, steps);
      encode_piece(i * weights.n_cols, weights.n_cols, steps, is_plain, weights.n_cols);
    }
  }

  // A row long enough to occupy every thread by itself.
  void giant_row(std::size_t i) const {
    const std::span<const T> row = weights.row(i);
    const auto of_piece = [&](std::size_t begin, std::size_t end) {
      return extremes_of(row.data() + begin, end - begin);
    };
    std::vector<float> all;
    for (const Extremes& extremes : parallel_map(row.size(), kGrain, of_piece)) {
      all.insert(all.end(), {extremes.low, extremes.high});
    }
    const Step step = fit(i, extremes_of(all.data(), all.size()));
    RowSteps steps(1);
    steps.set(0, step);
    scales[i] = from_float<T>(step.scale);
    if (!offsets.empty()) {
      offsets[i] = static_cast<Code>(step.offset);
    }
    const bool is_plain = is_symmetric() && step.quotient_in_weight_precision;
    parallel_for(row.size(), kGrain, [&](std::size_t begin, std::size_t end) {
      encode_piece(i * row.size() + begin, end - begin, steps, is_plain, kChunk);
    });
  }

  void run() const {
    check_quantize(weights, range, scales, offsets, codes);
    if (weights.n_cols == 0) {
      std::fill(scales.begin(), scales.end(), from_float<T>(1.0F));
      std::fill(offsets.begin(), offsets.end(), static_cast<Code>(clamp_code(0, range)));
      return;
    }
    if (weights.n_cols > 4 * kGrain) {
      for (std::size_t i = 0; i < weights.n_rows; ++i) {
        giant_row(i);
      }
      return;
    }
    const std::size_t grain = std::max<std::size_t>(1, kGrain / weights.n_cols);
    parallel_for(weights.n_rows, grain, [&](std::size_t begin, std::size_t end) {
      if (weights.n_cols <= kChunk) {
        short_rows(begin, end);
      } else {
        long_rows(begin, end);
      }
    });
  }
};

}  // namespace

void check_steps(std::size_t n_rows, std::size_t n_scales, std::size_t n_offsets) {
  check(n_scales == n_rows, "scales must have one element a row, ", n_rows, ", got ", n_scales);
  check(n_offsets == 0 || n_offsets == n_rows, "offsets must be empty or have one element a row, ",
        n_rows, ", got ", n_offsets);
}

template <typename T, typename Code>
void quantize(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
              std::span<Code> offsets, MatrixView<Code> codes) {
  Quantizer<T, Code>{weights, {}, range, false, scales, offsets, codes}.run();
}

template <typename T, typename Code>
void quantize_mse(MatrixView<const T> weights, MatrixView<const float> importance, CodeRange range,
                  std::span<T> scales, std::span<Code> offsets, MatrixView<Code> codes) {
  if (importance.n_rows > 0) {
    check_shape("importance", importance, "weights", weights.n_rows, weights.n_cols);
  }
  Quantizer<T, Code>{weights, importance, range, true, scales, offsets, codes}.run();
}

namespace {

template <typename Code>
MILPRESS_VECTORIZE void decode_row(const Code* codes, std::size_t n, float scale, float offset,
                                   float* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = scale * (static_cast<float>(codes[i]) - offset);
  }
}

}  // namespace

template <typename T, typename Code>
void dequantize(MatrixView<const Code> codes, std::span<const T> scales,
                std::span<const Code> offsets, MatrixView<T> weights) {
  check_steps(codes.n_rows, scales.size(), offsets.size());
  check_shape("weights", weights, "codes", codes.n_rows, codes.n_cols);
  parallel_for_rows(
      codes.n_rows, codes.n_cols, kGrain, [&](std::size_t row, std::size_t begin, std::size_t end) {
        std::array<float, kChunk> values;
        const float offset = offsets.empty() ? 0.0F : static_cast<float>(offsets[row]);
        for (; begin < end; begin += std::min(kChunk, end - begin)) {
          const std::size_t n = std::min(kChunk, end - begin);
          decode_row(codes.row(row).data() + begin, n, to_float(scales[row]), offset,
                     values.data());
          narrow(values.data(), n, weights.row(row).data() + begin);
        }
      });
}

#define MILPRESS_INSTANTIATE(T, Code)                                                         \
  template void quantize(MatrixView<const T>, CodeRange, std::span<T>, std::span<Code>,       \
                         MatrixView<Code>);                                                   \
  template void quantize_mse(MatrixView<const T>, MatrixView<const float>, CodeRange,         \
                             std::span<T>, std::span<Code>, MatrixView<Code>);                \
  template void dequantize(MatrixView<const Code>, std::span<const T>, std::span<const Code>, \
                           MatrixView<T>);

MILPRESS_INSTANTIATE(Half, std::int8_t)
MILPRESS_INSTANTIATE(Half, std::uint8_t)
MILPRESS_INSTANTIATE(float, std::int8_t)
MILPRESS_INSTANTIATE(float, std::uint8_t)

}  // namespace milpress
