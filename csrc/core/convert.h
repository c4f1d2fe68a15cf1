#pragma once

#include <cstddef>

#include "core/half.h"

namespace milpress {

/// Writes `n` weights to `out` as floats, exactly (a signalling NaN becomes quiet).
void widen(const Half* weights, std::size_t n, float* out);
void widen(const float* weights, std::size_t n, float* out);

/// Writes `n` values to `out`, each rounded to the nearest weight, ties to even.
void narrow(const float* values, std::size_t n, Half* out);
void narrow(const float* values, std::size_t n, float* out);

/// `widen` and `narrow` without the processor's own conversions: fallback and oracle.
void widen_plain(const Half* weights, std::size_t n, float* out);
void narrow_plain(const float* values, std::size_t n, Half* out);

}  // namespace milpress
