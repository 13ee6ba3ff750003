// What each barrier, each wait for asynchronous copies, and each order between blocks is there for. tests/cuda_mutants.py leaves out one at a time, and
// expects to see the kernels fail.
#pragma once

namespace proac::cuda {

enum class Barrier : int {
  none,
  warps_have_summed,  // block_sum
  // prepare.cu
  class_weights_are_read,
  weights_are_read,
  maxima_are_written,
  maxima_are_read,
  // merge.cuh
  row_is_written,
  arrivals_are_ordered,
  arrival_is_counted,
  weights_are_merged,
  // positive_sums.cu
  terms_are_free,
  terms_are_written,
  // select_negatives.cu
  warps_have_counted,
  bin_is_found,
  // the plain path
  generic_maxima_are_written,
  generic_squares_are_written,
  generic_slices_are_free,
  generic_slices_are_filled,
  generic_similarities_are_written,
  generic_pixels_are_free,
  generic_terms_are_written,
  generic_coefficients_are_free,
  generic_coefficients_are_filled,
  generic_gradient_is_complete,
  generic_products_are_free,
  generic_products_are_filled,
  generic_tile_is_free,
  generic_coefficients_are_written,
  // the fast path
  copies_of_stage_have_arrived,
  stage_has_arrived,  // for all threads; and nobody reads the slot of the stage before it any more
  tile_is_free,
  ring_is_free,
  parts_are_written,
  block_is_done,
  tile_is_written,
  gradient_ring_is_free,
  copies_of_prototypes_have_arrived,
  prototypes_have_arrived,
  gradient_is_complete,
  scratch_is_free,
  coefficients_are_written,
  count
};

}  // namespace proac::cuda
