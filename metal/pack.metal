#include <metal_stdlib>

#include "numeric.h"
#include "params.h"

using namespace metal;
using namespace milpress;

/// Writes the low bits of every eight codes to `n_bits` bytes, the first code in the lowest bits.
///
/// Grid: (ceil(n_codes / 8), 1, 1), one thread for eight codes; any threadgroup size.
/// Oracle: milpress::pack (csrc/kernels/pack.h); bytes match it.
[[kernel]] void pack(device const uchar* codes [[buffer(0)]],  // (n_codes)
                     device uchar* packed [[buffer(1)]],       // (ceil(n_codes * n_bits / 8))
                     constant PackParams& p [[buffer(2)]], uint eight [[thread_position_in_grid]]) {
  const uint first = 8 * eight;
  if (first >= p.n_codes) {
    return;
  }
  const uint n = min(8u, p.n_codes - first);
  ulong word = 0;
  for (uint j = 0; j < n; ++j) {
    word |= ulong(codes[first + j] & ((1u << p.n_bits) - 1)) << (p.n_bits * j);
  }
  const uint n_bytes = (n * p.n_bits + 7) / 8;
  for (uint j = 0; j < n_bytes; ++j) {
    packed[eight * p.n_bits + j] = uchar(word >> (8 * j));
  }
}
