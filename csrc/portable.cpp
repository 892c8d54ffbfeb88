// Symbols that a new compiler takes from the system, but that older systems lack. The library
// defines them itself, so that it loads wherever torch's own wheels do (manylinux_2_28), whichever
// compiler built it. `make dist` fails if one is missing here.
#include <features.h>

#include <new>
#include <sstream>

#ifdef __GLIBCXX__
// libstdc++ exports the default constructors of string streams from GCC 9 on; before, they were
// compiled into every program, as they are here.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();

// From GCC 11 on. std::allocator calls it if a size overflows.
namespace std {
__attribute__((visibility("hidden"), noreturn)) void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}
}  // namespace std
#endif

#ifdef __GLIBC__
// From glibc 2.32 on. std::shared_ptr counts without atomics while it is true, and with them while
// it is false, which is always correct.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif
