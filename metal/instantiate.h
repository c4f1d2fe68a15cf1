#pragma once

/// Compiles a kernel for weights of type `T`, under the name that the host asks for, such as
/// "lut_assign_half".
#define MILPRESS_INSTANTIATE(name, T) \
  template [[host_name(#name "_" #T)]] [[kernel]] decltype(name<T>) name<T>;
