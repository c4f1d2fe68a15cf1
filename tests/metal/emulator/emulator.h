#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

/// Runs kernels as a GPU would: the threads of a threadgroup take turns in an order that a seed
/// chooses, changing places wherever they meet. Threadgroup memory holds garbage at first. Threads
/// that don't meet at the same place, or have ended, are an error.
namespace emulator {

constexpr unsigned kSimdWidth = 32;
constexpr std::uint64_t kGarbage = 0xfbfbfbfbfbfbfbfb;

/// What goes wrong when a kernel is called or runs; the message says where.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Size {
  unsigned x = 1;
  unsigned y = 1;
};

/// Bytes that are bound to a buffer's index.
using Buffers = std::vector<std::span<std::byte>>;

/// What one thread's call of a kernel is made with.
struct Call {
  const Buffers& buffers;
  Size n_groups;
  Size group_size;
  Size group;
  unsigned local;  // its index in the group

  template <typename T>
  T* buffer(std::size_t index) const {
    return reinterpret_cast<T*>(buffers[index].data());
  }

  // Scalars for grids along x alone, vectors else.
  template <typename T>
  static T position(unsigned x, unsigned y) {
    if constexpr (sizeof(T) == sizeof(unsigned)) {
      return x;
    } else {
      T result{};
      result.x = x;
      result.y = y;
      return result;
    }
  }
  template <typename T>
  T thread_position_in_grid() const {
    return position<T>(group.x * group_size.x + local % group_size.x,
                       group.y * group_size.y + local / group_size.x);
  }
  template <typename T>
  T threads_per_grid() const {
    return position<T>(n_groups.x * group_size.x, n_groups.y * group_size.y);
  }
  template <typename T>
  T thread_position_in_threadgroup() const {
    return position<T>(local % group_size.x, local / group_size.x);
  }
  template <typename T>
  T threads_per_threadgroup() const {
    return position<T>(group_size.x, group_size.y);
  }
  template <typename T>
  T threadgroup_position_in_grid() const {
    return position<T>(group.x, group.y);
  }
  template <typename T>
  T threadgroups_per_grid() const {
    return position<T>(n_groups.x, n_groups.y);
  }
  template <typename T>
  T thread_index_in_threadgroup() const {
    return local;
  }
  template <typename T>
  T thread_index_in_simdgroup() const {
    return local % kSimdWidth;
  }
  template <typename T>
  T simdgroup_index_in_threadgroup() const {
    return local / kSimdWidth;
  }
  template <typename T>
  T simdgroups_per_threadgroup() const {
    return (group_size.x * group_size.y + kSimdWidth - 1) / kSimdWidth;
  }
  template <typename T>
  T threads_per_simdgroup() const {
    return kSimdWidth;
  }
};

/// A buffer that a kernel declares: the size that it must have, if it is one value, and alignment.
struct Declared {
  std::size_t n_bytes;
  std::size_t alignment;
  bool is_output;
};

struct Kernel {
  std::string name;
  std::vector<Declared> buffers;
  void (*run)(const Call&);
};

struct Registration {
  Registration(const char* name, std::vector<Declared> buffers, void (*run)(const Call&));
};

/// The kernel of that name; null if there is none.
const Kernel* find(std::string_view name);

/// How the next kernels run.
struct Settings {
  std::uint64_t seed = 0;
  unsigned max_threads = 256;  // of a threadgroup
};
Settings& settings();

/// Runs a kernel to its end.
///
/// Throws `KernelError` if a buffer is missing or of the wrong size, or threads don't meet.
void run(const Kernel& kernel, const Buffers& buffers, Size n_groups, Size group_size);

// ---------------------------------------------------------------------------------------------
// What kernels call

using Lanes = std::array<std::uint64_t, kSimdWidth>;

/// Waits for all threads of the group, or of the simdgroup; if it `publishes`, they see what others
/// wrote before.
void threadgroup_barrier(bool publishes, int line);
void simdgroup_barrier(bool publishes, int line);

/// What each lane of the simdgroup gave. Publishes nothing.
Lanes exchange(std::uint64_t word, const char* operation, int line);

/// Lets other threads go first, now and then: between the atomic operations of a thread.
void yield();

/// The calling thread's lane.
unsigned lane();

/// Fills memory that a group shares with garbage, once a group.
void threadgroup_memory(void* memory, std::size_t n_bytes);

}  // namespace emulator
