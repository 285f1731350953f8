# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the programs that write systemd-boot's entries by themselves; `ROOT` is put before each."""

# After kernelstub 3.1.4 at 3fb4e06 (November 2025). Left out are the firmware's own boot entries (--stub), gzipped
# kernels, the journal, the check for root, and the options -e, -r, -k, -i, -o, -c, -l, -n and -m. Its habits:
# options are split at blanks, -a adds those that are not there, -d puts all others in an order of chance; the newest
# kernel that has an initrd is copied, and the one before it, in place; entries are written in place, the one of the
# older kernel only where there is one; loader.conf is made where there is none, or whole with force_update; the
# command line of this boot is copied beside the kernels; the configuration is written in place, whatever was asked,
# without a newline at its end; without a kernel it ends with 0, and so it does on a live medium when a hook asks.
KERNELSTUB = r"""
import json, pathlib, sys
root = pathlib.Path(ROOT)
fail = (root / "fail").read_text() if (root / "fail").exists() else ""
config = root / "etc/kernelstub/configuration"
given = dict(zip(sys.argv[1:], sys.argv[2:]))
known = ("-a", "-d", "--add-options", "--delete-options", "-p", "--print-config", "-g", "--log-file", "--verbose")
if any(a.startswith("-") and a not in (*known, "--preserve-live-mode") for a in sys.argv[1:]):
    print("usage: kernelstub [-h] [-c] [-p]", file=sys.stderr)
    sys.exit(2)
show = "-p" in sys.argv or "--print-config" in sys.argv
log = given.get("-g", given.get("--log-file", str(root / "var/log/kernelstub.log")))
pathlib.Path(log).parent.mkdir(parents=True, exist_ok=True)
with open(log, "a") as file:
    file.write("kernelstub: DEBUG Got command line options\n")
if fail == "start":
    raise KeyError("user")

def split(options):
    for index, option in enumerate(options):
        step = 1
        while '"' in option and option.count('"') < 2 and index + step < len(options):
            option, options[index + step] = option + " " + options[index + step], ""
            step += 1
        options[index] = option
    return options

whole = json.loads(config.read_text())
user = whole["user"] = whole.get("user") or dict(whole["default"])
if isinstance(user["kernel_options"], str):
    user["kernel_options"] = split(user["kernel_options"].split())
if user["config_rev"] < 3:
    whole["default"]["config_rev"] = user["config_rev"] = 3
if "--preserve-live-mode" in sys.argv and user["live_mode"]:
    sys.exit(0)
user["live_mode"] = False
boot = root / "boot"

def order(version):
    return [(0, int(x)) if x.isdigit() else (1, x) for x in version.replace("-", ".").split(".")]

kernels = sorted((p.name[8:] for p in boot.glob("vmlinuz-*")), key=order)
kernels = [v for v in kernels if (boot / f"initrd.img-{v}").exists()]
if not kernels:
    print("kernelstub: ERROR Can't find the kernel image", file=sys.stderr)
    sys.exit(0)
options = user["kernel_options"]
for option in split(given.get("-a", given.get("--add-options", "")).split(" ")):
    if option not in options and ("-a" in given or "--add-options" in given):
        options.append(option)
if "-d" in given or "--delete-options" in given:
    gone = split(given.get("-d", given.get("--delete-options", "")).split(" "))
    options = user["kernel_options"] = list(set(options) - set(gone))
words = " ".join(options).replace("memmap", "memmmap" if fail == "wrong" else "memmap")
if show:
    print("kernelstub           : INFO     System information: \n\n    Root FS UUID:........0", file=sys.stderr)
    print("    Kernel Boot Options:." + words, file=sys.stderr)
    print("    Kernel Image Path:...%s\n" % kernels[-1], file=sys.stderr)
    sys.exit(1 if fail == "end" else 0)
release = (root / "etc/os-release").read_text()
pretty = [x for x in release.splitlines() if x.startswith("NAME=")][0][5:].strip('"')
name = pretty.replace(" ", "_").replace("!", "")
esp = root / user["esp_path"].lstrip("/")
folder = esp / "EFI" / (name + "-0")
entries = esp / "loader/entries"
folder.mkdir(parents=True, exist_ok=True)
entries.mkdir(parents=True, exist_ok=True)

def entry(kind, kernel, initrd):
    linux, initrd = (f"/EFI/{folder.name}/{x}" for x in (kernel, initrd))
    text = f"title {pretty}\nlinux {linux}\ninitrd {initrd}\noptions root=UUID=0 ro {words}\n"
    (entries / f"{name}-{kind}.conf").write_text(text)

(folder / "vmlinuz.efi").write_bytes((boot / f"vmlinuz-{kernels[-1]}").read_bytes())
(folder / "initrd.img").write_bytes((boot / f"initrd.img-{kernels[-1]}").read_bytes())
if user["setup_loader"]:
    if user["force_update"] or not (esp / "loader/loader.conf").exists():
        (esp / "loader/loader.conf").write_text(f"default {name}-current\n")
    entry("current", "vmlinuz.efi", "initrd.img")
if len(kernels) > 1:
    (folder / "vmlinuz-previous.efi").write_bytes((boot / f"vmlinuz-{kernels[-2]}").read_bytes())
    (folder / "initrd.img-previous").write_bytes((boot / f"initrd.img-{kernels[-2]}").read_bytes())
    if user["setup_loader"]:
        entry("oldkern", "vmlinuz-previous.efi", "initrd.img-previous")
(folder / "cmdline").write_bytes((root / "proc/cmdline").read_bytes())
config.write_text(json.dumps(whole, indent=2))
"""

