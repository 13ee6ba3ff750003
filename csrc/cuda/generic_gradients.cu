#include "generic.cuh"

namespace proac::cuda {

// dL/dS_ki / tau, (8) to (10), of 64 classes: from tile.s into the block's coefficients. `others` is the sum of softmax over the
// other classes, 1 - softmax of the own class, of which a difference would leave nothing where it is near 1.
template <class C>
__device__ void write_coefficients(const GenericGradients& a, const GenericTile<C>& tile, C* coefficients, int k0,
                                   const C* pixel_log_z, const C* others) {
  int num_classes = static_cast<int>(a.pixels.num_classes);
  const C* factors = static_cast<const C*>(a.factors);
  for (int i = threadIdx.x; i < kGenericClasses * kGenericPixels; i += kGenericThreads) {
    int row = i % kGenericClasses, p = i / kGenericClasses, k = k0 + row;
    if (k >= num_classes) continue;
    C s = tile.s[row][p], g = C(0);
    if (tile.label[p] == k)
      g = -factors[kPositiveFactor * num_classes + k] * tile.weight[p] *
          sigmoid(factors[kContrast * num_classes + k] - s);
    else if (is_negative(tile, a.sampling, p, k))
      g = factors[kNegativeFactor * num_classes + k] *
          exp(s + tile.log_weight[p] - factors[kFactorLogZ * num_classes + k]);
    if (a.pixel_anchor && tile.label[p] >= 0)
      g += factors[kPixelFactor * num_classes] * tile.weight[p] *
           (tile.label[p] == k ? -others[p] : exp(s - pixel_log_z[p]));
    coefficients[static_cast<int64_t>(p) * num_classes + k] = g;
  }
}

// (11): 64 channels of the gradient of a tile's features.
template <class C, class T>
__device__ void write_gradient(const GenericGradients& a, GenericTile<C>& tile, const TilePlace& place,
                               const C* coefficients, const C* dot, int64_t d0) {
  int t = threadIdx.x, row = t / 16 * 4, column = t % 16 * 4, num_classes = static_cast<int>(a.pixels.num_classes);
  const C* unit = static_cast<const C*>(a.unit);
  C total[4][4] = {};
  for (int k0 = 0; k0 < num_classes; k0 += kGenericDepth) {
    SYNC_THREADS(generic_coefficients_are_free);
    for (int i = t; i < kGenericDepth * 64; i += kGenericThreads) {
      int k = i % kGenericDepth, p = i / kGenericDepth, d = i % 64, q = i / 64;
      tile.x[k][p] = k0 + k < num_classes ? coefficients[static_cast<int64_t>(p) * num_classes + k0 + k] : C(0);
      tile.p[q][d] =
          k0 + q < num_classes && d0 + d < a.features.channels ? unit[(k0 + q) * a.features.channels + d0 + d] : C(0);
    }
    SYNC_THREADS(generic_coefficients_are_filled);
    for (int k = 0; k < kGenericDepth; ++k)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) total[i][j] += tile.p[k][row + i] * tile.x[k][column + j];
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) tile.s[row + i][column + j] = total[i][j];
  SYNC_THREADS(generic_gradient_is_complete);
  bool planes = a.grad.stride_pixel == 1;
  for (int i = t; i < 64 * 64; i += kGenericThreads) {
    int d = planes ? i / 64 : i % 64, p = planes ? i % 64 : i / 64;
    if (d0 + d >= a.features.channels || p >= place.pixels) continue;
    C inverse = tile.inverse_norm[p], grad = C(0);
    if (tile.label[p] >= 0 && inverse != C(0) &&
        a.features.channels > 1) {  // a direction in one dimension has no derivative
      C unit_x = load<C, T>(a.features, place.image, d0 + d, place.first + p) * inverse;
      grad = (tile.s[d][p] - dot[p] * unit_x) * inverse;
    }
    static_cast<T*>(a.grad.data)[place.image * a.grad.stride_batch + (d0 + d) * a.grad.stride_channel +
                                 (place.first + p) * a.grad.stride_pixel] = narrow<T>(grad);
  }
}

