// One digest of the output of each kernel, the same on every processor, compiler and thread count.
//
// After a change that is meant to change results:
//     MILPRESS_WRITE_GOLDEN=tests/cpp/golden.inc build/release/milpress_tests
//     -sf='*test_golden.cpp'

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iomanip>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "core/convert.h"
#include "core/half.h"
#include "core/keys.h"
#include "core/parallel.h"
#include "kernels/fidelity.h"
#include "kernels/finite.h"
#include "kernels/kmeans1d.h"
#include "kernels/kmeans_vector.h"
#include "kernels/lut_assign.h"
#include "kernels/pack.h"
#include "kernels/quantize.h"
#include "kernels/sparsify.h"

namespace milpress {
namespace {

const std::map<std::string, std::uint64_t> kGolden{
#include "golden.inc"
};

// FNV-1a. Every NaN counts as the same: which of them an operation gives is the processor's choice.
class Digest {
 public:
  template <typename T>
  void add(const std::vector<T>& values) {
    add(values.size());
    for (const T& value : values) {
      add(value);
    }
  }

  template <typename T>
  void add(T value) {
    if constexpr (std::is_same_v<T, Half>) {
      add(std::isnan(to_float(value)) ? std::uint16_t{0x7e00} : value.bits);
    } else if constexpr (std::is_same_v<T, float>) {
      add(std::isnan(value) ? 0x7fc00000U : std::bit_cast<std::uint32_t>(value));
    } else if constexpr (std::is_same_v<T, double>) {
      add(std::isnan(value) ? std::uint64_t{0x7ff8} << 48 : std::bit_cast<std::uint64_t>(value));
    } else {
      const auto bits = static_cast<std::make_unsigned_t<T>>(value);
      for (std::size_t byte = 0; byte < sizeof(T); ++byte) {
        state_ = (state_ ^ (std::uint64_t{bits} >> 8 * byte & 0xff)) * 0x100000001b3;
      }
    }
  }

  std::uint64_t state() const { return state_; }

 private:
  std::uint64_t state_ = 0xcbf29ce484222325;
};

// SplitMix64: the standard library's distributions differ between its implementations.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t bits = state_ += 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return bits ^ bits >> 31;
  }

  std::size_t below(std::size_t n) { return static_cast<std::size_t>(next() % n); }

  // Bell-shaped within -1 to 1, in steps that a float holds.
  float bell() {
    const auto sum = static_cast<int>((next() & 0xffff) + (next() & 0xffff) + (next() & 0xffff));
    return static_cast<float>(sum - 0x17ffe) * 0x1p-17F;
  }

 private:
  std::uint64_t state_;
};

enum class Shape { kBell, kGrid, kFew, kTiny, kSteep, kAllBits };
constexpr Shape kAll[] = {Shape::kBell, Shape::kGrid,  Shape::kFew,
                          Shape::kTiny, Shape::kSteep, Shape::kAllBits};

template <typename T>
T of_bits(std::uint64_t bits) {
  if constexpr (std::is_same_v<T, Half>) {
    return Half{static_cast<std::uint16_t>(bits)};
  } else {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits));
  }
}

template <typename T>
T weight(Random& random, Shape shape) {
  constexpr bool is_half = sizeof(T) == 2;
  switch (shape) {
    case Shape::kBell:
      return from_float<T>(random.bell());
    case Shape::kGrid:  // ties wherever values are halved, squared or compared
      return from_float<T>(static_cast<float>(static_cast<int>(random.below(129)) - 64) / 8);
    case Shape::kFew: {
      constexpr float kValues[] = {-0.0F, 0.0F, 0.5F, -0.5F, 3.0F, -0.25F, 1.0F};
      return from_float<T>(kValues[random.below(std::size(kValues))]);
    }
    case Shape::kTiny:  // subnormals and their neighbours
      return of_bits<T>(random.next() & (is_half ? 0x87ffU : 0x80ffffffU));
    case Shape::kSteep: {  // all magnitudes up to the largest
      const T value = of_bits<T>(random.next());
      return std::isfinite(to_float(value)) ? value : T{};
    }
    case Shape::kAllBits:
      return of_bits<T>(random.next());
  }
  return T{};
}

