// ragsr._index: the search index that lives on the host. pybind11 and NumPy buffers, no torch header.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "flat.h"
#include "mih.h"

namespace py = pybind11;
using ragsr::FlatIndex;
using ragsr::MultiIndexHash;
using ragsr::Plan;
using ragsr::Tag;
using ragsr::View;
using Codes = py::array_t<uint8_t, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

namespace {

std::string shape_of(const py::array& array) {
  std::string text = std::string(py::str(array.dtype())) + " [";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

py::array as_array(const py::object& given, const std::string& name) {
  py::array array = py::array::ensure(given);
  if (!array)
    throw py::type_error(name + " are " + std::string(py::str(py::type::of(given))) + "; a NumPy array is needed");
  return array;
}

// The array itself where it is contiguous, else a copy; or a sentence about what came instead of uint8 [rows, width].
Codes packed(const py::object& given, int64_t width, const std::string& name) {
  const py::array codes = as_array(given, name);
  const std::string wanted = "; this index takes packed codes, uint8 [rows, " + std::to_string(width) + "]";
  if (!py::isinstance<py::array_t<uint8_t>>(codes)) throw py::type_error(name + " are " + shape_of(codes) + wanted);
  if (codes.ndim() != 2 || codes.shape(1) != width) throw py::value_error(name + " are " + shape_of(codes) + wanted);
  return Codes(codes);
}

std::string path_of(const py::object& path) {
  return py::bytes(py::module_::import("os").attr("fsencode")(path));
}

int64_t add(FlatIndex& index, const py::object& codes) {
  const Codes rows = packed(codes, index.view()->width(), "codes");
  const uint8_t* data = rows.data();
  const int64_t count = rows.shape(0);
  const py::gil_scoped_release release;
  return index.add(data, count);
}

std::vector<int64_t> numbers(const py::object& given) {
  const py::array ids = as_array(given, "ids");
  if (ids.size() == 0) return {};
  if (ids.ndim() != 1 || (ids.dtype().kind() != 'i' && ids.dtype().kind() != 'u'))
    throw py::type_error("ids are " + shape_of(ids) + "; one dimension of whole numbers is needed");
  const Ids wide(ids);
  return {wide.data(), wide.data() + wide.size()};
}

void remove_ids(FlatIndex& index, const py::object& given) {
  std::vector<int64_t> ids = numbers(given);
  const py::gil_scoped_release release;
  index.remove(std::move(ids));
}

py::array_t<int64_t> live_ids(const FlatIndex& index) {
  const std::shared_ptr<const View> view = index.view();
  py::array_t<int64_t> ids(view->live());
  int64_t* out = ids.mutable_data();
  for (int64_t id = 0; id < view->total(); ++id)
    if (!view->removed->has(id)) *out++ = id;
  return ids;
}

py::array_t<uint8_t> codes_of(const FlatIndex& index, const py::object& given) {
  const std::shared_ptr<const View> view = index.view();
  const std::vector<int64_t> ids = numbers(given);
  for (const int64_t id : ids)
    if (id < 0 || id >= view->total() || view->removed->has(id))
      throw py::index_error("there is no code with id " + std::to_string(id));
  view->check_blocks();
  py::array_t<uint8_t> codes({static_cast<int64_t>(ids.size()), view->width()});
  uint8_t* out = codes.mutable_data();
  for (const int64_t id : ids) out = std::copy_n(view->code(id), view->width(), out);
  return codes;
}

void check_k(int64_t k, int64_t live) {
  if (live == 0) throw py::value_error("the index is empty: add codes before searching");
  if (k < 1 || k > live)
    throw py::value_error("k is " + std::to_string(k) + ", and the index holds " + std::to_string(live) +
                          " codes: k must lie between 1 and their number");
}

// search(queries, q, k, distance, id) into new arrays
template <class Search>
py::tuple k_nearest(const View& view, const py::object& queries, int64_t k, const Search& search) {
  const Codes rows = packed(queries, view.width(), "queries");
  check_k(k, view.live());
  const int64_t q = rows.shape(0);
  py::array_t<int32_t> distances({q, k});
  py::array_t<int64_t> ids({q, k});
  const uint8_t* from = rows.data();
  int32_t* distance = distances.mutable_data();
  int64_t* id = ids.mutable_data();
  {
    const py::gil_scoped_release release;
    search(from, q, k, distance, id);
  }
  return py::make_tuple(distances, ids);
}

py::tuple search(const FlatIndex& index, const py::object& queries, int64_t k) {
  const std::shared_ptr<const View> view = index.view();
  return k_nearest(*view, queries, k, [&](auto... arguments) { view->search(arguments...); });
}

Plan plan_of(const std::string& name) {
  if (name == "auto") return Plan::automatic;
  if (name == "buckets") return Plan::buckets;
  if (name == "scan") return Plan::scan;
  throw py::value_error("plan is '" + name + "'; it is one of auto, buckets, scan");
}

py::tuple search_buckets(const MultiIndexHash& hash, const py::object& queries, int64_t k, const std::string& plan) {
  const Plan chosen = plan_of(plan);
  return k_nearest(hash.view(), queries, k, [&](auto... arguments) { hash.search(arguments..., chosen); });
}

std::shared_ptr<MultiIndexHash> make_hash(const FlatIndex& index, int64_t parts) {
  const py::gil_scoped_release release;
  return std::make_shared<MultiIndexHash>(index.view(), parts);
}

py::tuple range_search(const FlatIndex& index, const py::object& queries, int64_t radius) {
  const std::shared_ptr<const View> view = index.view();
  const Codes rows = packed(queries, view->width(), "queries");
  if (radius < 0 || radius > 8 * view->width())
    throw py::value_error("radius is " + std::to_string(radius) + "; codes of this width differ in 0 to " +
                          std::to_string(8 * view->width()) + " bits");
  const uint8_t* from = rows.data();
  const int64_t q = rows.shape(0);
  ragsr::Ranges ranges;
  {
    const py::gil_scoped_release release;
    ranges = view->range_search(from, q, radius);
  }
  const auto found = static_cast<py::ssize_t>(ranges.keys.size());
  py::array_t<int64_t> limits(q + 1, ranges.limits.data());
  py::array_t<int32_t> distances(found);
  py::array_t<int64_t> ids(found);
  std::transform(ranges.keys.begin(), ranges.keys.end(), distances.mutable_data(), ragsr::key_distance);
  std::transform(ranges.keys.begin(), ranges.keys.end(), ids.mutable_data(), ragsr::key_index);
  return py::make_tuple(limits, distances, ids);
}

std::shared_ptr<FlatIndex> load(const py::object& path, bool mmap) {
  const std::string name = path_of(path);
  std::shared_ptr<FlatIndex> index;
  {
    const py::gil_scoped_release release;
    index = FlatIndex::load(name, mmap);
  }
  if (index->left_out() > 0) {
    const std::string text = name + ": " + std::to_string(index->left_out()) +
                             " bytes behind the last commit are left out; a commit was interrupted, or the file "
                             "cut off";
    if (PyErr_WarnEx(PyExc_RuntimeWarning, text.c_str(), 1) != 0) throw py::error_already_set();
  }
  return index;
}

std::shared_ptr<FlatIndex> open_for_adding(const py::object& path) {
  const std::string name = path_of(path);
  const py::gil_scoped_release release;
  return FlatIndex::open(name);
}

Tag tag_from(const std::string& bytes) {
  Tag tag{};
  if (!bytes.empty() && bytes.size() != tag.size())
    throw py::value_error("the tag has " + std::to_string(bytes.size()) + " bytes; a tag has " +
                          std::to_string(tag.size()) + ", or none");
  std::copy(bytes.begin(), bytes.end(), tag.begin());
  return tag;
}

py::bytes tag_of(const FlatIndex& index) {
  Tag tag;
  {
    const py::gil_scoped_release release;  // a commit may be holding the writers' lock
    tag = index.tag();
  }
  return tag == Tag{} ? py::bytes() : py::bytes(tag.data(), tag.size());
}

void save(const FlatIndex& index, const py::object& path, const py::bytes& tag) {
  const std::string name = path_of(path);
  const Tag given = tag_from(tag);
  const py::gil_scoped_release release;
  index.save(name, given);
}

void commit(FlatIndex& index, const py::bytes& tag) {
  const Tag given = tag_from(tag);
  const py::gil_scoped_release release;
  index.commit(given);
}

py::str describe(const FlatIndex& index) {
  std::string text;
  {
    const py::gil_scoped_release release;  // a commit may be holding the writers' lock
    text = index.describe();
  }
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<int64_t>(text.size())));
}

