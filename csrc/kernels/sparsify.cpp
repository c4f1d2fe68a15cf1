#include "kernels/sparsify.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/check.h"
#include "core/order.h"
#include "core/parallel.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kGrain = 262'144;  // weights a thread takes at a time; a multiple of 8
constexpr std::size_t kChunk = 2048;     // weights gathered at a time; a multiple of 8
constexpr unsigned kDigitBits = 16;

// All half magnitudes are one digit, float magnitudes the higher and the lower of two.
template <typename T>
constexpr unsigned n_digits() {
  return sizeof(T) == 2 ? 1 : 2;
}

using Histogram = std::vector<std::size_t>;

// How often each value of the digit at `shift` occurs among the magnitudes whose higher bits are
// `prefix`.
template <typename T>
Histogram count_digits(std::span<const T> weights, unsigned shift, std::uint32_t prefix) {
  constexpr std::uint32_t kMask = (1U << kDigitBits) - 1;
  const std::size_t n_pieces = (weights.size() + kGrain - 1) / kGrain;
  const std::size_t per_slot = (n_pieces + 7) / 8;
  std::vector<std::vector<std::uint32_t>> slots((n_pieces + per_slot - 1) / per_slot);
  parallel_for(weights.size(), per_slot * kGrain, [&](std::size_t begin, std::size_t end) {
    std::vector<std::uint32_t>& counts = slots[begin / (per_slot * kGrain)];
    counts.resize(std::size_t{kMask} + 1);
    for (std::size_t i = begin; i < end; ++i) {
      const std::uint32_t bits = magnitude_bits(weights[i]);
      if (sizeof(T) == 2 || std::uint64_t{bits} >> (shift + kDigitBits) == prefix) {
        ++counts[bits >> shift & kMask];
      }
    }
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
  for (unsigned digit = n_digits<T>(); digit-- > 0;) {
    const Histogram counts = count_digits(weights, digit * kDigitBits, prefix);
    std::uint32_t value = 0;
    while (rank >= counts[value]) {
      rank -= counts[value++];
    }
    prefix = prefix << kDigitBits | value;
  }
  return {prefix, rank + 1};
}

void check_bitmask(std::size_t n_weights, std::size_t n_bytes) {
  check(n_bytes == (n_weights + 7) / 8, "bitmask must have ", (n_weights + 7) / 8, " bytes for ",
        n_weights, " weights, got ", n_bytes);
}

template <typename T>
MILPRESS_VECTORIZE void mask_above(const T* weights, std::size_t n, std::uint32_t magnitude,
                                   std::uint8_t* bitmask) {
  const auto cut = static_cast<decltype(magnitude_bits(T{}))>(magnitude);
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
void mask_all_above(std::span<const T> weights, std::uint32_t magnitude,
                    std::span<std::uint8_t> bitmask) {
  parallel_for(weights.size(), kGrain, [&](std::size_t begin, std::size_t end) {
    mask_above(weights.data() + begin, end - begin, magnitude, bitmask.data() + begin / 8);
  });
}

// The value if `bit` is 1, zero if it is 0, without a branch.
Half value_if(unsigned bit, Half value) {
  return Half{static_cast<std::uint16_t>(value.bits & (0U - bit))};
}

float value_if(unsigned bit, float value) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & (0U - bit));
}

// The bits set before each piece of kGrain weights.
std::vector<std::size_t> kept_before(std::span<const std::uint8_t> bitmask) {
  constexpr std::size_t kBytes = kGrain / 8;
  std::vector<std::size_t> starts((bitmask.size() + kBytes - 1) / kBytes);
  for (std::size_t i = 0; i < starts.size(); ++i) {
    starts[i] =
        count_kept(bitmask.subspan(i * kBytes, std::min(kBytes, bitmask.size() - i * kBytes)));
  }
  std::exclusive_scan(starts.begin(), starts.end(), starts.begin(), std::size_t{0});
  return starts;
}

}  // namespace

template <typename T>
void keep_largest(std::span<const T> weights, std::size_t n_zeros,
                  std::span<std::uint8_t> bitmask) {
  check(n_zeros <= weights.size(), "n_zeros must be at most ", weights.size(), ", got ", n_zeros);
  check_bitmask(weights.size(), bitmask.size());
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
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (magnitude_bits(weights[i]) == cut.magnitude && ++n_seen > cut.n_ties) {
      bitmask[i / 8] = static_cast<std::uint8_t>(bitmask[i / 8] | 1U << i % 8);
    }
  }
}

