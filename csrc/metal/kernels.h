#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/matrix.h"
#include "kernels/quantize.h"
#include "kernels/sparsify.h"
#include "metal/runtime.h"

/// The kernels of `csrc/kernels` on the GPU: same signatures, same results to the last bit. Each
/// throws what its twin does, and `DeviceError` where the GPU can't do it.
namespace milpress::metal {

/// `Half` only; importance must be 0 or 1. Counts the distinct values; the CPU finds the optimum.
template <typename T>
void kmeans1d(MatrixView<const T> weights, MatrixView<const float> importance, MatrixView<T> luts);

template <typename T>
void lut_assign(MatrixView<const T> weights, MatrixView<const T> luts,
                MatrixView<std::uint8_t> codes);

/// One step of Lloyd's iteration, as `milpress::kmeans_vector` takes it: writes to `codes` the
/// first of the entries nearest to each vector, to `distances` its squared distance, and to the
/// rows of `sums`, one for each `n_per_piece` vectors, what they add up to: importance times vector
/// for each entry and element, importance for each entry, importance times distance.
///
/// `vectors` is `(dim, n_vectors)`, `entries` `(n_entries, dim)`, of which there are 1 to 256.
void lloyd_step(MatrixView<const float> vectors, std::span<const float> importance,
                MatrixView<const float> entries, std::size_t n_per_piece,
                std::span<std::uint8_t> codes, std::span<float> distances, MatrixView<double> sums);

template <typename T, typename Code>
void quantize(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
              std::span<Code> offsets, MatrixView<Code> codes);

/// Without importance only.
template <typename T, typename Code>
void quantize_mse(MatrixView<const T> weights, MatrixView<const float> importance, CodeRange range,
                  std::span<T> scales, std::span<Code> offsets, MatrixView<Code> codes);

template <typename T>
void keep_largest(std::span<const T> weights, std::size_t n_zeros, std::span<std::uint8_t> bitmask);

template <typename T>
void keep_above(std::span<const T> weights, T threshold, std::span<std::uint8_t> bitmask);

template <typename T>
void keep_n_m(std::span<const T> weights, ChannelShape shape, std::size_t n, std::size_t m,
              std::span<std::uint8_t> bitmask);

template <typename T>
void compact(std::span<const T> weights, std::span<const std::uint8_t> bitmask,
             std::span<T> nonzeros);

void pack(std::span<const std::uint8_t> codes, int bits, std::span<std::uint8_t> packed);

/// Lets the GPU compute known answers. Returns which kernel failed and how; empty if none did.
std::string self_test();

}  // namespace milpress::metal
