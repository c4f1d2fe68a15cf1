#include <pybind11/stl/filesystem.h>

#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>
#include <system_error>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "blob/messages.h"
#include "blob/reader.h"
#include "blob/writer.h"

namespace milpress {
namespace {

Bytes read(const BlobReader& reader, const BlobInfo& info) {
  auto data = empty<std::uint8_t>(info.n_bytes);
  unlocked([&](auto out) { reader.read(info, 0, std::as_writable_bytes(out)); },
           mutable_view(data));
  return data;
}

std::uint64_t write(BlobWriter& writer, std::uint32_t dtype, const Bytes& data,
                    std::uint64_t padding_bits) {
  return unlocked([&](auto in) { return writer.write(dtype, std::as_bytes(in), padding_bits); },
                  view(data));
}

// Of the bytes of a file as Python reads them; they can't change meanwhile.
py::array_t<std::uint64_t> counted(const py::bytes& data, const Bytes& kinds) {
  const std::string_view text = data;
  const std::span in(reinterpret_cast<const std::uint8_t*>(text.data()), text.size());
  return array_of(unlocked(count_messages, in, rows(kinds)));
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

  m.def("count_messages", &counted, py::arg("data"), exact("kinds"),
        "How many messages of each kind the bytes of a protobuf message hold.");

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
      .def("write", &write, py::arg("dtype"), exact("data"), py::arg("padding_bits"),
           "Appends a blob; returns the offset of its metadata.")
      .def("copy", &BlobWriter::copy, py::arg("reader"), py::arg("info"), py::arg("dtype"),
           py::arg("padding_bits"), py::call_guard<py::gil_scoped_release>(),
           "Appends the data of a blob of another file, as a blob of that type.")
      .def("close", &BlobWriter::close, "Completes the file; without it the file is not valid.");
}

}  // namespace milpress
