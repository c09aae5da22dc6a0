#define MANYLORA_ISA avx512vnni
#define MANYLORA_TABLE kAvx512VnniKernels
#include "kernels.inl"
