// The host as it ships, through Apple's metal-cpp onto the fake runtime: what isn't a kernel's
// result. (The tests of the kernels run here too.)

#include <doctest/doctest.h>

#include <cstdlib>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "metal/kernels.h"
#include "metal/runtime.h"

namespace milpress {
namespace {

TEST_CASE("pages are taken as they are, everything else is copied") {
  constexpr std::size_t kPage = 16'384;
  auto* const pages = static_cast<std::byte*>(std::aligned_alloc(kPage, 2 * kPage));
  const metal::Buffer view = metal::Buffer::holding(std::span<const std::byte>(pages, 2 * kPage));
  CHECK(view.as<std::byte>(1).data() == pages);
  for (const auto& [offset, size] : std::vector<std::pair<std::size_t, std::size_t>>{
           {0, kPage + 1}, {1, kPage}, {64, 100}, {0, 0}}) {
    const metal::Buffer copy =
        metal::Buffer::holding(std::span<const std::byte>(pages + offset, size));
    CHECK(copy.as<std::byte>(1).data() != pages + offset);
    CHECK(copy.n_bytes() == size);
  }
  std::free(pages);
}

TEST_CASE("commands that never run are let go") {
  const metal::Commands commands;
  metal::Commands others;
  CHECK_THROWS_WITH_AS(others.add("no_such_kernel", {}, {}, 1), "there is no kernel no_such_kernel",
                       metal::DeviceError);
}

TEST_CASE("weights too large for 32 bits are refused") {
  const std::uint8_t byte = 0;
  const std::size_t n = std::size_t{1} << 32;
  std::uint8_t packed = 0;
  CHECK_THROWS_AS(metal::pack({&byte, n}, 8, {&packed, n}), metal::DeviceError);
}

// Run once with each fault, see CMakeLists.txt.
TEST_CASE("what fails is said" * doctest::skip()) {
  const std::map<std::string, std::string> reasons{
      {"no_device", "no GPU"},
      {"old_gpu", "Apple7 (M1) or later, got fake M1"},
      {"no_compile", "unknown type name 'hafl'"},
      {"no_function", "there is no kernel"},
      {"no_pipeline", "too many registers"},
      {"wide_simd", "32 lanes, got 64"},
      {"small_groups", "32 threads in a threadgroup, got 16"},
      {"no_buffer", "no buffer of"},
      {"no_queue", "no command queue"},
      {"no_commands", "no command encoder"},
      {"gpu_error", "did not finish: the GPU was reset"},
  };
  const char* const fault = std::getenv("FAKE_METAL_FAULT");
  REQUIRE(fault != nullptr);
  const std::string reason = metal::self_test();
  CAPTURE(reason);
  CHECK(reason.find(reasons.at(fault)) != std::string::npos);
  const bool is_known_at_once =
      std::string(fault) == "no_device" || std::string(fault) == "old_gpu";
  CHECK(metal::device().reason.empty() != is_known_at_once);
}

}  // namespace
}  // namespace milpress
