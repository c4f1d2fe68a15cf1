#pragma once

#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "core/matrix.h"

namespace milpress {

/// How k-means over vectors is run.
struct VectorSettings {
  std::size_t dim = 2;     // consecutive weights that make a vector
  std::uint64_t seed = 0;  // of the random start; every row starts from the same
};

/// Writes to each row of `luts` up to 256 vectors, `dim` weights each, so that
/// `sum_i importance_i * |vector_i - nearest entry|^2` over the same row of `weights` is small, and
/// to `codes` the index of the entry nearest to each vector.
///
/// Greedy k-means++, Lloyd iterations and exchanges of entries on a part of the vectors or on the
/// cells of a grid; then Lloyd iterations on all until one gains less than 1.5e-4 of the error, the
/// last of them with the table as it is stored: a local minimum, repeatable from the seed. Entries
/// ascend lexicographically. A row of no more distinct vectors than entries gets exactly those, the
/// last one repeated; an empty row gets zeros. Codes are the first of the nearest entries as
/// rounded to `T`, by squared distances added up in float, element by element, the row multiplied
/// by a power of two that brings it near 1.
///
/// `importance` has one element a vector, finite and not negative, or no rows at all for equal
/// importance; a row whose importance is all zero counts as equal. A vector of importance zero gets
/// a code but has no influence on the table; so does one that is not finite, whose code is 0. The
/// result does not depend on the core count.
template <typename T>
void kmeans_vector(MatrixView<const T> weights, MatrixView<const float> importance,
                   VectorSettings settings, MatrixView<T> luts, MatrixView<std::uint8_t> codes);

}  // namespace milpress
