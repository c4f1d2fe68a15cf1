#include "metal/kernels.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "core/keys.h"
#include "kernels/lut_assign.h"
#include "metal/launch.h"

namespace milpress::metal {

template <typename T>
void lut_assign(MatrixView<const T> weights, MatrixView<const T> luts,
                MatrixView<std::uint8_t> codes) {
  check_lut_assign(weights, luts, codes);
  if (weights.size() == 0) {
    milpress::lut_assign(weights, luts, codes);
    return;
  }
  narrow(weights.size());
  // A whole binary tree of thresholds; those that fill it up are above everything.
  std::size_t table_size = 0;
  while (table_size + 1 < luts.n_cols) {
    table_size = 2 * table_size + 1;
  }
  std::vector<std::int32_t> thresholds(luts.n_rows * table_size,
                                       std::numeric_limits<std::int32_t>::max());
  for (std::size_t row = 0; row < luts.n_rows; ++row) {
    const std::vector<float> limits = midpoint_table(luts.row(row));  // checks the table
    std::transform(limits.begin(), limits.end(),
                   thresholds.begin() + static_cast<std::ptrdiff_t>(row * table_size),
                   key_up_to<T>);
  }
  const std::string kernel = name_of<T>("lut_assign");
  const Buffer in = Buffer::holding(std::span<const T>(weights.flat()));
  const Buffer table = Buffer::holding(std::span<const std::int32_t>(thresholds));
  const Buffer out(codes.size());
  const LutAssignParams params{narrow(weights.n_rows), narrow(weights.n_cols), narrow(table_size)};
  Commands commands;
  commands.add(kernel, grid_for(kernel, weights.size()), {&in, &table, &out}, params);
  commands.run();
  copy_out(out, codes.flat());
}

template void lut_assign(MatrixView<const Half>, MatrixView<const Half>, MatrixView<std::uint8_t>);
template void lut_assign(MatrixView<const float>, MatrixView<const float>,
                         MatrixView<std::uint8_t>);

}  // namespace milpress::metal
