#define MANYLORA_ISA avx512
#define MANYLORA_TABLE kAvx512Kernels
#include "kernels.inl"
