#include "kernels.h"

// compilers know these tiles since GCC 11 and Clang 12
#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")
#endif

#define TRIMODE_NAME "amx"
#define TRIMODE_TILES
#include "lanes_avx512.h"

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif

const trimode::Kernels* trimode::kernels_amx() { return &kKernels; }
#else
const trimode::Kernels* trimode::kernels_amx() { return nullptr; }
#endif
