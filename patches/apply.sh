#!/usr/bin/env bash
# Puts the patches of the matching release into a Megatron-LM checkout.
#
#   patches/apply.sh MEGATRON_LM_DIR
#
# Every patch is checked before the first one is written; what was written is taken back if a later
# one fails or a patched script is no Python any more.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "patches/apply.sh: error: $*" >&2
    exit 1
}

if [ $# -ne 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [ $# -eq 1 ] && exit 0 || exit 2
fi
info=$1/megatron/core/package_info.py
[ -f "$info" ] || fail "no megatron/core/package_info.py in $1; expected a Megatron-LM checkout"
release=$(sed -n 's/^\(MAJOR\|MINOR\) = \([0-9]*\)$/\2/p' "$info" | paste -sd.)
folder=$(find "$here" -maxdepth 1 -name "core_v$release.*")
known=$(cd "$here" && echo core_v*)
[ -n "$folder" ] || fail "$1 is Megatron $release, and the patches are for ${known// /, }; start the \
unmodified script with -m megatron_mile.launch instead"
cd "$1"

# Relative to this folder, even where it lies inside another repository.
export GIT_CEILING_DIRECTORIES=${PWD%/*}
for patch in "$folder"/*.patch; do
    git apply --reverse --check "$patch" 2>/dev/null && fail "${patch##*/} is there already"
    git apply --check "$patch" || fail "${patch##*/} does not fit; nothing was changed"
done

applied=()
undo() {
    for patch in "${applied[@]}"; do
        git apply --reverse "$patch"
    done
    fail "taken back: $*"
}
for patch in "$folder"/*.patch; do
    git apply "$patch" || undo "${patch##*/} could not be written"
    applied=("$patch" "${applied[@]}")
done
for script in $(sed -n 's|^+++ b/||p' "$folder"/*.patch); do
    python3 -c 'import ast, sys; ast.parse(open(sys.argv[1]).read())' "$script" 2>/dev/null ||
        undo "$script is no Python afterwards"
    echo "$script: patched for ${folder##*/}; --mile flags work with plain torchrun now"
done
