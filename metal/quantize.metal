#include <metal_stdlib>

#include "float64.h"
#include "instantiate.h"
#include "numeric.h"
#include "params.h"

using namespace metal;
using namespace milpress;

/// Writes the order keys of the least and the greatest weight of each piece of each row.
///
/// Grid: (n_rows * n_pieces * 32, 1, 1), one simdgroup a piece of kRowPiece weights.
/// Oracle: extremes_of (csrc/kernels/quantize.cpp), piece by piece; keys are exact, NaN included.
template <typename T>
[[kernel]] void row_extremes(device const T* weights [[buffer(0)]],  // (n_rows, n_cols)
                             device int* extremes [[buffer(1)]],     // (n_rows, n_pieces, 2)
                             constant QuantizeParams& p [[buffer(2)]],
                             uint i [[thread_position_in_grid]],
                             uint lane [[thread_index_in_simdgroup]]) {
  const uint piece = i / kSimdWidth;
  if (piece >= p.n_rows * p.n_pieces) {
    return;
  }
  const uint begin = piece % p.n_pieces * kRowPiece;
  const uint end = min(begin + kRowPiece, p.n_cols);
  device const T* row = weights + piece / p.n_pieces * p.n_cols;
  int low = INT_MAX;
  int high = INT_MIN;
  for (uint j = begin + lane; j < end; j += kSimdWidth) {
    const int key = order_key(float(row[j]));
    low = min(low, key);
    high = max(high, key);
  }
  low = simd_min(low);
  high = simd_max(high);
  if (lane == 0) {
    extremes[2 * piece] = low;
    extremes[2 * piece + 1] = high;
  }
}

MILPRESS_INSTANTIATE(row_extremes, float)
MILPRESS_INSTANTIATE(row_extremes, half)

struct Extremes {
  float low;
  float high;
};

// The same for a whole row, from those of its pieces.
inline Extremes extremes_of_row(device const int* pieces, uint n_pieces, uint lane) {
  int low = INT_MAX;
  int high = INT_MIN;
  for (uint piece = lane; piece < n_pieces; piece += kSimdWidth) {
    low = min(low, pieces[2 * piece]);
    high = max(high, pieces[2 * piece + 1]);
  }
  return Extremes{value_at(simd_min(low)), value_at(simd_max(high))};
}

