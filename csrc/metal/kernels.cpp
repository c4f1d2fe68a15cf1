#include "metal/kernels.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "../../metal/params.h"
#include "core/check.h"
#include "core/parallel.h"
#include "kernels/kmeans1d.h"
#include "kernels/lut_assign.h"
#include "kernels/pack.h"

namespace milpress::metal {
namespace {

constexpr std::size_t kSimdWidth = 32;
constexpr std::size_t kMaxElements = std::size_t{1} << 31;    // a thread's place has 32 bits
constexpr std::size_t kMaxHistograms = std::size_t{1} << 28;  // bytes of them at a time

std::uint32_t narrow(std::size_t n) {
  if (n >= kMaxElements) {
    throw DeviceError("a weight must have fewer than 2^31 elements for the GPU, got " +
                      std::to_string(n));
  }
  return static_cast<std::uint32_t>(n);
}

template <typename T>
std::string name_of(const char* kernel) {
  return std::string(kernel) + (sizeof(T) == 2 ? "_half" : "_float");
}

template <typename T>
void copy_out(const Buffer& buffer, std::span<T> out) {
  const std::span<const T> contents = buffer.as<const T>(out.size());
  std::copy(contents.begin(), contents.end(), out.begin());
}

std::size_t n_words(std::size_t n_weights) { return (n_weights + kSimdWidth - 1) / kSimdWidth; }

// One thread for each of some simdgroups.
Grid grid_of_simdgroups(const std::string& kernel, std::size_t n_simdgroups) {
  return grid_for(kernel, n_simdgroups * kSimdWidth);
}

// Kernels that count in tiles and those that use the counts must agree on what a tile is.
std::size_t tile_size(const std::string& one, const std::string& other) {
  constexpr std::size_t kWanted = 256;
  return std::min(group_size(one, kWanted), group_size(other, kWanted));
}

Grid tiles(std::size_t n_weights, std::size_t tile) {
  return {(n_weights + tile - 1) / tile, tile};
}

void add_scan(Commands& commands, const Buffer& totals, std::size_t n_totals) {
  constexpr std::size_t kWanted = 1024;
  commands.add("scan_totals", {1, group_size("scan_totals", kWanted)}, {&totals}, narrow(n_totals));
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Palettes

template <>
void kmeans1d(MatrixView<const float>, MatrixView<const float>, MatrixView<float>) {
  throw DeviceError("the GPU counts the distinct values of float16 weights only, got float32");
}

template <>
void kmeans1d(MatrixView<const Half> weights, MatrixView<const float> importance,
              MatrixView<Half> luts) {
  constexpr std::size_t kBins = std::size_t{1} << 16;
  constexpr std::uint32_t kExact = 1U << 24;  // counts up to here are floats
  const bool has_mask = importance.n_rows > 0;
  for (const float share : importance.flat()) {
    if (share != 0 && share != 1) {
      throw DeviceError("importance must be 0 or 1 for the GPU, got " + std::to_string(share));
    }
  }
  if (weights.size() == 0 || luts.n_rows != weights.n_rows || luts.n_cols == 0 ||
      (has_mask && (importance.n_rows != weights.n_rows || importance.n_cols != weights.n_cols))) {
    milpress::kmeans1d(weights, importance, luts);  // which has the words for it
    return;
  }
  const std::size_t at_once =
      std::min({weights.n_rows, kMaxHistograms / (kBins * sizeof(std::uint32_t)),
                std::max<std::size_t>(1, (kMaxElements - 1) / weights.n_cols)});
  const Buffer counts(at_once * kBins * sizeof(std::uint32_t));
  for (std::size_t first = 0; first < weights.n_rows; first += at_once) {
    const std::size_t n_rows = std::min(at_once, weights.n_rows - first);
    const std::size_t n_weights = n_rows * weights.n_cols;
    const Buffer in = Buffer::holding(std::span<const Half>(weights.row(first).data(), n_weights));
    const Buffer mask =
        Buffer::holding(has_mask ? std::span<const float>(importance.row(first).data(), n_weights)
                                 : std::span<const float>());
    counts.fill_with_zeros();
    Commands commands;
    const HistogramParams params{narrow(n_weights), narrow(weights.n_cols), has_mask ? 1U : 0U};
    commands.add("count_halves", grid_for("count_halves", n_weights), {&in, &mask, &counts},
                 params);
    commands.run();
    const auto all_counts = counts.as<const std::uint32_t>(n_rows * kBins);
    parallel_for(n_rows, 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t row = begin; row < end; ++row) {
        // A value stands for all that equal it, with their number as importance.
        std::vector<Half> values;
        std::vector<float> shares;
        for (std::size_t bits = 0; bits < kBins; ++bits) {
          for (std::uint32_t left = all_counts[row * kBins + bits]; left > 0;) {
            const std::uint32_t part = std::min(left, kExact);
            values.push_back(Half{static_cast<std::uint16_t>(bits)});
            shares.push_back(static_cast<float>(part));
            left -= part;
          }
        }
        if (values.empty()) {
          milpress::kmeans1d<Half>({weights.row(first + row).data(), 1, weights.n_cols}, {},
                                   {luts.row(first + row).data(), 1, luts.n_cols});
        } else {
          milpress::kmeans1d<Half>({values.data(), 1, values.size()},
                                   {shares.data(), 1, shares.size()},
                                   {luts.row(first + row).data(), 1, luts.n_cols});
        }
      }
    });
  }
}

namespace {

// The bits of the largest `T` that is at most `limit`, as integers that order as values do.
template <typename T>
std::int32_t threshold_key(float limit) {
  const auto key_of = [](auto value) {
    using Bits = std::conditional_t<sizeof(value) == 2, std::uint16_t, std::uint32_t>;
    const auto bits = std::bit_cast<Bits>(value);
    const auto magnitude = static_cast<std::int32_t>(bits & (Bits(~Bits{0}) >> 1));
    return bits == static_cast<Bits>(magnitude) ? magnitude : -magnitude;
  };
  const T rounded = from_float<T>(limit);
  return key_of(rounded) - (to_float(rounded) > limit ? 1 : 0);
}

}  // namespace

template <typename T>
void lut_assign(MatrixView<const T> weights, MatrixView<const T> luts,
                MatrixView<std::uint8_t> codes) {
  constexpr std::size_t kMaxEntries = 256;
  if (weights.size() == 0 || luts.n_rows != weights.n_rows || luts.n_cols == 0 ||
      luts.n_cols > kMaxEntries || codes.size() != weights.size()) {
    milpress::lut_assign(weights, luts, codes);
    return;
  }
  narrow(weights.size());
  // A whole binary tree of thresholds; those that fill it up are above everything.
  std::size_t table_size = 0;
  while (table_size + 1 < luts.n_cols) {
    table_size = 2 * table_size + 1;
  }
  std::vector<std::int32_t> thresholds(luts.n_rows * table_size,
                                       std::numeric_limits<std::int32_t>::max());
  std::vector<float> lut(luts.n_cols);
  for (std::size_t row = 0; row < luts.n_rows; ++row) {
    const std::span<const T> entries = luts.row(row);
    std::transform(entries.begin(), entries.end(), lut.begin(),
                   [](T entry) { return to_float(entry); });
    const std::vector<float> limits = midpoint_table(lut);  // checks lut
    std::transform(limits.begin(), limits.end(),
                   thresholds.begin() + static_cast<std::ptrdiff_t>(row * table_size),
                   threshold_key<T>);
  }
  const std::string kernel = name_of<T>("lut_assign");
  const Buffer in = Buffer::holding(std::span<const T>(weights.flat()));
  const Buffer table = Buffer::holding(std::span<const std::int32_t>(thresholds));
  const Buffer out(codes.size());
  const LutAssignParams params{narrow(weights.n_rows), narrow(weights.n_cols), narrow(table_size)};
  Commands commands;
  commands.add(kernel, grid_for(kernel, weights.size()), {&in, &table, &out}, params);
  commands.run();
  copy_out(out, codes.flat());
}

void lloyd_step(MatrixView<const float> vectors, std::span<const float> importance,
                MatrixView<const float> entries, std::size_t n_per_piece,
                std::span<std::uint8_t> codes, std::span<float> distances,
                MatrixView<double> sums) {
  constexpr std::size_t kMaxEntries = 256;
  const std::size_t dim = vectors.n_rows;
  const std::size_t n = vectors.n_cols;
  check(dim > 0 && n > 0 && n_per_piece > 0, "there must be vectors and pieces, got ", n, " of ",
        dim, " elements, ", n_per_piece, " a piece");
  check(entries.n_cols == dim && entries.n_rows > 0 && entries.n_rows <= kMaxEntries,
        "entries must be 1 to 256 of ", dim, " elements, got ", entries.n_rows, " of ",
        entries.n_cols);
  const std::size_t n_pieces = (n - 1) / n_per_piece + 1;
  const std::size_t n_sums = entries.n_rows * (dim + 1) + 1;
  check(importance.size() == n && codes.size() == n && distances.size() == n &&
            sums.n_rows == n_pieces && sums.n_cols == n_sums,
        "importance, codes and distances must have one element a vector, and sums ", n_sums,
        " for each of ", n_pieces, " pieces");
  narrow(vectors.size());
  narrow(sums.size());
  const LloydParams params{narrow(n), narrow(dim), narrow(entries.n_rows), narrow(n_per_piece),
                           narrow(n_sums)};
  const Buffer in = Buffer::holding(std::span<const float>(vectors.flat()));
  const Buffer shares = Buffer::holding(importance);
  const Buffer table = Buffer::holding(std::span<const float>(entries.flat()));
  const Buffer nearest(codes.size());
  const Buffer away(distances.size_bytes());
  const Buffer moments(sums.size() * sizeof(double));
  Grid grid = grid_for("lloyd_moments", n_sums);
  grid.n_groups_y = n_pieces;
  Commands commands;
  commands.add("lloyd_assign", grid_for("lloyd_assign", n), {&in, &table, &nearest, &away}, params);
  commands.add("lloyd_moments", grid, {&in, &shares, &nearest, &away, &moments}, params);
  commands.run();
  copy_out(nearest, codes);
  copy_out(away, distances);
  copy_out(moments, sums.flat());
}

// ---------------------------------------------------------------------------------------------
// Integer codes

namespace {

enum class Search { kNone, kLeastError };

template <typename T, typename Code>
void quantize_rows(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
                   std::span<Code> offsets, MatrixView<Code> codes, Search search) {
  const std::size_t n_pieces = (weights.n_cols + kRowPiece - 1) / kRowPiece;
  narrow(weights.size());
  narrow(weights.n_rows * n_pieces * kSimdWidth);
  const QuantizeParams params{narrow(weights.n_rows), narrow(weights.n_cols),
                              narrow(n_pieces),       range.code_min,
                              range.code_max,         offsets.empty() ? 0U : 1U};
  const Buffer in = Buffer::holding(std::span<const T>(weights.flat()));
  const Buffer extremes(2 * weights.n_rows * n_pieces * sizeof(std::int32_t));
  const Buffer steps(weights.n_rows * sizeof(QuantizeStep));
  const Buffer scale_of(scales.size_bytes());
  const Buffer offset_of(offsets.size_bytes());
  const Buffer out(codes.size());
  const std::string find_extremes = name_of<T>("row_extremes");
  const std::string fit = name_of<T>(search == Search::kNone ? "fit_rows" : "search_rows");
  const std::string encode = name_of<T>("encode_rows");

  Commands commands;
  commands.add(find_extremes, grid_of_simdgroups(find_extremes, weights.n_rows * n_pieces),
               {&in, &extremes}, params);
  const Grid rows = grid_of_simdgroups(fit, weights.n_rows);
  if (search == Search::kNone) {
    commands.add(fit, rows, {&extremes, &scale_of, &offset_of, &steps}, params);
  } else {
    commands.add(fit, rows, {&in, &extremes, &scale_of, &offset_of, &steps}, params);
  }
  commands.add(encode, grid_for(encode, weights.size()), {&in, &steps, &out}, params);
  commands.run();
  copy_out(scale_of, scales);
  copy_out(offset_of, offsets);
  copy_out(out, codes.flat());
}

template <typename T, typename Code>
bool is_regular(MatrixView<const T> weights, CodeRange range, std::span<const T> scales,
                std::span<const Code> offsets, MatrixView<const Code> codes) {
  return weights.size() > 0 && range.code_min < range.code_max &&
         range.code_min >= std::numeric_limits<Code>::min() &&
         range.code_max <= std::numeric_limits<Code>::max() && scales.size() == weights.n_rows &&
         (offsets.empty() || offsets.size() == weights.n_rows) && codes.n_rows == weights.n_rows &&
         codes.n_cols == weights.n_cols;
}

}  // namespace

template <typename T, typename Code>
void quantize(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
              std::span<Code> offsets, MatrixView<Code> codes) {
  if (!is_regular<T, Code>(weights, range, scales, offsets,
                           {codes.data, codes.n_rows, codes.n_cols})) {
    milpress::quantize(weights, range, scales, offsets, codes);
    return;
  }
  quantize_rows(weights, range, scales, offsets, codes, Search::kNone);
}

template <typename T, typename Code>
void quantize_mse(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
                  std::span<Code> offsets, MatrixView<Code> codes) {
  if (!is_regular<T, Code>(weights, range, scales, offsets,
                           {codes.data, codes.n_rows, codes.n_cols})) {
    milpress::quantize_mse(weights, range, scales, offsets, codes);
    return;
  }
  quantize_rows(weights, range, scales, offsets, codes, Search::kLeastError);
}

void pack(std::span<const std::uint8_t> codes, int bits, std::span<std::uint8_t> packed) {
  constexpr std::array kWidths = {1, 2, 3, 4, 6, 8};
  if (codes.empty() || std::find(kWidths.begin(), kWidths.end(), bits) == kWidths.end() ||
      packed.size() != packed_size(codes.size(), bits)) {
    milpress::pack(codes, bits, packed);
    return;
  }
  const PackParams params{narrow(codes.size()), static_cast<std::uint32_t>(bits)};
  const Buffer in = Buffer::holding(codes);
  const Buffer out(packed.size());
  Commands commands;
  commands.add("pack", grid_for("pack", (codes.size() + 7) / 8), {&in, &out}, params);
  commands.run();
  copy_out(out, packed);
}

// ---------------------------------------------------------------------------------------------
// Pruning

namespace {

// Radix selection as on the CPU, with digits whose counters fit a threadgroup.
template <typename T>
MaskParams find_cut(const Buffer& in, std::size_t n_weights, std::size_t n_zeros) {
  constexpr std::uint32_t kDigitBits = 11;
  constexpr std::size_t kDigits = std::size_t{1} << kDigitBits;
  constexpr std::size_t kMaxGroups = 512;  // after which more add only contention
  const std::string kernel = name_of<T>("count_digits");
  const Buffer counts(kDigits * sizeof(std::uint32_t));
  Grid grid = grid_for(kernel, n_weights);
  grid.n_groups = std::min(grid.n_groups, kMaxGroups);
  std::uint32_t prefix = 0;
  std::size_t rank = n_zeros - 1;
  for (std::uint32_t digit = sizeof(T) == 2 ? 2 : 3; digit-- > 0;) {
    counts.fill_with_zeros();
    Commands commands;
    commands.add(kernel, grid, {&in, &counts},
                 DigitParams{narrow(n_weights), digit * kDigitBits, prefix});
    commands.run();
    const auto n_with = counts.as<const std::uint32_t>(kDigits);
    std::uint32_t value = 0;
    while (value < kDigits && rank >= n_with[value]) {
      rank -= n_with[value++];
    }
    if (value == kDigits) {
      throw DeviceError(kernel + " must count " + std::to_string(n_weights) +
                        " weights, got fewer");
    }
    prefix = prefix << kDigitBits | value;
  }
  return {narrow(n_weights), prefix, static_cast<std::uint32_t>(rank + 1)};
}

template <typename T>
void mask_above(const Buffer& in, MaskParams params, std::span<std::uint8_t> bitmask) {
  const std::string count = name_of<T>("count_ties");
  const std::string mask = name_of<T>("mask_above");
  const Grid grid = tiles(params.n_weights, tile_size(count, mask));
  const Buffer ties(grid.n_groups * sizeof(std::uint32_t));
  const Buffer words(n_words(params.n_weights) * sizeof(std::uint32_t));
  Commands commands;
  commands.add(count, grid, {&in, &ties}, params);
  add_scan(commands, ties, grid.n_groups);
  commands.add(mask, grid, {&in, &ties, &words}, params);
  commands.run();
  copy_out(words, bitmask);
}

bool is_bitmask(std::size_t n_weights, std::span<const std::uint8_t> bitmask) {
  return n_weights > 0 && bitmask.size() == (n_weights + 7) / 8;
}

template <typename T>
std::uint32_t magnitude_of(T value) {
  if constexpr (sizeof(T) == 2) {
    return value.bits & 0x7fffU;
  } else {
    return std::bit_cast<std::uint32_t>(value) & 0x7fffffffU;
  }
}

}  // namespace

template <typename T>
void keep_largest(std::span<const T> weights, std::size_t n_zeros,
                  std::span<std::uint8_t> bitmask) {
  if (!is_bitmask(weights.size(), bitmask) || n_zeros > weights.size()) {
    milpress::keep_largest(weights, n_zeros, bitmask);
    return;
  }
  const MaskParams none{narrow(weights.size()), 0, 0};  // but zeros, which never stay
  const Buffer in = Buffer::holding(weights);
  mask_above<T>(in, n_zeros == 0 ? none : find_cut<T>(in, weights.size(), n_zeros), bitmask);
}

template <typename T>
void keep_above(std::span<const T> weights, T threshold, std::span<std::uint8_t> bitmask) {
  if (!is_bitmask(weights.size(), bitmask) || !(to_float(threshold) >= 0)) {
    milpress::keep_above(weights, threshold, bitmask);
    return;
  }
  const MaskParams params{narrow(weights.size()), magnitude_of(threshold), narrow(weights.size())};
  const Buffer in = Buffer::holding(weights);
  mask_above<T>(in, params, bitmask);
}

template <typename T>
void keep_n_m(std::span<const T> weights, ChannelShape shape, std::size_t n, std::size_t m,
              std::span<std::uint8_t> bitmask) {
  const bool fits = shape.n_channels > 0 && shape.n_inner > 0 &&
                    weights.size() % shape.n_channels == 0 &&
                    weights.size() / shape.n_channels % shape.n_inner == 0 &&
                    weights.size() / shape.n_channels / shape.n_inner == shape.n_outer;
  if (!is_bitmask(weights.size(), bitmask) || !fits || m == 0 || n > m || m >= kMaxElements) {
    milpress::keep_n_m(weights, shape, n, m, bitmask);
    return;
  }
  const std::string kernel = name_of<T>("keep_n_m");
  const RunParams params{narrow(weights.size()), narrow(shape.n_channels), narrow(shape.n_inner),
                         narrow(n), narrow(m)};
  const Buffer in = Buffer::holding(weights);
  const Buffer words(n_words(weights.size()) * sizeof(std::uint32_t));
  Commands commands;
  commands.add(kernel, grid_for(kernel, weights.size()), {&in, &words}, params);
  commands.run();
  copy_out(words, bitmask);
}

template <typename T>
void compact(std::span<const T> weights, std::span<const std::uint8_t> bitmask,
             std::span<T> nonzeros) {
  if (!is_bitmask(weights.size(), bitmask) || nonzeros.size() != count_kept(bitmask) ||
      nonzeros.empty()) {
    milpress::compact(weights, bitmask, nonzeros);
    return;
  }
  const std::uint32_t n_weights = narrow(weights.size());
  const std::string kernel = name_of<T>("compact");
  const Grid grid = tiles(weights.size(), tile_size("count_bits", kernel));
  const Buffer in = Buffer::holding(weights);
  const Buffer words(n_words(weights.size()) * sizeof(std::uint32_t));
  words.fill_with_zeros();
  std::copy(bitmask.begin(), bitmask.end(), words.as<std::uint8_t>(bitmask.size()).begin());
  const Buffer kept(grid.n_groups * sizeof(std::uint32_t));
  const Buffer out(nonzeros.size_bytes());
  Commands commands;
  commands.add("count_bits", grid, {&words, &kept}, n_weights);
  add_scan(commands, kept, grid.n_groups);
  commands.add(kernel, grid, {&in, &words, &kept, &out}, n_weights);
  commands.run();
  copy_out(out, nonzeros);
}

// ---------------------------------------------------------------------------------------------
// Known answers

namespace {

// Weights with ties, both zeros, and magnitudes from tiny to large; the same on every machine.
template <typename T>
std::vector<T> sample(std::size_t n) {
  std::vector<T> weights(n);
  std::uint32_t state = 12'345;
  for (std::size_t i = 0; i < n; ++i) {
    state = state * 1'664'525 + 1'013'904'223;
    const float value = static_cast<float>(static_cast<std::int32_t>(state) >> 8) * 0x1p-23F;
    const float rounded = std::nearbyint(value * 8) / 8;  // ties
    weights[i] = from_float<T>(i % 7 == 0 ? rounded : value * value * value);
  }
  return weights;
}

template <typename T>
std::string test_palette() {
  constexpr std::size_t kRows = 3;
  constexpr std::size_t kCols = 1031;
  constexpr std::size_t kEntries = 16;
  const std::vector<T> weights = sample<T>(kRows * kCols);
  const MatrixView<const T> in{weights.data(), kRows, kCols};
  std::vector<T> luts(kRows * kEntries);
  milpress::kmeans1d<T>(in, {}, {luts.data(), kRows, kEntries});
  std::vector<std::uint8_t> expected(weights.size());
  std::vector<std::uint8_t> codes(weights.size());
  const MatrixView<const T> tables{luts.data(), kRows, kEntries};
  milpress::lut_assign<T>(in, tables, {expected.data(), kRows, kCols});
  metal::lut_assign<T>(in, tables, {codes.data(), kRows, kCols});
  if constexpr (sizeof(T) == 2) {
    std::vector<T> found(luts.size());
    metal::kmeans1d<T>(in, {}, {found.data(), kRows, kEntries});
    if (found != luts) {
      return "kmeans1d differs from the CPU";
    }
  }
  std::vector<std::uint8_t> packed(packed_size(codes.size(), 4));
  std::vector<std::uint8_t> packed_here(packed.size());
  milpress::pack(expected, 4, packed);
  metal::pack(expected, 4, packed_here);
  if (packed != packed_here) {
    return "pack differs from the CPU";
  }
  return codes == expected ? "" : name_of<T>("lut_assign") + " differs from the CPU";
}

template <typename T>
std::string test_quantize() {
  constexpr std::size_t kRows = 37;
  constexpr std::size_t kCols = 96;
  const std::vector<T> weights = sample<T>(kRows * kCols);
  const MatrixView<const T> in{weights.data(), kRows, kCols};
  for (const bool fits_offset : {false, true}) {
    for (const bool searches : {false, true}) {
      std::vector<T> scales(kRows);
      std::vector<T> scales_here(kRows);
      std::vector<std::int8_t> offsets(fits_offset ? kRows : 0);
      std::vector<std::int8_t> offsets_here(offsets.size());
      std::vector<std::int8_t> codes(weights.size());
      std::vector<std::int8_t> codes_here(weights.size());
      const auto on_cpu =
          searches ? milpress::quantize_mse<T, std::int8_t> : milpress::quantize<T, std::int8_t>;
      const auto on_gpu =
          searches ? metal::quantize_mse<T, std::int8_t> : metal::quantize<T, std::int8_t>;
      on_cpu(in, {-8, 7}, scales, offsets, {codes.data(), kRows, kCols});
      on_gpu(in, {-8, 7}, scales_here, offsets_here, {codes_here.data(), kRows, kCols});
      if (scales != scales_here || offsets != offsets_here || codes != codes_here) {
        return name_of<T>(searches ? "quantize_mse" : "quantize") + " differs from the CPU";
      }
    }
  }
  return "";
}

template <typename T>
std::string test_sparsify() {
  constexpr std::size_t kOuter = 11;
  constexpr std::size_t kChannels = 30;
  constexpr std::size_t kInner = 9;
  const std::vector<T> weights = sample<T>(kOuter * kChannels * kInner);
  const std::span<const T> in(weights);
  std::vector<std::uint8_t> expected((weights.size() + 7) / 8);
  std::vector<std::uint8_t> bitmask(expected.size());
  milpress::keep_n_m<T>(in, {kOuter, kChannels, kInner}, 2, 4, expected);
  metal::keep_n_m<T>(in, {kOuter, kChannels, kInner}, 2, 4, bitmask);
  if (bitmask != expected) {
    return name_of<T>("keep_n_m") + " differs from the CPU";
  }
  milpress::keep_largest<T>(in, weights.size() / 2, expected);
  metal::keep_largest<T>(in, weights.size() / 2, bitmask);
  if (bitmask != expected) {
    return name_of<T>("keep_largest") + " differs from the CPU";
  }
  std::vector<T> kept(count_kept(expected));
  std::vector<T> kept_here(kept.size());
  milpress::compact<T>(in, expected, kept);
  metal::compact<T>(in, expected, kept_here);
  return kept == kept_here ? "" : name_of<T>("compact") + " differs from the CPU";
}

}  // namespace

std::string self_test() {
  for (const auto test : {test_palette<Half>, test_palette<float>, test_quantize<Half>,
                          test_quantize<float>, test_sparsify<Half>, test_sparsify<float>}) {
    try {
      const std::string failure = test();
      if (!failure.empty()) {
        return failure;
      }
    } catch (const DeviceError& error) {
      return error.what();
    }
  }
  return "";
}

#define MILPRESS_INSTANTIATE(T)                                                                    \
  template void lut_assign(MatrixView<const T>, MatrixView<const T>, MatrixView<std::uint8_t>);    \
  template void quantize(MatrixView<const T>, CodeRange, std::span<T>, std::span<std::int8_t>,     \
                         MatrixView<std::int8_t>);                                                 \
  template void quantize(MatrixView<const T>, CodeRange, std::span<T>, std::span<std::uint8_t>,    \
                         MatrixView<std::uint8_t>);                                                \
  template void quantize_mse(MatrixView<const T>, CodeRange, std::span<T>, std::span<std::int8_t>, \
                             MatrixView<std::int8_t>);                                             \
  template void quantize_mse(MatrixView<const T>, CodeRange, std::span<T>,                         \
                             std::span<std::uint8_t>, MatrixView<std::uint8_t>);                   \
  template void keep_largest(std::span<const T>, std::size_t, std::span<std::uint8_t>);            \
  template void keep_above(std::span<const T>, T, std::span<std::uint8_t>);                        \
  template void keep_n_m(std::span<const T>, ChannelShape, std::size_t, std::size_t,               \
                         std::span<std::uint8_t>);                                                 \
  template void compact(std::span<const T>, std::span<const std::uint8_t>, std::span<T>);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress::metal
