# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.bench.guest`: what saving, restoring and DAX cost, as ratios, in one run of a guest.

Without KVM the bare numbers say little; the ratios compare what ran side by side on one machine.
"""

from __future__ import annotations

import json
import statistics
import sys

from tests.bench.table import COPYING, FAULTS, SAVING, Row, table
from tests.vm.image import ROOT_UUID, image, to_stderr
from tests.vm.machine import Image, Machine

SIZE = "512M"

MEASURE = r"""
set -eu
for n in 1 2 3 4 5 6 7 8 9; do [ -b /dev/pmem0 ] || sleep 3; done
# as emupmem mount makes it
mkfs.ext4 -q -b 4096 -m 0 -E stride=512,stripe_width=512 /dev/pmem0
mkdir -p /mnt/dax /mnt/tmpfs /root/disk
mount -o dax /dev/pmem0 /mnt/dax
mount -t tmpfs -o size=600M none /mnt/tmpfs
# half of it in use, as a device that somebody works with
head -c 200000000 /dev/urandom > /mnt/dax/noise
sync
umount /mnt/dax
/opt/emupmem/bin/python - <<'END' > /job/out/times.json
import json, mmap, os, subprocess, sys, time

def seconds(*argv):
    subprocess.run(['sync'])
    with open('/proc/sys/vm/drop_caches', 'w') as file:
        file.write('3')
    start = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start

def sh(text):
    return seconds('sh', '-ec', text)

out = {}
def note(name, value):
    out.setdefault(name, []).append(value)

for _ in range(3):
    for where in ('/root/disk', '/mnt/tmpfs'):
        name = where.rpartition('/')[2]
        note(f'cp {name}', sh(f'cp --sparse=always /dev/pmem0 {where}/cp'))
        os.unlink(f'{where}/cp')
        note(f'cp+sync {name}', sh(f'cp --sparse=always /dev/pmem0 {where}/cp; sync {where}/cp'))
        program = ('/opt/emupmem/bin/python', '-c', '''
import sys, time
from emupmem.device import image
from emupmem.system.machine import Machine
t = time.perf_counter()
if sys.argv[1] == "save": image.save_image(Machine(), sys.argv[2])
else: image.restore_image(Machine(), sys.argv[2])
print(time.perf_counter() - t, file=sys.stderr)
''')
        def ours(what):
            done = subprocess.run([*program, what, f'{where}/image'], stderr=subprocess.PIPE, check=True)
            return float(done.stderr.split()[-1])
        seconds('true')
        note(f'save {name}', ours('save'))
        note(f'emupmem save {name}', seconds('emupmem', 'save', f'{where}/image'))
        seconds('true')
        note(f'restore {name}', ours('restore'))
        note(f'cp back+sync {name}', sh(f'cp {where}/cp /dev/pmem0; sync /dev/pmem0'))
        os.unlink(f'{where}/cp'); os.unlink(f'{where}/image')

# a new one each time: what a used file system has free may be crooked
def renew():
    subprocess.run(['umount', '-q', '/mnt/dax'])
    subprocess.run('mkfs.ext4 -q -F -b 4096 -m 0 -E stride=512,stripe_width=512 /dev/pmem0'.split(), check=True)
    subprocess.run(['mount', '-o', 'dax', '/dev/pmem0', '/mnt/dax'], check=True)

MIB = 1 << 20
block = os.urandom(MIB)

def write(folder, count=256):
    start = time.perf_counter()
    with open(f'{folder}/file', 'wb', buffering=0) as file:
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())
    return count / (time.perf_counter() - start)

def read(folder, count=256):
    room = bytearray(MIB)
    start = time.perf_counter()
    with open(f'{folder}/file', 'rb', buffering=0) as file:
        while file.readinto(room):
            pass
    return count / (time.perf_counter() - start)

def faults(folder, count=256):
    with open(f'{folder}/mapped', 'w+b') as file:
        os.posix_fallocate(file.fileno(), 0, count * MIB)
        with mmap.mmap(file.fileno(), 0) as area:
            before = int(open('/proc/self/stat').read().rpartition(')')[2].split()[7])
            for at in range(0, len(area), 4096):
                area[at] = 1
            after = int(open('/proc/self/stat').read().rpartition(')')[2].split()[7])
    os.unlink(f'{folder}/mapped')
    return after - before

