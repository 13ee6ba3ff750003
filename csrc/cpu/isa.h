// All kernels of one instruction set, and their table. Include it once in a translation unit, after defining PROAC_ISA and
// PROAC_VECTOR_BYTES.
#pragma once

#include "gradients.h"
#include "keys.h"
#include "positives.h"

namespace proac::PROAC_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    PROAC_ISA_NAME,
    PROAC_VECTOR_BYTES,
    kHasTileUnit,
    {class_statistics<float>, class_statistics<double>, class_statistics<Half>, class_statistics<BFloat16>},
    {positive_sums<float>, positive_sums<double>},
    {loss_gradients<float>, loss_gradients<double>, loss_gradients<Half>, loss_gradients<BFloat16>},
    count_keys,
    collect_keys,
};

}  // namespace proac::PROAC_ISA
