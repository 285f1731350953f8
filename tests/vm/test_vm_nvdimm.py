# SPDX-License-Identifier: Apache-2.0
"""Real ndctl on virtual NVDIMMs: two modules on two nodes, beside a reserved range of RAM and a virtio-pmem device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from emupmem.model import KIB, MIB
from emupmem.vm.arguments import plan_devices
from emupmem.vm.guest import read_guest
from emupmem.vm.size import choose_size
from emupmem.vm.wish import Backend, Backing, DeviceOptions, DeviceWish, GuestDevice
from tests.vm.image import image
from tests.vm.machine import Machine
from tests.vm.nested import IDLE, nested_guest
from tests.vm.test_vm import FEWER

WORDS = """
set -eux
. /job/warm
refuses() { word="$1"; shift; "$@" 2> /run/why && exit 9 || [ $? = 1 ]; cat /run/why; grep -qF -- "$word" /run/why; }
"""

FIRST = (
    FEWER
    + WORDS
    + """
# fresh modules have no labels: each region is one raw namespace
emupmem nvdimm show --json > /job/out/fresh.json
grep -q 'raw' /sys/bus/nd/devices/namespace0.0/mode
ndctl create-namespace && exit 9 || true
refuses 'no region has labels' emupmem nvdimm create --yes
refuses 'always has its whole size' emupmem nvdimm create --region region0 --size 64M --yes
refuses 'there is no terminal to ask on' emupmem nvdimm destroy namespace0.0
refuses 'ipmctl is not installed' emupmem nvdimm goal --mode appdirect --yes
emupmem nvdimm destroy namespace0.0 --dry-run
emupmem nvdimm destroy namespace0.0 --yes
# each begins at a multiple of 16 MiB: both can be fsdax and devdax (the other one below, with labels)
for mode in devdax fsdax; do
    emupmem nvdimm create --region region1 --mode $mode --yes
    emupmem nvdimm destroy namespace1.0 --yes
done
emupmem nvdimm create --region region1 --mode sector --yes --json > /job/out/whole.json

