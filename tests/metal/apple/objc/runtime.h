// What metal-cpp needs of Apple's headers, on a machine that has none of them.
#pragma once

#include <cmath>  // metal-cpp uses INFINITY
#include <cstddef>
#include <cstdint>

typedef void* Class;
typedef void* Protocol;
typedef const struct objc_selector* SEL;
struct objc_object {
  Class isa;
};
typedef objc_object* id;

extern "C" {
Class objc_lookUpClass(const char* name);
Protocol objc_getProtocol(const char* name);
SEL sel_registerName(const char* name);
}
