#include "blob/reader.h"

#include <bit>
#include <sstream>

namespace milpress {

static_assert(std::endian::native == std::endian::little, "weight files are little endian");

BlobReader::BlobReader(const std::string& path) : file_(File::open(path)) {
  blob_format::Header header;
  if (file_.read(0, std::as_writable_bytes(std::span(&header, 1))) != sizeof header) {
    refuse(0, "the file must begin with a 64-byte header, got " + std::to_string(file_.size()) +
                  " bytes in all");
  }
  if (header.version != blob_format::kVersion) {
    refuse(0, "the storage version must be 2, got " + std::to_string(header.version));
  }
}

BlobInfo BlobReader::info(std::uint64_t offset) const {
  if (offset % blob_format::kAlignment != 0 || offset < sizeof(blob_format::Header)) {
    refuse(offset, "a blob must begin at a multiple of 64 behind the header");
  }
  const std::uint64_t file_size = file_.size();
  blob_format::Metadata metadata;
  if (offset > file_size ||
      file_.read(offset, std::as_writable_bytes(std::span(&metadata, 1))) != sizeof metadata) {
    refuse(offset,
           "a blob must begin within the file, which has " + std::to_string(file_size) + " bytes");
  }
  if (metadata.sentinel != blob_format::kSentinel) {
    std::ostringstream got;
    got << "a blob must begin with 0xdeadbeef, got 0x" << std::hex << metadata.sentinel;
    refuse(offset, got.str());
  }
  const unsigned bits = blob_format::element_bits(metadata.dtype);
  if (bits == 0) {
    refuse(offset, "the data type must be 1 to 17, got " + std::to_string(metadata.dtype));
  }
  if (metadata.data_offset > file_size || metadata.n_bytes > file_size - metadata.data_offset) {
    refuse(offset, "data must lie within the file, which has " + std::to_string(file_size) +
                       " bytes, got " + std::to_string(metadata.n_bytes) + " bytes at " +
                       std::to_string(metadata.data_offset));
  }
  // Writers before iOS18 left garbage in the word that now holds the padding.
  const std::uint64_t padding = bits < 8 ? metadata.padding_bits : 0;
  if (padding >= 8) {
    refuse(offset, "the padding must be below 8 bits, got " + std::to_string(padding));
  }
  return {metadata.dtype, metadata.n_bytes, metadata.data_offset, padding};
}

void BlobReader::read(const BlobInfo& info, std::uint64_t begin, std::span<std::byte> out) const {
  if (begin > info.n_bytes || out.size() > info.n_bytes - begin) {
    refuse(info.data_offset, "a blob of " + std::to_string(info.n_bytes) + " bytes can't give " +
                                 std::to_string(out.size()) + " bytes from byte " +
                                 std::to_string(begin));
  }
  const std::size_t n = file_.read(info.data_offset + begin, out);
  if (n != out.size()) {
    refuse(info.data_offset + begin,
           "the file became shorter while it was read: " + std::to_string(out.size()) +
               " bytes expected, got " + std::to_string(n));
  }
}

void BlobReader::refuse(std::uint64_t offset, const std::string& reason) const {
  throw BlobError(file_.path() + ", offset " + std::to_string(offset) + ": " + reason);
}

}  // namespace milpress