# all modes on the first one
refuses 'is not a multiple of 16 MiB' emupmem nvdimm create --size 65M
refuses 'the largest that fits is 512M' emupmem nvdimm create --region region0 --size 528M
refuses 'it can 4K, 2M' emupmem nvdimm create --align 16M
refuses 'there is no region region7' emupmem nvdimm create --region region7
emupmem nvdimm create --size 64M --dry-run
emupmem nvdimm create --size 128M --map mem --name db --if-not-exists --json > /job/out/fsdax.json
emupmem nvdimm create --mode sector --size 32M --json > /job/out/sector.json
emupmem nvdimm create --mode raw --size 32M --json > /job/out/raw.json
emupmem nvdimm create --mode devdax --size 64M --map dev --align 4K --json > /job/out/devdax.json
# what is there is found again, by what it takes of its region, whatever of that is usable
for mode in sector:32M raw:32M devdax:64M; do
    emupmem nvdimm create --mode ${mode%:*} --size ${mode#*:} --if-not-exists --check
done
refuses 'needs root' emupmem_as dev nvdimm show
emupmem nvdimm show
ls -l /dev/pmem* /dev/dax*

# a file system on the one that can have DAX
refuses '/dev/pmem0.1s has no DAX' emupmem mount /dev/pmem0.1s
refuses '/dev/pmem0.2 has no DAX' emupmem mount /dev/pmem0.2
emupmem mount /dev/pmem0 /mnt/pmem0 --json > /job/out/mount.json
echo kept > /mnt/pmem0/file
emupmem mount /dev/pmem0 /mnt/pmem0 > /run/said
grep 'virtual NVDIMM, kept by what the host has behind it' /run/said
grep volatile /run/said && exit 9 || true
emupmem nvdimm show --socket $(cat /sys/bus/nd/devices/region0/numa_node) --json > /job/out/mounted.json
(cd /mnt/pmem0 && exec sleep 1000) &
user=$!
refuses '/dev/pmem0 is mounted on /mnt/pmem0, in use by sleep' emupmem nvdimm destroy namespace0.0 --yes
kill $user
mkswap /dev/pmem0.1s
swapon /dev/pmem0.1s
refuses 'is swap space' emupmem nvdimm destroy /dev/pmem0.1s --yes
swapoff -a
python3 -c 'import os, time; os.open("/dev/dax0.3", os.O_RDWR); open("/run/there", "w"); time.sleep(1000)' &
user=$!
until [ -e /run/there ]; do sleep 0.2; done
refuses '/dev/dax0.3 is in use by python3' emupmem nvdimm destroy namespace0.3 --yes
kill $user
umount /mnt/pmem0
# what is disabled has no size in ndctl's words, and what the kernel knows as bad is shown
for name in namespace0.0 namespace0.3; do ndctl disable-namespace $name; done
emupmem nvdimm show --json > /job/out/disabled.json
for name in namespace0.0 namespace0.3; do ndctl enable-namespace $name; done
echo 64 8 > /sys/block/pmem0.2/badblocks
emupmem nvdimm show > /run/said
grep 'namespace0.2 .* 8 bad blocks of 512 bytes' /run/said
emupmem apply --size 256M --yes
"""
)

PICK = """
import json
regions = json.load(open("/job/out/after.json"))["regions"]
mine = next(r["namespaces"] for r in regions if len(r["namespaces"]) == 4)
reserved = next(r for r in regions if r["emulated"])
for mode in ("fsdax", "raw", "devdax"):
    print(mode + "=" + next(n["dev"] for n in mine if n["mode"] == mode))
print("all='" + " ".join((n["name"], n["dev"])[i % 2] for i, n in enumerate(mine)) + "'")
print("gone=" + mine[0]["name"])
print("range=" + reserved["name"])
print("virtio=" + next(r["namespaces"][0]["dev"] for r in regions if r["provider"] == "virtio-pmem"))
print("reserved=" + reserved["namespaces"][0]["name"] + " ram=" + reserved["namespaces"][0]["dev"])
"""

# There are no Optane modules here: the goal is told to be reached, by modules with the handles of these.
IPMCTL = """#!/bin/sh
case "$*" in
  version) echo Intel Optane Persistent Memory Command Line Interface Version 03.00.00.0468 ;;
  *-dimm*) for n in $(ndctl list -D | grep -o '"handle":[0-9]*' | cut -d: -f2); do
      printf -- '---DimmID=0x%04x---\n   Capacity=538968064 B\n   HealthState=Healthy\n' $n
      printf '   DimmHandle=0x%04x\n   MemoryCapacity=0 B\n   AppDirectCapacity=538968064 B\n' $n
    done ;;
  *-region*) printf -- '---ISetID=0x1---\n   PersistentMemoryType=AppDirect\n' ;;
  *-goal*) echo There are no goal configs defined in the system. ;;
esac
"""

# What the guest inside the guest does: it tells of its two NVDIMMs and writes to them.
INNER = """
set -e
until [ -b /dev/pmem0 ] && [ -b /dev/pmem1 ]; do sleep 1; done
for name in pmem0 pmem1; do
    echo size $(cat /sys/block/$name/size)
    printf 'inner guest.' | dd of=/dev/$name bs=4096 conv=notrunc,fsync 2>/dev/null
done
echo domain $(cat /sys/bus/nd/devices/region0/persistence_domain)
"""

# The first bytes of a DAX device, which nobody can read but through a mapping.
HEAD = """
import mmap, os, sys
print(mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 4096, prot=mmap.PROT_READ)[:12].decode())
"""

SECOND = (
    WORDS
    + IDLE
    + """
# with a reserved range beside them; what was made is still there, by whichever number now
modprobe virtio_pmem
until find /sys/devices -path '*/virtio*/ndbus*/block/pmem*' | grep -q .; do sleep 1; done
emupmem nvdimm show
emupmem nvdimm show --json > /job/out/after.json
python3 /job/pick.py > /run/picked
. /run/picked

# its own name stays with it
emupmem nvdimm create --size 128M --map mem --name db --if-not-exists --check
refuses 'db is there' emupmem nvdimm create --size 64M --name db --if-not-exists
refuses 'has the name db' emupmem nvdimm create --size 64M --name db
emupmem nvdimm destroy db --if-exists --check && exit 9 || [ $? = 3 ]
emupmem nvdimm destroy none --if-exists --check

