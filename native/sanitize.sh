#!/usr/bin/env bash
# The kernel's own tests, and the property tests of its doors, under the address and undefined-behaviour sanitizers.
# CXX is the compiler, `python` one that has the project and its tests installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

cxx=${CXX:-c++}
flags=(-std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra
  -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
  -Inative/include -Itests/native -pthread)
isas=(baseline)
if [[ $(uname -m) == x86_64 ]]; then
  isas+=(x86_64_v3 x86_64_v4)
  flags+=(-DCHAINRULE_HAS_X86_64_V3 -DCHAINRULE_HAS_X86_64_V4)
fi

jobs=()
compile() {
  "$cxx" "${flags[@]}" "${@:3}" -c "$1" -o "$build/$2.o" &
  jobs+=($!)
}
for isa in "${isas[@]}"; do
  march=()
  [[ $isa == baseline ]] || march=("-march=${isa//_v/-v}")
  compile native/kernels.cc "kernels_$isa" -DCHAINRULE_ISA="$isa" "${march[@]/x86_64/x86-64}"
done
compile native/choose.cc choose
for test in tests/native/*.cc; do compile "$test" "$(basename "$test" .cc)"; done
for job in "${jobs[@]}"; do wait "$job"; done
"$cxx" "${flags[@]}" "$build"/*.o -o "$build/tests"

# The module as `pip install` builds it, but sanitized, in the place of the one that is installed.
sanitize="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
cmake -S . -B "$build/module" -DPython_EXECUTABLE="$(command -v python)" -DCMAKE_CXX_COMPILER="$cxx" \
  -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="$sanitize" >"$build/cmake.log" || { cat "$build/cmake.log"; exit 1; }
cmake --build "$build/module" --parallel >"$build/cmake.log" || { cat "$build/cmake.log"; exit 1; }
# Python itself is not sanitized, so the runtime comes first. It and JAX free with one allocator what another made, and
# leave memory to the end of the process.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)" \
  CHAINRULE_KERNEL="$(echo "$build"/module/_kernel.*)" CHAINRULE_EXAMPLES=300 PYTHONPATH=tests \
  python -m pytest -p kernel_from -n 0 -q tests/native/test_properties.py tests/native/test_bad_input.py
"$build/tests"
