// ragsr._index: the search index that lives on the host. pybind11 and NumPy buffers, no torch header.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "flat.h"

namespace py = pybind11;
using Codes = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;

namespace {

// [rows, width] or a sentence about what came instead
const uint8_t* rows_of(const py::array& codes, int64_t width, const char* what) {
  if (!py::isinstance<py::array_t<uint8_t>>(codes))
    throw py::type_error(std::string(what) + " must be packed bytes (uint8)");
  if (codes.ndim() != 2 || codes.shape(1) != width)
    throw py::value_error(std::string(what) + " must be [rows, " + std::to_string(width) + "] for this index");
  return static_cast<const uint8_t*>(codes.data());
}

void add(ragsr::FlatIndex& index, const py::array& codes) {
  rows_of(codes, index.width(), "codes");
  const Codes packed(codes);
  const int64_t rows = packed.shape(0);
  const uint8_t* data = packed.data();
  py::gil_scoped_release release;
  index.add(data, rows);
}

py::tuple search(const ragsr::FlatIndex& index, const py::array& queries, int64_t k) {
  rows_of(queries, index.width(), "queries");
  if (k < 1 || k > index.size())
    throw py::value_error("k is " + std::to_string(k) + " with " + std::to_string(index.size()) +
                          " codes in the index; it must lie between 1 and their number");
  const Codes packed(queries);
  const int64_t q = packed.shape(0);
  py::array_t<int32_t> distance({q, k});
  py::array_t<int64_t> found({q, k});
  const uint8_t* from = packed.data();
  int32_t* distances = distance.mutable_data();
  int64_t* indices = found.mutable_data();
  {
    py::gil_scoped_release release;
    index.search(from, q, k, distances, indices);
  }
  return py::make_tuple(distance, found);
}

}  // namespace

PYBIND11_MODULE(_index, m) {
  m.doc() = "Exact Hamming search over packed codes held in host memory.";
  py::class_<ragsr::FlatIndex>(m, "FlatIndex", "All codes in one array; every search scans them all, exactly.")
      .def(py::init<int64_t>(), py::arg("width"), "An empty index for codes of `width` bytes (1 to 128).")
      .def("add", &add, py::arg("codes"), "Append codes, uint8 [rows, width]; they are numbered in order of arrival.")
      .def("search", &search, py::arg("queries"), py::arg("k"),
           "The k nearest of every query, sorted by (distance, index): int32 [Q, k], int64 [Q, k].")
      .def_property_readonly("width", &ragsr::FlatIndex::width, "Bytes per code.")
      .def("__len__", &ragsr::FlatIndex::size)
      .def("__repr__", [](const ragsr::FlatIndex& index) {
        return "FlatIndex(width=" + std::to_string(index.width()) + ", len=" + std::to_string(index.size()) + ")";
      });
  m.def("cpu_kernel", [] { return std::string(ragsr::choose_kernel().name); }, "The distance kernel in use here.");
}
