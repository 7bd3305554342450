# Finds the CUDA compiler and declares the kernels. Sets JAX_FLASH_CUDA_FOUND, JAX_FLASH_CUDA_ARCHITECTURES and the target
# jax_flash_cuda.
set(JAX_FLASH_CUDA_FOUND OFF)
set(JAX_FLASH_CUDA_ARCHITECTURES "")
if(JAX_FLASH_CUDA STREQUAL "OFF")
  return()
endif()

# nvcc from PyPI (nvidia-cuda-nvcc and friends, added with -C build.requires=...) lies in the build environment's site-packages.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; s = u.find_spec('nvidia'); print(';'.join(s.submodule_search_locations) if s else '')"
  OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE nvidia_packages COMMAND_ERROR_IS_FATAL ANY)
if(NOT CMAKE_CUDA_COMPILER)
  foreach(folder IN LISTS nvidia_packages)
    foreach(toolkit IN ITEMS cu13 cuda_nvcc)
      if(EXISTS "${folder}/${toolkit}/bin/nvcc")
        set(CMAKE_CUDA_COMPILER "${folder}/${toolkit}/bin/nvcc")
        string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${folder}/${toolkit}/lib")
      endif()
    endforeach()
  endforeach()
endif()

# The sm_80 class runs from Ampere to consumer Blackwell (the PTX serves what is newer than its machine code); sm_90a is Hopper alone.
set(JAX_FLASH_SM80_ARCHITECTURES 80-real 86-real 89-real 90-real 90-virtual CACHE STRING "What the sm_80 class is compiled for")
set(CMAKE_CUDA_ARCHITECTURES 80-real)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(JAX_FLASH_CUDA STREQUAL "ON")
    message(FATAL_ERROR "JAX_FLASH_CUDA=ON, but no CUDA compiler was found. Install the CUDA toolkit (12.4 or newer, not 12.8.0-12.9.0) and put "
      "nvcc on PATH, or take nvcc from PyPI: pip install . -C cmake.define.JAX_FLASH_CUDA=ON "
      "-C build.requires='nvidia-cuda-nvcc==13.0.88;nvidia-nvvm==13.0.88;nvidia-cuda-crt==13.0.88;nvidia-cuda-cccl==13.0.85;nvidia-cuda-runtime==13.0.96'")
  endif()
  message(STATUS "No CUDA compiler found: building the CPU kernels only")
  return()
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

function(jax_flash_kernels name architectures)
  add_library(${name} OBJECT ${ARGN})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}")
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v --expt-relaxed-constexpr>)
  target_link_libraries(${name} PRIVATE jax_flash_options)
endfunction()

# The sources of a kernel's instances, one for each element type and head-dim bucket in ARGN: `kernel` is its folder in csrc/cuda,
# `namespace` and `params` the types in its launch.cuh.
function(jax_flash_instances sources kernel namespace params)
  foreach(element IN ITEMS Float16 BFloat16)
    foreach(bucket IN LISTS ARGN)
      set(file "${CMAKE_CURRENT_BINARY_DIR}/instances/${kernel}/${element}_${bucket}.cu")
      configure_file(csrc/cuda/instance.cu.in "${file}" @ONLY)
      list(APPEND files "${file}")
    endforeach()
  endforeach()
  set(${sources} ${files} PARENT_SCOPE)
endfunction()

jax_flash_instances(sm80_forward sm80/forward sm80 ForwardParams 64 96 128 192 256)
jax_flash_instances(sm80_backward sm80/backward sm80 BackwardParams 64 96 128 192 256)
jax_flash_instances(sm90_forward sm90/forward sm90 ForwardParams 64 96 128 192 256)
jax_flash_instances(sm90_backward sm90/backward sm90 BackwardParams 64 96 128 192 256)
jax_flash_instances(decode kvcache/decode decode KvcacheParams 64 128 256)

jax_flash_kernels(jax_flash_sm80 "${JAX_FLASH_SM80_ARCHITECTURES}" csrc/cuda/sm80/launch.cu csrc/cuda/kvcache/decode/launch.cu
  csrc/cuda/kvcache/prefill/prefill.cu ${sm80_forward} ${sm80_backward} ${decode})
jax_flash_kernels(jax_flash_sm90 90a-real csrc/cuda/sm90/forward/launch.cu csrc/cuda/sm90/backward/launch.cu ${sm90_forward} ${sm90_backward})

add_library(jax_flash_cuda STATIC csrc/cuda/launchers.cc csrc/cuda/device.cc)
target_include_directories(jax_flash_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(jax_flash_cuda PRIVATE jax_flash_options PUBLIC jax_flash_sm80 jax_flash_sm90)
set_target_properties(jax_flash_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CUDA CUDA_ARCHITECTURES 80-real)
set(JAX_FLASH_CUDA_FOUND ON)
# For build_info(): "80 86 89 90 ptx 90a".
set(architectures ${JAX_FLASH_SM80_ARCHITECTURES} 90a-real)
list(TRANSFORM architectures REPLACE "-real$" "")
list(TRANSFORM architectures REPLACE "^.*-virtual$" "ptx")
list(JOIN architectures " " JAX_FLASH_CUDA_ARCHITECTURES)
