#include <metal_stdlib>

#include "instantiate.h"
#include "numeric.h"
#include "params.h"

using namespace metal;
using namespace milpress;

// Compared as integers, which no mode of the processor flushes. Zeros are equal, NaN is above
// nothing.
inline int weight_key(float weight) {
  const uint magnitude = magnitude_bits(weight);
  if (magnitude > 0x7f800000u) {
    return INT_MIN;
  }
  return as_type<uint>(weight) == magnitude ? int(magnitude) : -int(magnitude);
}

inline int weight_key(half weight) {
  const uint magnitude = magnitude_bits(weight);
  if (magnitude > 0x7c00u) {
    return INT_MIN;
  }
  return as_type<ushort>(weight) == magnitude ? int(magnitude) : -int(magnitude);
}

/// codes[i] = number of the row's thresholds below the key of weights[i]: the index of the nearest
/// entry of its table.
///
/// Grid: (n_rows * n_cols, 1, 1), one thread a weight; any threadgroup size.
/// Oracle: milpress::lut_assign (csrc/kernels/lut_assign.h); codes match it bit for bit.
template <typename T>
[[kernel]] void lut_assign(device const T* weights [[buffer(0)]],       // (n_rows, n_cols)
                           device const int* thresholds [[buffer(1)]],  // (n_rows, table_size)
                           device uchar* codes [[buffer(2)]],           // (n_rows, n_cols)
                           constant LutAssignParams& p [[buffer(3)]],
                           uint i [[thread_position_in_grid]]) {
  if (i >= p.n_rows * p.n_cols) {
    return;
  }
  device const int* table = thresholds + i / p.n_cols * p.table_size;
  const int key = weight_key(weights[i]);
  uint count = 0;
  for (uint step = (p.table_size + 1) / 2; step > 0; step /= 2) {
    count += table[count + step - 1] < key ? step : 0;
  }
  codes[i] = uchar(count);
}

MILPRESS_INSTANTIATE(lut_assign, float)
MILPRESS_INSTANTIATE(lut_assign, half)
