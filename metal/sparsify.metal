#include <metal_stdlib>

#include "instantiate.h"
#include "numeric.h"
#include "params.h"

using namespace metal;
using namespace milpress;

constant constexpr uint kDigitBits = 11;  // counters of 32 bits that fit a quarter of a threadgroup
constant constexpr uint kDigits = 1u << kDigitBits;
constant constexpr uint kMaxSimdgroups = 32;  // of a threadgroup

/// Adds to counts[d] how many weights have the digit d at `shift` of their magnitude's bits, among
/// those whose higher bits are `prefix`.
///
/// Grid: any number of whole threadgroups of any size; threads take weights in turn.
/// Oracle: find_cut (csrc/kernels/sparsify.cpp), of which this is one digit; counts are exact.
template <typename T>
[[kernel]] void count_digits(device const T* weights [[buffer(0)]],     // (n_weights)
                             device atomic_uint* counts [[buffer(1)]],  // (2^kDigitBits), from 0
                             constant DigitParams& p [[buffer(2)]],
                             uint first [[thread_position_in_grid]],
                             uint n_threads [[threads_per_grid]],
                             uint local_i [[thread_position_in_threadgroup]],
                             uint n_local [[threads_per_threadgroup]]) {
  threadgroup atomic_uint bins[kDigits];
  for (uint digit = local_i; digit < kDigits; digit += n_local) {
    atomic_store_explicit(&bins[digit], 0, memory_order_relaxed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = first; i < p.n_weights; i += n_threads) {
    const uint bits = magnitude_bits(weights[i]) >> p.shift;
    if (bits >> kDigitBits == p.prefix) {
      atomic_fetch_add_explicit(&bins[bits & (kDigits - 1)], 1, memory_order_relaxed);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint digit = local_i; digit < kDigits; digit += n_local) {
    const uint count = atomic_load_explicit(&bins[digit], memory_order_relaxed);
    if (count > 0) {
      atomic_fetch_add_explicit(&counts[digit], count, memory_order_relaxed);
    }
  }
}

MILPRESS_INSTANTIATE(count_digits, float)
MILPRESS_INSTANTIATE(count_digits, half)

/// totals[tile] = number of weights of the tile whose magnitude is the one that is cut at.
///
/// Grid: (n_weights, 1, 1), one thread a weight, a threadgroup a tile; whole simdgroups.
/// Oracle: keep_largest (csrc/kernels/sparsify.h), of which this is a part; totals are exact.
template <typename T>
[[kernel]] void count_ties(device const T* weights [[buffer(0)]],  // (n_weights)
                           device uint* totals [[buffer(1)]],      // (n_tiles)
                           constant MaskParams& p [[buffer(2)]], uint i [[thread_position_in_grid]],
                           uint tile [[threadgroup_position_in_grid]],
                           uint local_i [[thread_position_in_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]],
                           uint n_simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup uint parts[kMaxSimdgroups];
  const bool is_tie = i < p.n_weights && magnitude_bits(weights[i]) == p.magnitude;
  const uint count = popcount(ballot(is_tie));
  if (lane == 0) {
    parts[simdgroup] = count;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (local_i == 0) {
    uint total = 0;
    for (uint part = 0; part < n_simdgroups; ++part) {
      total += parts[part];
    }
    totals[tile] = total;
  }
}

MILPRESS_INSTANTIATE(count_ties, float)
MILPRESS_INSTANTIATE(count_ties, half)

/// Replaces each total by the sum of those before it.
///
/// Grid: one threadgroup of whole simdgroups.
/// Oracle: std::exclusive_scan; sums are exact.
[[kernel]] void scan_totals(device uint* totals [[buffer(0)]],  // (n_totals)
                            constant uint& n_totals [[buffer(1)]],
                            uint local_i [[thread_position_in_threadgroup]],
                            uint n_local [[threads_per_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]],
                            uint simdgroup [[simdgroup_index_in_threadgroup]],
                            uint n_simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup uint parts[kMaxSimdgroups];
  uint before = 0;
  for (uint begin = 0; begin < n_totals; begin += n_local) {
    const uint i = begin + local_i;
    const uint total = i < n_totals ? totals[i] : 0;
    const uint sum = before + sum_before(total, parts, lane, simdgroup);
    if (i < n_totals) {
      totals[i] = sum;
    }
    for (uint part = 0; part < n_simdgroups; ++part) {
      before += parts[part];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before `parts` is written again
  }
}

/// Sets the bits of the weights above a magnitude, and of those equal to it from the n_ties-th on;
/// never that of a zero.
///
/// Grid: (n_weights, 1, 1), one thread a weight, tiles as those of count_ties; whole simdgroups.
/// Oracle: milpress::keep_largest and keep_above (csrc/kernels/sparsify.h); the bitmask matches
/// them bit for bit.
template <typename T>
[[kernel]] void mask_above(device const T* weights [[buffer(0)]],         // (n_weights)
                           device const uint* ties_before [[buffer(1)]],  // (n_tiles)
                           device uint* bitmask [[buffer(2)]],            // (ceil(n_weights / 32))
                           constant MaskParams& p [[buffer(3)]], uint i [[thread_position_in_grid]],
                           uint tile [[threadgroup_position_in_grid]],
                           uint lane [[thread_index_in_simdgroup]],
                           uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint parts[kMaxSimdgroups];
  const uint bits = i < p.n_weights ? magnitude_bits(weights[i]) : 0;
  const bool is_tie = i < p.n_weights && bits == p.magnitude;
  const uint rank = ties_before[tile] + sum_before(is_tie ? 1 : 0, parts, lane, simdgroup);
  const uint word = ballot(bits != 0 && (bits > p.magnitude || (is_tie && rank >= p.n_ties)));
  if (lane == 0 && i < p.n_weights) {
    bitmask[i / kSimdWidth] = word;
  }
}

MILPRESS_INSTANTIATE(mask_above, float)
MILPRESS_INSTANTIATE(mask_above, half)

/// Sets the bits of the weights that stay when, of every m consecutive channels, the n of least
/// magnitude go, the earlier of equals first; never that of a zero. A last run of fewer channels
/// counts as filled up with zeros.
///
/// Grid: (n_weights, 1, 1), one thread a weight; whole simdgroups.
/// Oracle: milpress::keep_n_m (csrc/kernels/sparsify.h); the bitmask matches it bit for bit.
template <typename T>
[[kernel]] void keep_n_m(device const T* weights [[buffer(0)]],  // (n_outer, n_channels, n_inner)
                         device uint* bitmask [[buffer(1)]],     // (ceil(n_weights / 32))
                         constant RunParams& p [[buffer(2)]], uint i [[thread_position_in_grid]],
                         uint lane [[thread_index_in_simdgroup]]) {
  bool stays = false;
  if (i < p.n_weights) {
    const uint channel = i / p.n_inner % p.n_channels;
    const uint place = channel % p.m;
    const uint length = min(p.m, p.n_channels - (channel - place));
    const uint n_dropped = p.n - min(p.n, p.m - length);
    device const T* run = weights + (i - place * p.n_inner);
    const uint mine = magnitude_bits(weights[i]);
    uint rank = 0;
    for (uint j = 0; j < length; ++j) {
      const uint other = magnitude_bits(run[j * p.n_inner]);
      rank += other < mine || (other == mine && j < place) ? 1 : 0;
    }
    stays = rank >= n_dropped && mine != 0;
  }
  const uint word = ballot(stays);
  if (lane == 0 && i < p.n_weights) {
    bitmask[i / kSimdWidth] = word;
  }
}

MILPRESS_INSTANTIATE(keep_n_m, float)
MILPRESS_INSTANTIATE(keep_n_m, half)

/// totals[tile] = number of bits that are set for the weights of the tile.
///
/// Grid: (n_weights, 1, 1), one thread a weight, a threadgroup a tile; whole simdgroups.
/// Oracle: milpress::count_kept (csrc/kernels/sparsify.h), tile by tile; totals are exact.
[[kernel]] void count_bits(device const uint* bitmask [[buffer(0)]],  // (ceil(n_weights / 32))
                           device uint* totals [[buffer(1)]],         // (n_tiles)
                           constant uint& n_weights [[buffer(2)]],
                           uint i [[thread_position_in_grid]],
                           uint tile [[threadgroup_position_in_grid]],
                           uint local_i [[thread_position_in_threadgroup]],
                           uint n_local [[threads_per_threadgroup]]) {
  if (local_i > 0) {
    return;
  }
  const uint end = min(i + n_local, n_weights);
  uint total = 0;
  for (uint bit = i; bit < end; bit += kSimdWidth) {
    total += popcount(bitmask[bit / kSimdWidth]);
  }
  totals[tile] = total;
}

/// Writes the weights whose bit is set to `nonzeros`, in order.
///
/// Grid: (n_weights, 1, 1), one thread a weight, tiles as those of count_bits; whole simdgroups.
/// Oracle: milpress::compact (csrc/kernels/sparsify.h); values match it bit for bit.
template <typename T>
[[kernel]] void compact(device const T* weights [[buffer(0)]],         // (n_weights)
                        device const uint* bitmask [[buffer(1)]],      // (ceil(n_weights / 32))
                        device const uint* kept_before [[buffer(2)]],  // (n_tiles)
                        device T* nonzeros [[buffer(3)]],              // (bits set)
                        constant uint& n_weights [[buffer(4)]], uint i [[thread_position_in_grid]],
                        uint tile [[threadgroup_position_in_grid]],
                        uint lane [[thread_index_in_simdgroup]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup uint parts[kMaxSimdgroups];
  const uint bit = i < n_weights ? bitmask[i / kSimdWidth] >> lane & 1 : 0;
  const uint place = kept_before[tile] + sum_before(bit, parts, lane, simdgroup);
  if (bit != 0) {
    nonzeros[place] = weights[i];
  }
}

MILPRESS_INSTANTIATE(compact, float)
MILPRESS_INSTANTIATE(compact, half)
