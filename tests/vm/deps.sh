#!/bin/sh
# Installs what emupmem needs on a Debian or Ubuntu host; does nothing when all is there.
#   deps.sh         everything: to build it, to test it, to boot virtual machines
#   deps.sh build   only what `pip install` of python-augeas needs
set -eu

packages="python3-venv python3-dev gcc libc6-dev libaugeas-dev libxml2-dev pkg-config"
[ "${1:-}" = build ] ||
    packages="$packages qemu-system-x86 qemu-utils mmdebstrap debian-archive-keyring ovmf
              e2fsprogs dosfstools fdisk util-linux mount busybox-static kmod xz-utils zstd
              cpio libvirt0 libxml2-utils mandoc zsh fish openssh-client"

# Where there are no Debian packages: what the build needs is looked for itself.
if ! command -v dpkg-query >/dev/null; then
    if command -v cc >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists augeas libxml-2.0; then
        [ "${1:-}" != build ] || exit 0
    fi
    for line in "dnf install gcc python3-devel augeas-devel libxml2-devel pkgconf" \
        "zypper install gcc python3-devel augeas-devel libxml2-devel pkgconf" \
        "pacman -S gcc augeas libxml2 pkgconf"; do
        command -v "${line%% *}" >/dev/null || continue
        echo "emupmem: a compiler and headers are missing: $line" >&2
        [ "${1:-}" = build ] || echo "         tests and demo need a Debian or Ubuntu host" >&2
        exit 1
    done
    echo "emupmem: this system has no apt-get: install what these Debian packages hold: $packages" >&2
    exit 1
fi

missing=""
for package in $packages; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

stop() {
    echo "emupmem: $1; missing:$missing" >&2
    exit 1
}

command -v apt-get >/dev/null || stop "this system has no apt-get: install what these Debian packages hold"
as_root=""
if [ "$(id -u)" != 0 ]; then
    as_root=sudo
    command -v sudo >/dev/null || stop "packages are missing, and only root can install them"
fi
$as_root apt-get update -qq || stop "apt-get update failed (its words are above): is the mirror reachable?"
# shellcheck disable=SC2086  # a list of words on purpose
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
    stop "apt-get install failed (its words are above)"
