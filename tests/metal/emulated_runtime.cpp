// The door of csrc/metal/runtime.h onto the emulator, without any of Apple's types between.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "emulator/emulator.h"
#include "metal/runtime.h"

namespace milpress::metal {
namespace {

// One byte more than asked for would hide an access behind the end.
void* allocate(std::size_t n_bytes) {
  void* const memory = std::malloc(n_bytes);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

const emulator::Kernel& kernel_named(std::string_view name) {
  const emulator::Kernel* const kernel = emulator::find(name);
  if (kernel == nullptr) {
    throw DeviceError("there is no kernel " + std::string(name));
  }
  return *kernel;
}

}  // namespace

Device device() { return {"emulator", ""}; }

Buffer::Buffer(std::size_t n_bytes)
    : handle_(allocate(n_bytes), &std::free), contents_(handle_.get()), n_bytes_(n_bytes) {
  std::memset(contents_, 0xfb, n_bytes);
}

Buffer Buffer::holding(std::span<const std::byte> bytes) {
  Buffer buffer(bytes.size());
  std::copy(bytes.begin(), bytes.end(), buffer.as<std::byte>(bytes.size()).begin());
  return buffer;
}

void Buffer::fill_with_zeros() const { std::memset(contents_, 0, n_bytes_); }

std::size_t group_size(std::string_view kernel, std::size_t wanted) {
  kernel_named(kernel);
  return std::min<std::size_t>(wanted, emulator::settings().max_threads) / emulator::kSimdWidth *
         emulator::kSimdWidth;
}

Grid grid_for(std::string_view kernel, std::size_t n_threads, std::size_t wanted) {
  const std::size_t size = group_size(kernel, wanted);
  return {(n_threads + size - 1) / size, size};
}

struct Commands::State {
  struct Command {
    const emulator::Kernel* kernel;
    Grid grid;
    emulator::Buffers buffers;
    std::vector<std::byte> params;
  };
  std::vector<Command> commands;
};

Commands::Commands() : state_(std::make_unique<State>()) {}

Commands::~Commands() = default;

void Commands::add(std::string_view kernel, Grid grid, std::initializer_list<const Buffer*> buffers,
                   std::span<const std::byte> params) {
  State::Command& command = state_->commands.emplace_back();
  command.kernel = &kernel_named(kernel);
  command.grid = grid;
  command.params.assign(params.begin(), params.end());
  for (const Buffer* buffer : buffers) {
    command.buffers.push_back(buffer->as<std::byte>(buffer->n_bytes()));
  }
  command.buffers.push_back(command.params);
}

double Commands::run() {
  for (const State::Command& command : state_->commands) {
    emulator::run(*command.kernel, command.buffers,
                  {static_cast<unsigned>(command.grid.n_groups),
                   static_cast<unsigned>(command.grid.n_groups_y)},
                  {static_cast<unsigned>(command.grid.group_size), 1});
  }
  state_->commands.clear();
  return 0;
}

}  // namespace milpress::metal
