#include "core/buffer.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <mutex>
#include <new>
#include <utility>

namespace milpress {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr std::size_t kMinKept = std::size_t{64} << 10;  // less is cheap to get
constexpr std::size_t kMaxIdle = std::size_t{32} << 20;

// Rounded up by an eighth at most, so that sizes that differ a little share.
std::size_t rounded_up(std::size_t n_bytes) {
  const std::size_t step = std::max<std::size_t>(64, std::bit_floor(n_bytes) / 8);
  return (n_bytes + step - 1) / step * step;
}

class IdleMemory {
 public:
  void* take(std::size_t capacity) {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(),
                                    [&](const Block& block) { return block.first == capacity; });
    if (found == blocks_.rend()) {
      return nullptr;
    }
    void* const data = found->second;
    n_idle_ -= capacity;
    blocks_.erase(std::next(found).base());
    return data;
  }

  // The oldest blocks go where there would be too many.
  void keep(std::size_t capacity, void* data) {
    const std::lock_guard lock(mutex_);
    blocks_.emplace_back(capacity, data);
    n_idle_ += capacity;
    while (n_idle_ > kMaxIdle) {
      n_idle_ -= blocks_.front().first;
      ::operator delete(blocks_.front().second, kAlignment);
      blocks_.pop_front();
    }
  }

 private:
  using Block = std::pair<std::size_t, void*>;

  std::mutex mutex_;
  std::deque<Block> blocks_;
  std::size_t n_idle_ = 0;
};

// Never destroyed: arrays may outlive everything else.
IdleMemory& idle_memory() {
  static auto* const memory = new IdleMemory;
  return *memory;
}

}  // namespace

Buffer::Buffer(std::size_t n_bytes)
    : capacity_(rounded_up(std::max<std::size_t>(1, n_bytes))),
      data_(capacity_ < kMinKept ? nullptr : idle_memory().take(capacity_)) {
  if (data_ == nullptr) {
    data_ = ::operator new(capacity_, kAlignment);
  }
}

Buffer::~Buffer() {
  if (capacity_ < kMinKept) {
    ::operator delete(data_, kAlignment);
  } else {
    idle_memory().keep(capacity_, data_);
  }
}

}  // namespace milpress
