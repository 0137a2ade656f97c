#!/bin/sh
# Prints the path of a Python >= 3.12 that can make a virtual environment; install.sh uses it.
# Order: $PYTHON, any 3.12 (the version tested), then later ones, on the PATH and among pyenv's.
# Each candidate is run, because names on the PATH may be pyenv shims of versions not selected.

probe='import sys, ctypes, ensurepip, ssl, venv, zlib
assert sys.version_info >= (3, 12)
print(sys.executable)'

usable() {
    "$1" -c "$probe" 2>/dev/null
}

# pyenv NAMES: the interpreters of pyenv's versions that match, newest first.
pyenv() {
    for python in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/$1/bin/python; do
        echo "$python"
    done | sort -rV
}

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && exit
    echo "PYTHON=$PYTHON is no Python >= 3.12 with venv and pip; looking for another" >&2
fi
IFS='
'
for candidate in python3.12 $(pyenv '3.12*') python3.13 python3.14 python3.15 python3 \
    $(pyenv '3.1[3-9]*'); do
    usable "$candidate" && exit
done
echo "No Python >= 3.12 with venv found: install one ('sudo apt install python3.12-venv'," \
    "'pyenv install 3.12' or 'uv python install 3.12'), or name it: make setup PYTHON=PATH" >&2
exit 1
