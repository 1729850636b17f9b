# The kernels as a static library, shared by the Python extension and the test program in csrc/tests.
function(freehold_add_kernels target)
  set(kernels ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/kernels)
  set(sources ${kernels}/ops.cpp ${kernels}/threads.cpp ${kernels}/select.cpp ${kernels}/isa_scalar.cpp)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    list(APPEND sources ${kernels}/isa_avx2.cpp ${kernels}/isa_avx512.cpp)
    set_source_files_properties(${kernels}/isa_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;-mbmi2")
    set_source_files_properties(${kernels}/isa_avx512.cpp PROPERTIES COMPILE_OPTIONS
      "-mavx2;-mfma;-mf16c;-mbmi2;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mprefer-vector-width=512;$<$<CXX_COMPILER_ID:GNU>:-Wno-uninitialized;-Wno-maybe-uninitialized>") # GCC 12 warns of its own header
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
    list(APPEND sources ${kernels}/isa_neon.cpp)
    set_source_files_properties(${kernels}/isa_neon.cpp PROPERTIES COMPILE_OPTIONS "-march=armv8.2-a+dotprod")
  endif()
  add_library(${target} STATIC ${sources})
  target_include_directories(${target} PUBLIC ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  target_compile_features(${target} PUBLIC cxx_std_20)
  # Sums must come out the same in every function that forms them, so the compiler may not fuse what we did not.
  target_compile_options(${target} PRIVATE -O3 -ffp-contract=off -Wall -Wextra -Werror=return-type)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  target_link_libraries(${target} PUBLIC Threads::Threads)
endfunction()