// `n` weights that begin `offset` elements after the start of an allocation.
template <typename T>
struct Weights {
  std::vector<T> storage;
  std::size_t offset;

  Weights(std::size_t n, Shape shape, std::uint64_t seed) : offset(n % 3) {
    Random random(seed * 1'000'003 + n * 17 + static_cast<std::size_t>(shape));
    storage.resize(offset + n);
    std::generate(storage.begin(), storage.end(), [&] { return weight<T>(random, shape); });
  }

  std::size_t size() const { return storage.size() - offset; }
  std::span<const T> flat() const { return std::span(storage).subspan(offset); }

  MatrixView<const T> rows(std::size_t n_rows) const {
    return {storage.data() + offset, n_rows, size() / n_rows};
  }
};

constexpr std::size_t kLengths[] = {0,  1,  2,  3,  5,  7,   8,   9,   15,   16,   17,   31,
                                    32, 33, 63, 64, 65, 127, 129, 500, 2047, 2049, 4100, 20001};
constexpr std::size_t kPastTheGrain = 150'001;

std::vector<float> importance_of(std::size_t n, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> importance(n);
  for (float& share : importance) {
    share = static_cast<float>(random.below(5)) / 4;
  }
  return importance;
}

template <typename T>
std::vector<T> ascending(std::size_t n, Shape shape, std::uint64_t seed) {
  const Weights<T> values(n, shape, seed);
  std::vector<T> lut(values.flat().begin(), values.flat().end());
  std::replace_if(lut.begin(), lut.end(), [](T entry) { return std::isnan(to_float(entry)); }, T{});
  std::sort(lut.begin(), lut.end(), [](T a, T b) { return order_key(a) < order_key(b); });
  return lut;
}

using Digests = std::map<std::string, std::uint64_t>;

// -------------------------------------------------------------------------------------------------

template <typename T>
void digest_conversions(Digest& digest) {
  for (const std::size_t n : kLengths) {
    for (const Shape shape : kAll) {
      const Weights<T> weights(n, shape, 1);
      std::vector<float> wide(n);
      widen(weights.flat().data(), n, wide.data());
      digest.add(wide);
      const Weights<float> values(n, shape, 1);
      std::vector<T> thin(n);
      narrow(values.flat().data(), n, thin.data());
      digest.add(thin);
      digest.add(first_nonfinite(weights.flat()));
    }
  }
}

template <typename T>
void digest_kmeans1d(Digest& digest, bool weighted) {
  const auto add = [&](std::size_t n_rows, std::size_t n_cols, Shape shape, std::size_t k) {
    const Weights<T> weights(n_rows * n_cols, shape, 2);
    const std::vector<float> importance = importance_of(weighted ? n_rows * n_cols : 0, 3);
    std::vector<T> luts(n_rows * k);
    kmeans1d<T>({weights.flat().data(), n_rows, n_cols},
                {importance.data(), weighted ? n_rows : 0, n_cols}, {luts.data(), n_rows, k});
    digest.add(luts);
  };
  for (const Shape shape : kAll) {
    for (const std::size_t k : {2U, 4U, 8U, 16U, 64U, 256U}) {
      for (const std::size_t n : {0U, 1U, 15U, 17U, 255U, 257U, 1500U}) {
        add(3, n, shape, k);
      }
    }
    add(1, 9001, shape, 16);
  }
}

