#include "kernels/bitmask.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>

#include "core/check.h"
#include "core/half.h"
#include "core/parallel.h"
#include "core/shuffle.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kGrain = 262'144;  // weights a thread takes at a time; a multiple of 8
constexpr std::size_t kChunk = 2048;     // weights gathered at a time; a multiple of 8

}  // namespace

void check_bitmask(std::size_t n_weights, std::size_t n_bytes) {
  check(n_bytes == (n_weights + 7) / 8, "bitmask must have ", (n_weights + 7) / 8, " bytes for ",
        n_weights, " weights, got ", n_bytes);
}

void check_compact(std::size_t n_weights, std::span<const std::uint8_t> bitmask,
                   std::size_t n_nonzeros) {
  check_bitmask(n_weights, bitmask.size());
  const std::size_t n_kept = count_kept(bitmask);
  check(n_nonzeros == n_kept, "nonzeros must have one element for each of the ", n_kept,
        " bits set, got ", n_nonzeros);
}

void check_expand(std::size_t n_weights, std::span<const std::uint8_t> bitmask,
                  std::size_t n_nonzeros) {
  check_compact(n_weights, bitmask, n_nonzeros);
  check(n_weights % 8 == 0 || bitmask.back() >> n_weights % 8 == 0,
        "spare bits of the last byte of bitmask must be 0, got ",
        bitmask.empty() ? 0 : static_cast<int>(bitmask.back()));
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

std::vector<std::size_t> kept_before(std::span<const std::uint8_t> bitmask, std::size_t piece) {
  check(piece > 0 && piece % 8 == 0, "a piece must be a multiple of 8 weights, got ", piece);
  const std::size_t n_bytes = piece / 8;
  std::vector<std::size_t> starts((bitmask.size() + n_bytes - 1) / n_bytes);
  for (std::size_t i = 0; i < starts.size(); ++i) {
    const std::size_t begin = i * n_bytes;
    starts[i] = count_kept(bitmask.subspan(begin, std::min(n_bytes, bitmask.size() - begin)));
  }
  std::exclusive_scan(starts.begin(), starts.end(), starts.begin(), std::size_t{0});
  return starts;
}

template <typename T>
void compact(std::span<const T> weights, std::span<const std::uint8_t> bitmask,
             std::span<T> nonzeros) {
  check_compact(weights.size(), bitmask, nonzeros.size());
  const std::vector<std::size_t> starts = kept_before(bitmask, kGrain);
  parallel_for(weights.size(), kGrain, [&](std::size_t begin, std::size_t end) {
    std::array<T, kChunk + kShuffleSlack> kept;
    T* out = nonzeros.data() + starts[begin / kGrain];
    for (; begin < end; begin += std::min(kChunk, end - begin)) {
      const std::size_t n = std::min(kChunk, end - begin) / 8 * 8;
      std::size_t n_kept_here =
          compact_eights(weights.data() + begin, bitmask.data() + begin / 8, n / 8, kept.data());
      for (std::size_t i = begin + n; i < std::min(begin + kChunk, end); ++i) {
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
  check_expand(weights.size(), bitmask, nonzeros.size());
  const std::vector<std::size_t> starts = kept_before(bitmask, kGrain);
  parallel_for(weights.size(), kGrain, [&](std::size_t begin, std::size_t end) {
    std::array<T, kChunk + kShuffleSlack> values{};
    const T* in = nonzeros.data() + starts[begin / kGrain];
    for (; begin < end; begin += std::min(kChunk, end - begin)) {
      const std::size_t n = std::min(kChunk, end - begin);
      const std::size_t n_left = static_cast<std::size_t>(nonzeros.data() + nonzeros.size() - in);
      std::copy_n(in, std::min(n, n_left), values.begin());
      std::size_t next =
          expand_eights(values.data(), bitmask.data() + begin / 8, n / 8, weights.data() + begin);
      for (std::size_t i = begin + n / 8 * 8; i < begin + n; ++i) {
        const bool is_kept = (bitmask[i / 8] >> i % 8 & 1U) != 0;
        weights[i] = is_kept ? values[next] : T{};
        next += is_kept ? 1 : 0;
      }
      in += next;
    }
  });
}

#define MILPRESS_INSTANTIATE(T)                                                           \
  template void compact(std::span<const T>, std::span<const std::uint8_t>, std::span<T>); \
  template void expand(std::span<const std::uint8_t>, std::span<const T>, std::span<T>);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress
