// The host as it ships, called by several threads at once, under the thread sanitizer. The fake and
// the emulator below it are built without, so that nothing they do passes for an order of the
// host's.

#include <doctest/doctest.h>

#include <cstdint>
#include <functional>
#include <latch>
#include <thread>
#include <vector>

#include "kernels/pack.h"
#include "kernels/sparsify.h"
#include "metal/kernels.h"
#include "metal/runtime.h"

namespace milpress {
namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes packed_by(void (*kernel)(std::span<const std::uint8_t>, int, std::span<std::uint8_t>)) {
  const Bytes codes(100, 5);
  Bytes packed(packed_size(codes.size(), 3));
  kernel(codes, 3, packed);
  return packed;
}

template <typename T>
Bytes masked_by(void (*kernel)(std::span<const T>, T, std::span<std::uint8_t>)) {
  std::vector<T> weights(100, from_float<T>(1));
  weights[7] = from_float<T>(0.25F);
  Bytes bitmask((weights.size() + 7) / 8);
  kernel(weights, from_float<T>(0.5F), bitmask);
  return bitmask;
}

// Each thread runs its commands once: what it does a second time might be ordered by the lock that
// it took the first time.
TEST_CASE("threads share the queue and the kernels, each of which is made once") {
  REQUIRE(metal::device().reason.empty());
  struct Call {
    std::function<Bytes()> on_cpu;
    std::function<Bytes()> on_gpu;
  };
  const Call packs{[] { return packed_by(&pack); }, [] { return packed_by(&metal::pack); }};
  const Call masks_halves{[] { return masked_by<Half>(&keep_above<Half>); },
                          [] { return masked_by<Half>(&metal::keep_above<Half>); }};
  const Call masks_floats{[] { return masked_by<float>(&keep_above<float>); },
                          [] { return masked_by<float>(&metal::keep_above<float>); }};
  const std::vector<Call> calls{packs, masks_halves, masks_floats, packs, masks_halves};
  std::vector<Bytes> results(calls.size());
  std::latch all_are_there(static_cast<std::ptrdiff_t>(calls.size()));
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < calls.size(); ++i) {
    threads.emplace_back([&, i] {
      all_are_there.arrive_and_wait();
      results[i] = calls[i].on_gpu();
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (std::size_t i = 0; i < calls.size(); ++i) {
    CHECK(results[i] == calls[i].on_cpu());
  }
}

}  // namespace
}  // namespace milpress