// The precision of a half without its range; a float as it is.
template <typename T>
inline float round_quotient(float value) {
  if (sizeof(T) == 2) {
    const uint bits = as_type<uint>(value);
    return as_type<float>((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
  }
  return value;
}

template <typename T>
inline float code_of(float weight, QuantizeStep step, constant QuantizeParams& p) {
  const float code_min = float(p.code_min);
  const float code_max = float(p.code_max);
  // NaN, which is above nothing, takes the lower limit.
  float quotient = weight / step.scale;
  quotient = quotient > -1024.0f ? quotient : -1024.0f;
  quotient = quotient < 1024.0f ? quotient : 1024.0f;
  quotient = step.rounds_quotient != 0 ? round_quotient<T>(quotient) : quotient;
  float code = rint(quotient) + float(step.offset);
  code = code > code_min ? code : code_min;
  return code < code_max ? code : code_max;
}

template <typename T>
inline float restored(float weight, QuantizeStep step, constant QuantizeParams& p) {
  return round_to<T>(step.scale * (code_of<T>(weight, step, p) - float(step.offset)));
}

// ---------------------------------------------------------------------------------------------
// The range that holds a row, as step_for in csrc/kernels/quantize.cpp finds it

template <typename T>
inline bool restores(float weight, QuantizeStep step, constant QuantizeParams& p) {
  const float decoded = restored<T>(weight, step, p);
  const float places = Limits<T>::kHalfPlace * abs(weight) + Limits<T>::kHalfPlace * abs(decoded);
  const float bound = 0.5f * step.scale + places + Limits<T>::kSubnormal;
  return is_finite(decoded) && abs(weight - decoded) <= bound;
}

template <typename T>
inline bool is_sound(QuantizeStep step, Extremes extremes, constant QuantizeParams& p) {
  return step.scale > 0 && is_finite(step.scale) && restores<T>(extremes.low, step, p) &&
         restores<T>(extremes.high, step, p);
}

inline float neighbour(float value, int distance) { return value_at(order_key(value) + distance); }

// The T so many places above `value`, which is positive.
template <typename T>
inline float next_above(float value, int distance) {
  if (sizeof(T) == 2) {
    return float(as_type<half>(ushort(as_type<ushort>(half(value)) + distance)));
  }
  return neighbour(value, distance);
}

inline int middle(constant QuantizeParams& p) { return (p.code_min + p.code_max) / 2; }

inline int clamp_code(float code, constant QuantizeParams& p) {
  return int(clamp(code, float(p.code_min), float(p.code_max)));
}

template <typename T>
inline QuantizeStep compatible_step(Extremes extremes, constant QuantizeParams& p) {
  const float width = round_to<T>(extremes.high - extremes.low);
  QuantizeStep step{round_to<T>(width / float(p.code_max - p.code_min)), middle(p), 1};
  if (p.fits_offset != 0) {
    const float numerator = round_to<T>(round_to<T>(float(p.code_min) * extremes.high) -
                                        round_to<T>(float(p.code_max) * extremes.low));
    const float offset = rint(round_to<T>(numerator / width));
    step.offset = is_finite(offset) ? clamp_code(offset, p) : 0;
  }
  return step;
}

template <typename T>
inline QuantizeStep step_for(Extremes extremes, constant QuantizeParams& p) {
  if (!is_finite(extremes.low) || !is_finite(extremes.high)) {
    return QuantizeStep{as_type<float>(0x7fc00000u), middle(p), 1};
  }
  if (extremes.low == extremes.high) {
    return QuantizeStep{1.0f, p.fits_offset != 0 ? clamp_code(0, p) : middle(p), 1};
  }
  const QuantizeStep step = compatible_step<T>(extremes, p);
  const bool is_plain =
      p.fits_offset == 0 && step.scale >= Limits<T>::kSmallestNormal && is_finite(step.scale);
  if (is_plain || is_sound<T>(step, extremes, p)) {
    return step;
  }
  const Float64 width = to_float64(extremes.high) - to_float64(extremes.low);
  const float nearest = round_to<T>(to_float(width / to_float64(p.code_max - p.code_min)));
  const float magnitude = max(abs(extremes.low), abs(extremes.high));
  const float n_outermost = max(1.0f, rint(magnitude / nearest));
  const float wider = round_to<T>(magnitude / (n_outermost - 0.5f));
  const float scales[6] = {nearest, next_above<T>(nearest, -1), next_above<T>(nearest, 1),
                           wider,   next_above<T>(wider, 1),    next_above<T>(wider, 2)};
  QuantizeStep last{};
  for (uint i = 0; i < 6; ++i) {
    const float zero = rint(float(p.code_min) - extremes.low / scales[i]);
    const bool is_fitted = p.fits_offset != 0 && is_finite(zero);
    last = QuantizeStep{scales[i], is_fitted ? clamp_code(zero, p) : middle(p), 0};
    if (is_sound<T>(last, extremes, p)) {
      break;
    }
  }
  return last;
}

inline Extremes widened(Extremes extremes, constant QuantizeParams& p) {
  if (p.fits_offset != 0) {
    return Extremes{min(0.0f, extremes.low), max(0.0f, extremes.high)};
  }
  const float limit = max(abs(extremes.low), abs(extremes.high));
  return Extremes{-limit, limit};
}

template <typename T>
inline QuantizeStep plain_step(Extremes extremes, constant QuantizeParams& p) {
  if (is_finite(extremes.low) && is_finite(extremes.high)) {
    extremes = widened(extremes, p);
  }
  return step_for<T>(extremes, p);
}

/// Writes scale and offset of each row, and the step that its codes are made with.
///
/// Grid: (n_rows * 32, 1, 1), one simdgroup a row.
/// Oracle: milpress::quantize (csrc/kernels/quantize.h); scales and offsets match it bit for bit,
/// where the device keeps subnormals.
template <typename T>
[[kernel]] void fit_rows(device const int* extremes [[buffer(0)]],  // (n_rows, n_pieces, 2)
                         device T* scales [[buffer(1)]],            // (n_rows)
                         device uchar* offsets [[buffer(2)]],       // (n_rows) if fits_offset
                         device QuantizeStep* steps [[buffer(3)]],  // (n_rows)
                         constant QuantizeParams& p [[buffer(4)]],
                         uint i [[thread_position_in_grid]],
                         uint lane [[thread_index_in_simdgroup]]) {
  const uint row = i / kSimdWidth;
  if (row >= p.n_rows) {
    return;
  }
  const Extremes found = extremes_of_row(extremes + 2 * row * p.n_pieces, p.n_pieces, lane);
  if (lane == 0) {
    const QuantizeStep step = plain_step<T>(found, p);
    steps[row] = step;
    scales[row] = T(step.scale);
    if (p.fits_offset != 0) {
      offsets[row] = uchar(step.offset);
    }
  }
}

MILPRESS_INSTANTIATE(fit_rows, float)
MILPRESS_INSTANTIATE(fit_rows, half)

// ---------------------------------------------------------------------------------------------
// The range of least squared error, as RangeSearch in csrc/kernels/quantize.cpp finds it: each lane
// tries a range, then all lanes share out the weights

constant constexpr uint kChunk = 2048;    // weights that are added up in float
constant constexpr uint kGrain = 131072;  // weights whose chunks are added up apart from others
constant constexpr uint kShares = 16;     // ranges tried together

template <typename T>
struct Row {
  device const T* weights;
  uint n;
  Extremes extremes;
  float limit;   // greatest magnitude
  float factor;  // by which weights come near 1, so that squares of floats neither overflow nor
                 // vanish
};

inline float factor_for(float limit) {
  const uint bits = as_type<uint>(limit);
  const int exponent = bits >= 0x800000u ? int(bits >> 23) - 127 : 31 - int(clz(bits)) - 149;
  return as_type<float>(uint(clamp(-exponent, -126, 126) + 127) << 23);
}

template <typename T>
inline bool is_usable(QuantizeStep step, Row<T> row, constant QuantizeParams& p) {
  if (step.scale == 0 || !is_finite(step.scale)) {
    return false;
  }
  return row.limit <= Limits<T>::kMax / 2 || (is_finite(restored<T>(row.extremes.low, step, p)) &&
                                              is_finite(restored<T>(row.extremes.high, step, p)));
}

template <typename T>
inline QuantizeStep step_of(Float64 scale, int offset) {
  return QuantizeStep{round_to<T>(to_float(scale)), offset, 0};
}

// The code without its offset.
inline float steps_from_zero(float weight, float inverse, float least, float greatest) {
  float quotient = weight * inverse;
  quotient = quotient > least ? quotient : least;
  quotient = quotient < greatest ? quotient : greatest;
  return rint(quotient);
}

// The squared error of the row with this lane's step.
template <typename T>
inline Float64 error_of(Row<T> row, QuantizeStep step, constant QuantizeParams& p) {
  const float scale = step.scale * row.factor;
  const float inverse = 1.0f / scale;
  const float least = float(p.code_min - step.offset);
  const float greatest = float(p.code_max - step.offset);
  Float64 total{0};
  for (uint piece = 0; piece < row.n; piece += kGrain) {
    const uint piece_end = min(piece + kGrain, row.n);
    Float64 sum{0};
    for (uint chunk = piece; chunk < piece_end; chunk += kChunk) {
      const uint chunk_end = min(chunk + kChunk, piece_end);
      float part = 0;
      for (uint i = chunk; i < chunk_end; ++i) {
        const float weight = float(row.weights[i]) * row.factor;
        const float code = steps_from_zero(weight, inverse, least, greatest);
        const float error = weight - round_quotient<T>(scale * code);
        const float square = error * error;
        part = part + square;
      }
      sum = sum + to_float64(part);
    }
    total = total + sum;
  }
  return total;
}

// Sums of the lanes in pairs, pairs of pairs ...: in lane 0.
inline float sum_lanes(float value) {
  for (ushort distance = kSimdWidth / 2; distance > 0; distance /= 2) {
    value = value + simd_shuffle_down(value, distance);
  }
  return value;
}

inline Float64 sum_lanes(Float64 value) {
  for (ushort distance = kSimdWidth / 2; distance > 0; distance /= 2) {
    value = value + shuffle_down(value, distance);
  }
  return value;
}

// The scale of least error for the codes of `step`, 0 if they are all the code of zero.
template <typename T>
inline float least_squares(Row<T> row, QuantizeStep step, constant QuantizeParams& p, uint lane) {
  const float inverse = 1.0f / (step.scale * row.factor);
  const float least = float(p.code_min - step.offset);
  const float greatest = float(p.code_max - step.offset);
  Float64 products{0};
  Float64 squares{0};
  for (uint piece = 0; piece < row.n; piece += kGrain) {
    const uint piece_end = min(piece + kGrain, row.n);
    Float64 product_sum{0};
    Float64 square_sum{0};
    for (uint chunk = piece; chunk < piece_end; chunk += kChunk) {
      const uint chunk_end = min(chunk + kChunk, piece_end);
      float product_part = 0;
      float square_part = 0;
      for (uint i = chunk + lane; i < chunk_end; i += kSimdWidth) {
        const float weight = float(row.weights[i]) * row.factor;
        const float code = steps_from_zero(weight, inverse, least, greatest);
        const float product = weight * code;
        const float square = code * code;
        product_part = product_part + product;
        square_part = square_part + square;
      }
      product_sum = product_sum + to_float64(sum_lanes(product_part));
      square_sum = square_sum + to_float64(sum_lanes(square_part));
    }
    products = products + product_sum;
    squares = squares + square_sum;
  }
  products = broadcast(products, 0);
  squares = broadcast(squares, 0);
  if (is_zero(squares)) {
    return 0;
  }
  return step_of<T>(products / squares / to_float64(row.factor), 0).scale;
}

// The squared error of the row as the codes that are written restore it.
template <typename T>
inline Float64 restored_error(Row<T> row, QuantizeStep step, constant QuantizeParams& p,
                              uint lane) {
  const float offset = float(step.offset);
  Float64 total{0};
  for (uint piece = 0; piece < row.n; piece += kGrain) {
    const uint piece_end = min(piece + kGrain, row.n);
    Float64 sum{0};
    for (uint chunk = piece; chunk < piece_end; chunk += kChunk) {
      const uint chunk_end = min(chunk + kChunk, piece_end);
      Float64 part{0};
      for (uint i = chunk + lane; i < chunk_end; i += kSimdWidth) {
        const float weight = float(row.weights[i]);
        const float code = code_of<T>(weight, step, p);
        const float decoded = round_quotient<T>(step.scale * (code - offset));
        const Float64 error = to_float64(weight) - to_float64(decoded);
        part = part + error * error;
      }
      sum = sum + sum_lanes(part);
    }
    total = total + sum;
  }
  return broadcast(total, 0);
}

// The first of the lanes that count whose error is least; kSimdWidth if none counts.
inline uint least_lane(Float64 error, bool counts) {
  uint best = kSimdWidth;
  Float64 least{0};
  for (uint lane = 0; lane < kSimdWidth; ++lane) {
    const Float64 other = broadcast(error, ushort(lane));
    const bool is_in = simd_broadcast(counts ? 1u : 0u, ushort(lane)) != 0;
    if (is_in && (best == kSimdWidth || other < least)) {
      best = lane;
      least = other;
    }
  }
  return best;
}

inline QuantizeStep broadcast(QuantizeStep step, uint lane) {
  return QuantizeStep{simd_broadcast(step.scale, ushort(lane)),
                      simd_broadcast(step.offset, ushort(lane)),
                      simd_broadcast(step.rounds_quotient, ushort(lane))};
}

constant constexpr ulong kLeastShare = 0x3fd999999999999a;  // 0.4 of the row's range

template <typename T>
inline QuantizeStep best_of_signs(Row<T> row, QuantizeStep plain, constant QuantizeParams& p,
                                  uint lane) {
  const int offset = middle(p);
  const int down = offset - p.code_min;
  const int up = p.code_max - offset;
  const Float64 reach = to_float64(max(down, up));
  const Float64 limit = to_float64(row.limit);
  const Float64 widest = to_float64(row.limit / float(max(1, min(down, up))));
  const Float64 shrinkage =
      (widest - Float64{kLeastShare} * limit / reach) / to_float64(int(kShares) - 1);
  const bool is_positive = lane < kShares;
  const Float64 scale = widest - shrinkage * to_float64(int(lane % kShares));
  const Float64 sign = to_float64(is_positive ? 1 : -1);
  const QuantizeStep step = step_of<T>(sign * scale, offset);
  const bool counts = (is_positive || (down != up && p.code_min < 0)) && is_usable<T>(step, row, p);
  const uint best = least_lane(error_of<T>(row, step, p), counts);
  if (best == kSimdWidth) {
    return plain;
  }
  return broadcast(step, best);
}

// `low` and `high` are shares of what the row extends to either side of zero.
template <typename T>
inline QuantizeStep step_of_ends(Row<T> row, Float64 low, Float64 high,
                                 constant QuantizeParams& p) {
  low = low * to_float64(row.extremes.low < 0 ? row.extremes.low : 0.0f);
  high = high * to_float64(row.extremes.high > 0 ? row.extremes.high : 0.0f);
  QuantizeStep step = step_of<T>((high - low) / to_float64(p.code_max - p.code_min), 0);
  if (step.scale != 0 && is_finite(step.scale)) {
    const Float64 zero = to_float64(p.code_min) - low / to_float64(step.scale);
    step.offset = clamp_code(round_even(zero), p);
  }
  return step;
}

template <typename T>
inline QuantizeStep best_of_ends(Row<T> row, QuantizeStep plain, constant QuantizeParams& p,
                                 uint lane) {
  const Float64 one = to_float64(1);
  const Float64 shrinkage =
      (one - Float64{kLeastShare}) * to_float64(int(lane % kShares)) / to_float64(int(kShares) - 1);
  const Float64 share = one - shrinkage;
  const QuantizeStep joint = step_of_ends<T>(row, share, share, p);
  const bool joint_counts = lane < kShares && is_usable<T>(joint, row, p);
  const uint best = least_lane(error_of<T>(row, joint, p), joint_counts);
  if (best == kSimdWidth) {
    return plain;
  }
  // 0.6, 0.7, 0.8, 0.9, 1.1, 1.2: of one end, then of the other
  constexpr uint kRatios = 6;
  const ulong ratios[kRatios] = {0x3fe3333333333333, 0x3fe6666666666666, 0x3fe999999999999a,
                                 0x3feccccccccccccd, 0x3ff199999999999a, 0x3ff3333333333333};
  const Float64 chosen = broadcast(share, ushort(best));
  const uint other = lane == 0 ? 0 : min((lane - 1) / 2, kRatios - 1);
  Float64 shrunk = Float64{ratios[other]} * chosen;
  shrunk = shrunk < one ? shrunk : one;
  const bool is_low = lane % 2 == 1;
  const QuantizeStep apart =
      step_of_ends<T>(row, is_low ? shrunk : chosen, is_low ? chosen : shrunk, p);
  const QuantizeStep chosen_step = broadcast(joint, best);
  const QuantizeStep step = lane == 0 ? chosen_step : apart;
  const bool counts = lane == 0 || (lane <= 2 * kRatios && is_usable<T>(step, row, p));
  return broadcast(step, least_lane(error_of<T>(row, step, p), counts));
}

// The step of least error that was found, `plain` if none is better.
template <typename T>
inline QuantizeStep best_step(Row<T> row, QuantizeStep plain, constant QuantizeParams& p,
                              uint lane) {
  constexpr uint kTurns = 2;
  QuantizeStep best = plain;
  Float64 least = restored_error<T>(row, plain, p, lane);
  QuantizeStep step = p.fits_offset != 0 ? best_of_ends<T>(row, plain, p, lane)
                                         : best_of_signs<T>(row, plain, p, lane);
  for (uint turn = 0;; ++turn) {
    if (is_usable<T>(step, row, p)) {
      const Float64 error = restored_error<T>(row, step, p, lane);
      if (error < least) {
        best = step;
        least = error;
      }
    }
    if (turn == kTurns || step.scale == 0) {
      return best;
    }
    step.scale = least_squares<T>(row, step, p, lane);
  }
}

/// Writes what fit_rows does, but for the range of each row that has the least squared error.
///
/// Grid: (n_rows * 32, 1, 1), one simdgroup a row.
/// Oracle: milpress::quantize_mse (csrc/kernels/quantize.h); scales and offsets match it bit for
/// bit, where the device keeps subnormals.
template <typename T>
[[kernel]] void search_rows(device const T* weights [[buffer(0)]],     // (n_rows, n_cols)
                            device const int* extremes [[buffer(1)]],  // (n_rows, n_pieces, 2)
                            device T* scales [[buffer(2)]],            // (n_rows)
                            device uchar* offsets [[buffer(3)]],       // (n_rows) if fits_offset
                            device QuantizeStep* steps [[buffer(4)]],  // (n_rows)
                            constant QuantizeParams& p [[buffer(5)]],
                            uint i [[thread_position_in_grid]],
                            uint lane [[thread_index_in_simdgroup]]) {
  const uint index = i / kSimdWidth;
  if (index >= p.n_rows) {
    return;
  }
  const Extremes found = extremes_of_row(extremes + 2 * index * p.n_pieces, p.n_pieces, lane);
  QuantizeStep step = plain_step<T>(found, p);
  if (is_finite(found.low) && is_finite(found.high) && (found.low != 0 || found.high != 0)) {
    const float limit = max(abs(found.low), abs(found.high));
    const Row<T> row{weights + index * p.n_cols, p.n_cols, found, limit, factor_for(limit)};
    step = best_step<T>(row, step, p, lane);
  }
  if (lane == 0) {
    steps[index] = step;
    scales[index] = T(step.scale);
    if (p.fits_offset != 0) {
      offsets[index] = uchar(step.offset);
    }
  }
}

MILPRESS_INSTANTIATE(search_rows, float)
MILPRESS_INSTANTIATE(search_rows, half)

/// Writes each weight divided by the scale of its row, rounded half to even, plus the row's offset.
///
/// Grid: (n_rows * n_cols, 1, 1), one thread a weight; any threadgroup size.
/// Oracle: milpress::quantize and quantize_mse (csrc/kernels/quantize.h); codes match them bit for
/// bit, where the device keeps subnormals.
template <typename T>
[[kernel]] void encode_rows(device const T* weights [[buffer(0)]],           // (n_rows, n_cols)
                            device const QuantizeStep* steps [[buffer(1)]],  // (n_rows)
                            device uchar* codes [[buffer(2)]],               // (n_rows, n_cols)
                            constant QuantizeParams& p [[buffer(3)]],
                            uint i [[thread_position_in_grid]]) {
  if (i >= p.n_rows * p.n_cols) {
    return;
  }
  codes[i] = uchar(int(code_of<T>(float(weights[i]), steps[i / p.n_cols], p)));
}

MILPRESS_INSTANTIATE(encode_rows, float)
MILPRESS_INSTANTIATE(encode_rows, half)
