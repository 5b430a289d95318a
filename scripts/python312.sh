#!/bin/sh
# Print the path of a Python 3.12 that runs and can make virtual environments; print nothing if there is none.
# Each candidate is tried: a pyenv shim, for example, is there for every version and runs only one that was chosen.
set -u

works() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

candidates() {
    command -v python3.12
    if command -v pyenv >/dev/null 2>&1; then
        prefix=$(pyenv prefix "$(pyenv latest 3.12 2>/dev/null)" 2>/dev/null) && echo "$prefix/bin/python"
    fi
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python 2>/dev/null | sort -r
    if command -v uv >/dev/null 2>&1; then
        uv python find --no-python-downloads 3.12 2>/dev/null
    fi
    command -v python3
}

candidates | while read -r candidate; do
    if works "$candidate"; then
        echo "$candidate"
        break
    fi
done
