#define MANYLORA_ISA portable
#define MANYLORA_TABLE kPortableKernels
#include "kernels.inl"
