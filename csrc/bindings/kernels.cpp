#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "bindings/register.h"
#include "bindings/twins.h"
#include "core/check.h"
#include "core/parallel.h"
#include "kernels/error_feedback.h"
#include "kernels/fidelity.h"
#include "kernels/finite.h"
#include "kernels/kmeans1d.h"
#include "kernels/kmeans_vector.h"
#include "kernels/lut_assign.h"
#include "kernels/pack.h"
#include "kernels/value_counts.h"

namespace milpress {
namespace {

struct OnCpu {
  static constexpr auto kmeans1d = [](auto... views) { milpress::kmeans1d(views...); };
  static constexpr auto lut_assign = [](auto... views) { milpress::lut_assign(views...); };
  static constexpr auto quantize = [](auto... views) { milpress::quantize(views...); };
  static constexpr auto quantize_mse = [](auto... views) { milpress::quantize_mse(views...); };
  static constexpr auto keep_largest = [](auto... views) { milpress::keep_largest(views...); };
  static constexpr auto keep_above = [](auto... views) { milpress::keep_above(views...); };
  static constexpr auto keep_n_m = [](auto... views) { milpress::keep_n_m(views...); };
  static constexpr auto compact = [](auto... views) { milpress::compact(views...); };
};

py::tuple as_tuple(const Fidelity& fidelity) {
  return py::make_tuple(fidelity.signal, fidelity.noise, fidelity.n_outside);
}

template <typename T, typename Code>
void register_linear(py::module_& m) {
  m.def(
      "dequantize",
      [](const Array<Code>& codes, const Array<T>& scales,
         const std::optional<Array<Code>>& offsets) {
        auto weights = empty_like<T>(codes);
        unlocked(dequantize<T, Code>, rows(codes), view(scales), view(offsets),
                 mutable_rows(weights));
        return weights;
      },
      exact("codes"), exact("scales"), exact("offsets").none(true),
      "scale * (code - offset) of each row, rounded once.");
  m.def(
      "compare_quantized",
      [](const Array<T>& source, const Array<Code>& codes, const Array<T>& scales,
         const std::optional<Array<Code>>& offsets) {
        return as_tuple(unlocked(compare_quantized<T, Code>, rows(source), rows(codes),
                                 view(scales), view(offsets)));
      },
      exact("source"), exact("codes"), exact("scales"), exact("offsets").none(true),
      "(signal, noise, weights beyond half a step) of a quantized weight.");
}

template <typename T>
void register_for(py::module_& m) {
  register_twins<OnCpu, T>(m);
  register_linear<T, std::int8_t>(m);
  register_linear<T, std::uint8_t>(m);
  m.def(
      "kmeans_vector",
      [](const Array<T>& weights, std::size_t n_entries, std::size_t dim, std::uint64_t seed,
         const std::optional<Array<float>>& importance) {
        const auto in = rows(weights);
        auto luts = empty<T>(in.n_rows, n_entries * dim);
        auto codes = empty<std::uint8_t>(in.n_rows, dim == 0 ? 0 : in.n_cols / dim);
        unlocked(kmeans_vector<T>, in, rows(importance), VectorSettings{dim, seed},
                 mutable_rows(luts), mutable_rows(codes));
        return py::make_tuple(luts, codes);
      },
      exact("weights"), py::arg("n_entries"), py::arg("dim"), py::arg("seed"),
      exact("importance").none(true), "(luts, codes) of the vectors of dim weights in each row.");
  m.def(
      "lut_to_dense",
      [](const Bytes& codes, const Array<T>& luts) {
        auto weights = empty_like<T>(codes);
        unlocked(lut_to_dense<T>, rows(codes), rows(luts), mutable_rows(weights));
        return weights;
      },
      exact("codes"), exact("luts"), "The entry of the row's table that each code names.");
  m.def(
      "keep_blocks",
      [](const Array<T>& weights, std::size_t outer, std::size_t n_channels, std::size_t inner,
         std::size_t block_size, std::size_t n_zeros) {
        return bitmask_of(weights, [&](auto in, auto out) {
          keep_blocks(in, {outer, n_channels, inner}, block_size, n_zeros, out);
        });
      },
      exact("weights"), py::arg("outer"), py::arg("n_channels"), py::arg("inner"),
      py::arg("block_size"), py::arg("n_zeros"),
      "Bitmask of the weights left when the blocks of least norm go, n_zeros weights at most.");
  m.def(
      "expand",
      [](const Bytes& bitmask, const Array<T>& nonzeros, std::size_t n_weights) {
        auto weights = empty<T>(n_weights);
        unlocked(expand<T>, view(bitmask), view(nonzeros), mutable_view(weights));
        return weights;
      },
      exact("bitmask"), exact("nonzeros"), py::arg("n_weights"),
      "The inverse of compact, zero where no bit is set.");
  m.def(
      "first_nonfinite",
      [](const Array<T>& weights) { return unlocked(first_nonfinite<T>, view(weights)); },
      exact("weights"),
      "Position of the first NaN or infinity, the number of weights if there is none.");
  m.def(
      "compare",
      [](const Array<T>& source, const Array<T>& decoded) {
        return as_tuple(unlocked(compare<T>, view(source), view(decoded)));
      },
      exact("source"), exact("decoded"), "(signal, noise, weights that differ in any bit).");
  m.def(
      "compare_palette",
      [](const Array<T>& source, const Bytes& codes, const Array<T>& luts) {
        return as_tuple(unlocked(compare_palette<T>, rows(source), rows(codes), rows(luts)));
      },
      exact("source"), exact("codes"), exact("luts"),
      "(signal, noise, weights not at their nearest entry) of a palettized weight.");
  m.def(
      "compare_vectors",
      [](const Array<T>& source, std::size_t dim, const Bytes& codes, const Array<T>& luts) {
        return as_tuple(unlocked(compare_vectors<T>, rows(source), dim, rows(codes), rows(luts)));
      },
      exact("source"), py::arg("dim"), exact("codes"), exact("luts"),
      "(signal, noise, vectors not at their nearest entry) of a weight palettized by vectors.");
  m.def(
      "compare_sparse",
      [](const Array<T>& source, const Bytes& bitmask, const Array<T>& nonzeros) {
        const SparseFidelity sparse =
            unlocked(compare_sparse<T>, view(source), view(bitmask), view(nonzeros));
        return py::make_tuple(sparse.fidelity.signal, sparse.fidelity.noise,
                              sparse.fidelity.n_outside, sparse.n_zeros, sparse.n_source_zeros,
                              sparse.greatest_pruned, sparse.least_kept);
      },
      exact("source"), exact("bitmask"), exact("nonzeros"),
      "(signal, noise, stored weights that differ, zeros, zeros of the source, greatest magnitude "
      "pruned, least kept).");
}

// What becomes of a panel: `kept` is the mask that is given, and `n` of `m` are pruned without one.
template <typename Grid>
py::tuple fed_back(const Array<float>& weights, const Array<float>& factor, const Grid& grid,
                   const std::optional<Bytes>& kept, std::size_t n, std::size_t m) {
  constexpr bool kHasCodes = !std::is_same_v<Grid, NoGrid>;
  const auto in = rows(weights);
  const bool has_mask = kept || m != 0;
  auto rounded = empty_like<float>(weights);
  auto errors = empty_like<float>(weights);
  auto codes = empty<std::uint8_t>(kHasCodes ? in.n_rows : 0, kHasCodes ? in.n_cols : 0);
  auto mask = empty<std::uint8_t>(has_mask ? in.n_rows : 0, has_mask ? in.n_cols : 0);
  const auto out = mutable_rows(rounded);
  const auto mask_of = mutable_rows(mask);
  std::copy_n(in.data, in.size(), out.data);
  if (kept) {
    const auto given = rows(*kept);
    check(given.size() == mask_of.size(), "kept must have the shape of weights");
    std::copy_n(given.data, given.size(), mask_of.data);
  }
  unlocked(error_feedback<Grid>, rows(factor), grid, Pruning{n, m}, out, mask_of,
           mutable_rows(codes), mutable_rows(errors));
  return py::make_tuple(rounded, codes, errors, mask);
}

void register_error_feedback(py::module_& m) {
  m.def(
      "error_feedback_linear",
      [](const Array<float>& weights, const Array<float>& factor, const Array<float>& scales,
         const Array<float>& offsets, const Array<std::uint32_t>& groups, int code_max,
         const std::optional<Bytes>& kept, std::size_t n, std::size_t m) {
        const LinearGrid grid{rows(scales), rows(offsets), view(groups), code_max};
        return fed_back(weights, factor, grid, kept, n, m);
      },
      exact("weights"), exact("factor"), exact("scales"), exact("offsets"), exact("groups"),
      py::arg("code_max"), exact("kept").none(true), py::arg("n"), py::arg("m"),
      "(rounded weights, codes, errors, mask) of a panel, its errors fed back to later columns.");
  m.def(
      "error_feedback_lut",
      [](const Array<float>& weights, const Array<float>& factor, const Array<float>& luts,
         const Array<std::uint32_t>& lut_of, const Array<std::uint32_t>& groups,
         const std::optional<Bytes>& kept, std::size_t n, std::size_t m) {
        const TableGrid grid{rows(luts), rows(lut_of), view(groups)};
        return fed_back(weights, factor, grid, kept, n, m);
      },
      exact("weights"), exact("factor"), exact("luts"), exact("lut_of"), exact("groups"),
      exact("kept").none(true), py::arg("n"), py::arg("m"), "The same onto lookup tables.");
  m.def(
      "error_feedback",
      [](const Array<float>& weights, const Array<float>& factor, const std::optional<Bytes>& kept,
         std::size_t n, std::size_t m) { return fed_back(weights, factor, NoGrid{}, kept, n, m); },
      exact("weights"), exact("factor"), exact("kept").none(true), py::arg("n"), py::arg("m"),
      "The same where weights are kept or become zero.");
}

template <typename Code>
void register_unpack(py::module_& m, const char* name, const char* doc) {
  m.def(
      name,
      [](const Bytes& packed, int bits, std::size_t n_codes) {
        auto codes = empty<Code>(n_codes);
        unlocked(unpack<Code>, view(packed), bits, mutable_view(codes));
        return codes;
      },
      exact("packed"), py::arg("bits"), py::arg("n_codes"), doc);
}

void register_bytes(py::module_& m) {
  m.def(
      "count_kept", [](const Bytes& bitmask) { return count_kept(view(bitmask)); },
      exact("bitmask"), "The number of bits set.");
  m.def(
      "pack",
      [](const Bytes& codes, int bits) {
        auto packed = empty<std::uint8_t>(packed_size(view(codes).size(), bits));
        unlocked(pack, view(codes), bits, mutable_view(packed));
        return packed;
      },
      exact("codes"), py::arg("bits"), "Codes as one stream of bits, least significant first.");
  register_unpack<std::uint8_t>(m, "unpack", "The inverse of pack.");
  register_unpack<std::int8_t>(m, "unpack_signed",
                               "The inverse of pack for codes in two's complement.");
}

}  // namespace

void register_kernels(py::module_& m) {
  register_for<Half>(m);
  register_for<float>(m);
  register_error_feedback(m);
  register_bytes(m);
  m.def(
      "value_counts",
      [](const Array<Half>& weights) {
        const WeightedValues counts = unlocked(value_counts, view(weights));
        return py::make_tuple(array_of(counts.values), array_of(counts.weights));
      },
      exact("weights"),
      "(distinct finite values in order, how many weights have each), as float64.");
  m.def("thread_limit", &thread_limit, "Threads that kernels called from this thread may use.");
  m.def("set_thread_limit", &set_thread_limit, py::arg("n_threads"),
        "Sets that number, 0 for the default; returns what was set before.");
}

}  // namespace milpress
