# SPDX-License-Identifier: Apache-2.0
"""Build and cache whole Debian guests: `python -m tests.vm.image bookworm bios`.

An image is made in two steps: mmdebstrap makes the tree, which becomes a disk with `mke2fs -d`; the
guest then boots once with its kernel from outside, installs the boot loader on its own disk, and
is sealed.

Everything lies under ~/.cache/emupmem (or $EMUPMEM_CACHE): `images/` by the hash of all that
decides the content, `archives/` with the packages and `wheels/` with the built Python
dependencies, both only to save time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests import PROJECT
from tests.vm import machine, progress
from tests.vm.machine import MIB, SECTOR, Image, run

Progress = Callable[[str], None]

SUITES = ("bookworm", "trixie", "forky")
# "sdboot" is UEFI with systemd-boot and without any GRUB: for trixie only.
FIRMWARES = ("bios", "uefi", "sdboot")
FALLBACK_MIRROR = "http://deb.debian.org/debian"

PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "passwd", "mount", "util-linux", "kmod"),
    *("linux-image-cloud-amd64", "initramfs-tools", "e2fsprogs", "xfsprogs", "ndctl"),
    *("acl", "attr", "python3", "python3-venv", "libaugeas0"),
)
# What emupmem's package depends on, and for the trial that starts its kernel by kexec.
LIBRARIES = ("python3-typer", "python3-regex", "python3-augeas", "python3-rich")
EXTRA = {"trixie": (*LIBRARIES, "kexec-tools"), "forky": LIBRARIES}
LOADER = {
    "bios": ("grub-pc",),
    "uefi": ("grub-efi-amd64", "dosfstools"),
    "sdboot": ("systemd-boot", "dosfstools"),
}
# On every kernel's command line: an emulated processor spends much of a boot on what these switch off,
# and nothing in it is about which memory is reserved and what is on it.  By the last word programs have the same
# addresses each time: the code that was translated for one is good for the next, and a shell script takes a quarter
# of the time.
SPARE = "mitigations=off init_on_alloc=0 apparmor=0 audit=0 no_timer_check norandmaps"
# Only while the Python dependencies are built: python-augeas has no wheels.
COMPILERS = "gcc libc6-dev python3-dev libaugeas-dev libxml2-dev pkg-config"
# Used until pyproject.toml says it.
DEPENDENCIES = ("typer>=0.15", "regex", "python-augeas>=1.2", "rich")

ROOT_UUID = "e0b0eed5-0000-4000-8000-000000000001"
EFI_ID = "E0B00EED"
DISK_SIZE = 3072 * MIB
EFI_SIZE = 64 * MIB
# systemd-boot starts kernels from there: room for two of them.
EFI_SIZE_SDBOOT = 128 * MIB
# What GRUB 2.06 and the oldest kernel read, whatever the host's mke2fs would choose.
EXT4 = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)

# The guest's side of `machine.converse`: see there.  The pipe between script and port makes the
# script's output a pipe, as in any other program's hands, and not a terminal.
RUNNER = r"""#!/bin/bash
mkdir -p /job
mount /dev/vdb /job || exit 0
token=$(cat /job/token)
boot=$(cat /job/boot 2>/dev/null || echo 0)
# Counted before the script runs, so that a script which resets the machine is not run again.
echo $((boot + 1)) >/job/boot
sync -f /job
stty -F /dev/ttyS1 raw -echo
exec 3> >(exec cat >/dev/ttyS1)
writer=$!
printf '\036%s start %d\n' "$token" "$boot" >&3
if [ -e /job/script.$boot ]; then
    cd /root
    export HOME=/root USER=root LANG=C.UTF-8 LC_ALL=C.UTF-8 TERM=dumb
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    bash /job/script.$boot </dev/null >&3 2>&1 3>&-
    status=$?
    # Whoever hears the end may take the power away and read what the script left.
    sync -f /job
    printf '\036%s end %d %d\n' "$token" "$boot" $status >&3
    cd /
