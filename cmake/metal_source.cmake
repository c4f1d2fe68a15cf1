# Sets `metal_source` to a file that holds all kernels as one string.
set(metal_source ${PROJECT_BINARY_DIR}/metal_source.cpp)
file(GLOB metal_files CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/metal/*)
add_custom_command(OUTPUT ${metal_source}
  COMMAND ${CMAKE_COMMAND} -DOUT=${metal_source} -DDIR=${PROJECT_SOURCE_DIR}/metal
    -P ${PROJECT_SOURCE_DIR}/cmake/embed_metal.cmake
  DEPENDS ${metal_files} ${PROJECT_SOURCE_DIR}/cmake/embed_metal.cmake)
