#pragma once

#include <cstddef>
#include <initializer_list>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace milpress::metal {

/// What the GPU can't do, or did wrong. The message says why, with the compiler's log if there is
/// one; the CPU can take over.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A GPU that the runtime found, or why it found none.
struct Device {
  std::string name;    // empty if there is none
  std::string reason;  // why it can't be used; empty if it can
};

/// The system's GPU. Nothing is compiled yet.
Device device();

/// Memory that host and GPU share.
class Buffer {
 public:
  /// With contents that are not defined.
  explicit Buffer(std::size_t n_bytes);

  /// A copy; the memory itself where its address and size are those of whole pages. It must then
  /// live, and stay as it is, as long as the buffer.
  static Buffer holding(std::span<const std::byte> bytes);

  template <typename T>
  static Buffer holding(std::span<const T> values) {
    return holding(std::as_bytes(values));
  }

  std::size_t n_bytes() const { return n_bytes_; }

  /// The contents as `n` elements, no more than fit.
  template <typename T>
  std::span<T> as(std::size_t n) const {
    return {static_cast<T*>(contents_), n};
  }

  void fill_with_zeros() const;

 private:
  friend class Commands;

  Buffer() = default;

  std::shared_ptr<void> handle_;
  void* contents_ = nullptr;
  std::size_t n_bytes_ = 0;
};

/// Threadgroups along each axis, and threads in each.
struct Grid {
  std::size_t n_groups = 1;
  std::size_t group_size = 1;
  std::size_t n_groups_y = 1;
};

/// Threads of a group that suits a kernel: `wanted`, or as many as it can have, in whole simdgroups
/// of 32.
std::size_t group_size(std::string_view kernel, std::size_t wanted);

/// Enough groups of such a size for `n_threads`.
Grid grid_for(std::string_view kernel, std::size_t n_threads, std::size_t wanted = 256);

/// Kernels for the GPU, run one after the other.
class Commands {
 public:
  Commands();
  ~Commands();
  Commands(const Commands&) = delete;
  Commands& operator=(const Commands&) = delete;

  /// Adds a kernel with its buffers in order, behind which come its parameters. A buffer must live
  /// until the commands have run.
  template <typename Params>
  void add(std::string_view kernel, Grid grid, std::initializer_list<const Buffer*> buffers,
           const Params& params) {
    add(kernel, grid, buffers, std::as_bytes(std::span(&params, 1)));
  }

  /// Runs them to the end and returns the seconds that the GPU took.
  double run();

 private:
  struct State;

  void add(std::string_view kernel, Grid grid, std::initializer_list<const Buffer*> buffers,
           std::span<const std::byte> params);

  std::unique_ptr<State> state_;
};

}  // namespace milpress::metal