# After sdboot-manage of systemd-boot-manager 20 (CachyOS-PKGBUILDS at ec68f190, February 2026), started by bash. Left
# out are setup, update and autoupdate, -e and -c, what it asks of disks (the root is UUID=0 on ext4, not encrypted),
# the check for root, and the words of its titles. Its habits: the settings are sourced, then those of two
# folders, and options of an earlier one may be replaced; with REMOVE_EXISTING (by default) all entries go first,
# those of other systems too; entries that are there are skipped without OVERWRITE_EXISTING; a file is written in
# place, its initrd is added to it later; the entry of a fallback is made where its initrd lies in /, not on the ESP;
# it ends with 0 whatever it could not write; `remove` takes away entries whose kernel is gone.
SDBOOT_MANAGE = r"""
root="$(cd "${0%/*}/.." && pwd)"
esp="$root/boot" fail="$(cat "$root/fail" 2>/dev/null)"
entries="$esp/loader/entries"
export LINUX_OPTIONS LINUX_FALLBACK_OPTIONS DISABLE_FALLBACK=no KERNEL_PATTERN="vmlinuz-*" REMOVE_EXISTING=yes
export OVERWRITE_EXISTING REMOVE_OBSOLETE=yes NO_AUTOGEN INITRD_PREFIX=initramfs INITRD_ENTRIES
for file in "$root"/etc/sdboot-manage.conf "$root"/{usr/lib,etc}/sdboot-manage.conf.d/*.conf; do
  [ -f "$file" ] && . "$file"
done
[ "$fail" = start ] && { echo "Error: loader.conf does not exist" >&2; exit 1; }
[ "$fail" = wrong ] && LINUX_OPTIONS="${LINUX_OPTIONS/memmap/memmmap}"

entry() {  # name, title, words, kernel, initrd
  printf 'title %s\noptions root=UUID=0 rw %s\nlinux /%s\n' "$2" "$3" "$4" > "$entries/$1.conf"
  [ "$fail" = half ] && exit 1
  for more in "${INITRD_ENTRIES[@]}"; do echo "initrd $more" >> "$entries/$1.conf"; done
  echo "initrd /$5" >> "$entries/$1.conf"
}

generate() {
  [ -f "$esp/loader/loader.conf" ] && [ -d "$entries" ] || { echo "Error: loader.conf does not exist" >&2; exit 1; }
  [ "${REMOVE_EXISTING,,}" = yes ] && rm -f "$entries"/*.conf
  for path in "$esp"/$KERNEL_PATTERN; do
    [ -f "$path" ] || continue
    kernel="${path##*/}" name="${path##*/vmlinuz-}"
    [ "${OVERWRITE_EXISTING,,}" != yes ] && [ -f "$entries/$name.conf" ] && continue
    initrd="${kernel//vmlinuz/$INITRD_PREFIX}"
    entry "$name" "$name" "$LINUX_OPTIONS" "$kernel" "$initrd.img"
    if [ -e "$root/$initrd-fallback.img" ] && [ "$DISABLE_FALLBACK" != yes ]; then
      entry "$name-fallback" "$name (Fallback)" "$LINUX_FALLBACK_OPTIONS" "$kernel" "$initrd-fallback.img"
    fi
  done
}

case "$1" in
  autogen) [ "$NO_AUTOGEN" != yes ] && generate ;;
  gen) generate ;;
  remove)
    for file in "$entries"/*.conf; do
      kernel="$(sed -n 's/^linux *//p' "$file")"
      [ -z "$kernel" ] || [ -e "$esp$kernel" ] || [ "${REMOVE_OBSOLETE,,}" != yes ] || rm "$file"
    done ;;
  *) echo "Usage: sdboot-manage [OPTIONS]... [ACTION]" ;;
esac
[ "$fail" = end ] && exit 1
[ "$fail" = interrupt ] && kill -INT $PPID
exit 0
"""