for _ in range(3):
    renew()
    for folder in ('/mnt/dax', '/mnt/tmpfs'):
        note(f"faults {folder.rpartition('/')[2]}", faults(folder))

for _ in range(3):
    for folder in ('/mnt/dax', '/mnt/tmpfs', '/root/disk'):
        name = folder.rpartition('/')[2]
        note(f'write {name}', write(folder))
        seconds('true')
        note(f'read {name}', read(folder))
        os.unlink(f'{folder}/file')
json.dump(out, sys.stdout)
END
"""


def report(times: dict[str, list[float]]) -> str:
    """The medians and what divides them."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    lines = [f"save and restore of {SIZE}, 200 MB in use: seconds, and what cp takes of it (more is better)"]
    for place in ("disk", "tmpfs"):
        for ours, theirs in (("save", "cp"), ("save", "cp+sync"), ("restore", "cp back+sync")):
            mine, yours = middle[f"{ours} {place}"], middle[f"{theirs} {place}"]
            lines.append(
                f"  {ours:8} {place:6} {mine:6.2f} s   {theirs:13} {yours:6.2f} s   ratio {yours / mine:.2f}"
            )
        lines.append(f"  the whole command: emupmem save {middle[f'emupmem save {place}']:.2f} s ({place})")
    lines.append("sequential MiB/s of 256 MiB, and as a ratio to the DAX mount")
    for what in ("write", "read"):
        for place in ("dax", "tmpfs", "disk"):
            value = middle[f"{what} {place}"]
            lines.append(f"  {what:6} {place:6} {value:8.0f}   {value / middle[f'{what} dax']:.2f}")
    lines.append("page faults for touching 256 MiB through a mapping")
    lines += [f"  {place:6} {middle[f'faults {place}']:8.0f}" for place in ("dax", "tmpfs")]
    return "\n".join(lines)


def reserved(guest: Image) -> list[str]:
    """QEMU's arguments for a kernel that is told at once what to reserve: GRUB is not what is measured."""
    append = f"root=UUID={ROOT_UUID} ro console=ttyS0 memmap={SIZE}!4G"
    return ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", append]


def rows(times: dict[str, list[float]]) -> list[Row]:
    """The same for the table."""
    middle = {name: statistics.median(values) for name, values in times.items()}

    def ratio(theirs: str, ours: str, place: str) -> str:
        return f"{middle[f'{theirs} {place}'] / middle[f'{ours} {place}']:.1f}"

    def both(place: str) -> str:
        return f"{middle[f'write {place}']:.0f} and {middle[f'read {place}']:.0f}"

    saved = (
        f"{ratio('cp+sync', 'save', 'disk')} times as fast as `cp --sparse=always` and `sync` to the same virtio "
        f"disk; {ratio('cp back+sync', 'restore', 'disk')} times `cp` back and `sync` (to tmpfs "
        f"{ratio('cp+sync', 'save', 'tmpfs')} and {ratio('cp back+sync', 'restore', 'tmpfs')})"
    )
    copied = f"DAX mount {both('dax')}, tmpfs {both('tmpfs')}, ext4 on a virtio disk {both('disk')}"
    faults = (
        f"{middle['faults dax']:,.0f} on a new file system laid out as `emupmem mount` does it; "
        f"{middle['faults tmpfs']:,.0f} on tmpfs"
    )
    return [Row(SAVING, saved), Row(COPYING, copied), Row(FAULTS, faults)]


def inside(suite: str) -> list[Row]:
    """Boot the guest, measure, print; the rows of the table. Raises RuntimeError where the guest's script failed."""
    guest = image(suite, "bios", to_stderr)
    with Machine(guest, qemu_args=reserved(guest)) as machine:
        result = machine.boot(MEASURE, timeout=3600)
    if result.status != 0:
        raise RuntimeError(result.output)
    times = json.loads(result.files["times.json"])
    print(report(times))
    return rows(times)


if __name__ == "__main__":
    print(table(inside(sys.argv[1] if len(sys.argv) > 1 else "bookworm")))
