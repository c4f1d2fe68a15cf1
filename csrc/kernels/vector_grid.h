#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/vectors.h"

namespace milpress {

constexpr std::size_t kMaxGridDim = 2;  // cells of more elements hold hardly a vector each

/// Vectors in an order in which those near one another stand together: by the cells of a grid,
/// along a curve that goes from each to one beside it.
struct Grid {
  Vectors sorted;
  std::vector<std::uint32_t> places;  // of each of them before
  Vectors merged;                     // one for each cell: its vectors' mean, their shares together
  std::vector<std::uint32_t> ends;    // how many of `sorted` belong to a cell and those before it
};

/// A grid of `2^n_bits` cells along each element, the smaller the denser the vectors, as the cells
/// of k-means are. `vectors` are finite, of up to `kMaxGridDim` elements, with shares above zero.
Grid merge(const Vectors& vectors, std::size_t n_bits);

}  // namespace milpress