fi
exec 3>&-
# The port drains before the power goes; a child that keeps it open must not keep us.
for _ in $(seq 100); do kill -0 $writer 2>/dev/null || break; sleep 0.1; done
[ -e /job/script.$((boot + 1)) ] && next=reboot || next=poweroff
# Stopping the units one by one takes longer than all the rest of it: only where somebody wants to see that.
[ -e /job/orderly ] && how=--no-block || how=--force
systemctl $how $next
"""

UNIT = """[Unit]
Description=Run the job of the second disk
ConditionPathExists=/dev/vdb
After=systemd-user-sessions.service dbus.service

[Service]
# Not oneshot: the boot is finished while the job runs, so the job may start any unit.
Type=exec
ExecStart=/usr/local/lib/emupmem-job
TimeoutStopSec=5

[Install]
WantedBy=multi-user.target
"""

# The job disk is a new one at every boot: what Python compiles is kept on the guest's own.
COMMAND = """#!/bin/sh
export PYTHONPYCACHEPREFIX=/var/cache/emupmem-pyc
exec /opt/emupmem/bin/python -m emupmem "$@"
"""

# Run in the tree.  {words} are filled in by `_fill`.
PREPARE = r"""#!/bin/bash
set -eu
echo guest >/etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 guest\n' >/etc/hosts
useradd --create-home --shell /bin/bash dev
passwd -d root >/dev/null
systemctl enable -q emupmem-job.service
# Slow or periodic, and nothing here needs them: without them a boot takes half the time.  The root
# file system is checked in the initramfs.
systemctl set-default -q multi-user.target
systemctl mask -q apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer \
    e2scrub_all.timer e2scrub_reap.service systemd-tmpfiles-clean.timer getty.target \
    ndctl-monitor.service systemd-timesyncd.service systemd-networkd.service networking.service \
    systemd-networkd-wait-online.service systemd-logind.service systemd-binfmt.service \
    kexec.service kexec-load.service systemd-update-utmp.service \
    systemd-update-utmp-runlevel.service systemd-fsck-root.service \
    systemd-pstore.service systemd-random-seed.service systemd-hwdb-update.service \
    systemd-sysusers.service systemd-modules-load.service systemd-user-sessions.service \
    systemd-udev-load-credentials.service cxl-monitor.service dbus.service dbus.socket \
    ldconfig.service modprobe@.service sys-kernel-debug.mount sys-kernel-tracing.mount \
    sys-kernel-config.mount sys-fs-fuse-connections.mount dev-hugepages.mount dev-mqueue.mount \
    proc-sys-fs-binfmt_misc.automount systemd-journal-flush.service systemd-sysctl.service \
    systemd-tmpfiles-setup.service systemd-tmpfiles-setup-dev-early.service tmp.mount run-lock.mount
mkdir -p /etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\n' >/etc/systemd/journald.conf.d/volatile.conf
# Of the coldplugged devices only those that can lead to a disk: not 32 serial ports, nor the CPU's
# features, which load a dozen crypto modules.
mkdir -p /etc/systemd/system/systemd-udev-trigger.service.d
cat >/etc/systemd/system/systemd-udev-trigger.service.d/few.conf <<'END'
[Service]
ExecStart=
ExecStart=-udevadm trigger --action=add --subsystem-match=acpi --subsystem-match=platform \
    --subsystem-match=pci --subsystem-match=virtio --subsystem-match=block \
    --subsystem-match=nd --subsystem-match=dax
END
# How long something takes says nothing here: a busy host must not send a guest into its emergency mode.
mkdir -p /etc/systemd/system.conf.d
cat >/etc/systemd/system.conf.d/patient.conf <<'END'
[Manager]
DefaultTimeoutStartSec=30min
DefaultTimeoutStopSec=30min
DefaultDeviceTimeoutSec=30min
END
# What the board has and nobody here uses: each is a module to load, with all that it needs.
printf 'blacklist %s\n' ata_piix ata_generic pata_acpi evdev button psmouse floppy parport_pc pcspkr \
    i2c_piix4 bochs qemu_fw_cfg efi_pstore >/etc/modprobe.d/few.conf
