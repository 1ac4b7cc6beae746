# The kernels as a static library, without Python: for the module, and for csrc/check.cpp.
include(CheckCXXSourceCompiles)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

set(CMAKE_REQUIRED_FLAGS -std=c++17)
check_cxx_source_compiles("
  typedef float F __attribute__((vector_size(16)));
  typedef signed char B __attribute__((vector_size(4)));
  typedef int I __attribute__((vector_size(16)));
  int main() {
    F v = {1, 2, 3, 4};
    v = __builtin_shufflevector(v, v, 1, 0, 3, 2);
    B b = __builtin_convertvector(__builtin_convertvector(v, I), B);
    return b[0] - 2;
  }" OMEGA_COMPILER_OK)
check_cxx_source_compiles("
  #include <immintrin.h>
  __attribute__((target(\"avxvnni,avx2\")))
  __m256i f(__m256i a) { return _mm256_dpbusd_avx_epi32(a, a, a); }
  int main() { return 0; }" OMEGA_HAVE_AVXVNNI)
check_cxx_source_compiles("
  int main() {
    __asm__ volatile(\"tdpbssd %tmm2, %tmm1, %tmm0\");
    return 0;
  }" OMEGA_HAVE_AMX)
unset(CMAKE_REQUIRED_FLAGS)

find_package(Threads REQUIRED)
set(kernels ${CMAKE_CURRENT_LIST_DIR}/../csrc)
add_library(omega_kernels STATIC
  ${kernels}/cpu.cpp ${kernels}/pool.cpp ${kernels}/linear.cpp ${kernels}/product.cpp
  ${kernels}/rows.cpp ${kernels}/dense.cpp ${kernels}/block.cpp
  ${kernels}/isa_portable.cpp ${kernels}/isa_avx2.cpp ${kernels}/isa_avxvnni.cpp
  ${kernels}/isa_avx512.cpp ${kernels}/isa_amx.cpp ${kernels}/isa_pairs.cpp ${kernels}/isa_neon.cpp)
target_include_directories(omega_kernels PUBLIC ${kernels})
target_compile_features(omega_kernels PUBLIC cxx_std_17)
set_target_properties(omega_kernels PROPERTIES
  POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
# No contraction: every backend rounds after each operation, see docs/native.md.
target_compile_options(omega_kernels PRIVATE -O3 -ffp-contract=off -Wall -Wextra)
if(OMEGA_HAVE_AVXVNNI)
  target_compile_definitions(omega_kernels PRIVATE OMEGA_HAVE_AVXVNNI)
endif()
if(OMEGA_HAVE_AMX)
  target_compile_definitions(omega_kernels PRIVATE OMEGA_HAVE_AMX)
endif()
option(OMEGA_EMULATE_TILES "Check what needs a matrix unit on a CPU without one" OFF)
if(OMEGA_EMULATE_TILES)
  target_compile_definitions(omega_kernels PRIVATE OMEGA_EMULATE_TILES)
endif()
target_link_libraries(omega_kernels PUBLIC Threads::Threads)
