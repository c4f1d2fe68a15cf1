#include "core/convert.h"

#include <algorithm>
#include <cmath>

#include "core/vectorize.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace milpress {
namespace {

#if defined(__x86_64__)

// Every processor with AVX2 has F16C, which gcc 12 can't ask for by name.
bool has_conversions() { return __builtin_cpu_supports("avx2") != 0; }

__attribute__((target("avx,f16c"))) void widen_native(const Half* weights, std::size_t n,
                                                      float* out) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
  }
  for (; i < n; ++i) {
    out[i] = _cvtsh_ss(weights[i].bits);
  }
}

__attribute__((target("avx,f16c"))) void narrow_native(const float* values, std::size_t n,
                                                       Half* out) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
  }
  for (; i < n; ++i) {
    out[i].bits = _cvtss_sh(values[i], _MM_FROUND_TO_NEAREST_INT);
  }
}

#elif defined(__aarch64__)

constexpr bool has_conversions() { return true; }

void widen_native(const Half* weights, std::size_t n, float* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = to_float(weights[i]);
  }
}

void narrow_native(const float* values, std::size_t n, Half* out) {
  std::size_t i = 0;
  // gcc 12 doesn't vectorise the plain loop.
  for (; i + 4 <= n; i += 4) {
    const float16x4_t halves = vcvt_f16_f32(vld1q_f32(values + i));
    vst1_u16(&out[i].bits, vreinterpret_u16_f16(halves));
  }
  for (; i < n; ++i) {
    out[i] = to_half(values[i]);
  }
}

#else

constexpr bool has_conversions() { return false; }
constexpr auto widen_native = widen_plain;
constexpr auto narrow_native = narrow_plain;

#endif

}  // namespace

MILPRESS_VECTORIZE
void widen_plain(const Half* weights, std::size_t n, float* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = to_float_plain(weights[i]);
  }
}

MILPRESS_VECTORIZE
void narrow_plain(const float* values, std::size_t n, Half* out) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = to_half_plain(values[i]);
  }
}

void widen(const Half* weights, std::size_t n, float* out) {
  has_conversions() ? widen_native(weights, n, out) : widen_plain(weights, n, out);
}

void narrow(const float* values, std::size_t n, Half* out) {
  has_conversions() ? narrow_native(values, n, out) : narrow_plain(values, n, out);
}

void widen(const float* weights, std::size_t n, float* out) { std::copy_n(weights, n, out); }

void narrow(const float* values, std::size_t n, float* out) { std::copy_n(values, n, out); }

float factor_to_one(float magnitude) {
  constexpr int kMaxExponent = 126;
  return magnitude == 0
             ? 1.0F
             : std::ldexp(1.0F, std::clamp(-std::ilogb(magnitude), -kMaxExponent, kMaxExponent));
}

}  // namespace milpress
