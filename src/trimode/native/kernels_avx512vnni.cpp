#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif

#define TRIMODE_NAME "avx512vnni"
#include "lanes_avx512.h"

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const trimode::Kernels* trimode::kernels_avx512vnni() { return &kKernels; }
#else
const trimode::Kernels* trimode::kernels_avx512vnni() { return nullptr; }
#endif
