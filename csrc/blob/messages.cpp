#include "blob/messages.h"

#include <array>

#include "core/check.h"

namespace milpress {
namespace {

constexpr std::size_t kMaxDepth = 100;  // what parsers of protobuf allow

enum WireType : std::uint8_t {
  kVarint = 0,
  kFixed64 = 1,
  kBytes = 2,
  kGroup = 3,
  kEndGroup = 4,
  kFixed32 = 5
};

struct Tag {
  std::uint64_t number = 0;
  std::uint8_t wire_type = 0;
};

// Where reading stands. Every step checks the end of the bytes first.
class Cursor {
 public:
  explicit Cursor(std::span<const std::uint8_t> data) : data_(data) {}

  std::size_t position() const { return position_; }

  std::uint64_t varint(std::size_t end) {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      check(position_ < end, "a number runs beyond its message, at byte ", position_);
      const std::uint8_t byte = data_[position_++];
      value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) {
        return value;
      }
    }
    check(false, "a number has more than 10 bytes, at byte ", position_);
    return value;
  }

  Tag tag(std::size_t end) {
    const std::uint64_t value = varint(end);
    return {value >> 3, static_cast<std::uint8_t>(value & 7)};
  }

  void skip(std::uint64_t n_bytes, std::size_t end) {
    check(n_bytes <= end - position_, "a field must lie within its message, got ", n_bytes,
          " bytes at byte ", position_);
    position_ += n_bytes;
  }

  // Passes what a field holds; a group with all in it.
  void skip_field(std::uint8_t wire_type, std::size_t end) {
    std::size_t n_open = 0;
    while (true) {
      switch (wire_type) {
        case kVarint:
          varint(end);
          break;
        case kFixed64:
          skip(8, end);
          break;
        case kBytes:
          skip(varint(end), end);
          break;
        case kFixed32:
          skip(4, end);
          break;
        case kGroup:
          ++n_open;
          break;
        case kEndGroup:
          check(n_open > 0, "a group ends that did not begin, at byte ", position_);
          --n_open;
          break;
        default:
          check(false, "a wire type must be 0 to 5, got ", int{wire_type}, " at byte ", position_);
      }
      if (n_open == 0) {
        return;
      }
      wire_type = tag(end).wire_type;
    }
  }

 private:
  std::span<const std::uint8_t> data_;
  std::size_t position_ = 0;
};

struct Frame {
  std::size_t end = 0;
  std::size_t kind = 0;
};

}  // namespace

std::vector<std::uint64_t> count_messages(std::span<const std::uint8_t> data,
                                          MatrixView<const std::uint8_t> kinds) {
  check(kinds.n_rows > 0, "kinds has no row");
  for (const std::uint8_t kind : kinds.flat()) {
    check(kind <= kinds.n_rows + 1, "an entry of kinds must be at most ", kinds.n_rows + 1,
          ", got ", int{kind});
  }
  std::vector<std::uint64_t> counts(kinds.n_rows + 1);
  std::array<Frame, kMaxDepth> open;
  std::size_t depth = 1;
  open[0] = {data.size(), 0};
  counts[0] = 1;
  Cursor cursor(data);
  while (depth > 0) {
    const Frame frame = open[depth - 1];
    if (cursor.position() == frame.end) {
      --depth;
      continue;
    }
    const Tag tag = cursor.tag(frame.end);
    const bool may_count = tag.wire_type == kBytes && tag.number < kinds.n_cols;
    const std::uint8_t entry = may_count ? kinds.row(frame.kind)[tag.number] : std::uint8_t{0};
    if (entry == 0) {
      cursor.skip_field(tag.wire_type, frame.end);
      continue;
    }
    const std::size_t kind = entry - std::size_t{1};
    ++counts[kind];
    const std::uint64_t n_bytes = cursor.varint(frame.end);
    const std::size_t begin = cursor.position();
    if (kind == kinds.n_rows) {
      cursor.skip(n_bytes, frame.end);
      continue;
    }
    check(n_bytes <= frame.end - begin, "a message must lie within the one around it, got ",
          n_bytes, " bytes at byte ", begin);
    check(depth < kMaxDepth, "messages are nested more than ", kMaxDepth, " deep");
    open[depth++] = {begin + static_cast<std::size_t>(n_bytes), kind};
  }
  return counts;
}

}  // namespace milpress
