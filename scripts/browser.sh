#!/bin/sh
# Make sure that the cockpit's page can be tested in a browser: Debian's Chromium. Safe to run again; never fails the build,
# because those tests are skipped, with the reason, where there is none.
set -u

can_browse() {
    for name in chromium chromium-browser google-chrome; do
        # Ubuntu's chromium-browser may be a stub that only says where to get one.
        command -v "$name" >/dev/null 2>&1 && "$name" --version >/dev/null 2>&1 && return 0
    done
    return 1
}

package="chromium"
if can_browse; then
    echo "browser: it is there"
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "browser: there is no Chromium, and this is not a Debian system. Install one for the tests of the cockpit's page; they are skipped without."
    exit 0
fi
if [ "$(id -u)" = 0 ]; then
    as_root=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "browser: no permission to install $package. Ask an administrator for 'apt-get install $package' to have the cockpit's page tested; those tests are skipped without."
    exit 0
fi
echo "browser: installing $package"
if $as_root apt-get install -y -qq --no-install-recommends $package >/dev/null 2>&1; then
    :
elif $as_root apt-get update -qq >/dev/null && $as_root apt-get install -y -qq --no-install-recommends $package >/dev/null; then
    :
fi
if can_browse; then
    echo "browser: ready"
else
    echo "browser: installing $package did not work (see above). The tests of the cockpit's page are skipped; everything else works."
fi
