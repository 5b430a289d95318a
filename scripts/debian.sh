# Sourced by the scripts beside it: bring a Debian system's packages where they are missing. Never fails the build.
#
# bring NAME CHECK PACKAGES MISSING PURPOSE WITHOUT
#   NAME      said before every line
#   CHECK     a command that succeeds once it is there
#   PACKAGES  to be installed
#   MISSING, PURPOSE, WITHOUT   what is missing, what it is for, what is the case without it
bring() {
    name=$1 check=$2 packages=$3 missing=$4 purpose=$5 without=$6
    if $check; then
        echo "$name: it is there"
        return 0
    fi
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "$name: $missing, and this is not a Debian system. Install one for $purpose; $without."
        return 0
    fi
    if [ "$(id -u)" = 0 ]; then
        as_root=""
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        echo "$name: no permission to install $packages. Ask an administrator for 'apt-get install $packages' for $purpose; $without."
        return 0
    fi
    echo "$name: installing $packages"
    # The lists of packages are fetched only where those that are there don't do.
    if $as_root apt-get install -y -qq --no-install-recommends $packages >/dev/null 2>&1; then
        :
    elif $as_root apt-get update -qq >/dev/null && $as_root apt-get install -y -qq --no-install-recommends $packages >/dev/null; then
        :
    fi
    if $check; then
        echo "$name: ready"
    else
        echo "$name: installing $packages did not work (see above); $without."
    fi
}
