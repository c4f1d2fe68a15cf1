#include "metal/kernels.h"

#include <string>

#include "kernels/quantize.h"
#include "metal/launch.h"

namespace milpress::metal {
namespace {

// One thread for each of some simdgroups.
Grid grid_of_simdgroups(const std::string& kernel, std::size_t n_simdgroups) {
  return grid_for(kernel, n_simdgroups * kSimdWidth);
}

enum class Search { kNone, kLeastError };

template <typename T, typename Code>
void quantize_rows(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
                   std::span<Code> offsets, MatrixView<Code> codes, Search search) {
  const std::size_t n_pieces = (weights.n_cols + kRowPiece - 1) / kRowPiece;
  narrow(weights.size());
  narrow(weights.n_rows * n_pieces * kSimdWidth);
  const QuantizeParams params{narrow(weights.n_rows), narrow(weights.n_cols),
                              narrow(n_pieces),       range.code_min,
                              range.code_max,         offsets.empty() ? 0U : 1U};
  const Buffer in = Buffer::holding(std::span<const T>(weights.flat()));
  const Buffer extremes(2 * weights.n_rows * n_pieces * sizeof(std::int32_t));
  const Buffer steps(weights.n_rows * sizeof(QuantizeStep));
  const Buffer scale_of(scales.size_bytes());
  const Buffer offset_of(offsets.size_bytes());
  const Buffer out(codes.size());
  const std::string find_extremes = name_of<T>("row_extremes");
  const std::string fit = name_of<T>(search == Search::kNone ? "fit_rows" : "search_rows");
  const std::string encode = name_of<T>("encode_rows");

  Commands commands;
  commands.add(find_extremes, grid_of_simdgroups(find_extremes, weights.n_rows * n_pieces),
               {&in, &extremes}, params);
  const Grid rows = grid_of_simdgroups(fit, weights.n_rows);
  if (search == Search::kNone) {
    commands.add(fit, rows, {&extremes, &scale_of, &offset_of, &steps}, params);
  } else {
    commands.add(fit, rows, {&in, &extremes, &scale_of, &offset_of, &steps}, params);
  }
  commands.add(encode, grid_for(encode, weights.size()), {&in, &steps, &out}, params);
  commands.run();
  copy_out(scale_of, scales);
  copy_out(offset_of, offsets);
  copy_out(out, codes.flat());
}

}  // namespace

template <typename T, typename Code>
void quantize(MatrixView<const T> weights, CodeRange range, std::span<T> scales,
              std::span<Code> offsets, MatrixView<Code> codes) {
  check_quantize(weights, range, scales, offsets, codes);
  if (weights.size() == 0) {
    milpress::quantize(weights, range, scales, offsets, codes);
    return;
  }
  quantize_rows(weights, range, scales, offsets, codes, Search::kNone);
}

template <typename T, typename Code>
void quantize_mse(MatrixView<const T> weights, MatrixView<const float> importance, CodeRange range,
                  std::span<T> scales, std::span<Code> offsets, MatrixView<Code> codes) {
  if (importance.n_rows > 0) {
    throw DeviceError("the GPU has no kernel that weighs errors by importance");
  }
  check_quantize(weights, range, scales, offsets, codes);
  if (weights.size() == 0) {
    milpress::quantize_mse(weights, importance, range, scales, offsets, codes);
    return;
  }
  quantize_rows(weights, range, scales, offsets, codes, Search::kLeastError);
}

#define MILPRESS_INSTANTIATE(T, Code)                                                   \
  template void quantize(MatrixView<const T>, CodeRange, std::span<T>, std::span<Code>, \
                         MatrixView<Code>);                                             \
  template void quantize_mse(MatrixView<const T>, MatrixView<const float>, CodeRange,   \
                             std::span<T>, std::span<Code>, MatrixView<Code>);

MILPRESS_INSTANTIATE(Half, std::int8_t)
MILPRESS_INSTANTIATE(Half, std::uint8_t)
MILPRESS_INSTANTIATE(float, std::int8_t)
MILPRESS_INSTANTIATE(float, std::uint8_t)

}  // namespace milpress::metal
