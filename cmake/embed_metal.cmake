# Writes the Metal sources as one string of C++: cmake -DOUT=... -DDIR=... -P embed_metal.cmake
# Headers come first, each once, as the compiler at run time knows no files.
set(headers params.h instantiate.h numeric.h float64.h)
file(GLOB sources RELATIVE ${DIR} ${DIR}/*.metal)
list(SORT sources)
set(text "")
foreach(name ${headers} ${sources})
  file(READ ${DIR}/${name} part)
  string(REGEX REPLACE "#pragma once" "" part "${part}")
  string(REGEX REPLACE "#include \"[a-z0-9_]+\\.h\"" "" part "${part}")
  if(part MATCHES "\\)metal\"")
    message(FATAL_ERROR "${name} must not hold the end of the string that it becomes")
  endif()
  string(APPEND text "#line 1 \"${name}\"\n${part}")
endforeach()
file(WRITE ${OUT}
  "namespace milpress::metal {\nextern const char* const kSource;\n"
  "const char* const kSource = R\"metal(\n${text})metal\";\n}  // namespace milpress::metal\n")
