#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c")
#endif

#define TRIMODE_NAME "avx2"
#include "lanes_avx2.h"

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const trimode::Kernels* trimode::kernels_avx2() { return &kKernels; }
#else
const trimode::Kernels* trimode::kernels_avx2() { return nullptr; }
#endif
