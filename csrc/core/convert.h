#pragma once

#include <cstddef>

#include "core/half.h"

namespace milpress {

/// Writes `to_float` of `n` weights to `out`, with the processor's own conversions where it has
/// them, bit for bit the same where not.
void widen(const Half* weights, std::size_t n, float* out);
void widen(const float* weights, std::size_t n, float* out);

/// Writes `to_half` of `n` values to `out`, likewise.
void narrow(const float* values, std::size_t n, Half* out);
void narrow(const float* values, std::size_t n, float* out);

/// `widen` and `narrow` without the processor's own conversions: fallback and oracle.
void widen_plain(const Half* weights, std::size_t n, float* out);
void narrow_plain(const float* values, std::size_t n, Half* out);

/// The power of two by which a magnitude comes near 1, so that no square overflows and no product
/// vanishes; 1 for zero.
float factor_to_one(float magnitude);

}  // namespace milpress
