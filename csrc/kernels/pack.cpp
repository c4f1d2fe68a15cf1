#include "kernels/pack.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "core/check.h"
#include "core/parallel.h"
#include "core/vectorize.h"

namespace milpress {
namespace {

constexpr std::size_t kGrain = 524'288;  // codes a thread takes at a time; a multiple of 8

// Eight codes fill a whole number of bytes at every width: the unit of both directions.
template <int kBits>
void pack_eight(const std::uint8_t* codes, std::uint8_t* packed) {
  constexpr std::uint64_t kMask = (1U << kBits) - 1;
  std::uint64_t word = 0;
  for (unsigned j = 0; j < 8; ++j) {
    word |= (codes[j] & kMask) << (kBits * j);
  }
  for (unsigned j = 0; j < kBits; ++j) {
    packed[j] = static_cast<std::uint8_t>(word >> (8 * j));
  }
}

template <int kBits, typename Code>
void unpack_eight(const std::uint8_t* packed, Code* codes) {
  constexpr std::uint64_t kMask = (1U << kBits) - 1;
  constexpr unsigned kSign = 1U << (kBits - 1);
  std::uint64_t word = 0;
  for (unsigned j = 0; j < kBits; ++j) {
    word |= std::uint64_t{packed[j]} << (8 * j);
  }
  for (unsigned j = 0; j < 8; ++j) {
    const auto code = static_cast<unsigned>(word >> (kBits * j) & kMask);
    codes[j] = static_cast<Code>(std::is_signed_v<Code> ? (code ^ kSign) - kSign : code);
  }
}

template <int kBits>
MILPRESS_VECTORIZE void pack_eights(const std::uint8_t* codes, std::size_t n_eights,
                                    std::uint8_t* packed) {
  for (std::size_t i = 0; i < n_eights; ++i) {
    pack_eight<kBits>(codes + 8 * i, packed + kBits * i);
  }
}

template <int kBits, typename Code>
MILPRESS_VECTORIZE void unpack_eights(const std::uint8_t* packed, std::size_t n_eights,
                                      Code* codes) {
  for (std::size_t i = 0; i < n_eights; ++i) {
    unpack_eight<kBits>(packed + kBits * i, codes + 8 * i);
  }
}

template <int kBits>
void pack_all(std::span<const std::uint8_t> codes, std::span<std::uint8_t> packed) {
  const std::size_t n_eights = codes.size() / 8;
  parallel_for(n_eights, kGrain / 8, [&](std::size_t begin, std::size_t end) {
    pack_eights<kBits>(codes.data() + 8 * begin, end - begin, packed.data() + kBits * begin);
  });
  std::array<std::uint8_t, 8> last{};
  std::array<std::uint8_t, kBits> bytes{};
  std::copy(codes.begin() + static_cast<std::ptrdiff_t>(8 * n_eights), codes.end(), last.begin());
  pack_eight<kBits>(last.data(), bytes.data());
  std::copy_n(bytes.begin(), packed.size() - kBits * n_eights,
              packed.begin() + static_cast<std::ptrdiff_t>(kBits * n_eights));
}

template <int kBits, typename Code>
void unpack_all(std::span<const std::uint8_t> packed, std::span<Code> codes) {
  const std::size_t n_eights = codes.size() / 8;
  parallel_for(n_eights, kGrain / 8, [&](std::size_t begin, std::size_t end) {
    unpack_eights<kBits>(packed.data() + kBits * begin, end - begin, codes.data() + 8 * begin);
  });
  std::array<std::uint8_t, kBits> bytes{};
  std::array<Code, 8> last{};
  std::copy(packed.begin() + static_cast<std::ptrdiff_t>(kBits * n_eights), packed.end(),
            bytes.begin());
  unpack_eight<kBits>(bytes.data(), last.data());
  std::copy_n(last.begin(), codes.size() - 8 * n_eights,
              codes.begin() + static_cast<std::ptrdiff_t>(8 * n_eights));
}

// Calls `body` with the width as a compile-time constant.
template <typename Body>
void with_width(int bits, const Body& body) {
  switch (bits) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 6:
      return body(std::integral_constant<int, 6>());
    case 8:
      return body(std::integral_constant<int, 8>());
    default:
      check(false, "bits must be 1, 2, 3, 4, 6 or 8, got ", bits);
  }
}

}  // namespace

void check_pack(std::size_t n_codes, int bits, std::size_t n_bytes) {
  with_width(bits, [&](auto) {
    check(n_bytes == packed_size(n_codes, bits), "packed must have ", packed_size(n_codes, bits),
          " bytes for ", n_codes, " codes of ", bits, " bits, got ", n_bytes);
  });
}

void pack(std::span<const std::uint8_t> codes, int bits, std::span<std::uint8_t> packed) {
  check_pack(codes.size(), bits, packed.size());
  with_width(bits, [&](auto width) { pack_all<width()>(codes, packed); });
}

template <typename Code>
void unpack(std::span<const std::uint8_t> packed, int bits, std::span<Code> codes) {
  check_pack(codes.size(), bits, packed.size());
  with_width(bits, [&](auto width) { unpack_all<width()>(packed, codes); });
}

template void unpack(std::span<const std::uint8_t>, int, std::span<std::int8_t>);
template void unpack(std::span<const std::uint8_t>, int, std::span<std::uint8_t>);

}  // namespace milpress