# The job brings emupmem compiled, see `bytecode`.
mkdir -p /var/cache/emupmem-pyc/job
ln -s /job/pyc /var/cache/emupmem-pyc/job/src
# Generators for what no guest has (a name that is not there costs nothing).
mkdir -p /etc/systemd/system-generators
for name in bless-boot cryptsetup debug getty gpt-auto hibernate-resume import integritysetup rc-local run \
    ssh system-update sysv tpm2 veritysetup; do
    ln -s /dev/null "/etc/systemd/system-generators/systemd-$name-generator"
done
# A small initramfs: GRUB reads it through the firmware, which is slow. Its modules lead to the disk: no udev, which
# from Debian 13 on brings its data base of hardware, and no device mapper.
cat >/etc/initramfs-tools/hooks/zz-no-udev <<'END'
#!/bin/sh
[ "$1" != prereqs ] || exit 0
cd "$DESTDIR"
rm -f scripts/init-*/udev usr/bin/udevadm usr/lib/systemd/systemd-udevd usr/sbin/dmsetup
rm -rf usr/lib/udev usr/lib/*/systemd usr/lib/*/libdevmapper.* usr/lib/modules/*/kernel/drivers/md
END
chmod +x /etc/initramfs-tools/hooks/zz-no-udev
sed -i 's/^MODULES=.*/MODULES=list/' /etc/initramfs-tools/initramfs.conf
printf '%s\n' virtio_pci virtio_blk ext4 >>/etc/initramfs-tools/modules
update-initramfs -u >/dev/null
"""

GRUB_DEFAULTS = r"""# The rest of the file stays as Debian ships it.
sed -i -e 's/^GRUB_TIMEOUT=.*/GRUB_TIMEOUT=0/' \
    -e 's/^GRUB_CMDLINE_LINUX_DEFAULT=.*/GRUB_CMDLINE_LINUX_DEFAULT="console=ttyS0 {spare}"/' \
    /etc/default/grub
# No letters to draw before each menu, but for one of the suites.
grep -q forky /etc/os-release || sed -i 's/^#GRUB_TERMINAL=console/GRUB_TERMINAL=console/' /etc/default/grub
grep -q '^GRUB_CMDLINE_LINUX=""' /etc/default/grub
"""

ENVIRONMENT = r"""
python3 -m venv /opt/emupmem
echo /job/src >"$(echo /opt/emupmem/lib/python3*/site-packages)/job.pth"
pip() { /opt/emupmem/bin/pip --disable-pip-version-check -q "$@"; }
offline() { pip install --no-index --find-links /var/tmp/wheels {dependencies}; }
if ! offline 2>/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends {compilers} >/dev/null
    rm -rf /var/tmp/wheels
    pip wheel --use-pep517 -w /var/tmp/wheels {dependencies}
    apt-get purge -y -qq --auto-remove {compilers} >/dev/null
    offline
fi
/opt/emupmem/bin/python -c 'import augeas, regex, rich, typer'
# What a call of emupmem would compile anew in every guest.
PYTHONPYCACHEPREFIX=/var/cache/emupmem-pyc /opt/emupmem/bin/python -m compileall -q -x '/(pip|test|idlelib|lib2to3)/' \
    $(/opt/emupmem/bin/python -c 'import sys; print(*(p for p in sys.path[1:] if not p.endswith(".zip")))') || true
