// The CUDA launchers, compiled for the CPU, on numpy arrays. 16-bit features come as uint16 with the name of their type.
#include <dlfcn.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "fast.cuh"
#include "on_cpu.h"
#include "portable.cuh"

namespace py = pybind11;
using namespace proac::cuda;
using Array = py::array;
using Maybe = std::optional<py::array>;

static std::vector<int64_t> strides_of(const Array& a) {
  std::vector<int64_t> s;
  for (int i = 0; i < a.ndim(); ++i) s.push_back(a.strides(i) / a.itemsize());
  return s;
}
static std::vector<int64_t> shape_of(const Array& a) { return {a.shape(), a.shape() + a.ndim()}; }
static void* data_of(const Array& a) { return const_cast<void*>(a.data()); }
static void* data_of(const Maybe& a) { return a ? data_of(*a) : nullptr; }

static Type type_of(const std::string& name) {
  if (name == "float16") return Type::float16;
  if (name == "bfloat16") return Type::bfloat16;
  return name == "float32" ? Type::float32 : Type::float64;
}
static LabelType label_type_of(const Array& a) {
  return a.itemsize() == 1   ? LabelType::uint8
         : a.itemsize() == 2 ? LabelType::int16
         : a.itemsize() == 4 ? LabelType::int32
                             : LabelType::int64;
}
static Array make(const Array& like, std::vector<int64_t> shape) {
  return Array(like.dtype(), std::vector<py::ssize_t>(shape.begin(), shape.end()));
}

// Memory as cudaMalloc gives it: aligned, of exactly this size, and full of NaN.
struct Workspace {
  explicit Workspace(size_t bytes) : bytes(bytes) {
    if (posix_memalign(&data, 256, bytes ? bytes : 1)) throw std::bad_alloc();
    memset(data, 0xFF, bytes);
  }
  ~Workspace() { free(data); }
  void* data;
  size_t bytes;
};
static std::vector<std::pair<size_t, size_t>>& workspaces() {
  static std::vector<std::pair<size_t, size_t>> w;
  return w;
}

template <class Stage>
static void run_stage(Stage& stage) {
  Workspace workspace(workspace_bytes(stage));
  stage.workspace = workspace.data;
  workspaces().push_back({reinterpret_cast<size_t>(workspace.data), workspace.bytes});
  if (run(stage, nullptr) != cudaSuccess) throw std::runtime_error("launch failed");
}

static Features features_of(const Array& x, const std::string& type) {
  auto shape = shape_of(x), strides = strides_of(x);
  return describe_features(data_of(x), type_of(type), static_cast<int>(x.ndim()) - 2, shape.data(), strides.data());
}
static Pixels pixels_of(const Array& labels, const Maybe& weight, const std::vector<int64_t>& spatial,
                        int64_t num_classes, int64_t ignore_index, bool nearest_exact) {
  auto shape = shape_of(labels), strides = strides_of(labels);
  auto weight_strides = weight ? strides_of(*weight) : strides;
  return describe_pixels(data_of(labels), label_type_of(labels), data_of(weight), static_cast<int>(spatial.size()),
                         spatial.data(), shape.data(), strides.data(), weight_strides.data(), num_classes, ignore_index,
                         nearest_exact);
}
static std::vector<int64_t> spatial_of(const Array& x, int first) {
  auto s = shape_of(x);
  return {s.begin() + first, s.end()};
}
static Sampling sampling_of(const Maybe& thresholds, const Maybe& rng) {
  if (!thresholds) return {nullptr, nullptr};
  return {static_cast<const int64_t*>(data_of(thresholds)), static_cast<const int64_t*>(data_of(rng))};
}
static Array int64_array(std::vector<py::ssize_t> shape) { return Array(py::dtype::of<int64_t>(), shape); }

