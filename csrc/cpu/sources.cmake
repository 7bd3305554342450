# Declares jax_flash_cpu. Every file kernels_<set>.cc is the same source compiled for one instruction set, of which one is
# chosen at run time; the portable one is built everywhere.
set(cpu_sources launch.cc kvcache.cc pages.cc parallel.cc plan.cc kernels_portable.cc)

# -O3 in every build type: the kernels rely on loops being unrolled. -Wpsabi is about vectors that cross a library's
# boundary; these do not.
set(cpu_kernel_flags -O3 -fno-math-errno -fno-trapping-math -Wno-psabi)
set(cpu_portable_flags "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND cpu_sources kernels_avx2.cc kernels_avx512.cc kernels_avx512bf16.cc)
  set(cpu_avx2_flags -mavx2 -mfma -mf16c)
  set(cpu_avx512_flags ${cpu_avx2_flags} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  set(cpu_avx512bf16_flags ${cpu_avx512_flags} -mavx512bf16)
endif()

list(TRANSFORM cpu_sources PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
foreach(source IN LISTS cpu_sources)
  if(source MATCHES "kernels_([a-z0-9]+)\\.cc$")
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${cpu_kernel_flags};${cpu_${CMAKE_MATCH_1}_flags}")
  endif()
endforeach()

add_library(jax_flash_cpu STATIC ${cpu_sources})
target_link_libraries(jax_flash_cpu PRIVATE jax_flash_options)
