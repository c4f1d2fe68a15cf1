// The door where there is no Metal: nothing is behind it.

#include "metal/runtime.h"

namespace milpress::metal {
namespace {

constexpr const char* kReason = "milpress was built without Metal";

}  // namespace

Device device() { return {"", kReason}; }

Buffer::Buffer(std::size_t) { throw DeviceError(kReason); }

Buffer Buffer::holding(std::span<const std::byte>) { throw DeviceError(kReason); }

void Buffer::fill_with_zeros() const {}

std::size_t group_size(std::string_view, std::size_t) { throw DeviceError(kReason); }

Grid grid_for(std::string_view, std::size_t, std::size_t) { throw DeviceError(kReason); }

struct Commands::State {};

Commands::Commands() { throw DeviceError(kReason); }

Commands::~Commands() = default;

void Commands::add(std::string_view, Grid, std::initializer_list<const Buffer*>,
                   std::span<const std::byte>) {}

double Commands::run() { return 0; }

}  // namespace milpress::metal
