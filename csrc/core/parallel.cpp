#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>

namespace milpress {
namespace {

constexpr std::size_t kMaxThreads = 256;

thread_local std::size_t limit_of_this_thread = 0;
thread_local bool inside_a_body = false;

std::size_t default_limit() {
  static const std::size_t limit = [] {
    const char* text = std::getenv("MILPRESS_NUM_THREADS");
    const long asked = text == nullptr ? 0 : std::strtol(text, nullptr, 10);
    const std::size_t n = asked > 0 ? static_cast<std::size_t>(asked)
                                    : std::max<std::size_t>(1, std::thread::hardware_concurrency());
    return std::min(n, kMaxThreads);
  }();
  return limit;
}

// One call of parallel_for. Helpers hold it by shared_ptr: one that wakes late finds no piece left.
struct Job {
  const std::function<void(std::size_t, std::size_t)>* body;
  std::size_t n;
  std::size_t grain;
  std::size_t n_pieces;
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  std::size_t n_done = 0;
  std::exception_ptr error;

  void work() {
    inside_a_body = true;
    for (std::size_t piece = next++; piece < n_pieces; piece = next++) {
      std::exception_ptr caught;
      try {
        const std::size_t begin = piece * grain;
        (*body)(begin, begin + std::min(grain, n - begin));
      } catch (...) {
        caught = std::current_exception();
      }
      const std::lock_guard lock(mutex);
      if (error == nullptr) {
        error = std::move(caught);
      }
      if (++n_done == n_pieces) {
        finished.notify_all();
      }
    }
    inside_a_body = false;
  }
};

class Pool {
 public:
  // Adds `n_helpers` requests for `job`, starting threads that don't exist yet.
  void help(const std::shared_ptr<Job>& job, std::size_t n_helpers) {
    const std::lock_guard lock(mutex_);
    while (threads_.size() < n_helpers) {
      threads_.emplace_back([this] { serve(); });
    }
    requests_.insert(requests_.end(), n_helpers, job);
    wake_.notify_all();
  }

 private:
  [[noreturn]] void serve() {
    for (;;) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return !requests_.empty(); });
      const std::shared_ptr<Job> job = requests_.front();
      requests_.pop_front();
      lock.unlock();
      job->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> requests_;
  std::vector<std::thread> threads_;
};

// Never destroyed: its threads wait until the process ends. A forked child has no copy of the
// threads, so it gets a pool of its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  static pid_t owner = 0;
  const std::lock_guard lock(mutex);
  if (current == nullptr || owner != getpid()) {
    current = new Pool;
    owner = getpid();
  }
  return *current;
}

}  // namespace

std::size_t thread_limit() {
  return limit_of_this_thread > 0 ? limit_of_this_thread : default_limit();
}

std::size_t set_thread_limit(std::size_t n_threads) {
  const std::size_t before = limit_of_this_thread;
  limit_of_this_thread = std::min(n_threads, kMaxThreads);
  return before;
}

void parallel_for(std::size_t n, std::size_t grain,
                  const std::function<void(std::size_t, std::size_t)>& body) {
  if (n == 0) {
    return;
  }
  grain = std::max<std::size_t>(1, grain);
  const std::size_t n_pieces = (n - 1) / grain + 1;
  const std::size_t n_threads = inside_a_body ? 1 : std::min(thread_limit(), n_pieces);
  if (n_threads == 1) {
    for (std::size_t begin = 0; begin < n; begin += std::min(grain, n - begin)) {
      body(begin, begin + std::min(grain, n - begin));
    }
    return;
  }
  const auto job = std::make_shared<Job>();
  job->body = &body;
  job->n = n;
  job->grain = grain;
  job->n_pieces = n_pieces;
  pool().help(job, n_threads - 1);
  job->work();
  std::unique_lock lock(job->mutex);
  job->finished.wait(lock, [&] { return job->n_done == job->n_pieces; });
  // Taken out of the job, which a thread that wakes late may be the last to hold: the exception
  // ends on the thread that catches it.
  if (std::exception_ptr error = std::exchange(job->error, nullptr); error != nullptr) {
    std::rethrow_exception(std::move(error));
  }
}

}  // namespace milpress
