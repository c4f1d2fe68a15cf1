// Every kernel on the GPU's side of the door, against its oracle in csrc/kernels, bit for bit.

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "emulator/emulator.h"
#include "kernels/kmeans1d.h"
#include "kernels/kmeans_vector.h"
#include "kernels/lut_assign.h"
#include "kernels/pack.h"
#include "kernels/quantize.h"
#include "kernels/sparsify.h"
#include "metal/kernels.h"

namespace milpress {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Data { kNormal, kTies, kConstant, kZeros, kMixed, kTiny, kHuge, kNonfinite };
template <typename T>
std::vector<T> make(Data data, std::size_t n, unsigned seed = 1) {
  std::mt19937 random(seed * 7919 + static_cast<unsigned>(n));
  std::normal_distribution<float> normal;
  const bool is_half = sizeof(T) == 2;
  std::vector<T> weights(n);
  for (std::size_t i = 0; i < n; ++i) {
    const float value = normal(random);
    float weight = value;
    switch (data) {
      case Data::kNormal:
        break;
      case Data::kTies:  // few values, halfway between codes, and both zeros
        weight = std::round(value * 2) / 2;
        weight = weight == 0 && random() % 2 == 0 ? -0.0F : weight;
        break;
      case Data::kConstant:
        weight = 0.375F;
        break;
      case Data::kZeros:
        weight = random() % 2 == 0 ? 0.0F : -0.0F;
        break;
      case Data::kMixed:  // magnitudes of all kinds, blocks of zeros between
        weight = i / 32 % 3 == 0 ? 0.0F : std::ldexp(value, static_cast<int>(random() % 24) - 12);
        break;
      case Data::kTiny:  // subnormals
        weight = value * (is_half ? 0x1p-20F : 0x1p-140F);
        break;
      case Data::kHuge:  // beyond half of the largest
        weight = std::clamp(value, -1.0F, 1.0F) * (is_half ? 65504.0F : 3.4e38F);
        break;
      case Data::kNonfinite:
        weight = random() % 40 != 0  ? value
                 : random() % 3 == 0 ? kNaN
                 : random() % 2 == 0 ? kInfinity
                                     : -kInfinity;
        break;
    }
    weights[i] = from_float<T>(weight);
  }
  return weights;
}

// Sanitizers look for what a few sizes and kinds of data show already.
bool is_quick() { return std::getenv("MILPRESS_METAL_QUICK") != nullptr; }

// On and beside the sizes of simdgroups and threadgroups.
std::vector<std::size_t> sizes() {
  return is_quick() ? std::vector<std::size_t>{1, 33, 257}
                    : std::vector<std::size_t>{1, 31, 32, 33, 255, 256, 257, 1000};
}

std::vector<Data> kinds() {
  return is_quick()
             ? std::vector<Data>{Data::kTies, Data::kMixed, Data::kTiny, Data::kNonfinite}
             : std::vector<Data>{Data::kNormal, Data::kTies, Data::kConstant, Data::kZeros,
                                 Data::kMixed,  Data::kTiny, Data::kHuge,     Data::kNonfinite};
}

// Runs `body` under several schedules and sizes of threadgroups.
template <typename Body>
void with_schedules(const Body& body) {
  emulator::Settings& settings = emulator::settings();
  const emulator::Settings before = settings;
  const char* const limit = std::getenv("MILPRESS_EMULATOR_THREADS");
  const unsigned most = limit == nullptr ? 1024 : static_cast<unsigned>(std::atoi(limit));
  const std::vector<unsigned> all{1024, 64, 96};
  for (const unsigned threads : is_quick() ? std::vector<unsigned>{1024} : all) {
    settings = {17 + threads, std::min(threads, most)};
    CAPTURE(threads);
    body();
  }
  settings = before;
}

template <typename T>
std::vector<std::uint32_t> bits_of(const std::vector<T>& values) {
  std::vector<std::uint32_t> bits;
  for (const T value : values) {
    if constexpr (sizeof(T) == 4) {
      bits.push_back(std::bit_cast<std::uint32_t>(value));
    } else if constexpr (sizeof(T) == 2) {
      bits.push_back(value.bits);
    } else {
      bits.push_back(static_cast<std::uint8_t>(value));
    }
  }
  return bits;
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return bits_of(a) == bits_of(b);
}

// ---------------------------------------------------------------------------------------------
// Palettes

template <typename T>
void check_lut_assign(const std::vector<T>& weights, const std::vector<T>& luts,
                      std::size_t n_rows) {
  const MatrixView<const T> in{weights.data(), n_rows, weights.size() / n_rows};
  const MatrixView<const T> tables{luts.data(), n_rows, luts.size() / n_rows};
  std::vector<std::uint8_t> expected(weights.size());
  std::vector<std::uint8_t> codes(weights.size());
  lut_assign<T>(in, tables, {expected.data(), in.n_rows, in.n_cols});
  metal::lut_assign<T>(in, tables, {codes.data(), in.n_rows, in.n_cols});
  CHECK(codes == expected);
}

template <typename T>
std::vector<T> sorted_luts(std::size_t n_rows, std::size_t n_entries, unsigned seed) {
  std::vector<T> luts =
      make<T>(seed % 2 == 0 ? Data::kTies : Data::kNormal, n_rows * n_entries, seed);
  for (std::size_t row = 0; row < n_rows; ++row) {
    std::sort(luts.begin() + row * n_entries, luts.begin() + (row + 1) * n_entries,
              [](T a, T b) { return to_float(a) < to_float(b); });
  }
  return luts;
}

TEST_CASE_TEMPLATE("lut_assign gives the codes of its oracle", T, Half, float) {
  with_schedules([] {
    for (const std::size_t n : sizes()) {
      for (const std::size_t n_entries : {1, 2, 3, 16, 17, 255, 256}) {
        const auto luts = sorted_luts<T>(3, n_entries, static_cast<unsigned>(n_entries));
        check_lut_assign<T>(make<T>(Data::kNormal, 3 * n), luts, 3);
        check_lut_assign<T>(make<T>(Data::kTies, 3 * n), luts, 3);
        check_lut_assign<T>(make<T>(Data::kNonfinite, 3 * n), luts, 3);
        check_lut_assign<T>(make<T>(Data::kTiny, 3 * n), make<T>(Data::kZeros, 3 * n_entries), 3);
      }
    }
    std::vector<T> subnormal = make<T>(Data::kTiny, 16);
    std::sort(subnormal.begin(), subnormal.end(),
              [](T a, T b) { return to_float(a) < to_float(b); });
    check_lut_assign<T>(make<T>(Data::kTiny, 1000), subnormal, 1);
    const std::vector<T> infinite{from_float<T>(-kInfinity), from_float<T>(0),
                                  from_float<T>(kInfinity), from_float<T>(kInfinity)};
    check_lut_assign<T>(make<T>(Data::kNonfinite, 1000), infinite, 1);
    check_lut_assign<T>(make<T>(Data::kHuge, 1000), infinite, 1);
  });
}

TEST_CASE_TEMPLATE("lut_assign takes the lower entry halfway between two", T, Half, float) {
  std::vector<T> lut;
  std::vector<T> weights;
  for (int i = -8; i < 8; ++i) {
    lut.push_back(from_float<T>(static_cast<float>(i)));
    weights.push_back(from_float<T>(static_cast<float>(i) + 0.5F));
  }
  std::vector<std::uint8_t> codes(16);
  metal::lut_assign<T>({weights.data(), 1, 16}, {lut.data(), 1, 16}, {codes.data(), 1, 16});
  for (std::size_t i = 0; i < 16; ++i) {
    CHECK(codes[i] == i);
  }
}

void check_kmeans1d(const std::vector<Half>& weights, const std::vector<float>& importance,
                    std::size_t n_rows, std::size_t n_entries) {
  const std::size_t n_cols = weights.size() / n_rows;
  std::vector<Half> expected(n_rows * n_entries);
  std::vector<Half> luts(n_rows * n_entries);
  const MatrixView<const float> shares{importance.data(), importance.empty() ? 0 : n_rows, n_cols};
  kmeans1d<Half>({weights.data(), n_rows, n_cols}, shares, {expected.data(), n_rows, n_entries});
  metal::kmeans1d<Half>({weights.data(), n_rows, n_cols}, shares, {luts.data(), n_rows, n_entries});
  CHECK(same(luts, expected));
}

TEST_CASE("kmeans1d gives the tables of its oracle") {
  for (const Data data : {Data::kNormal, Data::kTies, Data::kConstant, Data::kMixed, Data::kTiny,
                          Data::kHuge, Data::kNonfinite}) {
    CAPTURE(static_cast<int>(data));
    for (const std::size_t n : {1, 33, 257, 1000}) {
      check_kmeans1d(make<Half>(data, 3 * n), {}, 3, 16);
    }
  }
  check_kmeans1d(make<Half>(Data::kNormal, 40'000), {}, 1, 4);
}

TEST_CASE("kmeans1d counts the weights of importance 1 alone") {
  const std::size_t n = 1000;
  std::vector<float> importance(3 * n);
  for (std::size_t i = 0; i < 2 * n; ++i) {
    importance[i] = i % 3 == 0 ? 1.0F : 0.0F;  // in the last row all are 0, which counts as equal
  }
  check_kmeans1d(make<Half>(Data::kNormal, 3 * n), importance, 3, 16);
  importance[5] = 0.5F;
  std::vector<Half> luts(3 * 16);
  CHECK_THROWS_AS(metal::kmeans1d<Half>({make<Half>(Data::kNormal, 3 * n).data(), 3, n},
                                        {importance.data(), 3, n}, {luts.data(), 3, 16}),
                  metal::DeviceError);
}

// Threads have no part in how rows are cut into batches, and their sanitizer needs 800 MB here.
#if !__has_feature(thread_sanitizer)
// The GPU counts 1,024 rows at a time; what lies behind the weights is not the last batch's.
TEST_CASE("kmeans1d gives every row of more than a batch the table of its oracle") {
  constexpr std::size_t kRows = 1027;
  constexpr std::size_t kCols = 5;
  const std::vector<Half> weights = make<Half>(Data::kNormal, kRows * kCols);
  check_kmeans1d(weights, {}, kRows, 2);
  std::vector<float> importance(weights.size());
  for (std::size_t i = 0; i < importance.size(); ++i) {
    importance[i] = i % 3 == 0 ? 1.0F : 0.0F;
  }
  // In a row of either batch all are 0, which counts as equal.
  for (const std::size_t row : {2U, 1025U}) {
    std::fill_n(importance.begin() + static_cast<std::ptrdiff_t>(row * kCols), kCols, 0.0F);
  }
  check_kmeans1d(weights, importance, kRows, 2);
}
#endif

TEST_CASE("kmeans1d counts exactly beyond 2^24, where floats leave integers out") {
  if (is_quick()) {
    return;
  }
  // Their mean is the tie between 1 and 1 + 2^-10, which goes to 1; of one 1 less, it is above. A
  // float holds one 1 less.
  constexpr std::uint32_t kOnes = 7 * (2048 * 1171 - 1);
  static_assert(static_cast<float>(kOnes) == kOnes - 1);
  std::vector<Half> weights(kOnes, from_float<Half>(1));
  weights.insert(weights.end(), 7, from_float<Half>(1172));
  Half lut{};
  metal::kmeans1d<Half>({weights.data(), 1, weights.size()}, {}, {&lut, 1, 1});
  CHECK(to_float(lut) == 1);
}

// ---------------------------------------------------------------------------------------------
// Integer codes

template <typename T, typename Code>
void check_quantize(const std::vector<T>& weights, std::size_t n_rows, CodeRange range,
                    bool fits_offset, bool searches) {
  const std::size_t n_cols = weights.size() / n_rows;
  const MatrixView<const T> in{weights.data(), n_rows, n_cols};
  std::vector<T> expected_scales(n_rows);
  std::vector<T> scales(n_rows);
  std::vector<Code> expected_offsets(fits_offset ? n_rows : 0);
  std::vector<Code> offsets(fits_offset ? n_rows : 0);
  std::vector<Code> expected(weights.size());
  std::vector<Code> codes(weights.size());
  const MatrixView<Code> expected_out{expected.data(), n_rows, n_cols};
  const MatrixView<Code> out{codes.data(), n_rows, n_cols};
  if (searches) {
    quantize_mse<T, Code>(in, {}, range, expected_scales, expected_offsets, expected_out);
    metal::quantize_mse<T, Code>(in, {}, range, scales, offsets, out);
  } else {
    quantize<T, Code>(in, range, expected_scales, expected_offsets, expected_out);
    metal::quantize<T, Code>(in, range, scales, offsets, out);
  }
  CHECK(same(scales, expected_scales));
  CHECK(offsets == expected_offsets);
  CHECK(codes == expected);
}

template <typename T>
void check_all_quantize(const std::vector<T>& weights, std::size_t n_rows, bool searches) {
  for (const bool fits_offset : {false, true}) {
    check_quantize<T, std::int8_t>(weights, n_rows, {-127, 127}, fits_offset, searches);
    check_quantize<T, std::int8_t>(weights, n_rows, {-8, 7}, fits_offset, searches);
    check_quantize<T, std::uint8_t>(weights, n_rows, {0, 15}, fits_offset, searches);
    check_quantize<T, std::uint8_t>(weights, n_rows, {0, 254}, fits_offset, searches);
  }
}

TEST_CASE_TEMPLATE("quantize gives the scales, offsets and codes of its oracle", T, Half, float) {
  with_schedules([] {
    for (const Data data : kinds()) {
      CAPTURE(static_cast<int>(data));
      for (const std::size_t n : sizes()) {
        CAPTURE(n);
        check_all_quantize<T>(make<T>(data, 5 * n), 5, false);
      }
    }
  });
  check_all_quantize<T>(make<T>(Data::kMixed, 2 * 9001), 2, false);
}

// Next to the largest number and among the smallest, where the first scale that comes to mind
// restores few rows, and one of the five after it is taken.
TEST_CASE_TEMPLATE("quantize tries the scales of its oracle in its order", T, Half, float) {
  constexpr bool kIsHalf = sizeof(T) == 2;
  constexpr float kMax = kIsHalf ? 65504.0F : std::numeric_limits<float>::max();
  constexpr float kMin = kIsHalf ? 0x1p-24F : 0x1p-149F;
  const std::size_t n_rows = is_quick() ? 200 : 1000;
  std::mt19937 random(12);
  std::uniform_real_distribution<float> unit(0.0F, 1.0F);
  std::vector<T> weights;
  for (std::size_t row = 0; row < n_rows; ++row) {
    const float share = row % 4 < 2 ? 1.0F : 1 - unit(random) / 50;
    const float end = row % 2 == 0 ? kMax * share : kMin * static_cast<float>(1 + random() % 3000);
    const float sign = row % 3 == 0 ? -1.0F : 1.0F;
    weights.push_back(from_float<T>(sign * end));
    weights.push_back(from_float<T>(-sign * end * unit(random)));
  }
  for (const bool fits_offset : {false, true}) {
    for (const int code_max : {1, 7, 31, 32, 127}) {
      CAPTURE(code_max);
      check_quantize<T, std::int8_t>(weights, n_rows, {-code_max, code_max}, fits_offset, false);
      check_quantize<T, std::int8_t>(weights, n_rows, {-code_max - 1, code_max}, fits_offset,
                                     false);
    }
  }
}

TEST_CASE_TEMPLATE("rows of zeros and of one value have the scale and offset of the oracle", T,
                   Half, float) {
  for (const float value : {0.0F, 0.1F, -0.1F, 31.875F, -31.875F, 60000.0F, -60000.0F}) {
    CAPTURE(value);
    const std::vector<T> weights(3 * 33, from_float<T>(value));
    for (const bool searches : {false, true}) {
      check_all_quantize<T>(weights, 3, searches);
      check_quantize<T, std::int8_t>(weights, 3, {3, 15}, true, searches);  // 0 is no code
    }
  }
}

TEST_CASE_TEMPLATE("quantize_mse gives the scales, offsets and codes of its oracle", T, Half,
                   float) {
  for (const Data data : kinds()) {
    CAPTURE(static_cast<int>(data));
    for (const std::size_t n : {1, 31, 32, 33, 257}) {
      CAPTURE(n);
      check_all_quantize<T>(make<T>(data, 4 * n), 4, true);
    }
  }
  with_schedules([] { check_all_quantize<T>(make<T>(Data::kMixed, 3 * 64), 3, true); });
}

TEST_CASE_TEMPLATE("quantize_mse adds up long rows in the pieces of its oracle", T, Half, float) {
  if (is_quick()) {
    return;
  }
  check_quantize<T, std::int8_t>(make<T>(Data::kNormal, 2 * 4100), 2, {-8, 7}, true, true);
  check_quantize<T, std::int8_t>(make<T>(Data::kNormal, 135'000), 1, {-8, 7}, false, true);
  // At the ends of what is added up together: one weight that decides the range.
  for (const std::size_t place : {0, 31, 2047, 2048, 4095, 4099}) {
    CAPTURE(place);
    std::vector<T> weights = make<T>(Data::kNormal, 4100);
    for (const float outlier : {6.0F, 12.0F, 25.0F}) {
      weights[place] = from_float<T>(outlier);
      check_quantize<T, std::int8_t>(weights, 1, {-8, 7}, false, true);
      check_quantize<T, std::uint8_t>(weights, 1, {0, 15}, true, true);
    }
  }
}

TEST_CASE_TEMPLATE("quantize rounds halfway between codes to even", T, Half, float) {
  std::vector<T> weights;
  for (int i = -127; i <= 127; ++i) {
    weights.push_back(from_float<T>(static_cast<float>(i)));
    weights.push_back(from_float<T>(static_cast<float>(i) - 0.5F));
  }
  weights[1] = from_float<T>(0.5F);
  check_quantize<T, std::int8_t>(weights, 1, {-127, 127}, false, false);
}

TEST_CASE("pack gives the bytes of its oracle") {
  std::mt19937 random(3);
  for (const int bits : {1, 2, 3, 4, 6, 8}) {
    for (const std::size_t n : {1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 5000}) {
      std::vector<std::uint8_t> codes(n);
      for (std::uint8_t& code : codes) {
        code = static_cast<std::uint8_t>(random());  // bits above the width are to be dropped
      }
      std::vector<std::uint8_t> expected(packed_size(n, bits));
      std::vector<std::uint8_t> packed(expected.size());
      pack(codes, bits, expected);
      metal::pack(codes, bits, packed);
      CHECK(packed == expected);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Pruning

template <typename T>
void check_pruned(const std::vector<T>& weights, std::size_t n_zeros) {
  const std::span<const T> in(weights);
  std::vector<std::uint8_t> expected((weights.size() + 7) / 8);
  std::vector<std::uint8_t> bitmask(expected.size());
  keep_largest<T>(in, n_zeros, expected);
  metal::keep_largest<T>(in, n_zeros, bitmask);
  CHECK(bitmask == expected);
  std::vector<T> kept(count_kept(expected));
  std::vector<T> kept_here(kept.size());
  compact<T>(in, expected, kept);
  metal::compact<T>(in, expected, kept_here);
  CHECK(same(kept_here, kept));
}

TEST_CASE_TEMPLATE("pruning gives the bitmask and values of its oracle", T, Half, float) {
  with_schedules([] {
    for (const Data data : kinds()) {
      CAPTURE(static_cast<int>(data));
      for (const std::size_t n : sizes()) {
        CAPTURE(n);
        const std::vector<T> weights = make<T>(data, n);
        for (const std::size_t n_zeros : {std::size_t{0}, std::size_t{1}, n / 3, n / 2, n - 1, n}) {
          check_pruned<T>(weights, n_zeros);
        }
        for (const float threshold : {0.0F, 0.5F, 1.0F, 100.0F}) {
          std::vector<std::uint8_t> expected((n + 7) / 8);
          std::vector<std::uint8_t> bitmask(expected.size());
          keep_above<T>(weights, from_float<T>(threshold), expected);
          metal::keep_above<T>(weights, from_float<T>(threshold), bitmask);
          CHECK(bitmask == expected);
        }
      }
    }
  });
  check_pruned<T>(make<T>(Data::kTies, 70'000), 31'111);
  check_pruned<T>(make<T>(Data::kConstant, 5000), 1234);
}

TEST_CASE_TEMPLATE("keep_n_m gives the bitmask of its oracle", T, Half, float) {
  struct Case {
    ChannelShape shape;
    std::size_t n;
    std::size_t m;
  };
  const Case cases[] = {{{1, 4, 1}, 2, 4},   {{1, 1, 1}, 0, 1},   {{3, 31, 1}, 2, 4},
                        {{5, 33, 3}, 3, 4},  {{2, 255, 1}, 1, 2}, {{1, 257, 2}, 5, 7},
                        {{7, 6, 5}, 4, 4},   {{2, 10, 3}, 0, 3},  {{2, 40, 3}, 20, 33},
                        {{3, 8, 11}, 9, 16}, {{1, 1000, 1}, 2, 4}};
  with_schedules([&] {
    for (const Data data : {Data::kNormal, Data::kTies, Data::kConstant, Data::kZeros,
                            Data::kNonfinite, Data::kTiny}) {
      for (const auto& [shape, n, m] : cases) {
        CAPTURE(m);
        const std::vector<T> weights =
            make<T>(data, shape.n_outer * shape.n_channels * shape.n_inner);
        std::vector<std::uint8_t> expected((weights.size() + 7) / 8);
        std::vector<std::uint8_t> bitmask(expected.size());
        keep_n_m<T>(weights, shape, n, m, expected);
        metal::keep_n_m<T>(weights, shape, n, m, bitmask);
        CHECK(bitmask == expected);
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Vectors

// The first of the entries at the least squared distance, added up in float in the order of
// elements.
std::pair<std::uint8_t, float> nearest(const std::vector<float>& vectors, std::size_t n,
                                       const std::vector<float>& entries, std::size_t dim,
                                       std::size_t i) {
  float least = kInfinity;
  std::uint8_t code = 0;
  for (std::size_t j = 0; j * dim < entries.size(); ++j) {
    float sum = 0;
    for (std::size_t d = 0; d < dim; ++d) {
      const float difference = vectors[d * n + i] - entries[j * dim + d];
      sum += difference * difference;
    }
    if (sum < least) {
      least = sum;
      code = static_cast<std::uint8_t>(j);
    }
  }
  return {code, least};
}

TEST_CASE("a Lloyd step gives codes, distances and sums in the order of the oracle") {
  with_schedules([] {
    for (const std::size_t dim :
         is_quick() ? std::vector<std::size_t>{3} : std::vector<std::size_t>{1, 2, 3, 4, 8}) {
      for (const std::size_t n : {1, 33, 257, 1100}) {
        for (const std::size_t n_entries : {1, 5, 16, 256}) {
          CAPTURE(dim);
          CAPTURE(n);
          CAPTURE(n_entries);
          const Data data = n % 2 == 0 ? Data::kTies : Data::kNormal;
          const std::vector<float> vectors = make<float>(data, dim * n, 3);
          const std::vector<float> entries = make<float>(data, dim * n_entries, 4);
          std::vector<float> importance = make<float>(Data::kNormal, n, 5);
          for (float& share : importance) {
            share = std::max(0.0F, share);
          }
          constexpr std::size_t kPerPiece = 512;
          const std::size_t n_pieces = (n + kPerPiece - 1) / kPerPiece;
          const std::size_t n_sums = n_entries * (dim + 1) + 1;
          std::vector<std::uint8_t> codes(n);
          std::vector<float> distances(n);
          std::vector<double> sums(n_pieces * n_sums);
          metal::lloyd_step({vectors.data(), dim, n}, importance, {entries.data(), n_entries, dim},
                            kPerPiece, codes, distances, {sums.data(), n_pieces, n_sums});

          std::vector<double> expected(n_pieces * n_sums);
          std::size_t n_wrong = 0;
          for (std::size_t i = 0; i < n; ++i) {
            const auto [code, distance] = nearest(vectors, n, entries, dim, i);
            n_wrong += codes[i] != code || distances[i] != distance;
            double* const piece = expected.data() + i / kPerPiece * n_sums;
            const double share = importance[i];
            for (std::size_t d = 0; d < dim; ++d) {
              piece[code * dim + d] += share * vectors[d * n + i];
            }
            piece[n_entries * dim + code] += share;
            piece[n_sums - 1] += share * distance;
          }
          CHECK(n_wrong == 0);
          CHECK(sums == expected);
        }
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------
// What isn't a kernel's business

TEST_CASE("nothing to do, and what the CPU refuses, is as on the CPU") {
  std::vector<Half> none;
  std::vector<std::uint8_t> bytes;
  metal::keep_largest<Half>(std::span<const Half>(none), 0, bytes);
  metal::compact<Half>(std::span<const Half>(none), bytes, none);
  metal::pack(bytes, 4, bytes);
  metal::lut_assign<Half>({none.data(), 0, 4}, {none.data(), 0, 2}, {bytes.data(), 0, 4});
  std::vector<Half> scales(3);
  std::vector<std::int8_t> offsets;
  std::vector<std::int8_t> codes;
  metal::quantize<Half, std::int8_t>({none.data(), 3, 0}, {-8, 7}, scales, offsets,
                                     {codes.data(), 3, 0});
  CHECK(to_float(scales[0]) == 1);
  const std::vector<Half> weights(8);
  CHECK_THROWS_AS(metal::keep_largest<Half>(weights, 9, bytes), std::invalid_argument);
  CHECK_THROWS_AS(metal::pack(std::vector<std::uint8_t>(8), 5, bytes), std::invalid_argument);
  CHECK_THROWS_AS(metal::keep_n_m<Half>(weights, {1, 8, 1}, 3, 2, bytes), std::invalid_argument);
}

TEST_CASE("the self-test passes") { CHECK(metal::self_test() == ""); }

// A weight of a real model, as raw halves; .ci/run takes it from a package.
TEST_CASE("a real weight gives the codes, tables and masks of the oracles") {
  const char* const path = std::getenv("MILPRESS_REAL_WEIGHT");
  if (path == nullptr) {
    MESSAGE("MILPRESS_REAL_WEIGHT is not set");
    return;
  }
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  REQUIRE(bytes.size() % (16 * sizeof(Half)) == 0);
  REQUIRE(!bytes.empty());
  std::vector<Half> weights(bytes.size() / sizeof(Half));
  std::memcpy(weights.data(), bytes.data(), bytes.size());
  const std::size_t n_rows = 16;
  const std::size_t n_cols = weights.size() / n_rows;
  std::vector<Half> luts(n_rows * 16);
  kmeans1d<Half>({weights.data(), n_rows, n_cols}, {}, {luts.data(), n_rows, 16});
  check_kmeans1d(weights, {}, n_rows, 16);
  check_lut_assign<Half>(weights, luts, n_rows);
  check_quantize<Half, std::int8_t>(weights, weights.size() / 16, {-8, 7}, true, false);
  check_quantize<Half, std::int8_t>(weights, n_rows, {-127, 127}, false, false);
  check_quantize<Half, std::int8_t>(weights, weights.size() / 16, {-8, 7}, false, true);
  check_pruned<Half>(weights, weights.size() * 3 / 5);
}

}  // namespace
}  // namespace milpress
