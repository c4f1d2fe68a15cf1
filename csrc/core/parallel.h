#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <vector>

namespace milpress {

/// Calls `body(begin, end)` for consecutive pieces of `[0, n)`, each of `grain` elements (the last
/// may be shorter), on up to `thread_limit()` threads, and returns when all are done.
///
/// Pieces depend on `n` and `grain` only, so a body that writes each piece's own results gives the
/// same bytes on any number of cores. The first exception thrown by a body is rethrown here. A call
/// from within a body runs on the calling thread.
void parallel_for(std::size_t n, std::size_t grain,
                  const std::function<void(std::size_t, std::size_t)>& body);

/// What `body(begin, end)` returns for each of those pieces, in their order; `grain` is not 0.
template <typename Body>
auto parallel_map(std::size_t n, std::size_t grain, const Body& body) {
  std::vector<decltype(body(n, n))> results((n + grain - 1) / grain);
  parallel_for(n, grain, [&](std::size_t begin, std::size_t end) {
    results[begin / grain] = body(begin, end);
  });
  return results;
}

/// Calls `body(row, begin, end)` for pieces of the columns of a matrix, up to `piece` of them: many
/// short rows or a part of a long one are a thread's share.
template <typename Body>
void parallel_for_rows(std::size_t n_rows, std::size_t n_cols, std::size_t piece,
                       const Body& body) {
  const std::size_t per_row = (n_cols + piece - 1) / piece;
  const std::size_t grain = piece / std::max<std::size_t>(1, n_cols);
  parallel_for(n_rows * per_row, grain, [&](std::size_t first, std::size_t last) {
    for (std::size_t i = first; i < last; ++i) {
      const std::size_t begin = i % per_row * piece;
      body(i / per_row, begin, std::min(begin + piece, n_cols));
    }
  });
}

/// Threads that `parallel_for` may use when called from this thread: what `set_thread_limit` said,
/// else the environment variable MILPRESS_NUM_THREADS, else the number of cores.
std::size_t thread_limit();

/// Sets this thread's limit; 0 restores the default. Returns what was set before, 0 if nothing was.
std::size_t set_thread_limit(std::size_t n_threads);

}  // namespace milpress