static Array select_negatives(std::vector<int64_t> spatial, bool is_double, Array labels, Maybe weight, Array rng,
                              int64_t num_negatives, int64_t num_classes, int64_t ignore_index, bool nearest_exact) {
  Array thresholds = int64_array({num_classes, 2});
  SelectNegatives stage = {pixels_of(labels, weight, spatial, num_classes, ignore_index, nearest_exact),
                           is_double ? Type::float64 : Type::float32,
                           static_cast<const int64_t*>(rng.data()),
                           num_negatives,
                           static_cast<int64_t*>(data_of(thresholds)),
                           nullptr};
  run_stage(stage);
  return thresholds;
}
namespace {
// Stage (i) and what it leaves.
struct Forward {
  Forward(const Array& features, const std::string& type, const Array& labels, const Maybe& weight,
          const Array& prototypes, const Maybe& thresholds, const Maybe& rng, double temperature, int64_t ignore_index,
          bool pixel_anchor, bool hardest, bool nearest_exact)
      : statistics(make(prototypes, {kNumStatistics, prototypes.shape(0)})), diagnostics(int64_array({4})) {
    auto shape = spatial_of(features, 2);
    stage.statistics = {features_of(features, type),
                        pixels_of(labels, weight, shape, prototypes.shape(0), ignore_index, nearest_exact),
                        sampling_of(thresholds, rng),
                        prototypes.data(),
                        temperature,
                        pixel_anchor,
                        hardest,
                        data_of(statistics),
                        nullptr,
                        static_cast<int64_t*>(data_of(diagnostics)),
                        nullptr};
    shape.insert(shape.begin(), features.shape(0));
    positive = make(prototypes, shape);
    stage.statistics.positive = data_of(positive);
  }
  Array statistics, positive, diagnostics;
  LossForward stage = {};
};
}  // namespace
static PositiveSums sums_stage(const Array& positive, const Array& labels, const Maybe& weight, const Array& statistics,
                               int64_t ignore_index, bool negative_mean, bool nearest_exact, const Array& sums) {
  return {pixels_of(labels, weight, spatial_of(positive, 1), statistics.shape(1), ignore_index, nearest_exact),
          statistics.itemsize() == 8 ? Type::float64 : Type::float32,
          positive.data(),
          statistics.data(),
          negative_mean,
          data_of(sums),
          nullptr};
}
static ReduceLoss loss_stage(const Array& statistics, const Array& sums, const Maybe& class_weight,
                             double pixel_anchor_weight, int reduction, const Array& loss) {
  return {statistics.itemsize() == 8 ? Type::float64 : Type::float32,
          statistics.shape(1),
          statistics.data(),
          sums.data(),
          data_of(class_weight),
          pixel_anchor_weight,
          reduction,
          data_of(loss)};
}
static py::tuple class_statistics(Array features, std::string type, Array labels, Maybe weight, Array prototypes,
                                  Maybe thresholds, Maybe rng, double temperature, int64_t ignore_index,
                                  bool pixel_anchor, bool hardest, bool nearest_exact) {
  Forward f(features, type, labels, weight, prototypes, thresholds, rng, temperature, ignore_index, pixel_anchor,
            hardest, nearest_exact);
  run_stage(f.stage.statistics);
  return py::make_tuple(f.statistics, f.positive, f.diagnostics);
}
static Array positive_sums(Array positive, Array labels, Maybe weight, Array statistics, int64_t ignore_index,
                           bool negative_mean, bool nearest_exact) {
  Array sums = make(statistics, {2, statistics.shape(1)});
  PositiveSums stage =
      sums_stage(positive, labels, weight, statistics, ignore_index, negative_mean, nearest_exact, sums);
  run_stage(stage);
  return sums;
}
static Array reduce_loss(Array statistics, Array sums, Maybe class_weight, double pixel_anchor_weight, int reduction) {
  Array loss = reduction == kNone ? make(statistics, {statistics.shape(1)}) : make(statistics, {});
  ReduceLoss stage = loss_stage(statistics, sums, class_weight, pixel_anchor_weight, reduction, loss);
  if (run(stage, nullptr) != cudaSuccess) throw std::runtime_error("launch failed");
  return loss;
}
static py::tuple loss_forward(Array features, std::string type, Array labels, Maybe weight, Array prototypes,
                              Maybe class_weight, Maybe thresholds, Maybe rng, double temperature, int64_t ignore_index,
                              bool negative_mean, double pixel_anchor_weight, int reduction, bool hardest,
                              bool nearest_exact) {
  Forward f(features, type, labels, weight, prototypes, thresholds, rng, temperature, ignore_index,
            pixel_anchor_weight != 0, hardest, nearest_exact);
  Array sums = make(prototypes, {2, prototypes.shape(0)}),
        loss = reduction == kNone ? make(prototypes, {prototypes.shape(0)}) : make(prototypes, {});
  f.stage.sums = sums_stage(f.positive, labels, weight, f.statistics, ignore_index, negative_mean, nearest_exact, sums);
  f.stage.loss = loss_stage(f.statistics, sums, class_weight, pixel_anchor_weight, reduction, loss);
  run_stage(f.stage);
  return py::make_tuple(loss, f.statistics, sums, f.diagnostics, f.positive);
}
static void loss_gradients(Array features, std::string type, Array labels, Maybe weight, Array prototypes,
                           Maybe thresholds, Maybe rng, Array statistics, Array sums, Maybe class_weight,
                           Array grad_loss, double temperature, int64_t ignore_index, bool negative_mean,
                           double pixel_anchor_weight, int reduction, bool nearest_exact, Maybe grad_features,
                           Maybe grad_prototypes) {
  LossGradients stage = {
      features_of(features, type),
      pixels_of(labels, weight, spatial_of(features, 2), prototypes.shape(0), ignore_index, nearest_exact),
      sampling_of(thresholds, rng),
      prototypes.data(),
      statistics.data(),
      sums.data(),
      data_of(class_weight),
      grad_loss.data(),
      grad_loss.ndim() ? strides_of(grad_loss)[0] : 0,
      temperature,
      negative_mean,
      pixel_anchor_weight,
      reduction,
      {},
      data_of(grad_prototypes),
      nullptr};
  if (grad_features) stage.grad_features = features_of(*grad_features, type);
  run_stage(stage);
}

