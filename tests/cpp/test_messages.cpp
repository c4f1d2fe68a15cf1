#include <doctest/doctest.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "blob/messages.h"

namespace milpress {
namespace {

using Bytes = std::vector<std::uint8_t>;

// Kind 0 holds, in field 1, more of its kind; in field 2, messages of kind 1; in field 3, texts.
const Bytes kKinds = {0, 1, 2, 3,  //
                      0, 0, 0, 0};

std::vector<std::uint64_t> counted(const Bytes& data) {
  return count_messages(data, {kKinds.data(), 2, 4});
}

// A field that holds bytes, fewer than 128.
Bytes field(unsigned number, const Bytes& payload) {
  Bytes data(2 + payload.size());
  data[0] = static_cast<std::uint8_t>(number << 3 | 2);
  data[1] = static_cast<std::uint8_t>(payload.size());
  std::copy(payload.begin(), payload.end(), data.begin() + 2);
  return data;
}

Bytes joined(const std::vector<Bytes>& parts) {
  Bytes data;
  for (const Bytes& part : parts) {
    data.insert(data.end(), part.begin(), part.end());
  }
  return data;
}

TEST_CASE("messages are counted by kind, the whole one and nested ones included") {
  CHECK(counted({}) == std::vector<std::uint64_t>{1, 0, 0});
  const Bytes inner = joined({field(2, {}), field(2, {}), field(3, {'a'})});
  CHECK(counted(joined({field(1, inner), field(1, {}), field(2, {})})) ==
        std::vector<std::uint64_t>{3, 3, 1});
}

TEST_CASE("what is counted and not entered may hold anything") {
  CHECK(counted(field(3, {0xFF, 0xFF})) == std::vector<std::uint64_t>{1, 0, 1});
  // A kind without fields that count is entered, and must be whole.
  CHECK_THROWS_AS(counted(field(2, {0xFF, 0xFF})), std::invalid_argument);
}

TEST_CASE("other fields of every wire type are passed by, groups with all in them") {
  const Bytes number = {1 << 3, 0xFF, 0x01};
  const Bytes eight = {1 << 3 | 1, 1, 2, 3, 4, 5, 6, 7, 8};
  const Bytes four = {1 << 3 | 5, 1, 2, 3, 4};
  const Bytes unknown = {0xFA, 0x7F, 1, 0};  // field 2047
  const Bytes group =
      joined({{2 << 3 | 3}, number, {2 << 3 | 3}, field(2, {}), {2 << 3 | 4}, four, {2 << 3 | 4}});
  CHECK(counted(joined({number, eight, four, unknown, group, field(2, {})})) ==
        std::vector<std::uint64_t>{1, 1, 0});
}

TEST_CASE("what breaks the wire format is refused") {
  for (const Bytes& data : {Bytes{0x80},           // a tag that does not end
                            Bytes{1 << 3},         // no value
                            Bytes{1 << 3 | 1, 0},  // seven bytes too few
                            Bytes{1 << 3 | 5, 0},  // three bytes too few
                            Bytes{2 << 3 | 2, 1},  // a message beyond the end
                            Bytes{3 << 3 | 2, 1},  // a text beyond the end
                            Bytes{7 << 3 | 2, 1},  // an unknown field beyond the end
                            Bytes{1 << 3 | 3},     // a group that does not end
                            Bytes{1 << 3 | 4},     // one that did not begin
                            Bytes{1 << 3 | 6}, Bytes{1 << 3 | 7}}) {
    CAPTURE(data.size());
    CHECK_THROWS_AS(counted(data), std::invalid_argument);
  }
  Bytes endless(12, 0xFF);
  endless.front() = 1 << 3;
  endless.back() = 0;
  CHECK_THROWS_WITH_AS(counted(endless), "a number has more than 10 bytes, at byte 11",
                       std::invalid_argument);
  // A length near 2^64 must not wrap around.
  Bytes huge = {2 << 3 | 2, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1};
  CHECK_THROWS_AS(counted(huge), std::invalid_argument);
  // A message must end within the one around it, not only within the file.
  CHECK_THROWS_AS(counted({1 << 3 | 2, 2, 2 << 3 | 2, 2, 0, 0}), std::invalid_argument);
}

TEST_CASE("a hundred levels are counted, and no more") {
  // Lengths of two bytes each, so that deep ones fit.
  Bytes data;
  for (int depth = 1; depth < 100; ++depth) {
    const std::size_t size = data.size();
    Bytes around = {1 << 3 | 2, static_cast<std::uint8_t>(size % 128 | 128),
                    static_cast<std::uint8_t>(size / 128)};
    around.insert(around.end(), data.begin(), data.end());
    data = around;
  }
  CHECK(counted(data)[0] == 100);
  CHECK_THROWS_WITH_AS(
      counted(joined({{1 << 3 | 2, static_cast<std::uint8_t>(data.size() % 128 | 128),
                       static_cast<std::uint8_t>(data.size() / 128)},
                      data})),
      "messages are nested more than 100 deep", std::invalid_argument);
}

TEST_CASE("kinds that name no row are refused") {
  const Bytes kinds = {0, 3};
  CHECK_THROWS_AS(count_messages({}, {kinds.data(), 1, 2}), std::invalid_argument);
  CHECK_THROWS_AS(count_messages({}, {kinds.data(), 0, 2}), std::invalid_argument);
}

}  // namespace
}  // namespace milpress
