#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace milpress {

/// A weight file that breaks the blob storage format; the message names the file and the offset.
class BlobError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Where a blob's data lies, as its metadata says and the file bears out.
struct BlobInfo {
  std::uint32_t dtype = 0;  // BlobDataType of MILBlob: 1 float16, 2 float32, 3 uint8, ...
  std::uint64_t n_bytes = 0;
  std::uint64_t data_offset = 0;   // from the start of the file
  std::uint64_t padding_bits = 0;  // unused bits of the last byte; only sub-byte types have any
};

/// Blob storage, version 2, little endian: a 64-byte header (count, version), then for each blob
/// 64 bytes of metadata at a multiple of 64, followed by the data. Layout from coremltools' MILBlob
/// (BSD-3-Clause) and files it wrote.
namespace blob_format {

constexpr std::uint64_t kAlignment = 64;
constexpr std::uint32_t kVersion = 2;
constexpr std::uint32_t kSentinel = 0xdeadbeef;
constexpr std::uint32_t kLastType = 17;

struct Header {
  std::uint32_t n_blobs = 0;
  std::uint32_t version = kVersion;
  std::uint64_t reserved[7] = {};
};
static_assert(sizeof(Header) == kAlignment);

struct Metadata {
  std::uint32_t sentinel = kSentinel;
  std::uint32_t dtype = 0;
  std::uint64_t n_bytes = 0;
  std::uint64_t data_offset = 0;
  std::uint64_t padding_bits = 0;
  std::uint64_t reserved[4] = {};
};
static_assert(sizeof(Metadata) == kAlignment);

/// Bits of an element, 0 for an unknown type.
constexpr unsigned element_bits(std::uint32_t dtype) {
  constexpr unsigned kBits[kLastType + 1] = {0, 16, 32, 8, 8, 16, 16, 16, 4,
                                             1, 2,  4,  3, 6, 32, 32, 8,  8};
  return dtype <= kLastType ? kBits[dtype] : 0;
}

}  // namespace blob_format
}  // namespace milpress
