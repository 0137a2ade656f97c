#!/bin/sh
# One stage of `make setup`: install.sh VENV STAGE, with STAGE python, torch or an extra of
# pyproject.toml. Prints one line with the time; what pip says goes to build/setup-STAGE.log.
# A stage may run again at any time: it installs what is missing, also after one that was killed.

venv=$1 stage=$2 log=build/setup-$2.log

work() {
    case $stage in
        python) is_whole 2>/dev/null || "$python" -m venv --clear "$venv" ;;
        torch) install torch ;;
        *) install --editable ".[$stage]" ;;
    esac
}

# pip notes its name in INSTALLER as the last but one file of a package, its own package too.
is_whole() {
    "$venv/bin/python" -c 'import importlib.metadata, sys
assert sys.version_info >= (3, 12) and importlib.metadata.distribution("pip").read_text("INSTALLER")'
}

install() {
    # Left by a pip that was killed; the next one would take them for installed.
    for package in "$venv"/lib/python3*/site-packages/*.dist-info; do
        [ -e "$package/INSTALLER" ] || rm -rf "$package"
    done
    "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt "$@"
}

case $stage in
    python)
        python=$("$(dirname "$0")/find_python.sh") || exit
        title="Python in $venv"
        ;;
    torch) title="PyTorch, most of the download" ;;
    *) title="what $stage needs" ;;
esac

mkdir -p build
printf 'setup: %s ... ' "$title"
started=$(date +%s)
work >"$log" 2>&1 </dev/null
status=$?
if [ "$status" -eq 0 ]; then
    echo "$(($(date +%s) - started)) s"
    touch "$venv/.setup-$stage"
else
    echo failed
    echo "setup: error: $title: status $status; $log ends with: $(grep . "$log" | tail -n 1)" >&2
fi
exit "$status"
