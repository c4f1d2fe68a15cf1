#include "blob/writer.h"

#include <algorithm>
#include <vector>

#include "core/check.h"

namespace milpress {
namespace {

constexpr std::size_t kCopyBytes = 1 << 20;

}  // namespace

BlobWriter::BlobWriter(const std::string& path) : file_(File::create(path)) {}

std::uint64_t BlobWriter::begin_blob(const BlobInfo& info) {
  check(blob_format::element_bits(info.dtype) != 0, "dtype must be a blob data type, 1 to 17, got ",
        info.dtype);
  check(info.padding_bits < 8, "padding_bits must be below 8, got ", info.padding_bits);
  constexpr std::uint64_t kAlignment = blob_format::kAlignment;
  const std::uint64_t offset = (end_ + kAlignment - 1) / kAlignment * kAlignment;
  blob_format::Metadata metadata;
  metadata.dtype = info.dtype;
  metadata.n_bytes = info.n_bytes;
  metadata.data_offset = offset + sizeof metadata;
  metadata.padding_bits = info.padding_bits;
  file_.write(offset, std::as_bytes(std::span(&metadata, 1)));
  end_ = metadata.data_offset + info.n_bytes;
  ++n_blobs_;
  return offset;
}

std::uint64_t BlobWriter::write(std::uint32_t dtype, std::span<const std::byte> data,
                                std::uint64_t padding_bits) {
  const std::uint64_t offset = begin_blob({dtype, data.size(), 0, padding_bits});
  file_.write(offset + sizeof(blob_format::Metadata), data);
  return offset;
}

std::uint64_t BlobWriter::copy(const BlobReader& reader, const BlobInfo& info, std::uint32_t dtype,
                               std::uint64_t padding_bits) {
  const std::uint64_t offset = begin_blob({dtype, info.n_bytes, 0, padding_bits});
  std::vector<std::byte> buffer(std::min<std::uint64_t>(kCopyBytes, info.n_bytes));
  for (std::uint64_t begin = 0; begin < info.n_bytes; begin += buffer.size()) {
    const std::span<std::byte> part =
        std::span(buffer).first(std::min<std::uint64_t>(buffer.size(), info.n_bytes - begin));
    reader.read(info, begin, part);
    file_.write(offset + sizeof(blob_format::Metadata) + begin, part);
  }
  return offset;
}

void BlobWriter::close() {
  blob_format::Header header;
  header.n_blobs = n_blobs_;
  file_.write(0, std::as_bytes(std::span(&header, 1)));
  file_.close();
}

}  // namespace milpress
