// The engine for Python: `trimode._native`. Shapes and names are checked on the Python side (`trimode.model.native`).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "model.h"

namespace py = pybind11;
using namespace trimode;

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using FloatRoom = py::array_t<float, py::array::c_style>;  // to be written to
using IntArray = py::array_t<int, py::array::c_style | py::array::forcecast>;

#if defined(__x86_64__) && defined(__GNUC__)
// not every compiler's __builtin_cpu_supports knows its name
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#if defined(__x86_64__) && defined(__GNUC__)
// The processor has tiles and the system lets this process use them: it must be asked once, and may refuse.
bool may_use_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kInt8)) != (kTile | kInt8)) return false;
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

// From the fastest to the one that always runs; null where this build or this processor has none.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    if (kernels_amx() != nullptr && may_use_amx()) found.push_back(kernels_amx());
    found.push_back(kernels_avx512vnni());
  }
  if (avx2 && has_avxvnni()) found.push_back(kernels_avxvnni());
  if (avx2) found.push_back(kernels_avx2());
#endif
  found.push_back(kernels_portable());
  return found;
}

const Kernels* kernels_named(const std::string& name) {
  for (const Kernels* k : usable_kernels())
    if (name == k->name) return k;
  throw std::invalid_argument("this processor cannot run " + name);
}

struct PyMatrix {
  std::shared_ptr<Weights> weights;
  py::object borrowed;  // keeps a mapped file open
};

void require(bool sound, const char* fault) {
  if (!sound) throw std::invalid_argument(fault);
}

// Where the head's results go, beside what it returns.
struct HeadRoom {
  float *logits, *sums;
  size_t stride;
  HeadRoom(const Config& c, size_t num_rows, FloatRoom to, FloatRoom logsumexp) {
    require(to.ndim() == 2 && (size_t)to.shape(0) >= num_rows && to.shape(1) >= round_up(c.vocab_size, kLanes), "too little room for the logits");
    require(logsumexp.ndim() == 1 && (size_t)logsumexp.shape(0) >= num_rows, "too little room for the sums");
    logits = to.mutable_data();
    sums = logsumexp.mutable_data();
    stride = (size_t)to.shape(1);
  }
};

constexpr int kMost = 1 << 28;  // of any one size: sums of a few stay within an int

Format checked_format(int format, int outputs, int inputs) {
  require(format >= (int)Format::f32 && format <= (int)Format::s8, "there is no such format");
  require(outputs > 0 && outputs <= kMost && inputs > 0 && inputs <= kMost, "a matrix has no such size");
  return (Format)format;
}

PyMatrix borrow(int format, int outputs, int inputs, py::buffer buffer) {
  const Format known = checked_format(format, outputs, inputs);
  const py::buffer_info info = buffer.request();
  require(PyBuffer_IsContiguous(info.view(), 'C'), "the bytes of a packed matrix lie apart");
  PyMatrix m{std::make_shared<Weights>(), buffer};
  m.weights->matrix = shape_of(known, outputs, inputs);
  const size_t needed = m.weights->matrix.panel_bytes * m.weights->matrix.num_panels;
  if ((size_t)(info.size * info.itemsize) != needed) throw std::invalid_argument("a packed matrix of this shape has other bytes");
  m.weights->matrix.data = static_cast<const uint8_t*>(info.ptr);
  return m;
}

// y [rows][outputs] of x [rows][inputs], by one kernel set and thread: what its tests look at
void multiply_rows(const Matrix& m, const Kernels& kernels, const float* x, int num_rows, float* y) {
  const bool digits = m.format == Format::s8;
  const size_t padded = (size_t)m.padded_inputs, groups = padded / m.padding(), outputs = (size_t)m.num_panels * kLanes;
  const size_t stride = padded * (digits ? 2 : 1), biased = groups * (digits ? 2 : 1);
  std::vector<float> values(num_rows * padded + kLanes), scales(num_rows), out(num_rows * outputs);
  std::vector<RowGroup> rounded(num_rows * groups);
  std::vector<int8_t> quantized(round_up(num_rows, 8) * stride + 64);
  std::vector<int32_t> biases(num_rows * biased);
  for (size_t r = 0; r < (size_t)num_rows; ++r) {
    std::copy_n(x + r * m.num_inputs, m.num_inputs, &values[r * padded]);
    if (digits)
      kernels.quantize_digits(&values[r * padded], (int)padded, &quantized[r * stride], &scales[r], &biases[r * biased]);
    else
      kernels.quantize(&values[r * padded], (int)padded, &quantized[r * stride], &rounded[r * groups]);
  }
  Rows rows;
  rows.values = values.data(), rows.stride = padded;
  rows.rounding = rounding_of(m.format);
  rows.quantized = quantized.data(), rows.quantized_stride = stride;
  rows.groups = rounded.data(), rows.scales = scales.data(), rows.biases = biases.data(), rows.group_stride = biased;
  kernels.multiply(m, 0, m.num_panels, rows, num_rows, {out.data(), outputs, false, 1.0f}, {});
  for (size_t r = 0; r < (size_t)num_rows; ++r) std::copy_n(&out[r * outputs], m.num_outputs, y + r * m.num_outputs);
}