"""

SETUP = PREPARE + GRUB_DEFAULTS + ENVIRONMENT

# Modules for `tests.vm.kernel`.
EXPORT = (
    "kernel/drivers/nvdimm",
    "kernel/drivers/dax",
    "kernel/drivers/acpi/nfit",
    "kernel/drivers/virtio",
)

SEAL = {
    "bios": "set -e; grub-install /dev/vda; update-grub2",
    # As the removable medium's loader, which needs no entry in the firmware's variables.
    "uefi": "set -e; grub-install --target=x86_64-efi --removable --no-nvram; update-grub2",
}
DAY = 86400.0
SEAL_SECONDS = 1800
"""For a boot and the installation, which an idle machine does in one minute."""

# As Debian's package does it where there is an EFI partition, and as a kernel's package does.  There
# is no /etc/kernel/cmdline then: kernel-install takes the words of the running kernel.
SEAL_SDBOOT = """set -e
bootctl install --make-entry-directory=auto --no-variables
echo timeout 0 >/boot/efi/loader/loader.conf
/etc/kernel/postinst.d/zz-systemd-boot "$(uname -r)" "/boot/vmlinuz-$(uname -r)"
"""


def image(suite: str, firmware: str = "bios", words: Progress | None = None) -> Image:
    """Return the image of a suite for one of FIRMWARES, building it when the cache has none.

    `words` gets a line per step.
    The first build takes minutes.  Raises ValueError for an unknown suite or firmware,
    RuntimeError when a tool fails, and LostMachine when the guest does not come up to be sealed.
    """
    if suite not in SUITES or firmware not in FIRMWARES or (firmware == "sdboot" and suite != "trixie"):
        raise ValueError(f"no such guest: {suite} {firmware}")
    path = place(suite, firmware)
    images = path.parent
    images.mkdir(parents=True, exist_ok=True)
    found = Image(suite, firmware, path)
    with _lock(images / f"{suite}-{firmware}.lock"):
        if not path.is_dir():
            _clean(images, f"{suite}-{firmware}-")
            _build(found, words or progress.say)
        os.utime(path)  # the time of its last use
    return found


def place(suite: str, firmware: str) -> Path:
    """Return the directory of an image, be it there or not."""
    return cache() / "images" / f"{suite}-{firmware}-{_key(suite, firmware)}"


def cache() -> Path:
    """Return the cache directory: $EMUPMEM_CACHE or ~/.cache/emupmem."""
    return Path(os.environ.get("EMUPMEM_CACHE") or Path.home() / ".cache" / "emupmem")


def mirror() -> str:
    """Return the Debian mirror of this host's own apt sources, or the public one."""
    if "ID=debian" not in Path("/etc/os-release").read_text().splitlines():
        return FALLBACK_MIRROR
    etc = Path("/etc/apt")
    sources = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    text = "\n".join(path.read_text(errors="replace") for path in sources if path.is_file())
    lines = [line for line in text.splitlines() if re.match(r"(deb|URIs:)\s", line)]
    urls = re.findall(r"https?://\S+?/debian/?(?=\s|$)", "\n".join(lines))
    return urls[0].rstrip("/") if urls else FALLBACK_MIRROR


def dependencies() -> list[str]:
    """Return the project's Python dependencies as pyproject.toml has them."""
    file = PROJECT / "pyproject.toml"
    project = tomllib.loads(file.read_text()).get("project", {}) if file.exists() else {}
    return list(project.get("dependencies") or DEPENDENCIES)


def _key(suite: str, firmware: str) -> str:
    """Hash everything that decides what is on the disk."""
    packages = (*PACKAGES, *EXTRA.get(suite, ()), *LOADER[firmware])
    seal: object = SEAL_SDBOOT if firmware == "sdboot" else SEAL
    recipe: list[object] = [packages, RUNNER, UNIT, COMMAND, _setup(firmware), seal, EXT4, COMPILERS]
    recipe += [SPARE, EXPORT, suite, firmware, DISK_SIZE, _efi_size(firmware), sorted(dependencies())]
    return hashlib.sha256(json.dumps(recipe, default=str).encode()).hexdigest()[:12]


