#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds and checks the Debian package: `make deb`, or deb.sh FOLDER for the folder of the result.
#
# Everything happens in a tree of Debian 13 that mmdebstrap makes, with that release's own Python libraries, whatever
# this machine has; the tree is kept in ~/.cache/emupmem (or $EMUPMEM_CACHE). Needs root, mmdebstrap, unshare.
#   SUITE=forky             another release
#   MIRROR=URL              where its packages are
#   TESTS="tests/cli"       not all unit tests; DEB_BUILD_OPTIONS=nocheck: none
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$here/dist}
suite=${SUITE:-trixie}
mirror=${MIRROR:-http://deb.debian.org/debian}
cache=${EMUPMEM_CACHE:-$HOME/.cache/emupmem}

die() {
    echo "emupmem: $1" >&2
    exit 1
}
[ "$(id -u)" = 0 ] || die "a tree with files of many owners needs root: sudo make deb"
for program in mmdebstrap unshare flock; do
    command -v $program >/dev/null || die "$program is not installed: make deps"
done

# The tree: what the package needs to be built, and what looks at the result. -------------------------------------

needs=$(sed -n '/^Build-Depends:/,/^$/s/^ \([^ ,]*\).*/\1/p' "$here/.packaging/debian/control" | tr '\n' ',')
packages="${needs}lintian,mount,util-linux"
# A tree that was not used for a week goes when another one is made.
key=$(echo "$suite $packages" | sha256sum | cut -c1-12)
tree=$cache/build/$suite-$key
archives=$cache/archives/$suite
mkdir -p "$cache/build" "$archives" "$out"
(
    flock 9
    [ ! -d "$tree" ] || exit 0
    echo "emupmem: making a tree of Debian $suite to build in (a minute or two, once)" >&2
    find "$cache/build" -mindepth 1 -maxdepth 1 -name "$suite-*" \( -mtime +7 -o -name '*.new' \) \
        -exec rm -rf --one-file-system {} +
    mmdebstrap --mode=root --variant=apt --quiet --include="$packages" \
        --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Languages "none"' \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --skip=download/empty,essential/unlink,cleanup/apt/cache \
        --setup-hook="mkdir -p \"\$1/var/cache/apt/archives\"
            cp -n '$archives'/*.deb \"\$1/var/cache/apt/archives/\" 2>/dev/null || true" \
        --customize-hook="cp -n \"\$1\"/var/cache/apt/archives/*.deb '$archives/'; rm -f \"\$1\"/var/cache/apt/archives/*.deb" \
        "$suite" "$tree.new" "$mirror"
    mv "$tree.new" "$tree"
) 9>"$cache/build/$suite.lock"

touch "$tree"

# The build: over that tree, nothing of it is changed; this machine's own files are out of reach. ------------------

work=$(mktemp -d)
trap 'rmdir "$work/top" "$work/out" "$work"' EXIT
mkdir "$work/top" "$work/out"
export work tree here out
export options="${DEB_BUILD_OPTIONS:-}" tests="${TESTS:-tests}"
unshare --mount --propagation private sh -eu <<'OUTSIDE'
mount -t tmpfs -o mode=755 none "$work/top"
cd "$work/top"
mkdir upper work root
mount -t overlay -o "lowerdir=$tree,upperdir=upper,workdir=work" none root
mkdir -p root/build/emupmem root/out root/mnt/old
mount --bind "$out" root/out
mount -t proc none root/proc
mount --rbind /dev root/dev
tar -c -C "$here" --exclude=__pycache__ \
    pyproject.toml README.md LICENSE Makefile emupmem tests .packaging .github | tar -x -C root/build/emupmem
cd root
pivot_root . mnt/old
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEB_BUILD_OPTIONS="$options" TESTS="$tests" \
    sh -eu <<'INSIDE'
cd /build/emupmem
umount -l /mnt/old
ln -s .packaging/debian debian
dpkg-checkbuilddeps -I
# -d: build-essential, a compiler, is not needed.
dpkg-buildpackage -d -us -uc -b
lintian --tag-display-limit 0 --allow-root --fail-on error,warning --info ../*.changes
# It can be installed here, runs, says what stays when it is removed, and goes without a trace.
dpkg -i ../*.deb
cd /
emupmem --version
dpkg -L emupmem >/root/installed
mkdir -p /etc/default /boot/grub
echo 'GRUB_CMDLINE_LINUX="memmap=1G!4G"' >/etc/default/grub
echo '# menu' >/boot/grub/grub.cfg
dpkg --remove emupmem >/root/said 2>&1
grep 'memmap=1G!4G in GRUB_CMDLINE_LINUX: the memory stays reserved' /root/said
dpkg --purge emupmem
while read -r file; do
    [ -d "$file" ] || [ ! -e "$file" ] || { echo "emupmem: $file is left after purge" >&2; exit 1; }
done </root/installed
[ -z "$(find / -xdev -name '*emupmem*' ! -path '/build/*' ! -path '/out/*' ! -path '/var/lib/dpkg/*' \
    ! -path '/var/log/*')" ]
cp /build/*.deb /out/
INSIDE
OUTSIDE
[ -z "${SUDO_UID:-}" ] || chown "$SUDO_UID" "$out" "$out"/emupmem_*_all.deb
ls "$out"/emupmem_*_all.deb
