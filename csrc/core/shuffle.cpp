#include "core/shuffle.h"

#include <array>
#include <bit>
#include <cstring>

#include "core/vectorize.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define MILPRESS_SHUFFLE __attribute__((target("arch=x86-64-v3")))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define MILPRESS_SHUFFLE
#endif

namespace milpress {
namespace {

// The value if `bit` is 1, zero if it is 0, without a branch.
Half value_if(unsigned bit, Half value) {
  return Half{static_cast<std::uint16_t>(value.bits & (0U - bit))};
}

float value_if(unsigned bit, float value) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & (0U - bit));
}

#if defined(MILPRESS_SHUFFLE)

// ---------------------------------------------------------------------------------------------
// Sixteen bytes picked by sixteen indices; an index with its highest bit set gives zero

#if defined(__x86_64__)

using Bytes = __m128i;

MILPRESS_SHUFFLE inline Bytes load(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
MILPRESS_SHUFFLE inline void store(Bytes bytes, void* to) {
  _mm_storeu_si128(static_cast<__m128i*>(to), bytes);
}
MILPRESS_SHUFFLE inline Bytes pick(Bytes table, Bytes indices) {
  return _mm_shuffle_epi8(table, indices);
}
MILPRESS_SHUFFLE inline void store_interleaved(Bytes low, Bytes high, Half* to) {
  store(_mm_unpacklo_epi8(low, high), to);
  store(_mm_unpackhi_epi8(low, high), to + 8);
}

bool has_shuffle() {
  static const bool is_supported = __builtin_cpu_supports("avx2") != 0;
  return is_supported;
}

#else

using Bytes = uint8x16_t;

inline Bytes load(const void* from) { return vld1q_u8(static_cast<const std::uint8_t*>(from)); }
inline void store(Bytes bytes, void* to) { vst1q_u8(static_cast<std::uint8_t*>(to), bytes); }
inline Bytes pick(Bytes table, Bytes indices) { return vqtbl1q_u8(table, indices); }
inline void store_interleaved(Bytes low, Bytes high, Half* to) {
  store(vzip1q_u8(low, high), to);
  store(vzip2q_u8(low, high), to + 8);
}

constexpr bool has_shuffle() { return true; }

#endif

// For each mask of as many bits as elements fit into 16 bytes: the indices that move the bytes of
// its elements to the front, or from there to their places, and zero into the rest.
template <typename T>
struct Moves {
  static constexpr std::size_t kElements = 16 / sizeof(T);
  using Indices = std::array<std::array<std::uint8_t, 16>, std::size_t{1} << kElements>;

  Indices to_front;
  Indices to_places;

  constexpr Moves() : to_front(), to_places() {
    for (std::size_t mask = 0; mask < to_front.size(); ++mask) {
      to_front[mask].fill(0x80);
      to_places[mask].fill(0x80);
      std::size_t n_before = 0;
      for (std::size_t i = 0; i < kElements; ++i) {
        if ((mask >> i & 1U) == 0) {
          continue;
        }
        for (std::size_t byte = 0; byte < sizeof(T); ++byte) {
          const std::size_t place = i * sizeof(T) + byte;
          const std::size_t front = n_before * sizeof(T) + byte;
          to_front[mask][front] = static_cast<std::uint8_t>(place);
          to_places[mask][place] = static_cast<std::uint8_t>(front);
        }
        ++n_before;
      }
    }
  }
};

template <typename T>
constexpr Moves<T> kMoves;

template <typename T>
MILPRESS_SHUFFLE std::size_t compact_shuffled(const T* weights, const std::uint8_t* mask,
                                              std::size_t n_bytes, T* out) {
  constexpr std::size_t kElements = Moves<T>::kElements;
  constexpr unsigned kBits = (1U << kElements) - 1;
  T* const begin = out;
  for (std::size_t i = 0; i < n_bytes; ++i) {
    for (std::size_t part = 0; part < 8 / kElements; ++part) {
      const unsigned bits = mask[i] >> (part * kElements) & kBits;
      const Bytes moved = pick(load(weights), load(kMoves<T>.to_front[bits].data()));
      store(moved, out);
      weights += kElements;
      out += std::popcount(bits);
    }
  }
  return static_cast<std::size_t>(out - begin);
}

template <typename T>
MILPRESS_SHUFFLE std::size_t expand_shuffled(const T* values, const std::uint8_t* mask,
                                             std::size_t n_bytes, T* out) {
  constexpr std::size_t kElements = Moves<T>::kElements;
  constexpr unsigned kBits = (1U << kElements) - 1;
  const T* const begin = values;
  for (std::size_t i = 0; i < n_bytes; ++i) {
    for (std::size_t part = 0; part < 8 / kElements; ++part) {
      const unsigned bits = mask[i] >> (part * kElements) & kBits;
      store(pick(load(values), load(kMoves<T>.to_places[bits].data())), out);
      out += kElements;
      values += std::popcount(bits);
    }
  }
  return static_cast<std::size_t>(values - begin);
}

MILPRESS_SHUFFLE std::size_t look_up_shuffled(const Half* lut, const std::uint8_t* codes,
                                              std::size_t n, Half* out) {
  std::array<std::uint8_t, 16> low;
  std::array<std::uint8_t, 16> high;
  for (std::size_t j = 0; j < 16; ++j) {
    low[j] = static_cast<std::uint8_t>(lut[j].bits);
    high[j] = static_cast<std::uint8_t>(lut[j].bits >> 8);
  }
  const Bytes low_bytes = load(low.data());
  const Bytes high_bytes = load(high.data());
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Bytes indices = load(codes + i);
    store_interleaved(pick(low_bytes, indices), pick(high_bytes, indices), out + i);
  }
  return i;
}

