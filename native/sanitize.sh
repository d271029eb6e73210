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
