#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "blob/blob.h"
#include "blob/file.h"

namespace milpress {

/// Reads blobs of a weight file that may be damaged, hostile or changing: nothing is trusted, and
/// since the file is read and never mapped, one that shrinks is an error.
///
/// Throws `BlobError` where the file breaks the format, `std::system_error` where the system fails.
class BlobReader {
 public:
  explicit BlobReader(const std::string& path);

  const std::string& path() const { return file_.path(); }

  /// What the metadata at `offset` says, checked against the format and the size of the file.
  BlobInfo info(std::uint64_t offset) const;

  /// Fills `out` with the bytes of a blob from its byte `begin`.
  void read(const BlobInfo& info, std::uint64_t begin, std::span<std::byte> out) const;

 private:
  [[noreturn]] void refuse(std::uint64_t offset, const std::string& reason) const;

  File file_;
};

}  // namespace milpress
