#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace milpress {

/// A file descriptor that closes itself. Failures of the system are `std::system_error`.
class File {
 public:
  /// Opens an existing regular file for reading; the last part of `path` must be no symbolic link.
  static File open(const std::string& path);

  /// Creates `path` for writing; it must not exist.
  static File create(const std::string& path);

  File(File&& other) noexcept;
  File& operator=(File&&) = delete;
  ~File();

  const std::string& path() const { return path_; }
  std::uint64_t size() const;

  /// Reads up to `out.size()` bytes at `offset`; fewer only at the end of the file.
  std::size_t read(std::uint64_t offset, std::span<std::byte> out) const;

  /// Writes all of `bytes` at `offset`.
  void write(std::uint64_t offset, std::span<const std::byte> bytes) const;

  /// Closes the file and reports what the system may have kept back until now.
  void close();

 private:
  File(std::string path, int descriptor);

  std::string path_;
  int descriptor_;
};

}  // namespace milpress