def _build(target: Image, words: Progress) -> None:
    """Build one image next to its place and rename it there when it is finished."""
    work = Path(tempfile.mkdtemp(prefix=f"{target.path.name}.tmp-", dir=target.path.parent))
    tree = work / "tree"
    made = Image(target.suite, target.firmware, work / "image")
    made.path.mkdir()
    clock = _Clock(words, f"{target.suite} {target.firmware}")
    try:
        _make_tree(tree, work, made)
        clock.step("tree")
        _make_disk(tree, made)
        clock.step("disk")
        _export(tree, made)
        clock.step("kernel")
        _seal(made)
        clock.step("boot loader installed in the guest")
        made.path.rename(target.path)
    finally:
        run([*_root(), "rm", "-rf", "--one-file-system", str(work)])


def _make_tree(tree: Path, work: Path, made: Image) -> None:
    """Let mmdebstrap make the root file system, with the Python dependencies in a venv."""
    hook = work / "customize"
    hook.write_text(_customize(made, work))
    hook.chmod(0o755)
    archives = cache() / "archives" / made.suite
    archives.mkdir(parents=True, exist_ok=True)
    there = shlex.quote(str(archives))
    packages = ",".join((*PACKAGES, *EXTRA.get(made.suite, ()), *LOADER[made.firmware]))
    argv = ["mmdebstrap", "--mode=root", "--variant=apt", f"--include={packages}", "--quiet"]
    # Debian testing's index may be past its date.
    argv += ['--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Languages "none"']
    argv += ["--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/man/*"]
    argv += ["--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/doc/*"]
    # Keep the packages: a rebuild downloads nothing.
    argv += ["--skip=download/empty,essential/unlink,cleanup/apt/cache"]
    argv += [
        f'--setup-hook=mkdir -p "$1/var/cache/apt/archives"; cp -n {there}/*.deb '
        '"$1/var/cache/apt/archives/" 2>/dev/null || true'
    ]
    argv += [f"--customize-hook={hook}"]
    environment = [f"{name}={value}" for name, value in _environment().items()]
    # From nothing: variables such as REQUESTS_CA_BUNDLE name files of the host, and beat PIP_CERT.
    run([*_root(), "env", "-i", *environment, *argv, made.suite, str(tree), mirror()])


def _customize(made: Image, work: Path) -> str:
    """Return the script mmdebstrap runs on the host, with the tree's path as its argument."""
    here = shlex.quote(str(work))
    wheels = cache() / "wheels" / f"{made.suite}-{_digest(dependencies())}"
    wheels.mkdir(parents=True, exist_ok=True)
    archives = cache() / "archives" / made.suite
    files = {
        "usr/local/lib/emupmem-job": RUNNER,
        "usr/local/bin/emupmem": COMMAND,
        "etc/systemd/system/emupmem-job.service": UNIT,
        "var/tmp/setup": _fill(_setup(made.firmware)),
    }
    for name, text in files.items():
        (work / name.replace("/", "-")).write_text(text)
    install = [
        f"install -D -m {'644' if name.endswith('.service') else '755'} "
        f'{here}/{name.replace("/", "-")} "$1/{name}"'
        for name in files
    ]
    owner = f"{os.getuid()}:{os.getgid()}"
    return "\n".join(
        [
            "#!/bin/bash",
            "set -eu",
            *install,
            'mkdir -p "$1/var/tmp/wheels"',
            f'cp -n {wheels}/*.whl "$1/var/tmp/wheels/" 2>/dev/null || true',
            # The host's certificates for pip, gone again when it is done.
            'if [ -n "${HOST_CA:-}" ]; then cp -L "$HOST_CA" "$1/var/tmp/ca.pem"; '
            "export SSL_CERT_FILE=/var/tmp/ca.pem PIP_CERT=/var/tmp/ca.pem; fi",
            'chroot "$1" /var/tmp/setup',
            # New packages and wheels become visible in the cache as a whole or not at all.
            'for file in "$1"/var/tmp/wheels/*.whl "$1"/var/cache/apt/archives/*.deb; do',
            f"    case $file in *.whl) to={wheels} ;; *) to={archives} ;; esac",
            '    [ -e "$to/${file##*/}" ] && continue',
            f'    cp "$file" "$to/.new"; chown {owner} "$to/.new"; mv "$to/.new" "$to/${{file##*/}}"',
            "done",
            'rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/tmp/* "$1"/root/.cache',
            # Empty means: has no identity, but is not on its first boot, which would preset all units.
            ': >"$1/etc/machine-id"',
            f"printf '%s\\n' {shlex.join(_fstab(made.firmware))} >\"$1/etc/fstab\"",
            'mkdir -p "$1/boot/efi"' if made.firmware != "bios" else "",
            "",
        ]
    )


