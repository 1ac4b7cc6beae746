// Switches instruction sets on for the code between the two macros, and for nothing else: what
// the standard headers define stays runnable on every CPU.
#pragma once

#define OMEGA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define OMEGA_TARGET_BEGIN(features) \
    OMEGA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define OMEGA_TARGET_END _Pragma("clang attribute pop")
#else
#define OMEGA_TARGET_BEGIN(features) \
    _Pragma("GCC push_options") OMEGA_PRAGMA(GCC target(features))
#define OMEGA_TARGET_END _Pragma("GCC pop_options")
#endif
