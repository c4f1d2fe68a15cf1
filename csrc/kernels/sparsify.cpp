#include "kernels/sparsify.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <compare>
#include <numeric>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/keys.h"
#include "core/parallel.h"
#include "core/vectorize.h"
#include "kernels/pack.h"

namespace milpress {
namespace {

constexpr std::size_t kGrain = 262'144;  // weights a thread takes at a time; a multiple of 8
constexpr std::size_t kTieChunk = 256;   // weights searched for ties at a time

// A half's magnitude is one digit of 15 bits, a float's two of 16.
template <typename T>
constexpr unsigned kDigits = sizeof(T) == 2 ? 1 : 2;
template <typename T>
constexpr unsigned kDigitBits = sizeof(T) == 2 ? 15 : 16;

using Histogram = std::vector<std::size_t>;

// How often each value of the digit at `shift` occurs among the magnitudes whose higher bits are
// `prefix`.
template <typename T>
Histogram count_digits(std::span<const T> weights, unsigned shift, std::uint32_t prefix) {
  constexpr std::uint32_t kMask = (1U << kDigitBits<T>)-1;
  const std::size_t n_pieces = (weights.size() + kGrain - 1) / kGrain;
  const std::size_t per_slot = (n_pieces + 7) / 8;
  const auto slots =
      parallel_map(weights.size(), per_slot * kGrain, [&](std::size_t begin, std::size_t end) {
        std::vector<std::uint32_t> counts(std::size_t{kMask} + 1);
        for (std::size_t i = begin; i < end; ++i) {
          const std::uint32_t bits = magnitude_bits(weights[i]);
          if (kDigits<T> == 1 || std::uint64_t{bits} >> (shift + kDigitBits<T>) == prefix) {
            ++counts[bits >> shift & kMask];
          }
        }
        return counts;
      });
  Histogram total(std::size_t{kMask} + 1);
  for (const std::vector<std::uint32_t>& counts : slots) {
    std::transform(counts.begin(), counts.end(), total.begin(), total.begin(), std::plus<>());
  }
  return total;
}

struct Cut {
  std::uint32_t magnitude;  // everything below goes
  std::size_t n_ties;       // and so many of those that equal it
};

// Radix selection: the magnitude of the `n_zeros`-th smallest weight, digit by digit.
template <typename T>
Cut find_cut(std::span<const T> weights, std::size_t n_zeros) {
  std::uint32_t prefix = 0;
  std::size_t rank = n_zeros - 1;
  for (unsigned digit = kDigits<T>; digit-- > 0;) {
    const Histogram counts = count_digits(weights, digit * kDigitBits<T>, prefix);
    std::uint32_t value = 0;
    while (rank >= counts[value]) {
      rank -= counts[value++];
    }
    prefix = prefix << kDigitBits<T> | value;
  }
  return {prefix, rank + 1};
}

template <typename T>
MILPRESS_VECTORIZE void mask_above(const T* weights, std::size_t n, std::uint32_t magnitude,
                                   std::uint8_t* bitmask) {
  const auto cut = static_cast<Magnitude<T>>(magnitude);
  for (std::size_t i = 0; i < n / 8; ++i) {
    unsigned byte = 0;
    for (unsigned bit = 0; bit < 8; ++bit) {
      byte |= static_cast<unsigned>(magnitude_bits(weights[8 * i + bit]) > cut) << bit;
    }
    bitmask[i] = static_cast<std::uint8_t>(byte);
  }
  for (std::size_t i = n / 8 * 8; i < n; ++i) {
    const unsigned bit = magnitude_bits(weights[i]) > cut ? 1U << i % 8 : 0U;
    bitmask[i / 8] = static_cast<std::uint8_t>((i % 8 == 0 ? 0U : bitmask[i / 8]) | bit);
  }
}

template <typename T>
MILPRESS_VECTORIZE bool has_magnitude(const T* weights, std::size_t n, std::uint32_t magnitude) {
  using Bits = Magnitude<T>;
  Bits found = 0;
  for (std::size_t i = 0; i < n; ++i) {
    found = static_cast<Bits>(found | (magnitude_bits(weights[i]) == magnitude));
  }
  return found != 0;
}

template <typename T>
void mask_all_above(std::span<const T> weights, std::uint32_t magnitude,
                    std::span<std::uint8_t> bitmask) {
  parallel_for(weights.size(), kGrain, [&](std::size_t begin, std::size_t end) {
    mask_above(weights.data() + begin, end - begin, magnitude, bitmask.data() + begin / 8);
  });
}

}  // namespace

void check_channels(std::size_t n_weights, ChannelShape shape) {
  const auto [n_outer, n_channels, n_inner] = shape;
  const bool fits = n_weights == 0 ? n_outer == 0 || n_channels == 0 || n_inner == 0
                                   : n_outer > 0 && n_weights % n_outer == 0 && n_channels > 0 &&
                                         n_weights / n_outer % n_channels == 0 &&
                                         n_weights / n_outer / n_channels == n_inner;
  check(fits, "shape must have ", n_weights, " elements like weights, got ", n_outer, " x ",
        n_channels, " x ", n_inner);
}

template <typename T>
void keep_largest(std::span<const T> weights, std::size_t n_zeros,
                  std::span<std::uint8_t> bitmask) {
  check_keep_largest(weights, n_zeros, bitmask);
  if (n_zeros == 0) {
    mask_all_above(weights, 0, bitmask);
    return;
  }
  const Cut cut = find_cut(weights, n_zeros);
  mask_all_above(weights, cut.magnitude, bitmask);
  if (cut.magnitude == 0) {
    return;
  }
  // Ties stay from the first that is not needed to make up the number.
  std::size_t n_seen = 0;
  for (std::size_t begin = 0; begin < weights.size(); begin += kTieChunk) {
    const std::size_t end = std::min(begin + kTieChunk, weights.size());
    if (!has_magnitude(weights.data() + begin, end - begin, cut.magnitude)) {
      continue;
    }
    for (std::size_t i = begin; i < end; ++i) {
      if (magnitude_bits(weights[i]) == cut.magnitude && ++n_seen > cut.n_ties) {
        bitmask[i / 8] = static_cast<std::uint8_t>(bitmask[i / 8] | 1U << i % 8);
      }
    }
  }
}

template <typename T>
void keep_above(std::span<const T> weights, T threshold, std::span<std::uint8_t> bitmask) {
  check_keep_above(weights, threshold, bitmask);
  mask_all_above(weights, magnitude_bits(threshold), bitmask);
}

namespace {

constexpr std::size_t kLanes = 64;   // runs ranked side by side
constexpr std::size_t kRanked = 32;  // channels of a run up to which comparing all pairs pays

// Runs of equal length, one after the other at each of `width` neighbouring inner positions: a lane
// each. Channel j of run r at position i is `first[r * pitch + j * stride + i]`.
struct Runs {
  std::size_t n_runs;
  std::size_t width;
  std::size_t length;
  std::size_t stride;
  std::size_t pitch;
  std::size_t n_dropped;
};

// Ranks every weight within its run by comparing it with each other one, all lanes alike.
template <typename T, bool kSingle>
[[gnu::always_inline]] inline void rank_runs(const T* first, const Runs& runs, std::uint8_t* keep) {
  using Bits = Magnitude<T>;
  std::array<std::array<Bits, kLanes>, kRanked> magnitudes;
  std::array<Bits, kLanes> ranks;
  const std::size_t width = kSingle ? 1 : runs.width;
  const std::size_t stride = kSingle ? 1 : runs.stride;
  for (std::size_t j = 0; j < runs.length; ++j) {
    std::fill(magnitudes[j].begin() + runs.n_runs * width, magnitudes[j].end(), Bits{0});
    for (std::size_t run = 0; run < runs.n_runs; ++run) {
      for (std::size_t i = 0; i < width; ++i) {
        magnitudes[j][run * width + i] = magnitude_bits(first[run * runs.pitch + j * stride + i]);
      }
    }
  }
  const auto least_rank = static_cast<Bits>(runs.n_dropped);
  for (std::size_t j = 0; j < runs.length; ++j) {
    const std::array<Bits, kLanes>& mine = magnitudes[j];
    ranks.fill(0);
    for (std::size_t other = 0; other < j; ++other) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        ranks[lane] = static_cast<Bits>(ranks[lane] + (magnitudes[other][lane] <= mine[lane]));
      }
    }
    for (std::size_t other = j + 1; other < runs.length; ++other) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        ranks[lane] = static_cast<Bits>(ranks[lane] + (magnitudes[other][lane] < mine[lane]));
      }
    }
    for (std::size_t run = 0; run < runs.n_runs; ++run) {
      for (std::size_t i = 0; i < width; ++i) {
        const std::size_t lane = run * width + i;
        keep[run * runs.pitch + j * stride + i] = static_cast<std::uint8_t>(
            unsigned{ranks[lane] >= least_rank} & unsigned{mine[lane] != 0});
      }
    }
  }
}