static void set_options(int order, uint64_t seed, size_t shared_limit, int multiprocessors, int mutant) {
  auto& o = on_cpu::options();
  o.order = order, o.seed = seed, o.shared_limit = shared_limit, o.multiprocessors = multiprocessors, o.mutant = mutant;
  on_cpu::dynamic_shared_limits().clear();  // of another device
}
static py::list take_launches() {
  py::list out;
  for (auto& l : on_cpu::launches()) {
    Dl_info info;
    std::string name = dladdr(l.kernel, &info) && info.dli_sname ? info.dli_sname : "";
    out.append(py::make_tuple(name, l.blocks, l.threads, l.shared, py::bytes(l.arguments)));
  }
  on_cpu::launches().clear();
  return out;
}
static std::vector<std::pair<size_t, size_t>> take_workspaces() {
  auto w = workspaces();
  workspaces().clear();
  return w;
}

// A launch whose struct has a pointer's bytes around its fields, as a stack may leave them there.
struct Padded {
  void* pointer;
  bool flag;
};
static void padded_kernel(Padded) {}
static void launch_padded(size_t pointer) {
  alignas(Padded) char memory[sizeof(Padded)];
  for (size_t at = 0; at < sizeof memory; at += sizeof pointer) memcpy(memory + at, &pointer, sizeof pointer);
  Padded* arguments = reinterpret_cast<Padded*>(memory);
  arguments->flag = false;
  start(padded_kernel, 1, 1, 0, nullptr, *arguments);
}

PYBIND11_MODULE(cuda_on_cpu, m) {
  // How the fast path would cut a call, as {name: number}; empty where it does not take it.
  m.def("plan", [](const std::string& type, int64_t channels, int64_t pixels, bool channels_last, int64_t num_classes,
                   int stage) {
    Features x = {nullptr,
                  type_of(type),
                  1,
                  channels,
                  pixels,
                  channels * pixels,
                  channels_last ? 1 : pixels,
                  channels_last ? channels : 1};
    FastPlan p = {};
    std::map<std::string, int64_t> out;
    if (plan_fast(x, num_classes, static_cast<FastStage>(stage), p))
      out = {{"pixels", p.tile_pixels}, {"threads", p.threads},   {"classes", p.classes}, {"stages", p.stages},
             {"slots", p.slots},        {"resident", p.resident}, {"aligned", p.aligned}, {"shared", p.shared_bytes},
             {"blocks", p.blocks_each}, {"rows", p.rows}};
    return out;
  });

  m.def("select_negatives", select_negatives);
  m.def("class_statistics", class_statistics);
  m.def("positive_sums", positive_sums);
  m.def("reduce_loss", reduce_loss);
  m.def("loss_forward", loss_forward);
  m.def("loss_gradients", loss_gradients);
  m.def("set_options", set_options, py::arg("order") = 2, py::arg("seed") = 1, py::arg("shared_limit") = 227 << 10,
        py::arg("multiprocessors") = 132, py::arg("mutant") = 0);
  m.def("launch_padded", launch_padded);
  m.def("take_launches", take_launches);
  m.def("take_workspaces", take_workspaces);
}