def _setup(firmware: str) -> str:
    return PREPARE + ENVIRONMENT if firmware == "sdboot" else SETUP


def _efi_size(firmware: str) -> int:
    return EFI_SIZE_SDBOOT if firmware == "sdboot" else EFI_SIZE


def _fill(template: str) -> str:
    words = {"{dependencies}": shlex.join(dependencies()), "{compilers}": COMPILERS, "{spare}": SPARE}
    for name, value in words.items():
        template = template.replace(name, value)
    return template


def _fstab(firmware: str) -> list[str]:
    root = [f"UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1"]
    efi = [f"UUID={EFI_ID[:4]}-{EFI_ID[4:]} /boot/efi vfat umask=0077 0 0"]
    return root if firmware == "bios" else root + efi


def _make_disk(tree: Path, made: Image) -> None:
    """Write the tree to a partitioned raw disk; neither mounts nor loop devices are needed."""
    with made.disk.open("wb") as file:
        file.truncate(DISK_SIZE)
    start = MIB
    table = "label: dos\nstart=2048, type=83, bootable\n"
    if made.firmware != "bios":
        size = _efi_size(made.firmware)
        start += size
        efi = f"start=2048, size={size // SECTOR}, type=U"
        table = f"label: gpt\n{efi}\nstart={start // SECTOR}, type=L\n"
        fat = ["mkfs.vfat", "-F", "32", "-s", "1", "-i", EFI_ID, "--offset", str(MIB // SECTOR)]
        run([*fat, str(made.disk), str(size // 1024)])
    run(["sfdisk", "-q", str(made.disk)], text=table)
    extended = f"offset={start},lazy_itable_init=0,lazy_journal_init=0"
    make = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-O", EXT4, "-U", ROOT_UUID]
    # One MiB at the end stays free: the second copy of a GPT.
    blocks = f"{(DISK_SIZE - start - MIB) // 1024}k"
    run([*_root(), *make, "-E", extended, "-d", str(tree), str(made.disk), blocks])


def _export(tree: Path, made: Image) -> None:
    """Copy the kernel, its initramfs and the modules `tests.vm.kernel` uses out of the tree."""
    (modules,) = (tree / "usr/lib/modules").iterdir()
    version = modules.name
    owner = f"{os.getuid()}:{os.getgid()}"
    kernels = [tree / f"boot/vmlinuz-{version}", modules / "vmlinuz"]
    kernel = next(path for path in kernels if path.exists())
    run([*_root(), "cp", "-L", str(kernel), str(made.kernel)])
    run([*_root(), "cp", "-L", str(tree / f"boot/initrd.img-{version}"), str(made.initrd)])
    target = made.modules / version
    target.mkdir(parents=True)
    for name in ("modules.dep", "modules.builtin"):
        shutil.copy(modules / name, target)
    for name in EXPORT:
        if (modules / name).is_dir():
            shutil.copytree(modules / name, target / name)
    _export_python(tree, made)
    run([*_root(), "chown", "-R", owner, str(made.path)])


def _export_python(tree: Path, made: Image) -> None:
    """Copy the guest's Python with all that it needs to compile, see `machine.bytecode`."""
    name = (tree / "usr/bin/python3").readlink().name
    library = tree / "usr/lib" / name
    loader = tree / "usr/lib64/ld-linux-x86-64.so.2"
    folders = f"{tree}/usr/lib/x86_64-linux-gnu"
    program = str(tree / "usr/bin" / name)
    listed = run([str(loader), "--library-path", folders, "--list", program])
    (made.python / "lib").mkdir(parents=True)
    for file in (str(loader), *re.findall(r"=> (/\S+)", listed)):
        run([*_root(), "cp", "-L", file, str(made.python / "lib")])
    run([*_root(), "cp", "-L", program, str(made.python / "python3")])
    unused = shutil.ignore_patterns("__pycache__", "test", "idlelib", "lib2to3", "dist-packages", "config-*")
    shutil.copytree(library, made.python / "lib" / name, ignore=unused, ignore_dangling_symlinks=True)


def _seal(made: Image) -> None:
    """Boot once with the kernel from outside and install the boot loader from within.

    From outside GRUB would record the wrong disk.
    """
    append = f"root=UUID={ROOT_UUID} ro console=ttyS0 {SPARE}"
    boot = ["-kernel", str(made.kernel), "-initrd", str(made.initrd), "-append", append]
    token = "seal"
    with tempfile.TemporaryDirectory() as directory:
        job = Path(directory) / "job.img"
        script = SEAL_SDBOOT if made.firmware == "sdboot" else SEAL[made.firmware]
        machine.make_job_disk(job, token, [script], {})
        disks = [*machine.drive(made.disk, "raw"), *machine.drive(job, "raw"), "-no-reboot"]
        guest = progress.Boot(f"{made.suite} {made.firmware} image", counts=False)
        argv = [*machine.qemu("2G"), *disks, *boot]
        (result,) = machine.converse(argv, token, 1, timeout=SEAL_SECONDS, guest=guest)
    if result.status != 0:
        raise RuntimeError(f"the boot loader does not install: status {result.status}\n{result.output}")


def _environment() -> dict[str, str]:
    """Return the environment of the build: the host's package index, proxy and certificates for pip."""
    names = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT")
    proxies = ("http_proxy", "https_proxy", "no_proxy")
    wanted = [*names, *proxies, *(name.upper() for name in proxies)]
    found = {name: os.environ[name] for name in wanted if os.environ.get(name)}
    found |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    found |= {"HOME": "/root", "LC_ALL": "C.UTF-8"}
    authority = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    if authority and Path(authority).is_file():
        found["HOST_CA"] = authority
    return found


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _root() -> Sequence[str]:
    """Return the prefix for commands that need root: files of the tree belong to many users."""
    return () if os.geteuid() == 0 else ("sudo",)


def _clean(images: Path, prefix: str) -> None:
    """Remove what an interrupted build left, and images of other recipes that nobody used for a day.

    Another clone of the project may have guests on one of them now.
    """
    for path in images.glob(f"{prefix}*"):
        if ".tmp-" in path.name or path.stat().st_mtime < time.time() - DAY:
            run([*_root(), "rm", "-rf", "--one-file-system", str(path)])


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Clock:
    """Says how long each step took."""

    def __init__(self, words: Progress, what: str) -> None:
        self.words = words
        self.what = what
        self.last = time.monotonic()
        words(f"{what}: building the image (minutes)")

    def step(self, name: str) -> None:
        now = time.monotonic()
        self.words(f"{self.what}: {name}, {now - self.last:.0f} s")
        self.last = now


def to_stderr(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Build the image named on the command line and print its directory."""
    if not 1 <= len(arguments) <= 2:
        print(
            f"usage: python -m tests.vm.image {{{','.join(SUITES)}}} [{'|'.join(FIRMWARES)}]", file=sys.stderr
        )
        return 2
    suite, firmware = (*arguments, "bios")[:2]
    print(image(suite, firmware, to_stderr).path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
