"""Real ndctl on virtual NVDIMMs: two modules on two nodes, beside a reserved range of RAM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emupmem.model import MIB
from tests.vm.image import image
from tests.vm.machine import Machine

pytestmark = pytest.mark.vm

MODULE = 514
"""MiB of a module: 2 for its labels, so that the next one begins at a multiple of 16 MiB."""

WORDS = """
set -eux
. /job/warm
refuses() { word="$1"; shift; "$@" 2> /run/why && exit 9 || [ $? = 1 ]; cat /run/why; grep -qF -- "$word" /run/why; }
"""

FIRST = (
    WORDS
    + """
# fresh modules have no labels: each region is one raw namespace
emupmem nvdimm show --json > /job/out/fresh.json
refuses 'no region has labels' emupmem nvdimm create --yes
refuses 'always has its whole size' emupmem nvdimm create --region region0 --size 64M --yes
refuses 'there is no terminal to ask on' emupmem nvdimm destroy namespace0.0
refuses 'ipmctl is not installed' emupmem nvdimm goal --mode appdirect --yes
emupmem nvdimm destroy namespace0.0 --dry-run
emupmem nvdimm destroy namespace0.0 --yes
emupmem nvdimm create --region region1 --mode sector --yes --json > /job/out/whole.json

# all modes on the first one
refuses 'is no multiple of 16 MiB' emupmem nvdimm create --size 65M
refuses 'the largest that fits is 512M' emupmem nvdimm create --region region0 --size 528M
refuses 'it can 4K, 2M' emupmem nvdimm create --align 16M
refuses 'there is no region region7' emupmem nvdimm create --region region7
emupmem nvdimm create --size 64M --dry-run
for made in fsdax:128M sector:32M raw:32M devdax:64M; do
    emupmem nvdimm create --mode ${made%:*} --size ${made#*:} --json > /job/out/${made%:*}.json
done
emupmem nvdimm show
ls -l /dev/pmem* /dev/dax*

# a file system on the one that can have DAX
emupmem mount /dev/pmem0 /mnt/pmem0 --json > /job/out/mount.json
echo kept > /mnt/pmem0/file
emupmem nvdimm show --socket $(cat /sys/bus/nd/devices/region0/numa_node) --json > /job/out/mounted.json
(cd /mnt/pmem0 && exec sleep 1000) &
user=$!
refuses '/dev/pmem0 is mounted on /mnt/pmem0, in use by sleep' emupmem nvdimm destroy namespace0.0 --yes
kill $user
mkswap /dev/pmem0.1s && swapon /dev/pmem0.1s
refuses 'is swap space' emupmem nvdimm destroy /dev/pmem0.1s --yes
swapoff -a
python3 -c 'import os, time; os.open("/dev/dax0.3", os.O_RDWR); open("/run/there", "w"); time.sleep(1000)' &
user=$!
until [ -e /run/there ]; do sleep 0.2; done
refuses '/dev/dax0.3 is in use by python3' emupmem nvdimm destroy namespace0.3 --yes
kill $user
umount /mnt/pmem0
emupmem apply --size 256M --yes
"""
)

PICK = """
import json
regions = json.load(open("/job/out/after.json"))["regions"]
mine = next(r["namespaces"] for r in regions if len(r["namespaces"]) == 4)
reserved = next(r for r in regions if r["emulated"])
print("fsdax=" + next(n["dev"] for n in mine if n["mode"] == "fsdax"))
print("all='" + " ".join((n["name"], n["dev"])[i % 2] for i, n in enumerate(mine)) + "'")
print("gone=" + mine[0]["name"])
print("range=" + reserved["name"] + " reserved=" + reserved["namespaces"][0]["name"])
"""

SECOND = (
    WORDS
    + """
# with a reserved range beside them; what was made is still there, by whichever number now
emupmem nvdimm show
emupmem nvdimm show --json > /job/out/after.json
python3 /job/pick.py > /run/picked
. /run/picked
mount -o dax $fsdax /mnt
[ "$(cat /mnt/file)" = kept ]
umount /mnt
refuses 'cannot be destroyed' emupmem nvdimm destroy $reserved --yes
refuses 'has no labels' emupmem nvdimm create --region $range --size 64M --yes
emupmem nvdimm create --region $range --mode devdax --yes --json > /job/out/range.json
for name in $all; do
    emupmem nvdimm destroy $name --yes
done
refuses "there is no namespace $gone" emupmem nvdimm destroy $gone --yes

# ndctl leaves what a namespace held: a new one in its place tells of it
emupmem nvdimm create --size 128M --json > /job/out/again.json
emupmem nvdimm destroy $gone --yes
emupmem nvdimm show --json > /job/out/last.json
"""
)


def modules(folder: Path) -> list[str]:
    """QEMU's arguments for two NVDIMMs with labels, one on each node."""
    argv = ["-machine", "nvdimm=on"]
    for n in (0, 1):
        back = f"memory-backend-file,id=nv{n},share=on,mem-path={folder}/nv{n},size={MODULE}M"
        argv += ["-object", back, "-device", f"nvdimm,memdev=nv{n},label-size=2M,node={n}"]
    return argv


def test_namespaces_of_virtual_nvdimms(tmp_path: Path) -> None:
    with Machine(
        image("bookworm", "bios"),
        memory="6G,slots=2,maxmem=10G",
        nodes=("3G", "3G"),
        qemu_args=modules(tmp_path),
    ) as guest:
        first = guest.boot(FIRST)
        assert first.status == 0, first.output
        second = guest.boot(SECOND, {"pick.py": PICK})
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
    assert said["mount.json"]["map_sync"]
    assert said["mount.json"]["huge_pages"]

    node = regions(said["mounted.json"])
    assert list(node) == ["region0"], "the other module is on another node"
    assert node["region0"]["namespaces"][0]["mounts"] == [{"dir": "/mnt/pmem0", "fs": "ext4", "dax": True}]

    after = said["after.json"]["regions"]
    (reserved,) = [r for r in after if r["emulated"]]
    assert (reserved["provider"], reserved["volatile"], reserved["size"]) == ("e820", True, 256 * MIB)
    assert sorted(len(r["namespaces"]) for r in after) == [1, 1, 4]
    assert said["range.json"]["namespace"]["mode"] == "devdax"
    assert (made["fsdax"]["holds"], said["again.json"]["holds"]) == ("", "ext4")
    last = said["last.json"]["regions"]
    assert [r["free"] for r in last if not r["namespaces"]] == [512 * MIB]


def regions(view: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The regions of `show --json` by name."""
    return {r["name"]: r for r in view["regions"]}
