#define MANYLORA_ISA amx
#define MANYLORA_TABLE kAmxKernels
#include "kernels.inl"