// OSError by its errno (FileNotFoundError, PermissionError, ...), or ValueError where the bytes are at fault.
void raise_fault(const ragsr::FileFault& fault) {
  const auto text = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(fault.what.data(), static_cast<int64_t>(fault.what.size())));
  if (fault.code == 0) {
    PyErr_SetObject(PyExc_ValueError, text.ptr());
    return;
  }
  const py::object error = py::reinterpret_borrow<py::object>(PyExc_OSError)(fault.code, text);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
}

}  // namespace

PYBIND11_MODULE(_index, m) {
  m.doc() = "Exact Hamming search over packed codes in host memory and in files (docs/index_format.md).";
  py::register_exception_translator([](std::exception_ptr problem) {
    try {
      if (problem) std::rethrow_exception(problem);
    } catch (const ragsr::FileFault& fault) {
      raise_fault(fault);
    }
  });
  py::class_<FlatIndex, std::shared_ptr<FlatIndex>>(
      m, "FlatIndex",
      "Codes numbered in the order they were added; every search scans them all, exactly.\n\n"
      "Any number of threads may search while others add and remove: a search sees the index as it was at one moment.")
      .def(py::init<int64_t>(), py::arg("width"), "An empty index for codes of `width` bytes (1 to 128).")
      .def("add", &add, py::arg("codes"),
           "Append codes, uint8 [rows, width]. Returns the id of the first; the others follow it, one by one.")
      .def("remove", &remove_ids, py::arg("ids"),
           "Take codes out, by ids [n]. Their ids stay empty for ever. All or none: ValueError where one is not there.")
      .def("ids", &live_ids, "The ids of all codes that are not removed, ascending: int64 [len].")
      .def("codes", &codes_of, py::arg("ids"),
           "Copies of the codes with these ids: uint8 [n, width]. IndexError: not there.")
      .def("search", &search, py::arg("queries"), py::arg("k"),
           "The k nearest of every query, sorted by (distance, id): int32 [Q, k], int64 [Q, k].")
      .def("range_search", &range_search, py::arg("queries"), py::arg("radius"),
           "All codes at most `radius` bits away: limits int64 [Q + 1], distances int32, ids int64. Those of query i\n"
           "are at limits[i] to limits[i + 1], sorted by (distance, id).")
      .def("save", &save, py::arg("path"), py::arg("tag") = py::bytes(),
           "Write a whole new file, under a temporary name until it is complete. Ids stay as they are; `tag` as for\n"
           "`commit`.")
      .def_static("load", &load, py::arg("path"), py::arg("mmap") = true,
                  "The index in a file, as of its last commit. With `mmap`, codes stay in the file, which may be\n"
                  "larger than memory and must not be cut meanwhile; the first search checks them. Else they are read\n"
                  "and checked now. ValueError: no index, damaged, or of a newer version.")
      .def_static("open", &open_for_adding, py::arg("path"),
                  "The index in a file, for adding: `commit` writes to the file. One writer at a time:\n"
                  "BlockingIOError for a second.")
      .def("commit", &commit, py::arg("tag") = py::bytes(),
           "Append what was added and removed since the last commit; on the disk when this returns. After an OSError\n"
           "the file is as it was, and the additions wait in memory for another commit. `tag`: 16 bytes of your own\n"
           "that the file carries from this commit to the next, to tell what it belongs to.")
      .def("close", &FlatIndex::close, py::call_guard<py::gil_scoped_release>(),
           "Let other writers have the file. What was not committed stays in this object only.")
      .def_property_readonly("tag", &tag_of, "The tag of the last commit, 16 bytes; empty where it has none.")
      .def_property_readonly("total", [](const FlatIndex& index) { return index.view()->total(); },
                             "Ids given out so far: those of removed codes count too.")
      .def_property_readonly("width", [](const FlatIndex& index) { return index.view()->width(); }, "Bytes per code.")
      .def("__len__", [](const FlatIndex& index) { return index.view()->live(); }, "Codes that are not removed.")
      .def("__repr__", &describe);
  py::class_<MultiIndexHash, std::shared_ptr<MultiIndexHash>>(
      m, "MultiIndexHash",
      "The codes of a FlatIndex at this moment, in tables by parts of the code: the same answers as its scan, faster\n"
      "where the k nearest are near (Norouzi et al., arXiv 1307.2982). Later changes of the FlatIndex are not seen.")
      .def(py::init(&make_hash), py::arg("index"), py::arg("parts") = 0,
           "Tables over `parts` parts of the code; 0: bits / log2(number of codes). Takes 4 bytes per code and part.")
      .def("search", &search_buckets, py::arg("queries"), py::arg("k"), py::arg("plan") = "auto",
           "The k nearest of every query, as FlatIndex.search gives them. `plan`: auto chooses for every query;\n"
           "buckets or scan force one, to compare them.")
      .def_property_readonly("width", [](const MultiIndexHash& hash) { return hash.view().width(); }, "Bytes per code.")
      .def_property_readonly("parts", &MultiIndexHash::parts, "Parts a code is cut into.")
      .def_property_readonly("scanned", &MultiIndexHash::scanned, "Queries so far that a scan answered.")
      .def("__len__", [](const MultiIndexHash& hash) { return hash.view().live(); })
      .def("__repr__", [](const MultiIndexHash& hash) {
        return "MultiIndexHash(width=" + std::to_string(hash.view().width()) + ", len=" +
               std::to_string(hash.view().live()) + ", parts=" + std::to_string(hash.parts()) + ")";
      });
  m.def("cpu_kernel", [] { return std::string(ragsr::choose_kernel().name); }, "The distance kernel in use here.");
}
