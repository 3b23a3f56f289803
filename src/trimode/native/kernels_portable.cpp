#include "kernels.h"

#define TRIMODE_NAME "portable"
#include "lanes_portable.h"

#include "kernels.inl"

const trimode::Kernels* trimode::kernels_portable() { return &kKernels; }