# After what others found in limine-entry-tool and limine-mkinitcpio-hook 1.37.1 and 1.38.0 (2026) and wrote down; the
# source itself was not at hand, so this is less sure than the others. Left out are unified kernel images, checksums of
# files, mkinitcpio itself, snapshots, hooks, the lock, and fallback images. Its habits: settings of four layers, the
# last one wins, += adds, a pair of double quotes is taken off and single quotes stay; a key of the kernel's own takes
# the place of `default`; without any the words are those of /etc/kernel/cmdline, else of this boot; kernel and initial
# disk are copied in place (here from /kernels, there from /usr/lib/modules), then the body of the kernel's entry is
# written anew where it stands, and all else stays.
LIMINE_ENTRY_TOOL = r"""
import pathlib, re, shutil, sys
root = pathlib.Path(ROOT)
fail = (root / "fail").read_text() if (root / "fail").exists() else ""
ident = (root / "etc/machine-id").read_text().strip()
config = root / "boot/limine.conf"
values = {}
layers = [*sorted((root / "usr/share/limine-entry-tool.d").glob("*.conf")), root / "etc/limine-entry-tool.conf"]
layers += [*sorted((root / "etc/limine-entry-tool.d").glob("*.conf")), root / "etc/default/limine"]
for line in (x for f in layers if f.exists() for x in f.read_text().splitlines()):
    found = re.match(r"\s*KERNEL_CMDLINE\[[\"']?([^\]\"']+)[\"']?\]\s*(\+?)=\s*(.*?)\s*$", line)
    if found:
        value = found[3][1:-1] if re.fullmatch('".*"', found[3]) else found[3]
        values[found[1]] = (values.get(found[1], "") + " " if found[2] else "") + value

def line_of(kernel):
    if values:
        return " ".join(values.get(kernel, values.get("default", "")).split())
    own = root / "etc/kernel/cmdline"
    return " ".join((own if own.exists() else root / "proc/cmdline").read_text().split())

if fail == "start":
    sys.exit("Error: ESP is not mounted")
if sys.argv[1] == "--get-cmdline":
    print(line_of(sys.argv[2]).replace("memmap", "memmmap" if fail == "wrong" else "memmap"))
    sys.exit(1 if fail == "end" else 0)
assert sys.argv[1:] == ["--make-all"], sys.argv
text = config.read_text()
for folder in sorted((root / "kernels").iterdir()):
    kernel = (folder / "pkgbase").read_text().strip()
    to = root / "boot" / ident / kernel
    to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "vmlinuz", to / ("vmlinuz-" + kernel))
    (to / ("initramfs-" + kernel)).write_text("initramfs of " + folder.name)
    body = f"  ### This kernel entry is auto-generated by limine-entry-tool\n  comment: Kernel version: {folder.name}\n"
    body += f"  comment: kernel-id={kernel}\n  protocol: linux\n"
    body += f"  module_path: boot():/{ident}/{kernel}/initramfs-{kernel}\n"
    body += f"  path: boot():/{ident}/{kernel}/vmlinuz-{kernel}\n  cmdline: {line_of(kernel)}\n"
    head = "  //" + kernel + "\n"
    if head in text:
        before, _, rest = text.partition(head)
        end = re.search(r"^[ ]*/", rest, re.MULTILINE)
        text = before + head + body + "\n" + (rest[end.start():] if end else "")
    else:
        at = text.index("/+CachyOS\n") + len("/+CachyOS\n")
        text = text[:at] + head + body + "\n" + text[at:]
config.write_text(text)
print("Updated: /boot/limine.conf")
"""