template <typename T>
void keep_above(std::span<const T> weights, T threshold, std::span<std::uint8_t> bitmask) {
  check(to_float(threshold) >= 0, "threshold must not be negative, got ", to_float(threshold));
  check_bitmask(weights.size(), bitmask.size());
  mask_all_above(weights, magnitude_bits(threshold), bitmask);
}

MILPRESS_VECTORIZE
std::size_t count_kept(std::span<const std::uint8_t> bitmask) {
  std::size_t count = 0;
  std::size_t i = 0;
  for (; i + 8 <= bitmask.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, bitmask.data() + i, sizeof word);
    count += static_cast<std::size_t>(std::popcount(word));
  }
  for (; i < bitmask.size(); ++i) {
    count += static_cast<std::size_t>(std::popcount(bitmask[i]));
  }
  return count;
}

template <typename T>
void compact(std::span<const T> weights, std::span<const std::uint8_t> bitmask,
             std::span<T> nonzeros) {
  check_bitmask(weights.size(), bitmask.size());
  const std::vector<std::size_t> starts = kept_before(bitmask);
  const std::size_t n_kept = count_kept(bitmask);
  check(nonzeros.size() == n_kept, "nonzeros must have one element for each of the ", n_kept,
        " bits set, got ", nonzeros.size());
  parallel_for(weights.size(), kGrain, [&](std::size_t begin, std::size_t end) {
    // Every weight is stored and the place moves on only if it stays: no branch to mispredict.
    std::array<T, kChunk + 1> kept;
    T* out = nonzeros.data() + starts[begin / kGrain];
    for (; begin < end; begin += std::min(kChunk, end - begin)) {
      const std::size_t n = std::min(kChunk, end - begin);
      std::size_t n_kept_here = 0;
      for (std::size_t i = begin; i < begin + n; ++i) {
        kept[n_kept_here] = weights[i];
        n_kept_here += bitmask[i / 8] >> i % 8 & 1U;
      }
      out = std::copy_n(kept.begin(), n_kept_here, out);
    }
  });
}

template <typename T>
void expand(std::span<const std::uint8_t> bitmask, std::span<const T> nonzeros,
            std::span<T> weights) {
  check_bitmask(weights.size(), bitmask.size());
  const std::vector<std::size_t> starts = kept_before(bitmask);
  const std::size_t n_kept = count_kept(bitmask);
  check(nonzeros.size() == n_kept, "nonzeros must have one element for each of the ", n_kept,
        " bits set, got ", nonzeros.size());
  check(weights.size() % 8 == 0 || bitmask.back() >> weights.size() % 8 == 0,
        "spare bits of the last byte of bitmask must be 0, got ",
        bitmask.empty() ? 0 : static_cast<int>(bitmask.back()));
  parallel_for(weights.size(), kGrain, [&](std::size_t begin, std::size_t end) {
    // One value more than a chunk can hold, so that reading ahead stays inside.
    std::array<T, kChunk + 1> values;
    const T* in = nonzeros.data() + starts[begin / kGrain];
    for (; begin < end; begin += std::min(kChunk, end - begin)) {
      const std::size_t n = std::min(kChunk, end - begin);
      const std::size_t n_left = static_cast<std::size_t>(nonzeros.data() + nonzeros.size() - in);
      std::copy_n(in, std::min(n, n_left), values.begin());
      std::size_t next = 0;
      for (std::size_t i = begin; i < begin + n; ++i) {
        const unsigned bit = bitmask[i / 8] >> i % 8 & 1U;
        weights[i] = value_if(bit, values[next]);
        next += bit;
      }
      in += next;
    }
  });
}

#define MILPRESS_INSTANTIATE(T)                                                           \
  template void keep_largest(std::span<const T>, std::size_t, std::span<std::uint8_t>);   \
  template void keep_above(std::span<const T>, T, std::span<std::uint8_t>);               \
  template void compact(std::span<const T>, std::span<const std::uint8_t>, std::span<T>); \
  template void expand(std::span<const std::uint8_t>, std::span<const T>, std::span<T>);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress
