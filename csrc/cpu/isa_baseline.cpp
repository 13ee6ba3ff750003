// The kernels for any CPU: vectors of 16 bytes.
#define PROAC_ISA baseline
#define PROAC_ISA_NAME "baseline"
#define PROAC_VECTOR_BYTES 16
#include "isa.h"
