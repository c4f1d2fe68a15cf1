#include "metal/kernels.h"

#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "kernels/kmeans1d.h"
#include "metal/launch.h"

namespace milpress::metal {

template <>
void kmeans1d(MatrixView<const float>, MatrixView<const float>, MatrixView<float>) {
  throw DeviceError("the GPU counts the distinct values of float16 weights only, got float32");
}

template <>
void kmeans1d(MatrixView<const Half> weights, MatrixView<const float> importance,
              MatrixView<Half> luts) {
  constexpr std::size_t kBins = std::size_t{1} << 16;
  constexpr std::size_t kMaxHistograms = std::size_t{1} << 28;  // bytes of them at a time
  constexpr std::uint32_t kExact = 1U << 24;                    // counts up to here are floats
  const bool has_mask = importance.n_rows > 0;
  for (const float share : importance.flat()) {
    if (share != 0 && share != 1) {
      throw DeviceError("importance must be 0 or 1 for the GPU, got " + std::to_string(share));
    }
  }
  check_kmeans1d(weights, importance, luts);
  if (weights.size() == 0) {
    milpress::kmeans1d(weights, importance, luts);
    return;
  }
  const std::size_t at_once =
      std::min({weights.n_rows, kMaxHistograms / (kBins * sizeof(std::uint32_t)),
                std::max<std::size_t>(1, (kMaxElements - 1) / weights.n_cols)});
  const Buffer counts(at_once * kBins * sizeof(std::uint32_t));
  for (std::size_t first = 0; first < weights.n_rows; first += at_once) {
    const std::size_t n_rows = std::min(at_once, weights.n_rows - first);
    const std::size_t n_weights = n_rows * weights.n_cols;
    const Buffer in = Buffer::holding(std::span<const Half>(weights.row(first).data(), n_weights));
    const Buffer mask =
        Buffer::holding(has_mask ? std::span<const float>(importance.row(first).data(), n_weights)
                                 : std::span<const float>());
    counts.fill_with_zeros();
    Commands commands;
    const HistogramParams params{narrow(n_weights), narrow(weights.n_cols), has_mask ? 1U : 0U};
    commands.add("count_halves", grid_for("count_halves", n_weights), {&in, &mask, &counts},
                 params);
    commands.run();
    const auto all_counts = counts.as<const std::uint32_t>(n_rows * kBins);
    parallel_for(n_rows, 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t row = begin; row < end; ++row) {
        // A value stands for all that equal it, with their number as importance.
        std::vector<Half> values;
        std::vector<float> shares;
        for (std::size_t bits = 0; bits < kBins; ++bits) {
          for (std::uint32_t left = all_counts[row * kBins + bits]; left > 0;) {
            const std::uint32_t part = std::min(left, kExact);
            values.push_back(Half{static_cast<std::uint16_t>(bits)});
            shares.push_back(static_cast<float>(part));
            left -= part;
          }
        }
        const MatrixView<Half> lut{luts.row(first + row).data(), 1, luts.n_cols};
        if (values.empty()) {
          milpress::kmeans1d<Half>({weights.row(first + row).data(), 1, weights.n_cols}, {}, lut);
        } else {
          milpress::kmeans1d<Half>({values.data(), 1, values.size()},
                                   {shares.data(), 1, shares.size()}, lut);
        }
      }
    });
  }
}

}  // namespace milpress::metal