# After 20-grub.install of Fedora's grub2 (dist-git d483971), `add` and `remove`, in a machine in a folder. Left out are
# the files beside the kernel, debug entries, labels of SELinux, grub2-mkrelpath and other defaults than the newest
# kernel. Its habits: /etc/kernel/cmdline, else the vendor's, else the words of this boot without BOOT_IMAGE= and
# initrd=; where /etc/default/grub is newer than /etc/kernel/cmdline, grub2-mkconfig runs first, whose 10_linux then
# makes that file anew of GRUB_CMDLINE_LINUX; entries of others are left alone.
GRUB_INSTALL = r"""
root="$(cd "${0%/*}/.." && pwd)"
id="$(cat "$root/etc/machine-id")" cmdline="$root/etc/kernel/cmdline" version="$2"
entry="$root/boot/loader/entries/$id-$version.conf"
if [ "$1" = remove ]; then rm -f "$entry" "$root/boot/vmlinuz-$version"; exit 0; fi
. "$root/etc/default/grub"
if [ -f "$cmdline" ]; then
  [ "$cmdline" -ot "$root/etc/default/grub" ] && echo "root=UUID=0 ro mkconfig $GRUB_CMDLINE_LINUX" > "$cmdline"
  read -r -d '' -a options < "$cmdline"
elif [ -f "$root/usr/lib/kernel/cmdline" ]; then
  read -r -d '' -a options < "$root/usr/lib/kernel/cmdline"
else
  read -r -d '' -a words < "$root/proc/cmdline"
  for word in "${words[@]}"; do
    case "$word" in initrd=*|BOOT_IMAGE=*) ;; *) options+=("$word") ;; esac
  done
fi
printf 'title Fedora Linux (%s)\nversion %s\nlinux /vmlinuz-%s\ninitrd /initramfs-%s.img\noptions %s\n' \
  "$version" "$version" "$version" "$version" "${options[*]}" > "$entry"
printf 'grub_users $grub_users\ngrub_arg --unrestricted\ngrub_class fedora\n' >> "$entry"
"""

