// The kernels for AVX-512 F, BW, DQ and VL.
#define PROAC_ISA avx512
#define PROAC_ISA_NAME "avx512"
#define PROAC_VECTOR_BYTES 64
#include "isa.h"
