#!/bin/sh
# Installs what the virtual machines need on a Debian or Ubuntu host; does nothing when all is there.
set -eu

packages="qemu-system-x86 qemu-utils mmdebstrap debian-archive-keyring ovmf
          e2fsprogs dosfstools fdisk util-linux busybox-static kmod xz-utils zstd"

missing=""
for package in $packages; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

as_root=""
[ "$(id -u)" = 0 ] || as_root=sudo
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -qq
# shellcheck disable=SC2086  # a list of words on purpose
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
