#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <system_error>
#include <vector>

#include <sys/stat.h>

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

std::vector<std::byte> contents(const std::string& path) {
  std::vector<std::byte> data(fs::file_size(path));
  std::ifstream(path, std::ios::binary)
      .read(reinterpret_cast<char*>(data.data()), static_cast<std::streamsize>(data.size()));
  return data;
}

// `n_bytes` of `value`, least significant first.
void append(std::vector<std::byte>& out, std::uint64_t value, std::size_t n_bytes) {
  for (std::size_t i = 0; i < n_bytes; ++i) {
    out.push_back(static_cast<std::byte>(value >> (8 * i)));
  }
}

TEST_CASE("every byte of a file is as the format says, at all lengths around the alignment") {
  const Folder folder;
  const std::vector<std::size_t> lengths{0, 1, 63, 64, 65, 128, 200};
  const std::string path = folder.file("weight.bin");
  BlobWriter writer(path);
  std::vector<std::byte> expected;
  append(expected, lengths.size(), 4);
  append(expected, 2, 4);
  expected.resize(64);
  std::vector<std::uint64_t> offsets;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const std::vector<std::byte> data = bytes(lengths[i]);
    offsets.push_back(writer.write(static_cast<std::uint32_t>(8 + i), data, i % 8));
    expected.resize((expected.size() + 63) / 64 * 64);
    CHECK(offsets.back() == expected.size());
    append(expected, 0xdeadbeef, 4);
    append(expected, 8 + i, 4);
    append(expected, data.size(), 8);
    append(expected, offsets.back() + 64, 8);
    append(expected, i % 8, 8);
    expected.resize(expected.size() + 32);
    expected.insert(expected.end(), data.begin(), data.end());
  }
  writer.close();
  CHECK(contents(path) == expected);
  const BlobReader reader(path);
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    const BlobInfo info = reader.info(offsets[i]);
    CHECK(info.dtype == 8 + i);
    CHECK(info.n_bytes == lengths[i]);
    CHECK(info.data_offset == offsets[i] + 64);
    CHECK(info.padding_bits == (8 + i < 14 ? i % 8 : 0));  // from 14 on whole bytes
    std::vector<std::byte> data(lengths[i]);
    reader.read(info, 0, data);
    CHECK(data == bytes(lengths[i]));
  }
}

TEST_CASE("an empty file is a header") {
  const Folder folder;
  BlobWriter writer(folder.file("weight.bin"));
  writer.close();
  CHECK(fs::file_size(folder.file("weight.bin")) == 64);
  CHECK_THROWS_AS(BlobReader(folder.file("weight.bin")).info(64), BlobError);
}

TEST_CASE("a blob is read in parts, and nothing beyond its end is") {
  const Folder folder;
  const BlobReader reader(written(folder));
  const BlobInfo info = reader.info(64);
  const std::vector<std::byte> all = bytes(100);
  std::vector<std::byte> part(30);
  reader.read(info, 70, part);
  CHECK(std::equal(part.begin(), part.end(), all.begin() + 70));
  CHECK_NOTHROW(reader.read(info, 100, std::span(part).first(0)));
  CHECK_THROWS_AS(reader.read(info, 71, part), BlobError);
  CHECK_THROWS_AS(reader.read(info, 101, std::span(part).first(0)), BlobError);
  CHECK_THROWS_AS(reader.read(info, ~std::uint64_t{0}, part), BlobError);
}

TEST_CASE("a copy longer than its buffer is whole") {
  const Folder folder;
  const std::vector<std::byte> data = bytes(3 * (1 << 20) + 17);
  BlobWriter first(folder.file("first.bin"));
  first.write(1, data, 0);
  first.close();
  const BlobReader reader(folder.file("first.bin"));
  BlobWriter second(folder.file("second.bin"));
  second.write(4, bytes(5), 0);
  const std::uint64_t offset = second.copy(reader, reader.info(64), 8, 3);
  second.close();
  const BlobReader copy(folder.file("second.bin"));
  CHECK(copy.info(offset).dtype == 8);
  CHECK(copy.info(offset).padding_bits == 3);
  std::vector<std::byte> back(data.size());
  copy.read(copy.info(offset), 0, back);
  CHECK(back == data);
}

TEST_CASE("a writer takes no type or padding that a reader would refuse") {
  const Folder folder;
  BlobWriter writer(folder.file("weight.bin"));
  CHECK_THROWS_AS(writer.write(0, bytes(1), 0), std::invalid_argument);
  CHECK_THROWS_AS(writer.write(18, bytes(1), 0), std::invalid_argument);
  CHECK_THROWS_AS(writer.write(11, bytes(1), 8), std::invalid_argument);
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
  SUBCASE("no type") {
    overwrite(path, 68, std::uint32_t{0});
    CHECK_THROWS_AS(BlobReader(path).info(64), BlobError);
  }
  SUBCASE("a sentinel of other bits") {
    overwrite(path, 64, std::uint32_t{0xdeadbeee});
    CHECK_THROWS_AS(BlobReader(path).info(64), BlobError);
  }
  SUBCASE("data that starts beyond the file, or so far that its end overflows") {
    for (const std::uint64_t start : {std::uint64_t{324}, ~std::uint64_t{0}, ~std::uint64_t{49}}) {
      overwrite(path, 80, start);
      CHECK_THROWS_AS(BlobReader(path).info(64), BlobError);
    }
  }
  SUBCASE("one byte more than the file has; the last is accepted") {
    overwrite(path, 256 + 8, std::uint64_t{4});
    CHECK_THROWS_AS(BlobReader(path).info(256), BlobError);
    overwrite(path, 256 + 8, std::uint64_t{3});
    CHECK_NOTHROW(BlobReader(path).info(256));
  }
  SUBCASE("metadata that the file cuts off") {
    for (const std::uint64_t size : {256U, 257U, 319U}) {
      fs::resize_file(path, 323);
      fs::resize_file(path, size);
      CHECK_THROWS_AS(BlobReader(path).info(256), BlobError);
    }
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
    for (const std::uint64_t size : {63U, 8U, 0U}) {
      fs::resize_file(path, size);
      CHECK_THROWS_AS(BlobReader{path}, BlobError);
    }
  }
  SUBCASE("a source that shrinks while it is copied") {
    const BlobReader reader(path);
    const BlobInfo info = reader.info(64);
    fs::resize_file(path, 150);
    BlobWriter writer(folder.file("copy.bin"));
    CHECK_THROWS_AS(writer.copy(reader, info, 1, 0), BlobError);
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
  REQUIRE(::mkfifo(folder.file("pipe").c_str(), 0600) == 0);
  CHECK_THROWS_AS(BlobReader{folder.file("pipe")}, std::system_error);  // and doesn't wait
  const std::vector<std::byte> before = contents(path);
  CHECK_THROWS_AS(BlobWriter{path}, std::system_error);
  CHECK(contents(path) == before);
  fs::create_symlink(folder.file("none"), folder.file("dangling"));
  CHECK_THROWS_AS(BlobWriter{folder.file("dangling")}, std::system_error);
  CHECK_THROWS_AS(BlobWriter{folder.file("none/weight.bin")}, std::system_error);
}

}  // namespace
}  // namespace milpress
