// DSO_BEGIN_TARGET(features) and DSO_END_TARGET: functions between them are compiled for another instruction set than the rest
// of the file. Macros of the features, such as __AVXVNNI__, are the file's to define: clang's attribute defines none, nor does
// GCC's pragma before GCC 13.
#pragma once

#define DSO_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define DSO_BEGIN_TARGET(features) DSO_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DSO_END_TARGET _Pragma("clang attribute pop")
#else
#define DSO_BEGIN_TARGET(features) _Pragma("GCC push_options") DSO_PRAGMA(GCC target(features))
#define DSO_END_TARGET _Pragma("GCC pop_options")
#endif
