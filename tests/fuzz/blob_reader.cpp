// Feeds the reader of weight files with anything at all. The law: it refuses with `BlobError`, or
// what it says of a blob lies within the file and what it reads is what stands there.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#include "blob/reader.h"
#include "blob/writer.h"

namespace milpress {
namespace {

void require(bool holds) {
  if (!holds) {
    std::abort();
  }
}

// A folder for this process, gone when it ends.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "milpress-XXXXXX").string();
    require(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string file(const char* name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

void write_file(const std::string& path, std::span<const std::uint8_t> data) {
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  require(descriptor >= 0);
  require(::write(descriptor, data.data(), data.size()) == static_cast<ssize_t>(data.size()));
  require(::close(descriptor) == 0);
}

template <typename Call>
bool is_refused(const Call& call) {
  try {
    call();
    return false;
  } catch (const BlobError&) {
    return true;
  }
}

void check_copy(const BlobReader& reader, const BlobInfo& info, std::span<const std::byte> data,
                const std::string& path) {
  std::filesystem::remove(path);
  BlobWriter writer(path);
  const std::uint64_t offset = writer.copy(reader, info, info.dtype, info.padding_bits);
  writer.close();
  const BlobReader copied(path);
  const BlobInfo again = copied.info(offset);
  std::vector<std::byte> back(data.size());
  copied.read(again, 0, back);
  require(again.dtype == info.dtype && again.padding_bits == info.padding_bits);
  require(again.n_bytes == data.size() && std::equal(back.begin(), back.end(), data.begin()));
}

void check_blob(const BlobReader& reader, std::uint64_t offset, std::span<const std::uint8_t> file,
                const std::string& copy_path) {
  BlobInfo info;
  if (is_refused([&] { info = reader.info(offset); })) {
    return;
  }
  require(blob_format::element_bits(info.dtype) != 0 && info.padding_bits < 8);
  require(info.data_offset <= file.size() && info.n_bytes <= file.size() - info.data_offset);
  const auto expected = std::as_bytes(file.subspan(info.data_offset, info.n_bytes));
  std::vector<std::byte> data(info.n_bytes);
  reader.read(info, 0, data);
  require(std::equal(data.begin(), data.end(), expected.begin()));
  std::vector<std::byte> too_many(info.n_bytes + 1);
  require(is_refused([&] { reader.read(info, 0, too_many); }));
  require(is_refused([&] { reader.read(info, info.n_bytes + 1, {}); }));
  check_copy(reader, info, data, copy_path);
}

}  // namespace
}  // namespace milpress

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t n_bytes) {
  using namespace milpress;
  static const Folder folder;
  static const std::string path = folder.file("weight.bin");
  const std::span<const std::uint8_t> file(bytes, n_bytes);
  write_file(path, file);
  try {
    const BlobReader reader(path);
    for (std::uint64_t offset = 0; offset <= std::min<std::uint64_t>(n_bytes, 1024); offset += 64) {
      check_blob(reader, offset, file, folder.file("copy.bin"));
    }
    // Where the file itself says, such as far beyond its end.
    for (std::size_t i = 0; i + 8 <= std::min<std::size_t>(n_bytes, 64); i += 8) {
      std::uint64_t offset = 0;
      std::memcpy(&offset, bytes + i, sizeof offset);
      check_blob(reader, offset, file, folder.file("copy.bin"));
    }
  } catch (const BlobError&) {
    require(n_bytes < 64 || bytes[4] != 2 || bytes[5] != 0 || bytes[6] != 0 || bytes[7] != 0);
  }
  return 0;
}
