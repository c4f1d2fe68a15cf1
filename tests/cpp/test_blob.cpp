#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <vector>

#include "blob/reader.h"
#include "blob/writer.h"

namespace milpress {
namespace {

namespace fs = std::filesystem;

// A folder of its own for each test, gone with it.
class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "milpress-XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  ~Folder() { fs::remove_all(path_); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  fs::path path_;
};

std::vector<std::byte> bytes(std::size_t n) {
  std::vector<std::byte> data(n);
  for (std::size_t i = 0; i < n; ++i) {
    data[i] = static_cast<std::byte>(i * 7 + 1);
  }
  return data;
}

void overwrite(const std::string& path, std::uint64_t offset, const void* data, std::size_t n) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(offset));
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(n));
}

template <typename T>
void overwrite(const std::string& path, std::uint64_t offset, T value) {
  overwrite(path, offset, &value, sizeof value);
}

std::string written(const Folder& folder) {
  const std::string path = folder.file("weight.bin");
  BlobWriter writer(path);
  CHECK(writer.write(1, bytes(100), 0) == 64);
  CHECK(writer.write(11, bytes(3), 4) == 256);
  writer.close();
  return path;
}

TEST_CASE("a file has the documented layout and gives back what was written") {
  const Folder folder;
  const std::string path = written(folder);
  CHECK(fs::file_size(path) == 256 + 64 + 3);
  std::vector<std::uint32_t> words(80);
  std::ifstream(path, std::ios::binary)
      .read(reinterpret_cast<char*>(words.data()), static_cast<std::streamsize>(320));
  CHECK(words[0] == 2);            // blobs
  CHECK(words[1] == 2);            // version
  CHECK(words[16] == 0xdeadbeef);  // metadata of the first, at 64
  CHECK(words[17] == 1);           // float16
  CHECK(words[18] == 100);         // bytes
  CHECK(words[20] == 128);         // offset of the data
  CHECK(words[64] == 0xdeadbeef);  // metadata of the second, at 256
  CHECK(words[70] == 4);           // padding in bits
  const BlobReader reader(path);
  const BlobInfo info = reader.info(256);
  CHECK(info.dtype == 11);
  CHECK(info.padding_bits == 4);
  std::vector<std::byte> data(100);
  reader.read(reader.info(64), 0, data);
  CHECK(data == bytes(100));
}

TEST_CASE("a copied blob keeps its data and takes the type it is given") {
  const Folder folder;
  const BlobReader reader(written(folder));
  const std::string path = folder.file("copy.bin");
  BlobWriter writer(path);
  const std::uint64_t offset = writer.copy(reader, reader.info(64), 3, 0);
  writer.close();
  const BlobReader copy(path);
  CHECK(copy.info(offset).dtype == 3);
  std::vector<std::byte> data(100);
  copy.read(copy.info(offset), 0, data);
  CHECK(data == bytes(100));
}

TEST_CASE("damage is refused, with the file and the offset") {
  const Folder folder;
  const std::string path = written(folder);
  CHECK_THROWS_AS(BlobReader(path).info(65), BlobError);
  CHECK_THROWS_AS(BlobReader(path).info(0), BlobError);
  CHECK_THROWS_AS(BlobReader(path).info(1 << 20), BlobError);
  CHECK_THROWS_AS(BlobReader(path).info(~std::uint64_t{63}), BlobError);
  CHECK_THROWS_WITH_AS(BlobReader(path).info(128),
                       doctest::Contains("offset 128: a blob must begin with 0xdeadbeef"),
                       BlobError);
  SUBCASE("type") {
    overwrite(path, 68, std::uint32_t{18});
    CHECK_THROWS_AS(BlobReader(path).info(64), BlobError);
  }
  SUBCASE("size that overflows") {
    overwrite(path, 72, ~std::uint64_t{0});
    CHECK_THROWS_AS(BlobReader(path).info(64), BlobError);
  }
  SUBCASE("data beyond the file") {
    overwrite(path, 80, std::uint64_t{300});
    CHECK_THROWS_AS(BlobReader(path).info(64), BlobError);
  }
  SUBCASE("padding of whole bytes") {
    overwrite(path, 256 + 24, std::uint64_t{8});
    CHECK_THROWS_AS(BlobReader(path).info(256), BlobError);
  }
  SUBCASE("garbage where early writers left it is accepted") {
    overwrite(path, 64 + 24, ~std::uint64_t{0});
    CHECK(BlobReader(path).info(64).padding_bits == 0);
  }
  SUBCASE("version") {
    overwrite(path, 4, std::uint32_t{1});
    CHECK_THROWS_AS(BlobReader{path}, BlobError);
  }
  SUBCASE("a file shorter than its header") {
    fs::resize_file(path, 63);
    CHECK_THROWS_AS(BlobReader{path}, BlobError);
  }
  SUBCASE("a file that shrinks") {
    const BlobReader reader(path);
    const BlobInfo info = reader.info(64);
    fs::resize_file(path, 150);
    std::vector<std::byte> data(100);
    CHECK_THROWS_WITH_AS(reader.read(info, 0, data), doctest::Contains("became shorter"),
                         BlobError);
  }
}

TEST_CASE("links, folders and files in the way are the system's errors") {
  const Folder folder;
  const std::string path = written(folder);
  fs::create_symlink(path, folder.file("link"));
  CHECK_THROWS_AS(BlobReader{folder.file("link")}, std::system_error);
  CHECK_THROWS_AS(BlobReader{folder.file(".")}, std::system_error);
  CHECK_THROWS_AS(BlobReader{folder.file("none")}, std::system_error);
  CHECK_THROWS_AS(BlobWriter{path}, std::system_error);
}

}  // namespace
}  // namespace milpress
