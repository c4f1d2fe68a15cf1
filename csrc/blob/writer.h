#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "blob/blob.h"
#include "blob/file.h"
#include "blob/reader.h"

namespace milpress {

/// Writes a weight file front to back, a blob at a time; memory does not grow with the file.
/// Failures of the system are `std::system_error`.
class BlobWriter {
 public:
  /// Creates the file, which must not exist.
  explicit BlobWriter(const std::string& path);

  /// Appends a blob and returns the offset of its metadata, which is what a model refers to. Data
  /// of a sub-byte type is packed already; `padding_bits` of its last byte are unused.
  std::uint64_t write(std::uint32_t dtype, std::span<const std::byte> data,
                      std::uint64_t padding_bits);

  /// Appends the data of a blob of another file, as a blob of that type and padding.
  std::uint64_t copy(const BlobReader& reader, const BlobInfo& info, std::uint32_t dtype,
                     std::uint64_t padding_bits);

  /// Completes the header and closes the file. Without it the file is not valid.
  void close();

 private:
  std::uint64_t begin_blob(const BlobInfo& info);

  File file_;
  std::uint64_t end_ = sizeof(blob_format::Header);
  std::uint32_t n_blobs_ = 0;
};

}  // namespace milpress
