// The door onto Metal, through Apple's metal-cpp. The kernels are compiled when the first of them
// is asked for.

#define NS_PRIVATE_IMPLEMENTATION
#define MTL_PRIVATE_IMPLEMENTATION
// Other modules of the process, such as torch, may bring metal-cpp too.
#define METALCPP_SYMBOL_VISIBILITY_HIDDEN
#include <Foundation/Foundation.hpp>
#include <Metal/Metal.hpp>

#include "metal/runtime.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace milpress::metal {

extern const char* const kSource;  // all kernels, from embed_metal.cmake

namespace {

constexpr std::size_t kSimdWidth = 32;
constexpr std::size_t kPageBytes = 16'384;
constexpr std::size_t kMaxParamBytes = 4096;  // that Metal copies into a command
// M1 and later: groups of 1024 threads, 32 lanes, 64-bit integers, memory shared with the CPU.
constexpr MTL::GPUFamily kLeastFamily = MTL::GPUFamilyApple7;

class Pool {
 public:
  Pool() : pool_(NS::AutoreleasePool::alloc()->init()) {}
  ~Pool() { pool_->release(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

 private:
  NS::AutoreleasePool* pool_;
};

std::string text(const NS::String* string) {
  const char* const bytes = string == nullptr ? nullptr : string->utf8String();
  return bytes == nullptr ? "" : bytes;
}

std::string reason_of(const NS::Error* error) {
  const std::string reason = error == nullptr ? "" : text(error->localizedDescription());
  return reason.empty() ? "no reason given" : reason;
}

NS::String* string_of(std::string_view name) {
  return NS::String::string(std::string(name).c_str(), NS::UTF8StringEncoding);
}

// What lives as long as the process: device, queue, compiled kernels.
class Runtime {
 public:
  static Runtime& instance() {
    static Runtime runtime;
    return runtime;
  }

  Device description() const { return {name_, reason_}; }

  MTL::Device* device() const {
    if (!reason_.empty()) {
      throw DeviceError(reason_);
    }
    return device_.get();
  }

  MTL::CommandQueue* queue() {
    const std::lock_guard lock(mutex_);
    const Pool pool;
    if (!queue_) {
      queue_ = NS::TransferPtr(device()->newCommandQueue());
      if (!queue_) {
        throw DeviceError("the GPU gave no command queue");
      }
    }
    return queue_.get();
  }

  MTL::ComputePipelineState* pipeline(std::string_view name) {
    const std::lock_guard lock(mutex_);
    const auto known = pipelines_.find(name);
    if (known != pipelines_.end()) {
      return known->second.get();
    }
    const Pool pool;
    if (!library_) {
      library_ = compiled();
    }
    const auto function = NS::TransferPtr(library_->newFunction(string_of(name)));
    if (!function) {
      throw DeviceError("there is no kernel " + std::string(name));
    }
    NS::Error* error = nullptr;
    auto pipeline = NS::TransferPtr(device()->newComputePipelineState(function.get(), &error));
    if (!pipeline) {
      throw DeviceError("no pipeline for " + std::string(name) + ": " + reason_of(error));
    }
    if (pipeline->threadExecutionWidth() != kSimdWidth) {
      throw DeviceError("a simdgroup must have 32 lanes, got " +
                        std::to_string(pipeline->threadExecutionWidth()));
    }
    return pipelines_.emplace(name, std::move(pipeline)).first->second.get();
  }

 private:
  Runtime() {
    const Pool pool;
    device_ = NS::TransferPtr(MTL::CreateSystemDefaultDevice());
    if (!device_) {
      reason_ = "the system has no GPU for Metal";
      return;
    }
    name_ = text(device_->name());
    if (!device_->supportsFamily(kLeastFamily)) {
      reason_ = "the GPU must be of family Apple7 (M1) or later, got " + name_;
    }
  }

  NS::SharedPtr<MTL::Library> compiled() const {
    const auto options = NS::TransferPtr(MTL::CompileOptions::alloc()->init());
    options->setFastMathEnabled(false);  // ties, NaN and the order of operations count
    NS::Error* error = nullptr;
    auto library = NS::TransferPtr(device()->newLibrary(string_of(kSource), options.get(), &error));
    if (!library) {
      throw DeviceError("the kernels did not compile: " + reason_of(error));
    }
    return library;
  }

  std::string name_;
  std::string reason_;
  NS::SharedPtr<MTL::Device> device_;
  std::mutex mutex_;
  NS::SharedPtr<MTL::CommandQueue> queue_;
  NS::SharedPtr<MTL::Library> library_;
  std::map<std::string, NS::SharedPtr<MTL::ComputePipelineState>, std::less<>> pipelines_;
};

std::shared_ptr<void> owned(MTL::Buffer* buffer, std::size_t n_bytes) {
  if (buffer == nullptr) {
    throw DeviceError("the GPU gave no buffer of " + std::to_string(n_bytes) + " bytes");
  }
  return {buffer, [](void* handle) { static_cast<MTL::Buffer*>(handle)->release(); }};
}

}  // namespace

Device device() { return Runtime::instance().description(); }

Buffer::Buffer(std::size_t n_bytes) : n_bytes_(n_bytes) {
  const Pool pool;
  // Metal has no empty buffers.
  MTL::Buffer* const buffer = Runtime::instance().device()->newBuffer(
      std::max<std::size_t>(1, n_bytes), MTL::ResourceStorageModeShared);
  handle_ = owned(buffer, n_bytes);
  contents_ = buffer->contents();
}

Buffer Buffer::holding(std::span<const std::byte> bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
  if (bytes.empty() || address % kPageBytes != 0 || bytes.size() % kPageBytes != 0) {
    Buffer copy(bytes.size());
    std::copy(bytes.begin(), bytes.end(), copy.as<std::byte>(bytes.size()).begin());
    return copy;
  }
  const Pool pool;
  // Metal takes a pointer that may be written through; kernels bind such a buffer as const.
  auto* const memory = const_cast<std::byte*>(bytes.data());
  MTL::Buffer* const buffer = Runtime::instance().device()->newBuffer(
      memory, bytes.size(), MTL::ResourceStorageModeShared, nullptr);
  if (buffer == nullptr) {
    throw DeviceError("the GPU took no memory of " + std::to_string(bytes.size()) + " bytes");
  }
  Buffer view;
  view.n_bytes_ = bytes.size();
  view.handle_ = owned(buffer, bytes.size());
  view.contents_ = buffer->contents();
  return view;
}

void Buffer::fill_with_zeros() const { std::memset(contents_, 0, n_bytes_); }

std::size_t group_size(std::string_view kernel, std::size_t wanted) {
  const std::size_t most = Runtime::instance().pipeline(kernel)->maxTotalThreadsPerThreadgroup();
  const std::size_t size = std::min(wanted, most) / kSimdWidth * kSimdWidth;
  if (size == 0) {
    throw DeviceError(std::string(kernel) + " must have 32 threads in a threadgroup, got " +
                      std::to_string(most));
  }
  return size;
}

Grid grid_for(std::string_view kernel, std::size_t n_threads, std::size_t wanted) {
  const std::size_t size = group_size(kernel, wanted);
  return {(n_threads + size - 1) / size, size};
}

struct Commands::State {
  NS::SharedPtr<MTL::CommandBuffer> buffer;
  NS::SharedPtr<MTL::ComputeCommandEncoder> encoder;
  bool has_ended = false;

