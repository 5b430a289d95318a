#!/bin/sh
# Make sure that frames can be drawn without a screen: EGL or OSMesa, for MuJoCo. Safe to run again; never fails the build,
# because everything but videos works without.
set -u
python=${1:-python3}
. "$(dirname "$0")/debian.sh"

can_draw() {
    "$python" - <<'PYTHON'
import ctypes.util, sys
sys.exit(0 if any(ctypes.util.find_library(name) for name in ("EGL", "OSMesa")) else 1)
PYTHON
}

bring rendering can_draw "libegl1 libgl1-mesa-dri" "neither EGL nor OSMesa is installed" videos "everything else works without"
