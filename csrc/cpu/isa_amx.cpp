// The kernels for AVX-512 with the tile unit, AMX, which 16-bit features and products of many classes make use of.
#define PROAC_ISA amx
#define PROAC_ISA_NAME "amx"
#define PROAC_VECTOR_BYTES 64
#include "isa.h"
