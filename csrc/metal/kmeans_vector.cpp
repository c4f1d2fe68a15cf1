#include "metal/kernels.h"

#include "core/check.h"
#include "kernels/lut_assign.h"
#include "metal/launch.h"

namespace milpress::metal {

void lloyd_step(MatrixView<const float> vectors, std::span<const float> importance,
                MatrixView<const float> entries, std::size_t n_per_piece,
                std::span<std::uint8_t> codes, std::span<float> distances,
                MatrixView<double> sums) {
  const std::size_t dim = vectors.n_rows;
  const std::size_t n = vectors.n_cols;
  check(dim > 0 && n > 0 && n_per_piece > 0, "there must be vectors and pieces, got ", n, " of ",
        dim, " elements, ", n_per_piece, " a piece");
  check(entries.n_cols == dim && entries.n_rows > 0 && entries.n_rows <= kMaxEntries,
        "entries must be 1 to ", kMaxEntries, " of ", dim, " elements, got ", entries.n_rows,
        " of ", entries.n_cols);
  const std::size_t n_pieces = (n - 1) / n_per_piece + 1;
  const std::size_t n_sums = entries.n_rows * (dim + 1) + 1;
  check(importance.size() == n && codes.size() == n && distances.size() == n &&
            sums.n_rows == n_pieces && sums.n_cols == n_sums,
        "importance, codes and distances must have one element a vector, and sums ", n_sums,
        " for each of ", n_pieces, " pieces");
  narrow(vectors.size());
  narrow(sums.size());
  const LloydParams params{narrow(n), narrow(dim), narrow(entries.n_rows), narrow(n_per_piece),
                           narrow(n_sums)};
  const Buffer in = Buffer::holding(std::span<const float>(vectors.flat()));
  const Buffer shares = Buffer::holding(importance);
  const Buffer table = Buffer::holding(std::span<const float>(entries.flat()));
  const Buffer nearest(codes.size());
  const Buffer away(distances.size_bytes());
  const Buffer moments(sums.size() * sizeof(double));
  Grid grid = grid_for("lloyd_moments", n_sums);
  grid.n_groups_y = n_pieces;
  Commands commands;
  commands.add("lloyd_assign", grid_for("lloyd_assign", n), {&in, &table, &nearest, &away}, params);
  commands.add("lloyd_moments", grid, {&in, &shares, &nearest, &away, &moments}, params);
  commands.run();
  copy_out(nearest, codes);
  copy_out(away, distances);
  copy_out(moments, sums.flat());
}

}  // namespace milpress::metal
