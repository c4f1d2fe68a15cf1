#include "metal/kernels.h"

#include <algorithm>
#include <string>

#include "core/keys.h"
#include "kernels/sparsify.h"
#include "metal/launch.h"

namespace milpress::metal {

namespace {

std::size_t n_words(std::size_t n_weights) { return (n_weights + kSimdWidth - 1) / kSimdWidth; }

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
      throw DeviceError(kernel + " counted fewer than " + std::to_string(n_weights) + " weights");
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

}  // namespace

template <typename T>
void keep_largest(std::span<const T> weights, std::size_t n_zeros,
                  std::span<std::uint8_t> bitmask) {
  check_keep_largest(weights, n_zeros, bitmask);
  if (weights.empty()) {
    return;
  }
  const MaskParams none{narrow(weights.size()), 0, 0};  // but zeros, which never stay
  const Buffer in = Buffer::holding(weights);
  mask_above<T>(in, n_zeros == 0 ? none : find_cut<T>(in, weights.size(), n_zeros), bitmask);
}

template <typename T>
void keep_above(std::span<const T> weights, T threshold, std::span<std::uint8_t> bitmask) {
  check_keep_above(weights, threshold, bitmask);
  if (weights.empty()) {
    return;
  }
  const MaskParams params{narrow(weights.size()), magnitude_bits(threshold),
                          narrow(weights.size())};
  const Buffer in = Buffer::holding(weights);
  mask_above<T>(in, params, bitmask);
}

template <typename T>
void keep_n_m(std::span<const T> weights, ChannelShape shape, std::size_t n, std::size_t m,
              std::span<std::uint8_t> bitmask) {
  check_keep_n_m(weights, shape, n, m, bitmask);
  if (weights.empty() || m >= kMaxElements) {
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
  check_compact(weights.size(), bitmask, nonzeros.size());
  if (nonzeros.empty()) {
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

#define MILPRESS_INSTANTIATE(T)                                                         \
  template void keep_largest(std::span<const T>, std::size_t, std::span<std::uint8_t>); \
  template void keep_above(std::span<const T>, T, std::span<std::uint8_t>);             \
  template void keep_n_m(std::span<const T>, ChannelShape, std::size_t, std::size_t,    \
                         std::span<std::uint8_t>);                                      \
  template void compact(std::span<const T>, std::span<const std::uint8_t>, std::span<T>);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress::metal
