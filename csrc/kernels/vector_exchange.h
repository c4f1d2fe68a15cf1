#pragma once

#include <cstddef>

#include "kernels/vector_lloyd.h"
#include "kernels/vectors.h"

namespace milpress {

/// Moves entries that do little to the side of those whose vectors add much to the error, up to
/// `n_most` of them, as Lloyd's iteration can't. Returns how many.
///
/// An entry does little if the error grows little without it; how little counts as so is `least`
/// times the error that the other one leaves. `lloyd` has just assigned `vectors` to `entries`.
std::size_t exchange(const Vectors& vectors, const Lloyd& lloyd, double least, std::size_t n_most,
                     Entries& entries);

}  // namespace milpress
