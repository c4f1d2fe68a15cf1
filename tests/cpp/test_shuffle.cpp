#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <random>
#include <vector>

#include "core/buffer.h"
#include "core/half.h"
#include "core/shuffle.h"

namespace milpress {
namespace {

template <typename T>
std::vector<T> numbered(std::size_t n) {
  std::vector<T> weights;
  for (std::size_t i = 0; i < n; ++i) {
    weights.push_back(from_float<T>(static_cast<float>(i + 1)));
  }
  return weights;
}

std::vector<std::uint8_t> random_bytes(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::uint8_t> bytes(n);
  for (std::uint8_t& byte : bytes) {
    byte = static_cast<std::uint8_t>(random());
  }
  return bytes;
}

template <typename T>
void check_twins(const std::vector<std::uint8_t>& mask, std::size_t start) {
  const std::vector<T> weights = numbered<T>(start + 8 * mask.size() + kShuffleSlack);
  std::vector<T> kept(8 * mask.size() + kShuffleSlack);
  std::vector<T> kept_plain(kept.size());
  const std::size_t n_kept =
      compact_eights(weights.data() + start, mask.data(), mask.size(), kept.data());
  CHECK(n_kept ==
        compact_eights_plain(weights.data() + start, mask.data(), mask.size(), kept_plain.data()));
  CHECK(std::equal(kept.begin(), kept.begin() + static_cast<std::ptrdiff_t>(n_kept),
                   kept_plain.begin()));

  std::vector<T> spread(8 * mask.size());
  std::vector<T> spread_plain(spread.size());
  CHECK(expand_eights(kept.data(), mask.data(), mask.size(), spread.data()) == n_kept);
  CHECK(expand_eights_plain(kept.data(), mask.data(), mask.size(), spread_plain.data()) == n_kept);
  CHECK(spread == spread_plain);
}

TEST_CASE("every mask moves halves and floats as its plain twin does, at any alignment") {
  std::vector<std::uint8_t> all(256);
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i] = static_cast<std::uint8_t>(i);
  }
  for (std::size_t start = 0; start < 9; ++start) {
    check_twins<Half>(all, start);
    check_twins<float>(all, start);
    check_twins<Half>(random_bytes(start, 1), start);
    check_twins<float>(random_bytes(start, 2), start);
  }
}

TEST_CASE("sixteen entries are looked up as the plain twin does, at any length and alignment") {
  std::array<Half, 16> lut;
  for (std::size_t j = 0; j < lut.size(); ++j) {
    lut[j] = Half{static_cast<std::uint16_t>(0x1234 + 0x0f1d * j)};
  }
  std::vector<std::uint8_t> codes = random_bytes(100, 3);
  for (std::uint8_t& code : codes) {
    code &= 15U;
  }
  for (std::size_t start = 0; start < 4; ++start) {
    for (std::size_t n = 0; n <= 67; ++n) {
      std::vector<Half> found(n);
      std::vector<Half> expected(n);
      look_up_sixteen(lut.data(), codes.data() + start, n, found.data());
      look_up_sixteen_plain(lut.data(), codes.data() + start, n, expected.data());
      CHECK(found == expected);
    }
  }
}

TEST_CASE("a buffer given back serves the next of about its size, never two at once") {
  void* const first = [] {
    const Buffer buffer(200'000);
    return buffer.data();
  }();
  const Buffer again(199'990);
  const Buffer other(200'000);
  CHECK(again.data() == first);
  CHECK(other.data() != first);
  CHECK(reinterpret_cast<std::uintptr_t>(other.data()) % 64 == 0);
}

}  // namespace
}  // namespace milpress
