// The kernels for the CPU at hand.
#pragma once

#include "kernels.h"

namespace proac {

// Throws std::runtime_error where PROAC_CPU_ISA asks for what cannot run here.
const Kernels& cpu_kernels();

}  // namespace proac