# After proxmox-boot-tool and the hooks proxmox-auto-removal and zz-proxmox-boot of proxmox-kernel-helper 8.1.0
# (7007b33, November 2023), `refresh` and `refresh --hook`, on a machine in a folder: /dev/disk/by-uuid leads to a
# file that names the folder which is the partition; in a guest to the partition, which is mounted. Left out are all
# other actions, the GRUB menus that it makes on a partition (a note in a file `grub/made` is all), dpkg (the installed
# kernels stand in /packages), uname (/proc/sys/kernel/osrelease), systemd-boot's own hooks that it switches off, and
# containers. Its habits: only the first line of /etc/kernel/cmdline counts, and without root= in it the hook ends
# with 1; without that file the words are those of this boot, but for initrd=; a line that is no UUID of FAT, a
# partition that is not there, cannot be mounted or is not set up is passed over with a warning, and all ends with 0;
# one that has EFI/proxmox/grubx64.efi is GRUB's, and so are then all that follow it (the variable is never reset);
# kernels and initial disks are copied in place, then the entry is written in place; kernels that are not to be kept go
# with their entries: kept are the running one, the two latest, those added by hand, the pinned ones; entries of other
# names stay; `default` of loader.conf is set to proxmox-* or to the pinned kernel; apt's 76pveconf is made anew.
PROXMOX_BOOT_TOOL = r"""
import ctypes, os, pathlib, re, shutil, signal, subprocess, sys
root = pathlib.Path(ROOT)
if ROOT == "/" and "PVE_EFIBOOT_UNSHARED" not in os.environ:
    os.environ["PVE_EFIBOOT_UNSHARED"] = "1"
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv])
fail = (root / "fail").read_text() if (root / "fail").exists() else ""
if fail.endswith(" once"):
    (root / "fail").unlink()
    fail = fail.removesuffix(" once")
uuids = root / "etc/kernel/proxmox-boot-uuids"

def warn(text):
    print(text, file=sys.stderr)

def first_line(name):
    file = root / name
    return file.read_text().split("\n")[0] if file.exists() else ""

def order(version):
    return [(0, int(x)) if x.isdigit() else (1, x) for x in re.split("[-.]", version)]

def opened(device):
    if not device.is_block_device():
        return root / device.read_text().strip()
    place = pathlib.Path("/var/tmp/espmounts") / device.name
    place.mkdir(parents=True, exist_ok=True)
    return place if subprocess.run(["mount", device, place]).returncode == 0 else place / "none"

def kept():
    installed = sorted((root / "packages").read_text().split(), key=order, reverse=True)
    running = (root / "proc/sys/kernel/osrelease").read_text().strip()
    manual = root / "etc/kernel/proxmox-boot-manual-kernels"
    names = {first_line("etc/kernel/proxmox-boot-pin"), first_line("etc/kernel/next-boot-pin"), *installed[:2]}
    names |= {running} if (root / "boot" / ("vmlinuz-" + running)).exists() else set()
    names |= set(manual.read_text().split()) if manual.exists() else set()
    return sorted(names - {""})

def auto_removal():
    file = root / "etc/apt/apt.conf.d/76pveconf"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(file.name + ".dpkg-new")
    new.write_text("APT::NeverAutoRemove\n{\n" + "".join('   "^proxmox-kernel-%s$";\n' % v for v in kept()) + "};\n")
    os.replace(new, file)
    file.chmod(0o444)

def boot():
    if not uuids.exists():
        warn("No /etc/kernel/proxmox-boot-uuids found, skipping ESP sync.")
        return
    if (root / "etc/kernel/cmdline").is_file():
        line = first_line("etc/kernel/cmdline")
        if "root=" not in line:
            warn("No root= parameter in /etc/kernel/cmdline found!")
            sys.exit(1)
    else:
        warn("No /etc/kernel/cmdline found - falling back to /proc/cmdline")
        line = re.sub(r"\binitrd=[0-9a-zA-Z\\\/.-]*\s*", "", (root / "proc/cmdline").read_text().rstrip("\n"))
    line = line.replace("memmap", "memmmap") if fail == "wrong" else line
    grub = False
    for number, uuid in enumerate(x for x in uuids.read_text().split("\n")[:-1] if x):
        path = "/dev/disk/by-uuid/" + uuid
        if not re.search("[0-9a-fA-F]{4}-[0-9a-fA-F]{4}", uuid):
            warn("WARN: %s does not look like a VFAT-UUID - skipping" % uuid)
            continue
        device = root / path[1:]
        if not device.exists():
            warn("WARN: %s does not exist - clean the list! - skipping" % path)
            continue
        esp = opened(device)
        if not esp.is_dir() or (fail == "skip" and number):
            warn("mount of %s failed - skipping" % path)
            continue
        grub |= (esp / "EFI/proxmox/grubx64.efi").exists()
        if grub:
            if not (esp / "grub").is_dir():
                warn("%s contains no grub directory - skipping" % path)
                continue
            (esp / "grub/made").write_text((root / "etc/default/grub").read_text())
            continue
        config = esp / "loader/loader.conf"
        if not config.is_file() or not (esp / "EFI/proxmox").is_dir():
            warn("%s contains no loader.conf - skipping" % path)
            continue
        warn("Copying and configuring kernels on " + path)
        for version in kept():
            kernel, initrd = (root / "boot" / (x + version) for x in ("vmlinuz-", "initrd.img-"))
            if not kernel.exists() or not initrd.exists():
                warn("No linux-image or initrd-image of %s found - skipping" % version)
                continue
            folder = esp / "EFI/proxmox" / version
            folder.mkdir(exist_ok=True)
            shutil.copyfile(kernel, folder / kernel.name)
            shutil.copyfile(initrd, folder / initrd.name)
            here = "/EFI/proxmox/" + version
            text = f"title    Proxmox Virtual Environment\nversion  {version}\noptions  {line}\n"
            text += f"linux    {here}/{kernel.name}\ninitrd   {here}/{initrd.name}\n"
            (esp / "loader/entries" / f"proxmox-{version}.conf").write_text(text)
            if fail == "half":
                sys.exit("cp: error writing: No space left on device")
            if fail == "interrupt":
                os.kill(os.getppid(), signal.SIGINT)
        pinned = first_line("etc/kernel/next-boot-pin") or first_line("etc/kernel/proxmox-boot-pin")
        default = "default proxmox-%s" % (pinned + ".conf" if pinned else "*")
        text = config.read_text()
        found = re.search("^default .*$", text, re.MULTILINE)
        fresh = config.with_name("sedXXXXXX")  # of sed -i
        fresh.write_text(text.replace(found[0], default) if found else text + default + "\n")
        os.replace(fresh, config)
        for folder in (esp / "EFI/proxmox").iterdir():
            if folder.is_dir() and not any(folder.name in v for v in kept()):
                shutil.rmtree(folder)
                (esp / "loader/entries" / f"proxmox-{folder.name}.conf").unlink(missing_ok=True)
        descriptor = os.open(esp, os.O_RDONLY)
        ctypes.CDLL(None).syncfs(descriptor)  # as umount does
        os.close(descriptor)
        if device.is_block_device():
            subprocess.run(["umount", esp], check=True)
            esp.rmdir()

if fail == "start":
    sys.exit("Hook script 'functions' not found")
if sys.argv[1:] == ["refresh"]:
    auto_removal()
elif sys.argv[1:] != ["refresh", "--hook", "zz-proxmox-boot"]:
    sys.exit("Invalid/unknown command '%s'." % " ".join(sys.argv[1:]))
boot()
if fail == "end":
    sys.exit(1)
"""

