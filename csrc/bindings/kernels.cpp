#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "bindings/calls.h"
#include "bindings/register.h"
#include "core/check.h"
#include "core/parallel.h"
#include "kernels/compensate.h"
#include "kernels/fidelity.h"
#include "kernels/finite.h"
#include "kernels/kmeans1d.h"
#include "kernels/kmeans_vector.h"
#include "kernels/lut_assign.h"
#include "kernels/pack.h"
#include "kernels/quantize.h"
#include "kernels/sparsify.h"

namespace milpress {
namespace {

template <typename T>
Array<T> kmeans1d(const Array<T>& weights, std::size_t n_entries,
                  const std::optional<Array<float>>& importance) {
  return luts_by(weights, n_entries, importance,
                 [](auto... views) { milpress::kmeans1d(views...); });
}

py::tuple counted(const Array<Half>& weights) {
  const auto in = view(weights);
  WeightedValues found;
  {
    const py::gil_scoped_release unlocked;
    found = milpress::value_counts(in);
  }
  const auto array = [](const std::vector<double>& numbers) {
    return py::array_t<double>(static_cast<py::ssize_t>(numbers.size()), numbers.data());
  };
  return py::make_tuple(array(found.values), array(found.weights));
}

template <typename T>
py::tuple kmeans_vector(const Array<T>& weights, std::size_t n_entries, std::size_t dim,
                        std::uint64_t seed, const std::optional<Array<float>>& importance) {
  const auto in = rows(weights);
  const auto weight_of = importance ? rows(*importance) : MatrixView<const float>{};
  auto luts = empty<T>(in.n_rows, n_entries * dim);
  auto codes = empty<std::uint8_t>(in.n_rows, dim == 0 ? 0 : in.n_cols / dim);
  const auto entries = mutable_rows(luts);
  const auto out = mutable_rows(codes);
  {
    const py::gil_scoped_release unlocked;
    milpress::kmeans_vector(in, weight_of, {dim, seed}, entries, out);
  }
  return py::make_tuple(luts, codes);
}

template <typename T>
Bytes lut_assign(const Array<T>& weights, const Array<T>& luts) {
  return codes_by(weights, luts, [](auto... views) { milpress::lut_assign(views...); });
}

template <typename T>
Array<T> lut_to_dense(const Bytes& codes, const Array<T>& luts) {
  const auto in = rows(codes);
  const auto entries = rows(luts);
  auto weights = empty<T>(in.n_rows, in.n_cols);
  const auto out = mutable_rows(weights);
  {
    const py::gil_scoped_release unlocked;
    milpress::lut_to_dense(in, entries, out);
  }
  return weights;
}

template <typename T>
py::tuple quantize(const Array<T>& weights, int code_min, int code_max, bool fit_offset) {
  return quantized_by(weights, code_min, code_max, fit_offset,
                      [](auto... views) { milpress::quantize(views...); });
}

template <typename T>
py::tuple quantize_mse(const Array<T>& weights, int code_min, int code_max, bool fit_offset) {
  return quantized_by(weights, code_min, code_max, fit_offset,
                      [](auto... views) { milpress::quantize_mse(views...); });
}

template <typename T>
py::tuple quantize_mse_weighted(const Array<T>& weights, const Array<float>& importance,
                                int code_min, int code_max, bool fit_offset) {
  const auto share = rows(importance);
  return quantized_by(weights, code_min, code_max, fit_offset,
                      [share](auto in, CodeRange range, auto scales, auto offsets, auto codes) {
                        milpress::quantize_mse_weighted(in, share, range, scales, offsets, codes);
                      });
}

template <typename T, typename Code>
Array<T> dequantize(const Array<Code>& codes, const Array<T>& scales,
                    const std::optional<Array<Code>>& offsets) {
  const auto in = rows(codes);
  const auto scale_of = view(scales);
  const auto offset_of = offsets ? view(*offsets) : std::span<const Code>{};
  auto weights = empty<T>(in.n_rows, in.n_cols);
  const auto out = mutable_rows(weights);
  {
    const py::gil_scoped_release unlocked;
    milpress::dequantize(in, scale_of, offset_of, out);
  }
  return weights;
}

template <typename T>
Bytes keep_largest(const Array<T>& weights, std::size_t n_zeros) {
  return bitmask_by(weights, [&](auto in, auto out) { milpress::keep_largest(in, n_zeros, out); });
}

template <typename T>
Bytes keep_above(const Array<T>& weights, float threshold) {
  return bitmask_by(
      weights, [&](auto in, auto out) { milpress::keep_above(in, from_float<T>(threshold), out); });
}

template <typename T>
Bytes keep_n_m(const Array<T>& weights, std::size_t outer, std::size_t n_channels,
               std::size_t inner, std::size_t n, std::size_t m) {
  return bitmask_by(weights, [&](auto in, auto out) {
    milpress::keep_n_m(in, {outer, n_channels, inner}, n, m, out);
  });
}

template <typename T>
Bytes keep_blocks(const Array<T>& weights, std::size_t outer, std::size_t n_channels,
                  std::size_t inner, std::size_t block_size, std::size_t n_zeros) {
  return bitmask_by(weights, [&](auto in, auto out) {
    milpress::keep_blocks(in, {outer, n_channels, inner}, block_size, n_zeros, out);
  });
}

template <typename T>
Array<T> compact(const Array<T>& weights, const Bytes& bitmask) {
  return nonzeros_by(weights, bitmask, [](auto... views) { milpress::compact(views...); });
}

template <typename T>
Array<T> expand(const Bytes& bitmask, const Array<T>& nonzeros, std::size_t n_weights) {
  const auto mask = view(bitmask);
  const auto in = view(nonzeros);
  auto weights = empty<T>(n_weights);
  const auto out = mutable_view(weights);
  {
    const py::gil_scoped_release unlocked;
    milpress::expand(mask, in, out);
  }
  return weights;
}

Bytes pack(const Bytes& codes, int bits) {
  const auto in = view(codes);
  auto packed = empty<std::uint8_t>(packed_size(in.size(), bits));
  const auto out = mutable_view(packed);
  {
    const py::gil_scoped_release unlocked;
    milpress::pack(in, bits, out);
  }
  return packed;
}

template <typename Code>
Array<Code> unpack(const Bytes& packed, int bits, std::size_t n_codes) {
  const auto in = view(packed);
  auto codes = empty<Code>(n_codes);
  const auto out = mutable_view(codes);
  {
    const py::gil_scoped_release unlocked;
    milpress::unpack(in, bits, out);
  }
  return codes;
}

template <typename T>
std::size_t first_nonfinite(const Array<T>& weights) {
  const auto in = view(weights);
  const py::gil_scoped_release unlocked;
  return milpress::first_nonfinite(in);
}

py::tuple as_tuple(const Fidelity& fidelity) {
  return py::make_tuple(fidelity.signal, fidelity.noise, fidelity.n_outside);
}

template <typename T>
py::tuple compare(const Array<T>& source, const Array<T>& decoded) {
  const auto left = view(source);
  const auto right = view(decoded);
  Fidelity fidelity;
  {
    const py::gil_scoped_release unlocked;
    fidelity = milpress::compare(left, right);
  }
  return as_tuple(fidelity);
}

template <typename T, typename Code>
py::tuple compare_quantized(const Array<T>& source, const Array<Code>& codes,
                            const Array<T>& scales, const std::optional<Array<Code>>& offsets) {
  const auto in = rows(source);
  const auto code_of = rows(codes);
  const auto scale_of = view(scales);
  const auto offset_of = offsets ? view(*offsets) : std::span<const Code>{};
  Fidelity fidelity;
  {
    const py::gil_scoped_release unlocked;
    fidelity = milpress::compare_quantized(in, code_of, scale_of, offset_of);
  }
  return as_tuple(fidelity);
}

template <typename T>
py::tuple compare_palette(const Array<T>& source, const Bytes& codes, const Array<T>& luts) {
  const auto in = rows(source);
  const auto code_of = rows(codes);
  const auto entries = rows(luts);
  Fidelity fidelity;
  {
    const py::gil_scoped_release unlocked;
    fidelity = milpress::compare_palette(in, code_of, entries);
  }
  return as_tuple(fidelity);
}

template <typename T>
py::tuple compare_vectors(const Array<T>& source, std::size_t dim, const Bytes& codes,
                          const Array<T>& luts) {
  const auto in = rows(source);
  const auto code_of = rows(codes);
  const auto entries = rows(luts);
  Fidelity fidelity;
  {
    const py::gil_scoped_release unlocked;
    fidelity = milpress::compare_vectors(in, dim, code_of, entries);
  }
  return as_tuple(fidelity);
}

template <typename T>
py::tuple compare_sparse(const Array<T>& source, const Bytes& bitmask, const Array<T>& nonzeros) {
  const auto in = view(source);
  const auto mask = view(bitmask);
  const auto kept = view(nonzeros);
  SparseFidelity result;
  {
    const py::gil_scoped_release unlocked;
    result = milpress::compare_sparse(in, mask, kept);
  }
  return py::make_tuple(result.fidelity.signal, result.fidelity.noise, result.fidelity.n_outside,
                        result.n_zeros, result.n_source_zeros, result.greatest_pruned,
                        result.least_kept);
}

template <typename Grid>
py::tuple compensate_by(const Array<float>& factor, const Grid& grid, Pruning pruning,
                        const Array<float>& weights, const std::optional<Bytes>& kept) {
  constexpr bool kHasCodes = !std::is_same_v<Grid, NoGrid>;
  const auto shares = rows(factor);
  const auto in = rows(weights);
  auto rounded = empty<float>(in.n_rows, in.n_cols);
  auto errors = empty<float>(in.n_rows, in.n_cols);
  auto codes = empty<std::uint8_t>(kHasCodes ? in.n_rows : 0, kHasCodes ? in.n_cols : 0);
  const bool has_mask = kept || pruning.m != 0;
  auto mask = empty<std::uint8_t>(has_mask ? in.n_rows : 0, has_mask ? in.n_cols : 0);
  const auto out = mutable_rows(rounded);
  const auto error_of = mutable_rows(errors);
  const auto code_of = mutable_rows(codes);
  const auto mask_of = mutable_rows(mask);
  std::copy_n(in.data, in.size(), out.data);
  if (kept) {
    const auto given = rows(*kept);
    check(given.size() == mask_of.size(), "kept must have the shape of weights");
    std::copy_n(given.data, given.size(), mask_of.data);
  }
  {
    const py::gil_scoped_release unlocked;
    milpress::compensate(shares, grid, pruning, out, mask_of, code_of, error_of);
  }
  return py::make_tuple(rounded, codes, errors, mask);
}

py::tuple compensate_linear(const Array<float>& weights, const Array<float>& factor,
                            const Array<float>& scales, const Array<float>& offsets,
                            const Array<std::uint32_t>& groups, int code_max,
                            const std::optional<Bytes>& kept, std::size_t n, std::size_t m) {
  const LinearGrid grid{rows(scales), rows(offsets), view(groups), code_max};
  return compensate_by(factor, grid, {n, m}, weights, kept);
}

py::tuple compensate_lut(const Array<float>& weights, const Array<float>& factor,
                         const Array<float>& luts, const Array<std::uint32_t>& lut_of,
                         const Array<std::uint32_t>& groups, const std::optional<Bytes>& kept,
                         std::size_t n, std::size_t m) {
  const TableGrid grid{rows(luts), rows(lut_of), view(groups)};
  return compensate_by(factor, grid, {n, m}, weights, kept);
}

py::tuple compensate(const Array<float>& weights, const Array<float>& factor,
                     const std::optional<Bytes>& kept, std::size_t n, std::size_t m) {
  return compensate_by(factor, NoGrid{}, {n, m}, weights, kept);
}

template <typename T, typename Code>
void register_linear(py::module_& m) {
  m.def("dequantize", &dequantize<T, Code>, py::arg("codes").noconvert(),
        py::arg("scales").noconvert(), py::arg("offsets").noconvert().none(true),
        "scale * (code - offset) of each row, rounded once.");
  m.def("compare_quantized", &compare_quantized<T, Code>, py::arg("source").noconvert(),
        py::arg("codes").noconvert(), py::arg("scales").noconvert(),
        py::arg("offsets").noconvert().none(true),
        "(signal, noise, weights beyond half a step) of a quantized weight.");
}

template <typename T>
void register_for(py::module_& m) {
  m.def("kmeans1d", &kmeans1d<T>, py::arg("weights").noconvert(), py::arg("n_entries"),
        py::arg("importance").noconvert().none(true),
        "The optimal ascending lookup table of each row of weights.");
  m.def("kmeans_vector", &kmeans_vector<T>, py::arg("weights").noconvert(), py::arg("n_entries"),
        py::arg("dim"), py::arg("seed"), py::arg("importance").noconvert().none(true),
        "(luts, codes) of the vectors of dim weights in each row.");
  m.def("lut_assign", &lut_assign<T>, py::arg("weights").noconvert(), py::arg("luts").noconvert(),
        "Index of the nearest entry of the row's ascending table; ties go low.");
  m.def("lut_to_dense", &lut_to_dense<T>, py::arg("codes").noconvert(), py::arg("luts").noconvert(),
        "The entry of the row's table that each code names.");
  m.def("quantize", &quantize<T>, py::arg("weights").noconvert(), py::arg("code_min"),
        py::arg("code_max"), py::arg("fit_offset"),
        "(codes, scales, offsets or None), one scale and offset a row.");
  m.def("quantize_mse", &quantize_mse<T>, py::arg("weights").noconvert(), py::arg("code_min"),
        py::arg("code_max"), py::arg("fit_offset"),
        "The same with the range of each row that has the least squared error.");
  m.def("quantize_mse_weighted", &quantize_mse_weighted<T>, py::arg("weights").noconvert(),
        py::arg("importance").noconvert(), py::arg("code_min"), py::arg("code_max"),
        py::arg("fit_offset"), "The same with each squared error multiplied by its importance.");
  m.def("keep_largest", &keep_largest<T>, py::arg("weights").noconvert(), py::arg("n_zeros"),
        "Bitmask of the weights left when the n_zeros smallest go; the earlier of equals first.");
  m.def("keep_above", &keep_above<T>, py::arg("weights").noconvert(), py::arg("threshold"),
        "Bitmask of the weights whose magnitude is above the threshold.");
  m.def("keep_n_m", &keep_n_m<T>, py::arg("weights").noconvert(), py::arg("outer"),
        py::arg("n_channels"), py::arg("inner"), py::arg("n"), py::arg("m"),
        "Bitmask of the weights left when the n smallest of every m channels go.");
  m.def("keep_blocks", &keep_blocks<T>, py::arg("weights").noconvert(), py::arg("outer"),
        py::arg("n_channels"), py::arg("inner"), py::arg("block_size"), py::arg("n_zeros"),
        "Bitmask of the weights left when the blocks of least norm go, n_zeros weights at most.");
  m.def("compact", &compact<T>, py::arg("weights").noconvert(), py::arg("bitmask").noconvert(),
        "The weights whose bit is set, in order.");
  m.def("expand", &expand<T>, py::arg("bitmask").noconvert(), py::arg("nonzeros").noconvert(),
        py::arg("n_weights"), "The inverse of compact, zero where no bit is set.");
  m.def("first_nonfinite", &first_nonfinite<T>, py::arg("weights").noconvert(),
        "Position of the first NaN or infinity, the number of weights if there is none.");
  m.def("compare", &compare<T>, py::arg("source").noconvert(), py::arg("decoded").noconvert(),
        "(signal, noise, weights that differ in any bit).");
  m.def("compare_palette", &compare_palette<T>, py::arg("source").noconvert(),
        py::arg("codes").noconvert(), py::arg("luts").noconvert(),
        "(signal, noise, weights not at their nearest entry) of a palettized weight.");
  m.def("compare_vectors", &compare_vectors<T>, py::arg("source").noconvert(), py::arg("dim"),
        py::arg("codes").noconvert(), py::arg("luts").noconvert(),
        "(signal, noise, vectors not at their nearest entry) of a weight palettized by vectors.");
  m.def(
      "compare_sparse", &compare_sparse<T>, py::arg("source").noconvert(),
      py::arg("bitmask").noconvert(), py::arg("nonzeros").noconvert(),
      "(signal, noise, stored weights that differ, zeros, zeros of the source, greatest magnitude "
      "pruned, least kept).");
  register_linear<T, std::int8_t>(m);
  register_linear<T, std::uint8_t>(m);
}

void register_compensate(py::module_& m) {
  m.def("compensate_linear", &compensate_linear, py::arg("weights").noconvert(),
        py::arg("factor").noconvert(), py::arg("scales").noconvert(),
        py::arg("offsets").noconvert(), py::arg("groups").noconvert(), py::arg("code_max"),
        py::arg("kept").noconvert().none(true), py::arg("n"), py::arg("m"),
        "(rounded weights, codes, errors, mask) of a panel, its errors fed back to later columns.");
  m.def("compensate_lut", &compensate_lut, py::arg("weights").noconvert(),
        py::arg("factor").noconvert(), py::arg("luts").noconvert(), py::arg("lut_of").noconvert(),
        py::arg("groups").noconvert(), py::arg("kept").noconvert().none(true), py::arg("n"),
        py::arg("m"), "The same onto lookup tables.");
  m.def("compensate", &compensate, py::arg("weights").noconvert(), py::arg("factor").noconvert(),
        py::arg("kept").noconvert().none(true), py::arg("n"), py::arg("m"),
        "The same where weights are kept or become zero.");
}

void register_bytes(py::module_& m) {
  m.def(
      "count_kept", [](const Bytes& bitmask) { return count_kept(view(bitmask)); },
      py::arg("bitmask").noconvert(), "The number of bits set.");
  m.def("pack", &pack, py::arg("codes").noconvert(), py::arg("bits"),
        "Codes as one stream of bits, least significant first.");
  m.def("unpack", &unpack<std::uint8_t>, py::arg("packed").noconvert(), py::arg("bits"),
        py::arg("n_codes"), "The inverse of pack.");
  m.def("unpack_signed", &unpack<std::int8_t>, py::arg("packed").noconvert(), py::arg("bits"),
        py::arg("n_codes"), "The inverse of pack for codes in two's complement.");
  m.def("thread_limit", &thread_limit, "Threads that kernels called from this thread may use.");
  m.def("set_thread_limit", &set_thread_limit, py::arg("n_threads"),
        "Sets that number, 0 for the default; returns what was set before.");
}

}  // namespace

void register_kernels(py::module_& m) {
  register_for<Half>(m);
  register_for<float>(m);
  register_compensate(m);
  register_bytes(m);
  m.def("value_counts", &counted, py::arg("weights").noconvert(),
        "(distinct finite values in order, how many weights have each), as float64.");
}

}  // namespace milpress