// sum_i dL/dS_ki / tau xhat_i of a tile, 64 classes and 64 channels, added to the sums.
template <class C, class T>
__device__ void add_prototype_gradient(const GenericGradients& a, GenericTile<C>& tile, const TilePlace& place,
                                       const C* coefficients, int k0, int64_t d0) {
  int t = threadIdx.x, row = t / 16 * 4, column = t % 16 * 4, num_classes = static_cast<int>(a.pixels.num_classes);
  C total[4][4] = {};
  bool planes = a.features.stride_pixel == 1;
  for (int p0 = 0; p0 < kGenericPixels; p0 += kGenericDepth) {
    SYNC_THREADS(generic_products_are_free);
    for (int i = t; i < kGenericDepth * 64; i += kGenericThreads) {
      int k = i % 64, p = i / 64;
      tile.p[p][k] = k0 + k < num_classes ? coefficients[static_cast<int64_t>(p0 + p) * num_classes + k0 + k] : C(0);
      int d = planes ? i / kGenericDepth : i % 64, q = planes ? i % kGenericDepth : i / 64;
      bool inside = d0 + d < a.features.channels && p0 + q < place.pixels && tile.label[p0 + q] >= 0;
      tile.x[q][d] =
          inside ? load<C, T>(a.features, place.image, d0 + d, place.first + p0 + q) * tile.inverse_norm[p0 + q] : C(0);
    }
    SYNC_THREADS(generic_products_are_filled);
    for (int p = 0; p < kGenericDepth; ++p)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) total[i][j] += tile.p[p][row + i] * tile.x[p][column + j];
  }
  for (int i = 0; i < 4; ++i) {
    int k = k0 + row + i;
    if (k >= num_classes) break;
    C scale = static_cast<const C*>(a.factors)[kSumScale * num_classes + k];
    for (int j = 0; j < 4; ++j)
      if (d0 + column + j < a.features.channels)
        add_term(a.sums, a.features.channels, k, d0 + column + j, total[i][j] * scale);
  }
}

// Stage (iii): load a tile -> S -> coefficients -> products with prototypes and with features.
template <class T>
__global__ void __launch_bounds__(kGenericThreads, 1) generic_gradients_kernel(GenericGradients a) {
  using C = Compute<T>;
  SHARED(GenericTile<C>, tile);
  SHARED(C[kGenericPixels], pixel_log_z);
  SHARED(C[kGenericPixels], others);
  SHARED(C[kGenericPixels], dot);
  int t = threadIdx.x, num_classes = static_cast<int>(a.pixels.num_classes);
  int64_t channels = a.features.channels;
  C inverse_tau = static_cast<C>(1.0 / a.temperature);
  const C* unit = static_cast<const C*>(a.unit);
  C* coefficients = static_cast<C*>(a.coefficients) + static_cast<int64_t>(blockIdx.x) * kGenericPixels * num_classes;
  for (int64_t n = blockIdx.x; n < a.tiling.count; n += gridDim.x) {
    TilePlace place = place_of(a.tiling, a.features, n);
    SYNC_THREADS(generic_tile_is_free);
    read_generic_tile<C, T>(tile, a.features, a.pixels, a.sampling, place, nullptr);
    if (a.pixel_anchor) {
      LogSum<C> own = empty_sum<C>(), rest = empty_sum<C>();
      for (int k0 = 0; k0 < num_classes; k0 += kGenericClasses) {
        similarities<C, T>(tile, a.features, unit, num_classes, place, k0, inverse_tau);
        for (int r = 0; t < kGenericPixels && r < kGenericClasses && k0 + r < num_classes; ++r)
          (tile.label[t] == k0 + r ? own : rest) =
              merge(tile.label[t] == k0 + r ? own : rest, LogSum<C>{tile.s[r][t], C(1)});
      }
      if (t < kGenericPixels) {
        pixel_log_z[t] = value(merge(own, rest));
        others[t] = exp(value(rest) - pixel_log_z[t]);
      }
    }
    C along = C(0);  // <g_i, xhat_i> of pixel t = tau sum_k (dL/dS_ki / tau) S_ki
    for (int k0 = 0; k0 < num_classes; k0 += kGenericClasses) {
      similarities<C, T>(tile, a.features, unit, num_classes, place, k0, inverse_tau);
      write_coefficients(a, tile, coefficients, k0, pixel_log_z, others);
      SYNC_THREADS(generic_coefficients_are_written);
      for (int r = 0; t < kGenericPixels && r < kGenericClasses && k0 + r < num_classes; ++r)
        along += coefficients[static_cast<int64_t>(t) * num_classes + k0 + r] * tile.s[r][t];
    }
    if (t < kGenericPixels) dot[t] = along * static_cast<C>(a.temperature);
    for (int64_t d0 = 0; d0 < channels; d0 += 64) {
      if (a.grad.data) write_gradient<C, T>(a, tile, place, coefficients, dot, d0);
      for (int k0 = 0; a.sums.sum && k0 < num_classes; k0 += 64)
        add_prototype_gradient<C, T>(a, tile, place, coefficients, k0, d0);
    }
  }
}

cudaError_t generic_gradients(const GenericGradients& a, int blocks, cudaStream_t stream) {
  switch (a.features.type) {
    case Type::float16:
      return launch(generic_gradients_kernel<__half>, blocks, kGenericThreads, 0, stream, a);
    case Type::bfloat16:
      return launch(generic_gradients_kernel<__nv_bfloat16>, blocks, kGenericThreads, 0, stream, a);
    case Type::float32:
      return launch(generic_gradients_kernel<float>, blocks, kGenericThreads, 0, stream, a);
    default:
      return launch(generic_gradients_kernel<double>, blocks, kGenericThreads, 0, stream, a);
  }
}

}  // namespace proac::cuda