template <typename T>
void digest_kmeans_vector(Digest& digest, bool weighted) {
  const auto add = [&](std::size_t n_rows, std::size_t n, std::size_t dim, Shape shape,
                       std::size_t k) {
    const Weights<T> weights(n_rows * n * dim, shape, 4);
    const std::vector<float> importance = importance_of(weighted ? n_rows * n : 0, 5);
    std::vector<T> luts(n_rows * k * dim);
    std::vector<std::uint8_t> codes(n_rows * n);
    kmeans_vector<T>({weights.flat().data(), n_rows, n * dim},
                     {importance.data(), weighted ? n_rows : 0, n}, {dim, 6},
                     {luts.data(), n_rows, k * dim}, {codes.data(), n_rows, n});
    digest.add(luts);
    digest.add(codes);
  };
  for (const Shape shape : kAll) {
    for (const std::size_t dim : {1U, 2U, 3U, 4U, 8U}) {
      for (const std::size_t k : {2U, 5U, 16U}) {
        for (const std::size_t n : {0U, 1U, 17U, 300U}) {
          add(2, n, dim, shape, k);
        }
      }
    }
  }
  // Enough to be merged by a grid, and to be sampled.
  constexpr std::size_t kMany = 21'001;
  for (const std::size_t dim : {1U, 2U, 4U}) {
    add(1, kMany, dim, Shape::kBell, 8);
  }
  add(1, kMany, 2, Shape::kSteep, 8);
  add(1, kMany, 2, Shape::kBell, 40);
}

template <typename T>
void digest_lut_assign(Digest& digest) {
  for (const Shape shape : kAll) {
    for (const std::size_t k : {1U, 2U, 3U, 4U, 8U, 15U, 16U, 17U, 64U, 255U, 256U}) {
      const std::vector<T> lut = ascending<T>(k, shape, 7);
      std::vector<float> entries(k);
      widen(lut.data(), k, entries.data());
      digest.add(midpoint_table<float>(entries));
      for (const std::size_t n : kLengths) {
        const Weights<T> weights(n, shape, 8);
        std::vector<std::uint8_t> codes(n);
        lut_assign<T>({weights.flat().data(), 1, n}, {lut.data(), 1, k}, {codes.data(), 1, n});
        digest.add(codes);
        std::vector<T> dense(n);
        lut_to_dense<T>({codes.data(), 1, n}, {lut.data(), 1, k}, {dense.data(), 1, n});
        digest.add(dense);
        if (shape != Shape::kAllBits) {
          const Fidelity fidelity =
              compare_palette<T>(weights.rows(1), {codes.data(), 1, n}, {lut.data(), 1, k});
          digest.add(fidelity.noise);
          digest.add(fidelity.n_outside);
        }
      }
    }
  }
}

enum class Mode { kExact, kLeastSquares };

template <typename T, typename Code>
void digest_quantize(Digest& digest, Mode mode, std::size_t n_rows, std::size_t n_cols, Shape shape,
                     CodeRange range, bool fitted) {
  const Weights<T> weights(n_rows * n_cols, shape, 9);
  const MatrixView<const T> rows{weights.flat().data(), n_rows, n_cols};
  std::vector<T> scales(n_rows);
  std::vector<Code> offsets(fitted ? n_rows : 0), codes(n_rows * n_cols);
  if (mode == Mode::kExact) {
    quantize<T, Code>(rows, range, scales, offsets, {codes.data(), n_rows, n_cols});
  } else {
    quantize_mse<T, Code>(rows, {}, range, scales, offsets, {codes.data(), n_rows, n_cols});
  }
  digest.add(scales);
  digest.add(offsets);
  // A row that is not finite has no codes to rely on.
  for (std::size_t row = 0; row < n_rows; ++row) {
    if (!std::isnan(to_float(scales[row]))) {
      const auto begin = codes.begin() + static_cast<std::ptrdiff_t>(row * n_cols);
      digest.add(std::vector<Code>(begin, begin + static_cast<std::ptrdiff_t>(n_cols)));
    }
  }
  if (shape != Shape::kAllBits) {
    std::vector<T> decoded(n_rows * n_cols);
    dequantize<T, Code>({codes.data(), n_rows, n_cols}, scales, offsets,
                        {decoded.data(), n_rows, n_cols});
    digest.add(decoded);
    const Fidelity fidelity =
        compare_quantized<T, Code>(rows, {codes.data(), n_rows, n_cols}, scales, offsets);
    digest.add(fidelity.signal);
    digest.add(fidelity.noise);
    digest.add(fidelity.n_outside);
  }
}

template <typename T>
void digest_quantize(Digest& digest, Mode mode) {
  const auto add = [&](std::size_t n_rows, std::size_t n_cols, Shape shape) {
    for (const bool fitted : {false, true}) {
      digest_quantize<T, std::int8_t>(digest, mode, n_rows, n_cols, shape, {-127, 127}, fitted);
      digest_quantize<T, std::int8_t>(digest, mode, n_rows, n_cols, shape, {-8, 7}, fitted);
      digest_quantize<T, std::uint8_t>(digest, mode, n_rows, n_cols, shape, {0, 255}, fitted);
      digest_quantize<T, std::uint8_t>(digest, mode, n_rows, n_cols, shape, {0, 14}, fitted);
    }
  };
  for (const Shape shape : kAll) {
    for (const std::size_t n : {1U, 2U, 7U, 8U, 15U, 16U, 17U, 31U, 32U, 33U, 64U, 100U, 129U}) {
      add(5, n, shape);
    }
    add(2, 2049, shape);
    add(301, 32, shape);
  }
}

template <typename T>
void digest_sparsify(Digest& digest) {
  const auto add_mask = [&](const Weights<T>& weights, const std::vector<std::uint8_t>& bitmask) {
    digest.add(bitmask);
    const std::size_t n_kept = count_kept(bitmask);
    digest.add(n_kept);
    std::vector<T> nonzeros(n_kept), dense(weights.size());
    compact<T>(weights.flat(), bitmask, nonzeros);
    expand<T>(bitmask, nonzeros, dense);
    digest.add(nonzeros);
    digest.add(dense);
    const SparseFidelity fidelity = compare_sparse<T>(weights.flat(), bitmask, nonzeros);
    digest.add(fidelity.fidelity.signal);
    digest.add(fidelity.fidelity.noise);
    digest.add(fidelity.n_zeros);
    digest.add(fidelity.greatest_pruned);
    digest.add(fidelity.least_kept);
    const Fidelity dense_fidelity = compare<T>(weights.flat(), dense);
    digest.add(dense_fidelity.noise);
    digest.add(dense_fidelity.n_outside);
  };
  const auto add = [&](std::size_t n, Shape shape) {
    const Weights<T> weights(n, shape, 10);
    std::vector<std::uint8_t> bitmask((n + 7) / 8);
    for (const std::size_t n_zeros : {std::size_t{0}, n / 3, n / 2, n - n / 8, n}) {
      keep_largest<T>(weights.flat(), n_zeros, bitmask);
      add_mask(weights, bitmask);
    }
    for (const float threshold : {0.0F, 0.5F, 1e-6F, std::numeric_limits<float>::infinity()}) {
      keep_above<T>(weights.flat(), from_float<T>(threshold), bitmask);
      add_mask(weights, bitmask);
    }
  };
  for (const Shape shape : kAll) {
    for (const std::size_t n : kLengths) {
      add(n, shape);
    }
  }
  add(kPastTheGrain, Shape::kGrid);
}

template <typename T>
void digest_structured(Digest& digest) {
  for (const Shape shape : kAll) {
    for (const ChannelShape channels :
         {ChannelShape{1, 64, 1}, {3, 16, 5}, {2, 33, 9}, {7, 1, 1}, {1, 100, 31}, {5, 37, 1}}) {
      const std::size_t n = channels.n_outer * channels.n_channels * channels.n_inner;
      const Weights<T> weights(n, shape, 11);
      std::vector<std::uint8_t> bitmask((n + 7) / 8);
      for (const auto& [kept, m] :
           {std::pair{1, 2}, {2, 4}, {1, 4}, {4, 8}, {3, 5}, {7, 16}, {0, 3}, {20, 32}}) {
        keep_n_m<T>(weights.flat(), channels, static_cast<std::size_t>(kept),
                    static_cast<std::size_t>(m), bitmask);
        digest.add(bitmask);
      }
      for (const std::size_t block_size : {1U, 2U, 4U, 7U, 32U}) {
        for (const std::size_t n_zeros : {std::size_t{0}, n / 2, n}) {
          keep_blocks<T>(weights.flat(), channels, block_size, n_zeros, bitmask);
          digest.add(bitmask);
        }
      }
    }
  }
}

void digest_pack(Digest& digest) {
  for (const int bits : {1, 2, 3, 4, 6, 8}) {
    for (const std::size_t n : kLengths) {
      Random random(n);
      std::vector<std::uint8_t> codes(n), packed(packed_size(n, bits)), back(n);
      std::generate(codes.begin(), codes.end(),
                    [&] { return static_cast<std::uint8_t>(random.next()); });
      pack(codes, bits, packed);
      digest.add(packed);
      unpack<std::uint8_t>(packed, bits, back);
      digest.add(back);
      std::vector<std::int8_t> extended(n);
      unpack<std::int8_t>(packed, bits, extended);
      digest.add(extended);
    }
  }
}

// -------------------------------------------------------------------------------------------------

template <typename Kernel>
void put(Digests& digests, const std::string& name, const Kernel& kernel) {
  Digest digest;
  kernel(digest);
  digests[name] = digest.state();
}

template <typename T>
void put_all(Digests& digests, const std::string& type) {
  put(digests, "conversions " + type, [](Digest& digest) { digest_conversions<T>(digest); });
  put(digests, "kmeans1d " + type, [](Digest& digest) { digest_kmeans1d<T>(digest, false); });
  put(digests, "kmeans1d, weighted, " + type,
      [](Digest& digest) { digest_kmeans1d<T>(digest, true); });
  put(digests, "kmeans_vector " + type,
      [](Digest& digest) { digest_kmeans_vector<T>(digest, false); });
  put(digests, "kmeans_vector, weighted, " + type,
      [](Digest& digest) { digest_kmeans_vector<T>(digest, true); });
  put(digests, "lut_assign " + type, [](Digest& digest) { digest_lut_assign<T>(digest); });
  put(digests, "quantize " + type,
      [](Digest& digest) { digest_quantize<T>(digest, Mode::kExact); });
  put(digests, "quantize_mse " + type,
      [](Digest& digest) { digest_quantize<T>(digest, Mode::kLeastSquares); });
  put(digests, "sparsify " + type, [](Digest& digest) { digest_sparsify<T>(digest); });
  put(digests, "sparsify, structured, " + type,
      [](Digest& digest) { digest_structured<T>(digest); });
}

Digests all_digests() {
  Digests digests;
  put_all<Half>(digests, "float16");
  put_all<float>(digests, "float32");
  put(digests, "pack", digest_pack);
  return digests;
}

void write(const Digests& digests, const char* path) {
  std::ofstream file(path);
  file << std::hex << std::setfill('0');
  for (const auto& [name, digest] : digests) {
    file << "{\"" << name << "\", 0x" << std::setw(16) << digest << "},\n";
  }
}

TEST_CASE("every kernel writes the same bytes on every processor, compiler and thread count") {
  if (const char* path = std::getenv("MILPRESS_WRITE_GOLDEN"); path != nullptr) {
    write(all_digests(), path);
    return;
  }
  for (const std::size_t n_threads : {1U, 3U}) {
    CAPTURE(n_threads);
    const std::size_t before = set_thread_limit(n_threads);
    const Digests digests = all_digests();
    set_thread_limit(before);
    CHECK(digests.size() == kGolden.size());
    for (const auto& entry : digests) {
      CAPTURE(entry.first);
      REQUIRE(kGolden.contains(entry.first));
      CHECK(entry.second == kGolden.at(entry.first));
    }
  }
}

}  // namespace
}  // namespace milpress
