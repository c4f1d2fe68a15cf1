#include <metal_stdlib>

#include "float64.h"
#include "instantiate.h"
#include "numeric.h"
#include "params.h"

using namespace metal;
using namespace milpress;

/// Adds to counts[row][bits] how often the half of those bits occurs in the row.
///
/// Grid: (n_weights, 1, 1), one thread a weight; any threadgroup size.
/// Oracle: the distinct values of milpress::kmeans1d (csrc/kernels/kmeans1d.h); counts are exact.
[[kernel]] void count_halves(device const ushort* weights [[buffer(0)]],    // (n_rows, n_cols)
                             device const float* importance [[buffer(1)]],  // the same if has_mask
                             device atomic_uint* counts [[buffer(2)]],  // (n_rows, 2^16), from 0
                             constant HistogramParams& p [[buffer(3)]],
                             uint i [[thread_position_in_grid]]) {
  if (i >= p.n_weights || (p.has_mask != 0 && !(importance[i] > 0))) {
    return;
  }
  const uint bin = (i / p.n_cols << 16) + weights[i];
  atomic_fetch_add_explicit(&counts[bin], 1, memory_order_relaxed);
}

/// Writes the index of the first of the entries nearest to each vector, and its squared distance.
///
/// Grid: (n_vectors, 1, 1), one thread a vector; any threadgroup size.
/// Oracle: nearest_entries (csrc/kernels/vector_assign.cpp); codes and distances match it bit for
/// bit, where the device keeps subnormals.
[[kernel]] void lloyd_assign(device const float* vectors [[buffer(0)]],  // (dim, n_vectors)
                             device const float* entries [[buffer(1)]],  // (n_entries, dim)
                             device uchar* codes [[buffer(2)]],          // (n_vectors)
                             device float* distances [[buffer(3)]],      // (n_vectors)
                             constant LloydParams& p [[buffer(4)]],
                             uint i [[thread_position_in_grid]]) {
  if (i >= p.n_vectors) {
    return;
  }
  float least = INFINITY;
  uint nearest = 0;
  for (uint entry = 0; entry < p.n_entries; ++entry) {
    float distance = 0;
    for (uint d = 0; d < p.dim; ++d) {
      const float difference = vectors[d * p.n_vectors + i] - entries[entry * p.dim + d];
      const float square = difference * difference;
      distance = distance + square;
    }
    if (distance < least) {
      least = distance;
      nearest = entry;
    }
  }
  codes[i] = uchar(nearest);
  distances[i] = least;
}

constant constexpr uint kTile = 256;  // codes that a threadgroup looks at together

/// Adds up, one vector after the other, what each piece of the vectors contributes to the entries
/// that they are nearest to. A piece has n_sums of them, as bits of doubles: n_entries * dim sums
/// of importance times vector, n_entries sums of importance, and that of importance times distance.
///
/// Grid: (n_sums, n_pieces, 1), one thread a sum; any threadgroup size along x.
/// Oracle: the moments in csrc/kernels/vector_lloyd.cpp; sums match them bit for bit, where the
/// device keeps subnormals.
[[kernel]] void lloyd_moments(device const float* vectors [[buffer(0)]],     // (dim, n_vectors)
                              device const float* importance [[buffer(1)]],  // (n_vectors)
                              device const uchar* codes [[buffer(2)]],       // (n_vectors)
                              device const float* distances [[buffer(3)]],   // (n_vectors)
                              device ulong* sums [[buffer(4)]],              // (n_pieces, n_sums)
                              constant LloydParams& p [[buffer(5)]],
                              uint2 position [[thread_position_in_grid]],
                              uint2 thread_in_group [[thread_position_in_threadgroup]],
                              uint2 n_threads [[threads_per_threadgroup]]) {
  threadgroup uchar tile[kTile];
  const uint sum_index = position.x;
  const uint local_i = thread_in_group.x;
  const uint n_local = n_threads.x;
  const uint begin = position.y * p.n_per_piece;
  const uint end = min(begin + p.n_per_piece, p.n_vectors);
  const uint n_products = p.n_entries * p.dim;
  const bool is_product = sum_index < n_products;
  const bool is_error = sum_index >= n_products + p.n_entries;
  const uint entry = is_product ? sum_index / p.dim : sum_index - n_products;
  device const float* factors = is_product ? vectors + sum_index % p.dim * p.n_vectors : distances;
  Float64 sum{0};
  for (uint first = begin; first < end; first += kTile) {
    const uint n = min(kTile, end - first);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the tile is written again
    for (uint j = local_i; j < n; j += n_local) {
      tile[j] = codes[first + j];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint j = 0; j < n; ++j) {
      if (is_error || tile[j] == entry) {
        Float64 part = to_float64(importance[first + j]);
        if (is_product || is_error) {
          part = part * to_float64(factors[first + j]);
        }
        sum = sum + part;
      }
    }
  }
  if (sum_index < p.n_sums) {
    sums[position.y * p.n_sums + sum_index] = sum.bits;
  }
}
