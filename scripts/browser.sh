#!/bin/sh
# Make sure that the cockpit's page can be tested in a browser: Debian's Chromium. Safe to run again; never fails the build,
# because those tests are skipped, with the reason, where there is none.
set -u
. "$(dirname "$0")/debian.sh"

can_browse() {
    for browser in chromium chromium-browser google-chrome; do
        # Ubuntu's chromium-browser may be a stub that only says where to get one.
        command -v "$browser" >/dev/null 2>&1 && "$browser" --version >/dev/null 2>&1 && return 0
    done
    return 1
}

bring browser can_browse chromium "there is no Chromium" "the tests of the cockpit's page" \
    "the page's tests are skipped, and everything else works"