# and one by virtio-pmem: each is called what it is
emupmem nvdimm show > /run/said
cat /run/said
[ $(grep -c 'virtual NVDIMM, kept by what the host has behind it' /run/said) = 2 ]
[ $(grep -c 'emulated, volatile' /run/said) = 1 ]
grep '^region.* · virtio-pmem, kept by what the host has behind it$' /run/said
emupmem mount $virtio /mnt/virtio > /run/said
cat /run/said
grep '/mnt/virtio with dax=always · virtio-pmem, kept by what the host has behind it' /run/said
grep -e '- map-sync .* msync or fsync' /run/said
grep volatile /run/said && exit 9 || true
emupmem mount $virtio /mnt/virtio --json > /job/out/virtio.json
refuses 'is not a device that memmap= made' emupmem save /run/image $virtio
refuses 'is not one of emupmem' emupmem mount $virtio /mnt/virtio --at-boot
emupmem verify > /run/said
grep 'virtio' /run/said && exit 9 || true
emupmem umount /mnt/virtio
emupmem mount $fsdax /mnt/pmem0 --json > /job/out/kept.json
[ "$(cat /mnt/pmem0/file)" = kept ]

# real devices behind a virtual machine: what each can promise, and that QEMU takes it
given="--qemu /job/nested/qemu"
emupmem qemu args $given --pmem 16M --backend /mnt/pmem0 --json > /job/out/daxfile.json
refuses "$fsdax is mounted on /mnt/pmem0" emupmem qemu run $given --backend $fsdax
emupmem umount /mnt/pmem0
unshare -m sh -c "mount $fsdax /mnt/pmem0; touch /run/elsewhere; exec sleep 1000" &
user=$!
until [ -e /run/elsewhere ]; do sleep 0.2; done
refuses 'on /mnt/pmem0 in the mount namespace of sleep' emupmem qemu run $given --backend $fsdax
kill $user
wait $user || true
ln -s $devdax /run/renamed
emupmem qemu args $given --pmem 32M --backend /run/renamed
ln -s /dev/null /run/dax0.3
refuses '/run/dax0.3 is not a DAX device' emupmem qemu args $given --pmem 32M --backend /run/dax0.3
/usr/local/bin/emupmem qemu run $given --pmem 16M --backend $raw -- $idle < /run/monitor > /job/out/raw 2>&1 &
user=$!
started /job/out/raw
echo quit >&3
wait $user
/usr/local/bin/emupmem qemu run $given --pmem 32M --backend $devdax -- $idle < /run/monitor > /job/out/devdax 2>&1 &
user=$!
started /job/out/devdax
refuses "$devdax is in use by" emupmem qemu run $given --pmem 32M --backend $devdax
grep "$devdax" /proc/$user/maps
echo quit >&3
wait $user

# the whole chain: a reserved range, DAX on it, a file there, a guest that has it as its NVDIMM; a DAX device beside it
emupmem mount $ram /mnt/chain
cd /job/out
inner() {
    eval emupmem qemu run $given --pmem 64M --backend /mnt/chain --pmem 32M --backend $devdax --persistence cpu \
        -- $(cat /job/nested/$1)
    grep '^domain' output
}
modprobe kvm_amd || true
inner kvm || inner tcg
cd /
python3 /job/head.py $devdax > /job/out/chained
ls -l /mnt/chain
head -c 12 /mnt/chain/vnvdimm0.img > /job/out/chain

# latency of a file there; what has no data in it is nothing to measure
head -c 8M /dev/urandom > /mnt/chain/sample
sha256sum /mnt/chain/sample > /run/sum
emupmem bench /mnt/chain/sample $devdax --json > /job/out/bench.json
sha256sum -c /run/sum
fallocate -l 8M /mnt/chain/empty
refuses 'has less than 2 MiB of data' emupmem bench /mnt/chain/empty
refuses "$ram is a block device" emupmem bench $ram
refuses 'is not on a DAX mount' emupmem bench /etc/passwd
emupmem umount /mnt/chain
refuses "$ram holds ext4" emupmem nvdimm create --region $range --mode devdax --yes
wipefs -qa $ram
refuses 'cannot be destroyed' emupmem nvdimm destroy $reserved --yes
refuses 'has no labels' emupmem nvdimm create --region $range --size 64M --yes
# whatever is made of the range is as planned
emupmem verify
for mode in sector fsdax devdax; do
    emupmem nvdimm create --region $range --mode $mode --yes --json > /job/out/range.json
    emupmem verify >> /job/out/verified