bool is_sized(const Weights& w, int outputs, int inputs) {
  return w.is_set() && w.matrix.num_outputs == outputs && w.matrix.num_inputs == inputs;
}

int inputs_of(const Config& c, int place) {
  require(place >= 0 && place < kPlaces, "a layer has no such map");
  return place == kOutput ? c.num_heads * c.head_size : place == kDown ? c.mlp_width : c.width;
}

int outputs_of(const Config& c, int place) {
  return place == kQkv ? (c.num_heads + 2 * c.num_kv_heads) * c.head_size : place == kGateUp ? 2 * c.mlp_width : c.width;
}

void check(const Config& c, int num_threads) {
  bool sound = true;
  for (int size : {c.vocab_size, c.width, c.mlp_width, c.num_layers, c.num_heads, c.num_kv_heads, c.head_size})
    sound = sound && size > 0 && size <= kMost;
  sound = sound && (int64_t)(c.num_heads + 2 * (int64_t)c.num_kv_heads) * c.head_size <= kMost && c.num_layers <= 1 << 16;
  require(sound && c.num_heads % c.num_kv_heads == 0, "a model has no such sizes");
  require(c.head_size % 2 == 0 && (int)c.frequencies.size() == c.head_size / 2, "a frequency for each two of a head is needed");
  require(num_threads >= 1 && num_threads <= 4096, "a model has from 1 to 4,096 threads");
}

bool is_complete(const Model& m) {
  bool sound = m.embedding.is_set() && !m.norm.empty();
  for (const Layer& layer : m.layers) {
    sound = sound && !layer.attention_norm.empty();
    for (const Weights& w : layer.maps) sound = sound && w.is_set();
  }
  return sound;
}

// whatever would reach beyond memory; everything else is the caller's business
void check(const Config& config, const IntArray& tokens, const IntArray& positions, const std::vector<Span>& spans, const Cache& cache,
           const std::vector<int>& adapted, const std::vector<int>& asked) {
  const int n = (int)tokens.size();
  bool sound = n > 0 && positions.size() == n && cache.is_of(config);
  for (int i = 0; sound && i < n; ++i)
    sound = tokens.data()[i] >= 0 && tokens.data()[i] < config.vocab_size && positions.data()[i] >= 0 && positions.data()[i] < 1 << 24;
  int64_t covered = 0;
  for (const Span& s : spans) {
    sound = sound && s.start == covered && s.length > 0 && s.cached >= 0 && s.first_position >= 0 && s.first_position % kLanes == 0 &&
            (int64_t)s.first_position + s.cached + s.length <= cache.num_positions();
    covered += s.length;
  }
  for (int i : asked) sound = sound && i >= 0 && i < n;
  int before = -1;
  for (int i : adapted) {  // each once, in order: what follows one another is one run
    sound = sound && i > before && i < n;
    before = i;
  }
  if (!sound || covered != n) throw std::invalid_argument("a forward names tokens, inputs or cache positions that do not exist");
}

// none, or so many
std::vector<float> floats(const py::object& array, int size) {
  if (array.is_none()) return {};
  const FloatArray values = FloatArray::ensure(array);
  if (!values) throw py::error_already_set();
  require(values.size() == size, "a vector has another length");
  return {values.data(), values.data() + values.size()};
}

