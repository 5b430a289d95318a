#!/bin/sh
# Make sure that frames can be drawn without a screen: EGL or OSMesa, for MuJoCo. Safe to run again; never fails the build,
# because everything but videos works without.
set -u
python=${1:-python3}

can_draw() {
    "$python" - <<'PYTHON'
import ctypes.util, sys
sys.exit(0 if any(ctypes.util.find_library(name) for name in ("EGL", "OSMesa")) else 1)
PYTHON
}

packages="libegl1 libgl1-mesa-dri"
if can_draw; then
    echo "rendering: the library is there"
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "rendering: neither EGL nor OSMesa is installed, and this is not a Debian system. Install one of them for videos; everything else works without."
    exit 0
fi
if [ "$(id -u)" = 0 ]; then
    as_root=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "rendering: no permission to install $packages. Ask an administrator for 'apt-get install $packages' to have videos; everything else works without."
    exit 0
fi
echo "rendering: installing $packages"
if $as_root apt-get install -y -qq --no-install-recommends $packages >/dev/null 2>&1; then
    :
elif $as_root apt-get update -qq >/dev/null && $as_root apt-get install -y -qq --no-install-recommends $packages >/dev/null; then
    :
fi
if can_draw; then
    echo "rendering: ready"
else
    echo "rendering: installing $packages did not work (see above). Videos will be left out; everything else works."
fi