template <typename T>
MILPRESS_VECTORIZE void keep_ranked(const T* first, const Runs& runs, std::uint8_t* keep) {
  if (runs.stride == 1) {
    rank_runs<T, true>(first, runs, keep);
  } else {
    rank_runs<T, false>(first, runs, keep);
  }
}

// The same for runs of any length, one by one.
template <typename T>
void keep_selected(const T* first, const Runs& runs, std::uint8_t* keep) {
  std::vector<std::pair<Magnitude<T>, std::size_t>> order(runs.length);
  for (std::size_t lane = 0; lane < runs.n_runs * runs.width; ++lane) {
    const std::size_t begin = lane / runs.width * runs.pitch + lane % runs.width;
    for (std::size_t j = 0; j < runs.length; ++j) {
      const std::size_t place = begin + j * runs.stride;
      order[j] = {magnitude_bits(first[place]), place};
      keep[place] = order[j].first != 0 ? 1 : 0;
    }
    const auto end = order.begin() + static_cast<std::ptrdiff_t>(runs.n_dropped);
    std::nth_element(order.begin(), end, order.end());
    std::for_each(order.begin(), end, [&](const auto& dropped) { keep[dropped.second] = 0; });
  }
}

}  // namespace

template <typename T>
void keep_n_m(std::span<const T> weights, ChannelShape shape, std::size_t n, std::size_t m,
              std::span<std::uint8_t> bitmask) {
  check_keep_n_m(weights, shape, n, m, bitmask);
  if (weights.empty()) {
    return;
  }
  const std::size_t n_channels = shape.n_channels;
  const std::size_t n_inner = shape.n_inner;
  const std::size_t n_full = n_channels / m;  // runs; a shorter one may follow
  const std::size_t n_runs = (n_channels - 1) / m + 1;
  const std::size_t at_once = std::max<std::size_t>(1, kLanes / n_inner);
  const std::size_t n_tiles = (n_runs - 1) / at_once + 1;  // an outer position
  const std::size_t grain = kGrain / (at_once * std::min(m, n_channels) * n_inner);
  std::vector<std::uint8_t> keep(weights.size());
  const auto mask_runs = [&](std::size_t outer, std::size_t run, std::size_t run_end) {
    const std::size_t length = run < n_full ? m : n_channels - run * m;
    const std::size_t n_filled_up = m - length;
    Runs runs{run_end - run, 0, length, n_inner, m * n_inner, n - std::min(n, n_filled_up)};
    for (std::size_t i = 0; i < n_inner; i += kLanes) {
      runs.width = std::min(kLanes, n_inner - i);
      const std::size_t begin = (outer * n_channels + run * m) * n_inner + i;
      if (length <= kRanked) {
        keep_ranked(weights.data() + begin, runs, keep.data() + begin);
      } else {
        keep_selected(weights.data() + begin, runs, keep.data() + begin);
      }
    }
  };
  parallel_for(shape.n_outer * n_tiles, grain, [&](std::size_t first, std::size_t last) {
    for (std::size_t tile = first; tile < last; ++tile) {
      const std::size_t run = tile % n_tiles * at_once;
      const std::size_t end = std::min(run + at_once, n_runs);
      const std::size_t full_end = std::min(end, n_full);
      if (run < full_end) {
        mask_runs(tile / n_tiles, run, full_end);
      }
      if (full_end < end) {
        mask_runs(tile / n_tiles, full_end, end);
      }
    }
  });
  pack(keep, 1, bitmask);
}

