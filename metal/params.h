#pragma once

// What a shader is told besides its buffers; included by host and shaders alike. Fields are 32 bits
// wide, so that both lay them out without gaps.

#ifndef __METAL_VERSION__
#include <stdint.h>
#endif

namespace milpress {

struct LutAssignParams {
  uint32_t n_rows;
  uint32_t n_cols;
  uint32_t table_size;  // thresholds a row, 2^b - 1
};
static_assert(sizeof(LutAssignParams) == 12, "host and shader must agree");

/// Weights of a row whose extremes one simdgroup finds.
enum : uint32_t { kRowPiece = 4096 };

struct QuantizeParams {
  uint32_t n_rows;
  uint32_t n_cols;
  uint32_t n_pieces;  // of kRowPiece weights, a row
  int32_t code_min;
  int32_t code_max;
  uint32_t fits_offset;  // 1 if the range needn't be symmetric
};
static_assert(sizeof(QuantizeParams) == 24, "host and shader must agree");

/// What a row of codes is made with.
struct QuantizeStep {
  float scale;
  int32_t offset;
  uint32_t rounds_quotient;  // 1 if to the weight's own precision
};
static_assert(sizeof(QuantizeStep) == 12, "host and shader must agree");

struct PackParams {
  uint32_t n_codes;
  uint32_t n_bits;
};
static_assert(sizeof(PackParams) == 8, "host and shader must agree");

struct DigitParams {
  uint32_t n_weights;
  uint32_t shift;   // of the digit that is counted
  uint32_t prefix;  // the bits above it
};
static_assert(sizeof(DigitParams) == 12, "host and shader must agree");

struct MaskParams {
  uint32_t n_weights;
  uint32_t magnitude;  // its bits; what is below goes
  uint32_t n_ties;     // and so many, from the first, of what equals it
};
static_assert(sizeof(MaskParams) == 12, "host and shader must agree");

struct RunParams {
  uint32_t n_weights;
  uint32_t n_channels;
  uint32_t n_inner;
  uint32_t n;
  uint32_t m;
};
static_assert(sizeof(RunParams) == 20, "host and shader must agree");

struct HistogramParams {
  uint32_t n_weights;
  uint32_t n_cols;
  uint32_t has_mask;  // 1 if only the weights of positive importance count
};
static_assert(sizeof(HistogramParams) == 12, "host and shader must agree");

struct LloydParams {
  uint32_t n_vectors;  // with those that fill the last lanes
  uint32_t dim;
  uint32_t n_entries;
  uint32_t n_per_piece;  // vectors that are added up one after the other
  uint32_t n_sums;       // a piece: see lloyd_moments
};
static_assert(sizeof(LloydParams) == 20, "host and shader must agree");

}  // namespace milpress