done
emupmem_as dev verify
for name in $all; do
    emupmem nvdimm destroy $name --yes
done
refuses "there is no namespace $gone" emupmem nvdimm destroy $gone --yes

# ndctl leaves what a namespace held: a new one in its place tells of it
emupmem nvdimm create --size 128M --map mem --json > /job/out/again.json
emupmem nvdimm destroy $gone --yes
emupmem nvdimm show --json > /job/out/last.json

# where a goal is reached, the same command makes the namespaces that are missing, and no other
install -m 755 /job/ipmctl /usr/local/sbin/ipmctl
emupmem nvdimm show
refuses 'there is no terminal to ask on' emupmem nvdimm goal --mode appdirect
emupmem nvdimm goal --mode appdirect --yes --json > /job/out/goal.json
emupmem nvdimm goal --mode appdirect > /job/out/reached
refuses 'the goal would destroy' emupmem nvdimm goal --mode memory --yes
rm /usr/local/sbin/ipmctl
"""
)


def modules(folder: Path) -> list[str]:
    """emupmem's arguments of QEMU for two NVDIMMs with labels, one on each node."""
    guest = read_guest(("-m", "6G", "-numa", "node,memdev=ram0", "-numa", "node,memdev=ram1"))
    files = [Backend(Backing.FILE, str(folder / f"nv{n}")) for n in (0, 1)]
    label = 128 * KIB
    sizes = [choose_size(file, 512 * MIB, label) for file in files]
    wishes = [
        DeviceWish(file, size, n, label) for n, (file, size) in enumerate(zip(files, sizes, strict=True))
    ]
    return plan_devices(guest, wishes, DeviceOptions(), (7, 2)).argv


def by_virtio(folder: Path, there: Sequence[str]) -> list[str]:
    """emupmem's arguments for a device more, by virtio-pmem, beside those that the guest has."""
    file = Backend(Backing.FILE, str(folder / "virtio"))
    wish = DeviceWish(file, choose_size(file, 128 * MIB))
    guest = read_guest(("-m", "6G", *there))
    return plan_devices(guest, [wish], DeviceOptions(device=GuestDevice.VIRTIO), (7, 2)).argv


