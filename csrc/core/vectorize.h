#pragma once

/// Marks a function whose plain loops are compiled twice on x86-64, for the third level of its
/// instruction set (AVX2, FMA, F16C) and for the baseline; the loader picks one, so that one wheel
/// runs everywhere. Helpers called in the loop must be inline. Clang does not clone templates yet,
/// and sanitizers instrument the resolver before they are ready for it: both get the baseline.
#if defined(__x86_64__) && defined(__ELF__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MILPRESS_VECTORIZE __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define MILPRESS_VECTORIZE
#endif