  void end() {
    if (!has_ended) {
      encoder->endEncoding();
      has_ended = true;
    }
  }
};

Commands::Commands() : state_(std::make_unique<State>()) {
  const Pool pool;
  MTL::CommandBuffer* const buffer = Runtime::instance().queue()->commandBuffer();
  MTL::ComputeCommandEncoder* const encoder =
      buffer == nullptr ? nullptr : buffer->computeCommandEncoder();
  if (encoder == nullptr) {
    throw DeviceError("the GPU gave no command encoder");
  }
  // Both are autoreleased: they are kept beyond the pool.
  state_->buffer = NS::RetainPtr(buffer);
  state_->encoder = NS::RetainPtr(encoder);
}

// An encoder must be ended before it goes, even if nothing of it is to run.
Commands::~Commands() { state_->end(); }

void Commands::add(std::string_view kernel, Grid grid, std::initializer_list<const Buffer*> buffers,
                   std::span<const std::byte> params) {
  if (params.size() > kMaxParamBytes) {
    throw DeviceError("parameters must have at most 4096 bytes, got " +
                      std::to_string(params.size()));
  }
  MTL::ComputeCommandEncoder* const encoder = state_->encoder.get();
  encoder->setComputePipelineState(Runtime::instance().pipeline(kernel));
  NS::UInteger index = 0;
  for (const Buffer* buffer : buffers) {
    encoder->setBuffer(static_cast<MTL::Buffer*>(buffer->handle_.get()), 0, index++);
  }
  encoder->setBytes(params.data(), params.size(), index);
  encoder->dispatchThreadgroups(MTL::Size::Make(grid.n_groups, grid.n_groups_y, 1),
                                MTL::Size::Make(grid.group_size, 1, 1));
}

double Commands::run() {
  const Pool pool;
  state_->end();
  state_->buffer->commit();
  state_->buffer->waitUntilCompleted();
  if (state_->buffer->status() != MTL::CommandBufferStatusCompleted) {
    throw DeviceError("the GPU did not finish: " + reason_of(state_->buffer->error()));
  }
  return state_->buffer->GPUEndTime() - state_->buffer->GPUStartTime();
}

}  // namespace milpress::metal