@pytest.mark.vm(image="bookworm bios", boots=2, seconds=280)
def test_namespaces_of_virtual_nvdimms(tmp_path: Path) -> None:
    nested = nested_guest("bookworm", INNER, ("nfit", "nd_pmem"), tmp_path / "nested")
    with Machine(
        image("bookworm", "bios"),
        memory="6G",
        nodes=("3G", "3G"),
        qemu_args=modules(tmp_path),
        svm=True,
    ) as guest:
        first = guest.boot(FIRST)
        assert first.status == 0, first.output
        guest.qemu_args += tuple(by_virtio(tmp_path, guest.qemu_args))
        second = guest.boot(
            SECOND, {"pick.py": PICK, "head.py": HEAD, "ipmctl": IPMCTL, "nested": nested}, last=True
        )
        assert second.status == 0, second.output
    said = {
        n: json.loads(data) for r in (first, second) for n, data in r.files.items() if n.endswith(".json")
    }
    print(first.output, second.output)

    # which of the two is region0 is the kernel's choice, anew at each boot
    fresh = regions(said["fresh.json"])
    assert sorted((r["size"], r["numa_node"], r["labelled"]) for r in fresh.values()) == [
        (512 * MIB, 0, False),
        (512 * MIB, 1, False),
    ]
    assert [(r["provider"], r["emulated"]) for r in fresh.values()] == [("ACPI.NFIT", False)] * 2
    assert [d["label_area"] for d in said["fresh.json"]["dimms"]] == [True, True]

    whole = said["whole.json"]
    assert (whole["device"], whole["namespace"]["mode"]) == ("/dev/pmem1s", "sector")
    made = {mode: said[f"{mode}.json"] for mode in ("fsdax", "sector", "raw", "devdax")}
    assert [one["device"] for one in made.values()] == [
        "/dev/pmem0",
        "/dev/pmem0.1s",
        "/dev/pmem0.2",
        "/dev/dax0.3",
    ]
    assert {mode: one["namespace"]["mode"] for mode, one in made.items()} == {mode: mode for mode in made}
    assert (made["fsdax"]["namespace"]["map"], made["devdax"]["namespace"]["map"]) == ("mem", "dev")
    assert made["devdax"]["namespace"]["align"] == 4096
    sizes = {mode: one["namespace"]["raw_size"] // MIB for mode, one in made.items()}
    assert sizes == {"fsdax": 128, "sector": 32, "raw": 32, "devdax": 64}
    assert (made["fsdax"]["namespace"]["alt_name"], made["raw"]["namespace"]["alt_name"]) == ("db", "")
    assert said["mount.json"]["map_sync"]
    assert said["mount.json"]["huge_pages"]

    node = regions(said["mounted.json"])
    assert list(node) == ["region0"], "the other module is on another node"
    assert node["region0"]["namespaces"][0]["mounts"] == [{"dir": "/mnt/pmem0", "fs": "ext4", "dax": True}]

    after = said["after.json"]["regions"]
    (reserved,) = [r for r in after if r["emulated"]]
    assert (reserved["provider"], reserved["volatile"], reserved["size"]) == ("e820", True, 256 * MIB)
    assert sorted(len(r["namespaces"]) for r in after) == [1, 1, 1, 4]
    (virtio,) = [r for r in after if r["provider"] == "virtio-pmem"]
    assert (virtio["emulated"], virtio["volatile"], virtio["labelled"]) == (False, False, False)
    assert [said["virtio.json"][k] for k in ("dax_file", "map_sync")] == [True, False]
    assert said["range.json"]["namespace"]["mode"] == "devdax"
    verified = second.files["verified"].decode()
    assert verified.count("✓ device ") == verified.count("✓ dax ") == 3
    assert "(sector, " in verified
    assert "(fsdax with a page map on it, " in verified
    assert "devdax: programs map the device itself" in verified
    off = {n["name"]: n for r in said["disabled.json"]["regions"] for n in r["namespaces"]}
    assert [off[n]["enabled"] for n in ("namespace0.0", "namespace0.3")] == [False, False]
    assert (made["fsdax"]["holds"], said["again.json"]["holds"]) == ("", "ext4")
    assert (said["kept.json"]["fs"], said["kept.json"]["map_sync"]) == ("ext4", True), "as it was"
    goal = said["goal.json"]
    assert (goal["state"], goal["changed"], goal["destroys"]) == ("done", True, [])
    assert [n["mode"] for n in goal["namespaces"]] == ["fsdax"], "the other region has one"
    assert goal["namespaces"][0]["dev"] in second.files["reached"].decode()
    last = said["last.json"]["regions"]
    assert [r["free"] for r in last if not r["namespaces"]] == [512 * MIB]

    check_backends(second.files)


def check_backends(files: Mapping[str, bytes]) -> None:
    """What was said of real devices behind a virtual machine, and what the guest inside the guest did."""
    file = json.loads(files["daxfile.json"])
    assert file["promises"] == [
        "writes that the guest flushes survive the guest, a crash of this machine and power loss"
    ]
    assert "pmem=on" in " ".join(file["argv"])
    assert "through the page cache" in files["raw"].decode()
    assert "a crash of this machine and power loss" in files["devdax"].decode()
    lines = files["output"].decode().splitlines()
    assert {x for x in lines if x.startswith("size ")} == {f"size {n * MIB // 512}" for n in (64, 32)}
    assert "domain cpu_cache" in lines
    assert files["chain"] == b"inner guest."
    assert files["chained"] == b"inner guest.\n"
    measured = json.loads(files["bench.json"])
    local, sample, device = measured["results"]
    assert (local["target"], local["node"]) == ("node0", 0)
    (node,) = (r["numa_node"] for r in json.loads(files["after.json"])["regions"] if r["emulated"])
    assert (sample["target"], sample["node"], sample["loads"]) == ("/mnt/chain/sample", node, 8 * MIB // 256)
    assert device["node"] in (0, 1)
    assert ("/mnt/chain/sample is RAM of node 0, as fast as the rest of it" in measured["notes"]) is (
        node == 0
    )


def regions(view: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The regions of `show --json` by name."""
    return {r["name"]: r for r in view["regions"]}
