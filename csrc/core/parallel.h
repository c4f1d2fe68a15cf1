#pragma once

#include <cstddef>
#include <functional>

namespace milpress {

/// Calls `body(begin, end)` for consecutive pieces of `[0, n)`, each of `grain` elements (the last
/// may be shorter), on up to `thread_limit()` threads, and returns when all are done.
///
/// Pieces depend on `n` and `grain` only, so a body that writes each piece's own results gives the
/// same bytes on any number of cores. The first exception thrown by a body is rethrown here. A call
/// from within a body runs on the calling thread.
void parallel_for(std::size_t n, std::size_t grain,
                  const std::function<void(std::size_t, std::size_t)>& body);

/// Threads that `parallel_for` may use when called from this thread: what `set_thread_limit` said,
/// else the environment variable MILPRESS_NUM_THREADS, else the number of cores.
std::size_t thread_limit();

/// Sets this thread's limit; 0 restores the default. Returns what was set before, 0 if nothing was.
std::size_t set_thread_limit(std::size_t n_threads);

}  // namespace milpress
