// The launchers of stages (i) and (iii), and of the whole forward pass: what memory they want, and which path they take.
#include "fast.cuh"
#include "finish.cuh"
#include "generic.cuh"
#include "positive_sums.cuh"

namespace proac::cuda {

namespace {

// Hands out pieces of the workspace; with a null base it only counts them.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}
  void* take(size_t bytes) {
    char* piece = base_ ? base_ + used_ : nullptr;
    used_ += (bytes + 255) / 256 * 256;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

size_t compute_size(Type type) { return type == Type::float64 ? 8 : 4; }
size_t element_size(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// One image instead of many where their pixels follow each other at one stride, in `x` and in what is written beside it.
bool continues(const Features& x) { return x.stride_batch == x.pixels * x.stride_pixel; }
void flatten(Features& x, Features* other) {
  if (x.batch <= 1 || !continues(x) || (other && other->data && !continues(*other))) return;
  for (Features* f : {&x, other})
    if (f) f->pixels *= f->batch, f->batch = 1;
}

struct StatisticsPlan {
  bool fast;
  FastPlan fast_plan;
  int blocks;
  void *unit, *split, *partial;
  Counters counters;  // the diagnostics, then those of the merge
  size_t bytes;
};

StatisticsPlan plan(const ClassStatistics& a) {
  StatisticsPlan p = {};
  int64_t classes = a.pixels.num_classes, channels = a.features.channels;
  size_t size = compute_size(a.features.type);
  p.fast = plan_fast(a.features, classes, FastStage::statistics, p.fast_plan);
  p.blocks = p.fast ? p.fast_plan.blocks : generic_blocks(a.features, classes);
  Pieces pieces(a.workspace);
  p.unit = p.fast ? nullptr : pieces.take(classes * channels * size);
  p.split = p.fast ? pieces.take(2 * p.fast_plan.rows * p.fast_plan.channels * element_size(a.features.type)) : nullptr;
  p.partial = pieces.take(static_cast<size_t>(p.blocks) * kPartialRows * classes * size);
  p.counters.count = static_cast<int>(sizeof(Diagnostics)) / 4 + merge_counters(p.blocks);
  p.counters.word = static_cast<unsigned*>(pieces.take(p.counters.count * sizeof(unsigned)));
  p.bytes = pieces.used();
  return p;
}

struct GradientsPlan {
  bool fast;
  FastPlan fast_plan;
  int blocks;  // of the plain path
  void *unit, *norm, *split, *factors, *coefficients;
  PrototypeSums sums;
  size_t bytes;
};

GradientsPlan plan(const LossGradients& a) {
  GradientsPlan p = {};
  int64_t classes = a.pixels.num_classes, channels = a.features.channels;
  size_t size = compute_size(a.features.type);
  p.fast = plan_fast(a.features, classes,
                     a.grad_prototypes ? FastStage::gradients_and_prototypes : FastStage::gradients, p.fast_plan);
  p.blocks = generic_blocks(a.features, classes);
  Pieces pieces(a.workspace);
  p.factors = pieces.take(kFactorRows * classes * size);
  p.split = p.fast ? pieces.take(2 * p.fast_plan.rows * p.fast_plan.channels * element_size(a.features.type)) : nullptr;
  if (!p.fast || a.grad_prototypes) p.unit = pieces.take(classes * channels * size);
  if (!p.fast) p.coefficients = pieces.take(static_cast<size_t>(p.blocks) * kGenericPixels * classes * size);
  if (a.grad_prototypes) {
    p.norm = pieces.take(classes * size);
    p.sums.sum = static_cast<unsigned long long*>(pieces.take(classes * channels * sizeof(*p.sums.sum)));
    p.sums.bad = static_cast<int*>(pieces.take(classes * sizeof(*p.sums.bad)));
  }
  p.bytes = pieces.used();
  return p;
}

}  // namespace

// Which outputs are wanted counts, not where they lie.
size_t workspace_bytes(const ClassStatistics& a) {
  ClassStatistics shape = a;
  shape.workspace = nullptr;
  flatten(shape.features, nullptr);
  return plan(shape).bytes;
}

size_t workspace_bytes(const LossGradients& a) {
  LossGradients shape = a;
  shape.workspace = nullptr;
  flatten(shape.features, &shape.grad_features);
  return plan(shape).bytes;
}

// `more`: counters of a later launch.
static cudaError_t class_statistics(const ClassStatistics& call, Counters more, cudaStream_t stream) {
  ClassStatistics a = call;
  flatten(a.features, nullptr);
  StatisticsPlan p = plan(a);
  Type type = a.features.type;
  Prepare first = {};
  first.prototypes = a.prototypes;
  first.num_classes = static_cast<int>(a.pixels.num_classes);
  first.channels = static_cast<int>(a.features.channels);
  first.unit = p.unit;
  first.split = p.split;
  first.split_rows = p.fast ? p.fast_plan.rows : 0;
  first.split_channels = p.fast ? p.fast_plan.channels : 0;
  first.counters[0] = p.counters;
  first.counters[1] = more;
  cudaError_t error = prepare(first, type, stream);
  if (error != cudaSuccess) return error;
  MergeStatistics merge = {p.partial, p.counters.word + sizeof(Diagnostics) / 4,
                           reinterpret_cast<Diagnostics*>(p.counters.word), a.statistics, a.diagnostics};
  if (p.fast) {
    FastStatistics job = {{a.features, a.pixels, a.sampling, p.fast_plan, p.split, a.temperature, a.pixel_anchor},
                          a.hardest_negative,
                          a.positive,
                          merge};
    return fast_statistics(job, stream);
  }
  GenericStatistics job = {a.features, a.pixels,      a.sampling,     tile_pixels(a.features, kGenericPixels),
                           p.unit,     a.temperature, a.pixel_anchor, a.hardest_negative,
                           a.positive, merge};
  return generic_statistics(job, p.blocks, stream);
}

cudaError_t run(const ClassStatistics& a, cudaStream_t stream) { return class_statistics(a, {}, stream); }

size_t workspace_bytes(const LossForward& a) { return workspace_bytes(a.statistics) + workspace_bytes(a.sums); }

cudaError_t run(const LossForward& call, cudaStream_t stream) {
  LossForward a = call;
  a.statistics.workspace = a.workspace;
  a.sums.workspace = static_cast<char*>(a.workspace) + workspace_bytes(a.statistics);
  cudaError_t error = class_statistics(a.statistics, counters_of(a.sums), stream);
  return error != cudaSuccess ? error : positive_sums(a.sums, &a.loss, stream);
}

cudaError_t run(const LossGradients& call, cudaStream_t stream) {
  LossGradients a = call;
  flatten(a.features, &a.grad_features);
  GradientsPlan p = plan(a);
  Type type = a.features.type;
  int classes = static_cast<int>(a.pixels.num_classes), channels = static_cast<int>(a.features.channels);
  if (!a.grad_features.data && !a.grad_prototypes) return cudaSuccess;
  Prepare first = {};
  first.prototypes = a.prototypes;
  first.num_classes = classes;
  first.channels = channels;
  first.unit = p.unit;
  first.norm = p.norm;
  first.split = p.split;
  first.split_rows = p.fast ? p.fast_plan.rows : 0;
  first.split_channels = p.fast ? p.fast_plan.channels : 0;
  first.factors = p.factors;
  first.sums = p.sums;
  first.statistics = a.statistics;
  first.positive_sums = a.sums;
  first.class_weight = a.class_weight;
  first.grad_loss = a.grad_loss;
  first.grad_loss_stride = a.grad_loss_stride;
  first.temperature = a.temperature;
  first.pixel_anchor_weight = a.pixel_anchor_weight;
  first.reduction = a.reduction;
  first.negative_mean = a.negative_mean;
  cudaError_t error = prepare(first, type, stream);
  if (error != cudaSuccess) return error;
  bool pixel_anchor = a.pixel_anchor_weight != 0;
  if (p.fast) {
    FastGradients job = {{a.features, a.pixels, a.sampling, p.fast_plan, p.split, a.temperature, pixel_anchor},
                         p.factors,
                         a.grad_features,
                         is_aligned(a.grad_features, p.fast_plan.pixels_first),
                         p.sums};
    error = fast_gradients(job, stream);
  } else {
    GenericGradients job = {a.features,     a.pixels,        a.sampling,    tile_pixels(a.features, kGenericPixels),
                            p.unit,         p.factors,       a.temperature, pixel_anchor,
                            p.coefficients, a.grad_features, p.sums};
    error = generic_gradients(job, p.blocks, stream);
  }
  if (error != cudaSuccess || !a.grad_prototypes) return error;
  return finish_prototypes({p.sums, classes, channels, p.unit, p.norm, p.factors, a.grad_prototypes}, type, stream);
}

Features describe_features(void* data, Type type, int spatial_axes, const int64_t* shape, const int64_t* strides) {
  Features x = {data, type, shape[0], shape[1], 1, strides[0], strides[1], 1};
  bool found = false;
  for (int axis = spatial_axes + 1; axis >= 2; --axis) {
    x.pixels *= shape[axis];
    if (!found && shape[axis] != 1)
      x.stride_pixel = strides[axis], found = true;  // the stride of an axis of size 1 means nothing
  }
  if (x.channels == 1) x.stride_channel = found && x.stride_pixel == 1 ? x.pixels : 1;
  if (!found && x.channels > 1 && x.stride_channel == 1) x.stride_pixel = x.channels;
  return x;
}

Pixels describe_pixels(const void* label, LabelType label_type, const void* weight, int spatial_axes,
                       const int64_t* feature_spatial, const int64_t* label_shape, const int64_t* label_strides,
                       const int64_t* weight_strides, int64_t num_classes, int64_t ignore_index, bool nearest_exact) {
  Pixels s = {label,       label_type,   weight,       0,         {1, 1, 1},
              {1, 1, 1},   {0, 0, 0, 0}, {0, 0, 0, 0}, {1, 1, 1}, nearest_exact ? 0.5f : 0.0f,
              num_classes, ignore_index};
  s.count = label_shape[0];
  s.label_stride[0] = label_strides[0];
  s.weight_stride[0] = weight ? weight_strides[0] : 0;
  for (int axis = 0; axis < spatial_axes; ++axis) {
    int to = 3 - spatial_axes + axis;
    s.size[to] = feature_spatial[axis];
    s.label_size[to] = label_shape[axis + 1];
    s.label_stride[to + 1] = label_strides[axis + 1];
    s.weight_stride[to + 1] = weight ? weight_strides[axis + 1] : 0;
    s.scale[to] = static_cast<float>(s.label_size[to]) / static_cast<float>(s.size[to]);
    s.count *= feature_spatial[axis];
  }
  return s;
}

}  // namespace proac::cuda