# unshare, mount and findmnt as far as partitions are looked at by them, on the same machine: sh does the rest. The
# file /mounts says where a device is mounted; what is mounted cannot be mounted read-only as well.
UNSHARE = r"""#!/bin/sh
root="$(cd "${0%/*}/.." && pwd)"
[ "$1 $2 $3 $4 $5 $#" = "--mount --propagation private sh -c 6" ] || exit 64
mount() {
  [ "$1 $2 $3 $4 $6" = "-t vfat -o ro,nosuid,nodev,noexec /mnt" ] || exit 64
  there="$(command cat "$root$5")"
  [ -z "$(findmnt "$5")" ] || { echo "mount: /mnt: $5 already mounted or mount point busy." >&2; return 32; }
  [ -d "$root/$there" ] || { echo "mount: /mnt: wrong fs type, bad superblock on $5" >&2; return 32; }
}
findmnt() { for last; do :; done; [ ! -e "$root/mounts" ] || sed -n "s|^$last ||p" "$root/mounts"; }
umount() { [ "$1" = /mnt ] || exit 64; }
cd() { if [ "$1" = /mnt ]; then command cd "$root/$there"; else command cd "$root$1"; fi; }
cat() { command cat "$root$1"; }
test() { command test "$1" "$root$2"; }
eval "$6"
"""
