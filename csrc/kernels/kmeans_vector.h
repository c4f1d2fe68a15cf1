#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "core/matrix.h"

namespace milpress {

/// How vectors are clustered.
struct VectorClustering {
  std::size_t dim = 2;     // values of a vector
  std::uint64_t seed = 0;  // of the draws that choose the first entries
};

/// Writes to each row of `luts` a table of vectors of small squared error for the row of `weights`,
/// and to `codes` the entry nearest to each vector.
///
/// A row of `weights` has `n_vectors` vectors of `dim` values; one of `luts` up to 256 entries, in
/// lexicographic order. Entries start at vectors drawn by greedy k-means++ (Arthur and
/// Vassilvitskii 2007) and move by Lloyd's iteration until the error falls by less than a
/// ten-thousandth. A vector of `importance` 0 has no influence on the table; without rows, all
/// count the same. As many distinct vectors as entries or fewer are all kept exactly; the table
/// then repeats the last. Of equally near entries the first is taken. Values must be finite. The
/// result depends on the seed, not on the core count.
template <typename T>
void kmeans_vector(MatrixView<const T> weights, const VectorClustering& settings,
                   MatrixView<const float> importance, MatrixView<T> luts,
                   MatrixView<std::uint8_t> codes);

}  // namespace milpress
