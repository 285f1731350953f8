#!/bin/sh
# Installs what emupmem needs on a Debian or Ubuntu host; does nothing when all is there.
#   deps.sh         everything: to build it, to test it, to boot virtual machines
#   deps.sh build   only what `pip install` of python-augeas needs
set -eu

packages="python3-venv python3-dev gcc libc6-dev libaugeas-dev libxml2-dev pkg-config"
[ "${1:-}" = build ] ||
    packages="$packages qemu-system-x86 qemu-utils mmdebstrap debian-archive-keyring ovmf
              e2fsprogs dosfstools fdisk util-linux busybox-static kmod xz-utils zstd
              cpio libvirt0 libxml2-utils"

missing=""
for package in $packages; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

as_root=""
[ "$(id -u)" = 0 ] || as_root=sudo
$as_root apt-get update -qq
# shellcheck disable=SC2086  # a list of words on purpose
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