namespace {

// Adds the squares of a block's channels, at each of `n_inner` positions.
template <typename T>
MILPRESS_VECTORIZE void add_squares(const T* weights, std::size_t n_channels, std::size_t n_inner,
                                    double* sums) {
  std::fill_n(sums, n_inner, 0.0);
  for (std::size_t channel = 0; channel < n_channels; ++channel) {
    for (std::size_t i = 0; i < n_inner; ++i) {
      const double weight = to_float(weights[channel * n_inner + i]);
      sums[i] += weight * weight;
    }
  }
}

struct Block {
  std::uint64_t norm;
  std::size_t index;

  auto operator<=>(const Block&) const = default;
};

// The bits of the square, which order as norms do, NaN last. All NaNs are one: whose payload a sum
// of them has depends on the processor.
std::uint64_t norm_of(double square) {
  return std::isnan(square) ? ~std::uint64_t{0} : std::bit_cast<std::uint64_t>(square);
}

}  // namespace

template <typename T>
void keep_blocks(std::span<const T> weights, ChannelShape shape, std::size_t block_size,
                 std::size_t n_zeros, std::span<std::uint8_t> bitmask) {
  check_channels(weights.size(), shape);
  check_keep_largest(weights, n_zeros, bitmask);
  check(block_size > 0, "block_size must be at least 1, got 0");
  if (weights.empty()) {
    return;
  }
  const std::size_t n_channels = shape.n_channels;
  const std::size_t n_inner = shape.n_inner;
  block_size = std::min(block_size, n_channels);
  const std::size_t n_rows = (n_channels - 1) / block_size + 1;  // of blocks, an outer position
  const std::size_t grain = kGrain / (block_size * n_inner);
  const auto n_in_row = [&](std::size_t row) {
    return std::min(block_size, n_channels - row % n_rows * block_size);
  };
  const auto row_begin = [&](std::size_t row) {
    return (row / n_rows * n_channels + row % n_rows * block_size) * n_inner;
  };

  std::vector<Block> blocks(shape.n_outer * n_rows * n_inner);
  parallel_for(shape.n_outer * n_rows, grain, [&](std::size_t first, std::size_t last) {
    std::vector<double> sums(n_inner);
    for (std::size_t row = first; row < last; ++row) {
      add_squares(weights.data() + row_begin(row), n_in_row(row), n_inner, sums.data());
      for (std::size_t i = 0; i < n_inner; ++i) {
        blocks[row * n_inner + i] = {norm_of(sums[i]), row * n_inner + i};
      }
    }
  });

  // The blocks before `dropped_end` go. Each step settles half of those between it and `end`.
  std::size_t n_left = n_zeros;
  auto dropped_end = blocks.begin();
  for (auto end = blocks.end(); dropped_end < end;) {
    const auto middle = dropped_end + (end - dropped_end) / 2;
    std::nth_element(dropped_end, middle, end);
    const std::size_t n_weights = std::accumulate(
        dropped_end, middle + 1, std::size_t{0},
        [&](std::size_t sum, const Block& block) { return sum + n_in_row(block.index / n_inner); });
    if (n_weights <= n_left) {
      n_left -= n_weights;
      dropped_end = middle + 1;
    } else {
      end = middle;
    }
  }
  std::vector<std::uint8_t> stays(blocks.size(), 1);
  std::for_each(blocks.begin(), dropped_end, [&](const Block& block) { stays[block.index] = 0; });

  std::vector<std::uint8_t> keep(weights.size());
  parallel_for(shape.n_outer * n_rows, grain, [&](std::size_t first, std::size_t last) {
    for (std::size_t row = first; row < last; ++row) {
      const std::size_t begin = row_begin(row);
      for (std::size_t channel = 0; channel < n_in_row(row); ++channel) {
        for (std::size_t i = 0; i < n_inner; ++i) {
          const std::size_t place = begin + channel * n_inner + i;
          const bool is_zero = magnitude_bits(weights[place]) == 0;
          keep[place] = is_zero ? 0 : stays[row * n_inner + i];
        }
      }
    }
  });
  pack(keep, 1, bitmask);
}

#define MILPRESS_INSTANTIATE(T)                                                         \
  template void keep_largest(std::span<const T>, std::size_t, std::span<std::uint8_t>); \
  template void keep_above(std::span<const T>, T, std::span<std::uint8_t>);             \
  template void keep_n_m(std::span<const T>, ChannelShape, std::size_t, std::size_t,    \
                         std::span<std::uint8_t>);                                      \
  template void keep_blocks(std::span<const T>, ChannelShape, std::size_t, std::size_t, \
                            std::span<std::uint8_t>);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress
