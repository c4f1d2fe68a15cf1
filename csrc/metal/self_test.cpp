#include "metal/kernels.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/kmeans1d.h"
#include "kernels/lut_assign.h"
#include "kernels/pack.h"
#include "metal/launch.h"

namespace milpress::metal {
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
      const MatrixView<std::int8_t> out{codes.data(), kRows, kCols};
      const MatrixView<std::int8_t> out_here{codes_here.data(), kRows, kCols};
      if (searches) {
        milpress::quantize_mse<T, std::int8_t>(in, {}, {-8, 7}, scales, offsets, out);
        metal::quantize_mse<T, std::int8_t>(in, {}, {-8, 7}, scales_here, offsets_here, out_here);
      } else {
        milpress::quantize<T, std::int8_t>(in, {-8, 7}, scales, offsets, out);
        metal::quantize<T, std::int8_t>(in, {-8, 7}, scales_here, offsets_here, out_here);
      }
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

}  // namespace milpress::metal
