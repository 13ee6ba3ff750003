// The kernels for AVX2, FMA and F16C.
#define PROAC_ISA avx2
#define PROAC_ISA_NAME "avx2"
#define PROAC_VECTOR_BYTES 32
#include "isa.h"
