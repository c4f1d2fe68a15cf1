#include <pybind11/stl/filesystem.h>

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <system_error>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "blob/reader.h"
#include "blob/writer.h"

namespace milpress {
namespace {

using Bytes = Array<std::uint8_t>;

Bytes read(const BlobReader& reader, const BlobInfo& info) {
  auto data = empty<std::uint8_t>(info.n_bytes);
  const auto out = mutable_view(data);
  {
    const py::gil_scoped_release unlocked;
    reader.read(info, 0, std::as_writable_bytes(out));
  }
  return data;
}

std::uint64_t write(BlobWriter& writer, std::uint32_t dtype, const Bytes& data,
                    std::uint64_t padding_bits) {
  const auto in = view(data);
  const py::gil_scoped_release unlocked;
  return writer.write(dtype, std::as_bytes(in), padding_bits);
}

void translate_system_error(std::exception_ptr error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::system_error& failure) {
    // The message is "path: text"; OSError wants number, text and path apart.
    const std::string what = failure.what();
    const std::string text = failure.code().message();
    const std::string path = what.substr(0, what.size() - std::min(what.size(), text.size() + 2));
    errno = failure.code().value();
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
  }
}

}  // namespace

void register_blob(py::module_& m) {
  py::register_exception<BlobError>(m, "BlobError", PyExc_ValueError);
  py::register_exception_translator(&translate_system_error);

  // Ordinary classes: pybind11's own metaclass serves static properties, of which there are none.
  const py::metaclass plain_type(reinterpret_cast<PyObject*>(&PyType_Type));

  py::class_<BlobInfo>(m, "BlobInfo", plain_type, "Where a blob's data lies in its weight file.")
      .def_readonly("dtype", &BlobInfo::dtype)
      .def_readonly("n_bytes", &BlobInfo::n_bytes)
      .def_readonly("data_offset", &BlobInfo::data_offset)
      .def_readonly("padding_bits", &BlobInfo::padding_bits);

  py::class_<BlobReader>(m, "BlobReader", plain_type,
                         "Reads blobs of a weight file and trusts nothing in it.")
      .def(py::init([](const std::filesystem::path& path) {
             return std::make_unique<BlobReader>(path.string());
           }),
           py::arg("path"))
      .def("info", &BlobReader::info, py::arg("offset"), "What the metadata at offset says.")
      .def("read", &read, py::arg("info"), "The bytes of a blob.");

  py::class_<BlobWriter>(m, "BlobWriter", plain_type, "Writes a weight file, a blob at a time.")
      .def(py::init([](const std::filesystem::path& path) {
             return std::make_unique<BlobWriter>(path.string());
           }),
           py::arg("path"))
      .def("write", &write, py::arg("dtype"), py::arg("data").noconvert(), py::arg("padding_bits"),
           "Appends a blob; returns the offset of its metadata.")
      .def("copy", &BlobWriter::copy, py::arg("reader"), py::arg("info"), py::arg("dtype"),
           py::arg("padding_bits"), py::call_guard<py::gil_scoped_release>(),
           "Appends the data of a blob of another file, as a blob of that type.")
      .def("close", &BlobWriter::close, "Completes the file; without it the file is not valid.");
}

}  // namespace milpress