#else

constexpr bool has_shuffle() { return false; }

template <typename T>
std::size_t compact_shuffled(const T*, const std::uint8_t*, std::size_t, T*) {
  return 0;
}

template <typename T>
std::size_t expand_shuffled(const T*, const std::uint8_t*, std::size_t, T*) {
  return 0;
}

std::size_t look_up_shuffled(const Half*, const std::uint8_t*, std::size_t, Half*) { return 0; }

#endif

}  // namespace

template <typename T>
std::size_t compact_eights_plain(const T* weights, const std::uint8_t* mask, std::size_t n_bytes,
                                 T* out) {
  // Every weight is stored and the place moves on only if it stays: no branch to mispredict.
  std::size_t n_kept = 0;
  for (std::size_t i = 0; i < 8 * n_bytes; ++i) {
    out[n_kept] = weights[i];
    n_kept += mask[i / 8] >> i % 8 & 1U;
  }
  return n_kept;
}

template <typename T>
std::size_t expand_eights_plain(const T* values, const std::uint8_t* mask, std::size_t n_bytes,
                                T* out) {
  std::size_t n_taken = 0;
  for (std::size_t i = 0; i < 8 * n_bytes; ++i) {
    const unsigned bit = mask[i / 8] >> i % 8 & 1U;
    out[i] = value_if(bit, values[n_taken]);
    n_taken += bit;
  }
  return n_taken;
}

void look_up_sixteen_plain(const Half* lut, const std::uint8_t* codes, std::size_t n, Half* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = lut[codes[i]];
  }
}

template <typename T>
std::size_t compact_eights(const T* weights, const std::uint8_t* mask, std::size_t n_bytes,
                           T* out) {
  return has_shuffle() ? compact_shuffled(weights, mask, n_bytes, out)
                       : compact_eights_plain(weights, mask, n_bytes, out);
}

template <typename T>
std::size_t expand_eights(const T* values, const std::uint8_t* mask, std::size_t n_bytes, T* out) {
  return has_shuffle() ? expand_shuffled(values, mask, n_bytes, out)
                       : expand_eights_plain(values, mask, n_bytes, out);
}

void look_up_sixteen(const Half* lut, const std::uint8_t* codes, std::size_t n, Half* out) {
  const std::size_t done = has_shuffle() ? look_up_shuffled(lut, codes, n, out) : 0;
  look_up_sixteen_plain(lut, codes + done, n - done, out + done);
}

#define MILPRESS_INSTANTIATE(T)                                                              \
  template std::size_t compact_eights(const T*, const std::uint8_t*, std::size_t, T*);       \
  template std::size_t expand_eights(const T*, const std::uint8_t*, std::size_t, T*);        \
  template std::size_t compact_eights_plain(const T*, const std::uint8_t*, std::size_t, T*); \
  template std::size_t expand_eights_plain(const T*, const std::uint8_t*, std::size_t, T*);

MILPRESS_INSTANTIATE(Half)
MILPRESS_INSTANTIATE(float)

}  // namespace milpress
