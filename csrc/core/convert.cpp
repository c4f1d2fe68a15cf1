#include "core/convert.h"

#include <algorithm>

#include "core/vectorize.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace milpress {
namespace {

#if defined(__x86_64__)

bool has_f16c() {
  // Every processor with AVX2 has F16C, which gcc 12 can't ask for by name.
  static const bool supported = __builtin_cpu_supports("avx2") != 0;
  return supported;
}

__attribute__((target("avx,f16c"))) std::size_t widen_f16c(const Half* weights, std::size_t n,
                                                           float* out) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
  }
  return i;
}

__attribute__((target("avx,f16c"))) std::size_t narrow_f16c(const float* values, std::size_t n,
                                                            Half* out) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
  }
  return i;
}

#else

constexpr bool has_f16c() { return false; }
std::size_t widen_f16c(const Half*, std::size_t, float*) { return 0; }
std::size_t narrow_f16c(const float*, std::size_t, Half*) { return 0; }

#endif

}  // namespace

MILPRESS_VECTORIZE
void widen_plain(const Half* weights, std::size_t n, float* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = to_float(weights[i]);
  }
}

MILPRESS_VECTORIZE
void narrow_plain(const float* values, std::size_t n, Half* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = to_half(values[i]);
  }
}

void widen(const Half* weights, std::size_t n, float* out) {
  const std::size_t done = has_f16c() ? widen_f16c(weights, n, out) : 0;
  widen_plain(weights + done, n - done, out + done);
}

void narrow(const float* values, std::size_t n, Half* out) {
  const std::size_t done = has_f16c() ? narrow_f16c(values, n, out) : 0;
  narrow_plain(values + done, n - done, out + done);
}

void widen(const float* weights, std::size_t n, float* out) { std::copy_n(weights, n, out); }

void narrow(const float* values, std::size_t n, float* out) { std::copy_n(values, n, out); }

}  // namespace milpress
