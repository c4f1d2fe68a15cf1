#pragma once

#include <cstddef>

namespace milpress {

/// Memory of undefined contents, aligned to a cache line.
///
/// What is given back is kept, 32 MiB in all, for the next buffer of about that size: the system
/// takes longer to hand out fresh pages than most kernels take to fill them.
class Buffer {
 public:
  explicit Buffer(std::size_t n_bytes);
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  void* data() const { return data_; }

 private:
  std::size_t capacity_;
  void* data_;
};

}  // namespace milpress