// padded for kernels that read 16 at a time
std::vector<float> padded(const py::object& array, int size) {
  std::vector<float> values = floats(array, size);
  require(!values.empty(), "a norm is needed");
  values.resize((values.size() + 15) / 16 * 16, 0.0f);
  return values;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* k : usable_kernels()) names.push_back(k->name);
    return names;
  });

  py::class_<PyMatrix>(m, "Matrix")
      .def(py::init([](int format, int outputs, int inputs) {
        return PyMatrix{std::make_shared<Weights>(make_weights(checked_format(format, outputs, inputs), outputs, inputs)), py::none()};
      }))
      .def_static("borrow", &borrow)
      .def("pack_floats",
           [](PyMatrix& self, int first, FloatArray rows) {
             const Matrix& m = self.weights->matrix;
             require(self.borrowed.is_none() && rows.ndim() == 2 && rows.shape(1) == m.num_inputs && first >= 0 &&
                         rows.shape(0) <= m.num_outputs - first,
                     "rows that a matrix has not, or of another length");
             const int count = (int)rows.shape(0);
             py::gil_scoped_release release;
             pack_floats(*self.weights, first, count, rows.data());
           })
      .def("pack_blocks",
           [](PyMatrix& self, int encoding, std::vector<int> order, py::buffer raw) {
             const py::buffer_info info = raw.request();
             const Matrix& m = self.weights->matrix;
             const bool is_u4 = encoding == (int)Blocks::q4_0 || encoding == (int)Blocks::q4_1;
             require(is_u4 ? m.format == Format::u4 || m.format == Format::s8
                           : encoding == (int)Blocks::q8_0 && (m.format == Format::u8 || m.format == Format::s8),
                     "blocks of another encoding than the matrix");
             bool sound = self.borrowed.is_none() && m.num_inputs % kGroup == 0 && PyBuffer_IsContiguous(info.view(), 'C') &&
                          (size_t)(info.size * info.itemsize) == order.size() * row_bytes((Blocks)encoding, m.num_inputs);
             for (int row : order) sound = sound && row >= 0 && row < m.num_outputs;
             require(sound, "rows that a matrix has not, or of another length");
             py::gil_scoped_release release;
             pack_blocks(*self.weights, (Blocks)encoding, order, static_cast<const uint8_t*>(info.ptr));
           })
      .def("row",
           [](const PyMatrix& self, int row) {
             require(row >= 0 && row < self.weights->matrix.num_outputs, "a matrix has no such row");
             py::array_t<float> out(self.weights->matrix.num_inputs);
             unpack_row(self.weights->matrix, row, out.mutable_data());
             return out;
           })
      .def_property_readonly("kind",
                             [](const PyMatrix& self) {
                               switch (self.weights->matrix.format) {
                                 case Format::f32: return "float32";
                                 case Format::bf16: return "bfloat16";
                                 case Format::u8: return "u8";
                                 case Format::s8: return "s8";
                                 default: return "u4";
                               }
                             })
      .def_property_readonly("num_outputs", [](const PyMatrix& self) { return self.weights->matrix.num_outputs; })
      .def_property_readonly("num_inputs", [](const PyMatrix& self) { return self.weights->matrix.num_inputs; })
      .def("multiply",
           [](const PyMatrix& self, FloatArray x, const std::string& kernels) {
             if (x.ndim() != 2 || x.shape(1) != self.weights->matrix.num_inputs)
               throw std::invalid_argument("rows [n, " + std::to_string(self.weights->matrix.num_inputs) + "] are needed");
             py::array_t<float> out({x.shape(0), (py::ssize_t)self.weights->matrix.num_outputs});
             multiply_rows(self.weights->matrix, *kernels_named(kernels), x.data(), (int)x.shape(0), out.mutable_data());
             return out;
           })
      .def_property_readonly("num_bytes",
                             [](const PyMatrix& self) { return self.weights->matrix.panel_bytes * self.weights->matrix.num_panels; })
      .def("view", [](py::object self) {
        const Weights& w = *self.cast<PyMatrix&>().weights;
        return py::array_t<uint8_t>((py::ssize_t)(w.matrix.panel_bytes * w.matrix.num_panels), w.matrix.data, self);
      });

  py::class_<Cache>(m, "Cache")
      .def("copy",
           [](Cache& self, int source, int target, int count) {
             for (int64_t place : {source, target})
               require(place >= 0 && place % kLanes == 0 && count >= 0 && place + count <= self.num_positions(), "a cache has no such places");
             py::gil_scoped_release release;
             self.copy(source, target, count);
           })
      .def_property_readonly("num_bytes", &Cache::num_bytes);

  py::class_<Model>(m, "Model")
      .def(py::init([](int vocab_size, int width, int mlp_width, int num_layers, int num_heads, int num_kv_heads, int head_size,
                       float norm_eps, float rope_scale, float llama4_beta, int original_positions, FloatArray frequencies,
                       int num_threads, const std::string& kernels) {
        Config c{vocab_size, width,       mlp_width,          num_layers,         num_heads, num_kv_heads, head_size, norm_eps,
                 rope_scale, llama4_beta, original_positions, floats(frequencies, (int)frequencies.size())};
        check(c, num_threads);
        require(original_positions > 0, "a model has no such sizes");
        return std::make_unique<Model>(std::move(c), num_threads, kernels_named(kernels));
      }))
      .def("make_cache",
           [](const Model& self, int num_positions, bool is_half) {
             require(num_positions > 0 && num_positions <= kMost, "a cache has no such size");
             return std::make_unique<Cache>(self.config, num_positions, is_half);
           })
      .def("set_embedding",
           [](Model& self, const PyMatrix& w) {
             require(is_sized(*w.weights, self.config.vocab_size, self.config.width), "the embedding has another size");
             self.embedding = *w.weights;
           },
           py::keep_alive<1, 2>())
      .def("set_head",
           [](Model& self, const PyMatrix& w) {
             require(is_sized(*w.weights, self.config.vocab_size, self.config.width), "the head has another size");
             self.output_head = *w.weights;
           },
           py::keep_alive<1, 2>())
      .def("set_norm", [](Model& self, py::object w) { self.norm = padded(w, self.config.width); })
      .def("set_norms",
           [](Model& self, int layer, py::object attention, py::object mlp, py::object q, py::object k) {
             Layer& into = self.layers.at(layer);
             into.attention_norm = padded(attention, self.config.width);
             into.mlp_norm = padded(mlp, self.config.width);
             into.q_norm = floats(q, self.config.head_size);
             into.k_norm = floats(k, self.config.head_size);
           })
      .def("set_map",
           [](Model& self, int layer, int place, const PyMatrix& w, py::object bias) {
             const int inputs = inputs_of(self.config, place), outputs = outputs_of(self.config, place);
             require(is_sized(*w.weights, outputs, inputs), "a map has another size");
             self.layers.at(layer).maps[place] = *w.weights;
             self.layers.at(layer).biases[place] = floats(bias, outputs);
           },
           py::keep_alive<1, 4>())
      .def("set_adapter",
           [](Model& self, int layer, int place, const PyMatrix& a, const std::vector<std::tuple<PyMatrix, int, int>>& parts) {
             const int inputs = inputs_of(self.config, place), outputs = outputs_of(self.config, place);
             const Matrix& low = a.weights->matrix;
             // low numbers are rounded in whole groups
             require(is_sized(*a.weights, low.num_outputs, inputs) && low.num_outputs % kGroup == 0 && !parts.empty(),
                     "an adapter has another size");
             AdapterGroup group{*a.weights, {}};
             for (const auto& [b, column, output] : parts) {
               const Matrix& m = b.weights->matrix;
               require(column >= 0 && column % m.padding() == 0 && m.padded_inputs <= round_up(low.num_outputs, m.padding()) - column && output >= 0 &&
                           m.num_outputs <= outputs - output,
                       "an adapter has another size");
               group.parts.push_back({*b.weights, column, output});
             }
             self.layers.at(layer).adapters[place] = std::move(group);
           },
           py::keep_alive<1, 4>(), py::keep_alive<1, 5>())
      .def("set_adapter_scale",
           [](Model& self, float scale, py::object mask_embedding) {
             self.mask_embedding = floats(mask_embedding, self.config.width);
             self.adapter_scale = scale;
           })
      .def("run",
           [](Model& self, IntArray tokens, IntArray positions, const std::vector<std::tuple<int, int, int, int, py::object>>& spans,
              Cache& cache, const std::vector<int>& adapted, const std::vector<int>& asked, int but, const std::optional<FloatRoom>& logits,
              const std::optional<FloatRoom>& logsumexp) {
             std::vector<Span> rows;
             std::vector<py::array_t<uint8_t>> visible;  // kept while the forward reads them
             for (const auto& [start, length, first, cached, seen] : spans) {
               Span span{start, length, first, cached, nullptr};
               if (!seen.is_none()) {
                 visible.push_back(py::array_t<uint8_t, py::array::c_style>::ensure(seen));
                 require((bool)visible.back() && visible.back().size() == (py::ssize_t)length * length, "a view has another size");
                 span.visible = visible.back().data();
               }
               rows.push_back(span);
             }
             require(is_complete(self), "the model lacks weights");
             check(self.config, tokens, positions, rows, cache, adapted, asked);
             py::array_t<float> hidden({(py::ssize_t)asked.size(), (py::ssize_t)self.config.width});
             float* const out = hidden.mutable_data();
             std::vector<int> best;
             std::optional<HeadRoom> room;
             if (logits && logsumexp) room.emplace(self.config, asked.size(), *logits, *logsumexp), best.resize(asked.size());
             {
               py::gil_scoped_release release;
               self.run(tokens.data(), positions.data(), (int)tokens.size(), rows, cache, adapted, asked, out);
               if (room) self.head(out, (int)best.size(), but, room->logits, room->stride, best.data(), room->sums);
             }
             return py::make_tuple(hidden, best);
           },
           py::arg("tokens"), py::arg("positions"), py::arg("spans"), py::arg("cache"), py::arg("adapted"), py::arg("asked"),
           py::arg("but") = -1, py::arg("logits").noconvert() = py::none(), py::arg("logsumexp").noconvert() = py::none())
      .def("head",
           [](Model& self, FloatArray hidden, int but, FloatRoom logits, FloatRoom logsumexp) {
             require(self.embedding.is_set() && hidden.ndim() == 2 && hidden.shape(1) == self.config.width && hidden.shape(0) <= kMost,
                     "hidden states of another width");
             const HeadRoom room(self.config, (size_t)hidden.shape(0), logits, logsumexp);
             std::vector<int> best(hidden.shape(0));
             {
               py::gil_scoped_release release;
               self.head(hidden.data(), (int)best.size(), but, room.logits, room.stride, best.data(), room.sums);
             }
             return best;
           },
           py::arg("hidden"), py::arg("but"), py::arg("logits").noconvert(), py::arg("logsumexp").noconvert())
      .def("set_successor",
           [](Model& self, const PyMatrix& from_hidden, const PyMatrix& from_before, const PyMatrix& outer) {
             const int R = from_hidden.weights->matrix.num_outputs, D = self.config.width;
             require(is_sized(*from_hidden.weights, R, D) && is_sized(*from_before.weights, R, D) && is_sized(*outer.weights, D, R),
                     "a successor has another size");
             for (const PyMatrix* m : {&from_hidden, &from_before, &outer})
               require(m->weights->matrix.format <= Format::bf16, "a successor is not made of integers");
             self.successor = {*from_hidden.weights, *from_before.weights, *outer.weights};
           },
           py::keep_alive<1, 2>(), py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
      .def("rescore",
           [](Model& self, FloatArray hidden, FloatArray logits, int before, int but, int count) {
             require(self.embedding.is_set() && self.successor.outer.is_set(), "the model has no successor");
             const Config& c = self.config;
             require(hidden.size() == c.width && logits.size() == c.vocab_size && before >= 0 && before < c.vocab_size && count > 0 &&
                         count < c.vocab_size,
                     "a mask of another model");
             py::array_t<int> tokens(count);
             py::array_t<float> scores(count);
             int* const t = tokens.mutable_data();
             float* const s = scores.mutable_data();
             {
               py::gil_scoped_release release;
               self.rescore(hidden.data(), logits.data(), before, but, count, t, s);
             }
             return py::make_tuple(tokens, scores);
           })
      .def("draft",
           [](Model& self, FloatArray hidden, py::array_t<float> logits, int before, int but, int count) {
             require(self.embedding.is_set() && self.successor.outer.is_set(), "the model has no successor");
             const Config& c = self.config;
             require(hidden.ndim() == 2 && hidden.shape(1) == c.width && logits.ndim() == 2 && logits.shape(0) == hidden.shape(0) &&
                         logits.shape(1) == c.vocab_size && logits.strides(1) == 4 && logits.strides(0) % 4 == 0 && before >= 0 &&
                         before < c.vocab_size && count > 0 && count < c.vocab_size,
                     "masks of another model");
             const int num = (int)hidden.shape(0);
             const size_t stride = (size_t)logits.strides(0) / 4;
             py::array_t<int> drafts(num);
             py::array_t<float> probabilities(num);
             int* const d = drafts.mutable_data();
             float* const p = probabilities.mutable_data();
             {
               py::gil_scoped_release release;
               self.draft(hidden.data(), num, logits.data(), stride, before, but, count, d, p);
             }
             return py::make_tuple(drafts, probabilities);
           },
           py::arg("hidden"), py::arg("logits").noconvert(), py::arg("before"), py::arg("but"), py::arg("count"))
      .def_readwrite("rounds_activations", &Model::rounds_activations)
      .def_property_readonly("num_threads", &Model::num_threads)
      .def_property_readonly("kernels", [](const Model& self) { return self.kernels->name; });
}
