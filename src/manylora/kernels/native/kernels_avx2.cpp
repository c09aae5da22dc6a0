#define MANYLORA_ISA avx2
#define MANYLORA_TABLE kAvx2Kernels
#include "kernels.inl"
