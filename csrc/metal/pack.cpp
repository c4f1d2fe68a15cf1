#include "metal/kernels.h"

#include "kernels/pack.h"
#include "metal/launch.h"

namespace milpress::metal {

void pack(std::span<const std::uint8_t> codes, int bits, std::span<std::uint8_t> packed) {
  check_pack(codes.size(), bits, packed.size());
  if (codes.empty()) {
    return;
  }
  const PackParams params{narrow(codes.size()), static_cast<std::uint32_t>(bits)};
  const Buffer in = Buffer::holding(codes);
  const Buffer out(packed.size());
  Commands commands;
  commands.add("pack", grid_for("pack", (codes.size() + 7) / 8), {&in, &out}, params);
  commands.run();
  copy_out(out, packed);
}

}  // namespace milpress::metal
