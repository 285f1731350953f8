# SPDX-License-Identifier: Apache-2.0
"""What ipmctl prints in its versions. The texts are made up in its documented forms: no such module is here."""

from __future__ import annotations

import shutil

import pytest

from emupmem.model import GIB, EmupmemError
from emupmem.nvdimm import ipmctl
from emupmem.nvdimm import view as nvdimm_view
from emupmem.system.machine import Machine

# 1.x, early: columns apart by blanks
V1 = """
DimmID  Capacity        HealthState     ActionRequired  LockState       FWVersion
0x0001  126.4 GiB       Healthy         0               Disabled        01.02.00.5310
0x1001  126.4 GiB       Noncritical     1               Disabled        01.02.00.5310
"""

# 2.x and 3.x: a table
V2 = """
 DimmID | Capacity    | LockState | HealthState    | FWVersion
===============================================================
 0x0001 | 126.422 GiB | Disabled  | Healthy        | 01.02.00.5435
 0x1101 | 0.000 GiB   | N/A       | Non-functional | N/A
"""

# -a or -d
BLOCKS = """
---DimmID=0x0011---
   Capacity=253.734 GiB
   HealthState=Healthy
   LockState=Unlocked, Frozen
   DimmHandle=0x0011
   SocketID=0x0000
   MemoryCapacity=0.000 GiB
   AppDirectCapacity=252.000 GiB
---DimmID=0x1011---
   Capacity=253.734 GiB
   HealthState=Healthy
   DimmHandle=0x1011
   SocketID=0x0001
"""

# a preference names modules by their number
XML = """<?xml version="1.0"?>
 <DimmList>
  <Dimm>
   <DimmID>8089-a2-2015-00000abc</DimmID>
   <Capacity>135744782336 B</Capacity>
   <HealthState>Healthy</HealthState>
   <LockState>Disabled</LockState>
   <DimmHandle>0x1001</DimmHandle>
   <SocketID>0x0001</SocketID>
   <MemoryCapacity>0 B</MemoryCapacity>
   <AppDirectCapacity>135291469824 B</AppDirectCapacity>
  </Dimm>
  <Dimm> <DimmID>0x0101</DimmID>
   <Capacity>135744782336 B</Capacity>
  </Dimm>
 </DimmList>
"""

GOAL_TABLE = """
The following configuration will be applied:
 SocketID | DimmID | MemorySize | AppDirect1Size | AppDirect2Size
==================================================================
 0x0000   | 0x0001 | 88.000 GiB | 12.000 GiB     | 0.000 GiB
 0x0001   | 0x1001 | 88.000 GiB | 10.000 GiB     | 2.000 GiB
A reboot is required to process new memory allocation goals.
"""

GOAL_XML = """<?xml version="1.0"?>
<ConfigGoalList>
  <ConfigGoal>
    <SocketID>0x0000</SocketID>
    <DimmID>0x0001</DimmID>
    <MemorySize>0 B</MemorySize>
    <AppDirect1Size>135291469824 B</AppDirect1Size>
    <AppDirect2Size>0 B</AppDirect2Size>
    <Status>Failed - Not enough resources</Status>
  </ConfigGoal>
</ConfigGoalList>"""

REGION_TABLE = """
 SocketID | ISetID             | PersistentMemoryType | Capacity     | FreeCapacity | HealthState
================================================================================================
 0x0000   | 0xb8c12120c7bd1110 | AppDirect            | 1008.000 GiB | 0.000 GiB    | Healthy
"""

REGION_XML = """<?xml version="1.0"?>
 <RegionList>
  <Region>
   <SocketID>0x0001</SocketID>
   <PersistentMemoryType>AppDirectNotInterleaved</PersistentMemoryType>
   <Capacity>126.000 GiB</Capacity>
   <FreeCapacity>63.000 GiB</FreeCapacity>
   <HealthState>Healthy</HealthState>
   <DimmID>0x1001, 0x1011</DimmID>
   <RegionID>0x0002</RegionID>
   <ISetID>0x2acfda90a44a8a22</ISetID>
  </Region>
 </RegionList>
"""


# The program of Debian 12, asked on a machine without modules: each command printed this and ended with this status.
REAL_VERSION = "Intel(R) Optane(TM) Persistent Memory Command Line Interface Version 03.00.00.0468-1\n"
REAL_NOTHING = ("Initialization failed. No PMem modules in the system.\n", 1)

# 01.00.00.3072: tabs, and for regions columns that run to the right with one blank between them
EARLY_DIMMS = (
    "DimmID\tCapacity\tHealthState\tActionRequired\tLockState\tFWVersion\n"
    "0x0001\t126.4 GiB\tHealthy\t\t0\t\tUnlocked, Frozen\t01.00.00.4888\n"
)
EARLY_GOAL = (
    "SocketID\tDimmID\tMemorySize\tAppDirect1Size\tAppDirect2Size\n"
    "0x0000\t\t0x0001\t88.0 GiB\t\t12.0 GiB\t0.0 GiB\n"
    "A reboot is required to process new memory allocation goals.\n"
)
EARLY_REGIONS = (
    "SocketID             ISetID    PersistentMemoryType  Capacity FreeCapacity HealthState\n"
    "       0 0xb8c12120c7bd1110               AppDirect 252.0 GiB      0.0 GiB     Healthy\n"
    "       1 0x2acfda90a44a8a22 AppDirect, AppDirectNotInterleaved 252.0 GiB      0.0 GiB     Healthy\n"
)


def test_early_and_odd_tables() -> None:
    (module,) = ipmctl.dimms(EARLY_DIMMS)
    assert (module.id, module.capacity, module.health, module.lock) == (
        "0x0001",
        126 * GIB + GIB * 4 // 10,
        "Healthy",
        "Unlocked, Frozen",
    )
    (waiting,) = ipmctl.goals(EARLY_GOAL)
    assert (waiting.socket, waiting.memory, waiting.app_direct) == (0, 88 * GIB, 12 * GIB)
    first, second = ipmctl.sets(EARLY_REGIONS)
    assert (first.iset, first.type, first.capacity, first.free, first.health, first.socket) == (
        0xB8C12120C7BD1110,
        "AppDirect",
        252 * GIB,
        0,
        "Healthy",
        0,
    )
    assert (second.type, second.socket) == ("AppDirect, AppDirectNotInterleaved", 1)


def test_a_row_that_cannot_be_read_is_not_left_out() -> None:
    with pytest.raises(EmupmemError, match="in a table of ipmctl"):
        ipmctl.dimms(EARLY_DIMMS + "0x0011\t126.4 GiB\tHealthy\n")


@pytest.mark.parametrize("head", [EARLY_DIMMS.splitlines()[0], V2.splitlines()[1], " SocketID | ISetID\n==="])
def test_a_head_without_rows_is_nothing(head: str) -> None:
    assert ipmctl.empty(head)
    assert not ipmctl.empty(f"{head}\nsomething else")


def test_modules_in_each_form() -> None:
    old, new, blocks, xml = (ipmctl.dimms(t) for t in (V1, V2, BLOCKS, XML))
    assert [(d.id, d.capacity, d.health, d.socket) for d in old] == [
        ("0x0001", 126 * GIB + GIB * 4 // 10, "Healthy", 0),
        ("0x1001", 126 * GIB + GIB * 4 // 10, "Noncritical", 1),
    ]
    assert [(d.id, d.works, d.firmware, d.handle) for d in new] == [
        ("0x0001", True, "01.02.00.5435", 1),
        ("0x1101", False, "N/A", 0x1101),
    ]
    assert [(d.lock, d.socket, d.memory, d.app_direct) for d in blocks] == [
        ("Unlocked, Frozen", 0, 0, 252 * GIB),
        ("", 1, None, None),
    ]
    assert [(d.id, d.handle, d.socket, d.capacity) for d in xml] == [
        ("8089-a2-2015-00000abc", 0x1001, 1, 135744782336),
        ("0x0101", 0x0101, 0, 135744782336),
    ]


def test_goals_in_each_form() -> None:
    assert [(g.dimm, g.socket, g.memory, g.app_direct) for g in ipmctl.goals(GOAL_TABLE)] == [
        ("0x0001", 0, 88 * GIB, 12 * GIB),
        ("0x1001", 1, 88 * GIB, 12 * GIB),
    ]
    (goal,) = ipmctl.goals(GOAL_XML)
    assert goal.failed
    assert (goal.memory, goal.app_direct) == (0, 126 * GIB)


def test_sets_in_each_form() -> None:
    (table,), (xml,) = ipmctl.sets(REGION_TABLE), ipmctl.sets(REGION_XML)
    assert (table.iset, table.type, table.capacity) == (0xB8C12120C7BD1110, "AppDirect", 1008 * GIB)
    assert (xml.socket, xml.free, xml.dimms) == (1, 63 * GIB, ("0x1001", "0x1011"))


@pytest.mark.parametrize(
    "text",
    [
        "No DIMMs in the system.",
        "\nNo PMem modules in the system.\n",
        "No functional PMem modules in the system.",
        "No manageable DIMMs in the system.",
        "No manageable AEP DIMMs in the system.",
        REAL_NOTHING[0],
        "Error: There are no AEPs on the specified socket(s).",
        "Error: There are no PMem modules on the specified socket(s).",
        "There are no goal configs defined on the specified socket.\nPlease use 'show -region' to display them.",
        "There are no Regions defined in the system.",
        "There are no goal configs defined in the system.\nPlease use 'show -region' to display them.",
        '<?xml version="1.0"?>\n<Results>\n<Result>\nNo PMem modules in the system.\n</Result>\n</Results>',
    ],
)
def test_nothing_is_no_failure(text: str) -> None:
    assert ipmctl.nothing(text)
    assert ipmctl.complaint(text) == ""
    assert ipmctl.dimms(text) == ()
    assert ipmctl.sets(text) == ()
    assert ipmctl.goals(text) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Do you want to continue? [y/n] y\nCreate region configuration goal failed: Error 124 - Namespaces exist"
            " on specified DIMMs. They have to be removed.\nWARNING: Removing Namespaces will erase data.",
            "Error 124 - Namespaces exist",
        ),
        (
            "Create region configuration goal failed: Error (118) - Platform does not support it.",
            "Error (118)",
        ),
        ("Syntax Error: Invalid or unexpected token -namespace.\nDid you mean:", "Syntax Error"),
        ("The ipmctl command you have attempted to execute requires root privileges.", "root privileges"),
        ("\nError: GetMemoryResourcesInfo Failed\n", "Error: GetMemoryResourcesInfo"),
        (
            '<?xml version="1.0"?><Results><Result>Syntax Error: Incorrect value</Result></Results>',
            "Incorrect",
        ),
    ],
)
def test_complaints(text: str, words: str) -> None:
    assert words in ipmctl.complaint(text)
    assert "\n" not in ipmctl.complaint(text)
    assert not ipmctl.nothing(text)


@pytest.mark.parametrize("text", [V1, V2, BLOCKS, XML, GOAL_TABLE, REGION_TABLE, REGION_XML, ""])
def test_what_is_fine_is_no_complaint(text: str) -> None:
    assert ipmctl.complaint(text) == ""
    assert not ipmctl.nothing(text)


def test_a_failed_set_is_no_failure_of_ipmctl() -> None:
    text = REGION_TABLE.replace("Healthy", "Error  ")
    assert ipmctl.complaint(text) == ""
    assert ipmctl.sets(text)[0].health == "Error"
    assert ipmctl.complaint(XML.replace("Disabled", "Not Supported")) == ""


def test_warnings_are_kept() -> None:
    text = (
        "The requested goal was adjusted more than 10% to find a valid configuration.\n"
        "WARNING: Goal will not be applied unless security is disabled prior to provisioning!\n" + GOAL_TABLE
    )
    assert [w.split()[0] for w in ipmctl.warnings(text)] == ["The", "WARNING:"]


def test_sizes_and_numbers() -> None:
    assert ipmctl.size("135744782336 B") == 135744782336
    assert ipmctl.size("1.5 TiB") == 1536 * GIB
    assert ipmctl.size("2 GB") == 2 * 10**9
    for text in ("N/A", "", "GiB", "1.2.3 GiB", "12 parsecs"):
        assert ipmctl.size(text) is None, text
    assert (ipmctl.number("0x001f"), ipmctl.number(" 12 "), ipmctl.number("8089-a2")) == (31, 12, None)


def test_versions() -> None:
    name = "Intel(R) Optane(TM) Persistent Memory Command Line Interface Version "
    assert ipmctl.ipmctl_version(name + "03.00.00.0468") == (3, 0, 0, 468)
    assert ipmctl.is_broken(name + "02.00.00.3809")
    for good in ("01.00.00.3474", "02.00.00.3764", "02.00.00.3825", "03.00.00.0468"):
        assert not ipmctl.is_broken(name + good), good
    assert not ipmctl.is_broken("no number")


def argv(*options: object) -> str:
    return " ".join(ipmctl.create_goal(ipmctl.wanted(*options)).argv)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("ipmctl") is None, reason="no ipmctl here")
def test_the_real_ipmctl_without_modules() -> None:
    machine = Machine()
    said = machine.output("ipmctl", "version")
    assert said is not None
    assert ipmctl.ipmctl_version(said.stdout.decode()) >= (3, 0, 0, 468)
    for socket in (None, 0):
        for show in (ipmctl.show_dimms, ipmctl.show_regions, ipmctl.show_goal):
            done = machine.run(show(socket))
            if ipmctl.dimms(done.stdout.decode()):
                pytest.skip("there are modules here")
            assert ipmctl.nothing(done.stdout.decode()), done
    assert nvdimm_view.ask_ipmctl(machine, ipmctl.show_dimms, ipmctl.dimms) == ()


def test_goal_commands() -> None:
    create = "ipmctl create -f -goal"
    assert argv("appdirect") == f"{create} PersistentMemoryType=AppDirect"
    assert argv("appdirect", 0, 0) == f"{create} -socket 0 PersistentMemoryType=AppDirect"
    assert argv("appdirect", 25) == f"{create} MemoryMode=25 PersistentMemoryType=AppDirect"
    assert argv("appdirect-not-interleaved") == f"{create} PersistentMemoryType=AppDirectNotInterleaved"
    assert argv("memory", None, 1) == f"{create} -socket 1 MemoryMode=100"
    assert argv("memory", 100) == f"{create} MemoryMode=100"
    assert "-f" not in ipmctl.show_dimms().argv
    assert ipmctl.show_dimms(1, False).argv == ("ipmctl", "show", "-dimm", "-socket", "1")


@pytest.mark.parametrize(
    ("mode", "percent", "hint"),
    [
        ("memory", 50, "--mode appdirect --memory-percent 50"),
        ("appdirect", 100, "--mode memory"),
        ("appdirect", 101, "from 0 to 99"),
        ("storage", None, "there are appdirect"),
    ],
)
def test_contradictions(mode: str, percent: int | None, hint: str) -> None:
    with pytest.raises(EmupmemError) as caught:
        ipmctl.wanted(mode, percent)
    assert hint in caught.value.hint


def module(socket: int, memory: int | None, direct: int | None, health: str = "Healthy") -> ipmctl.PmemModule:
    return ipmctl.PmemModule("0x1", 128 * GIB, health, socket=socket, memory=memory, app_direct=direct)


def sets_of(*kinds: str) -> list[ipmctl.InterleaveSet]:
    return [ipmctl.InterleaveSet(1, kind, GIB, GIB, "Healthy", 0, ()) for kind in kinds]


def test_as_asked() -> None:
    full = [module(0, 0, 126 * GIB), module(0, 0, 126 * GIB), module(1, None, None, "Non-functional")]
    direct, apart, memory = (ipmctl.wanted(m) for m in ipmctl.MODES)
    assert ipmctl.is_as_asked(full, sets_of("AppDirect"), direct)
    assert not ipmctl.is_as_asked(full, (), direct), "no region yet"
    assert not ipmctl.is_as_asked(full, sets_of("AppDirect"), apart)
    assert not ipmctl.is_as_asked(full, sets_of("AppDirect"), memory)
    assert ipmctl.is_as_asked(full, sets_of(*["AppDirectNotInterleaved"] * 2), apart)
    assert not ipmctl.is_as_asked(full, sets_of(*["AppDirectNotInterleaved"] * 2), direct)
    single = [module(0, 0, 126 * GIB), module(1, 0, 126 * GIB)]
    assert ipmctl.is_as_asked(single, sets_of(*["AppDirectNotInterleaved"] * 2), direct), "one on each socket"
    assert ipmctl.is_as_asked([module(0, 126 * GIB, 0)], (), memory)
    mixed = [module(0, 32 * GIB, 94 * GIB)]
    assert ipmctl.is_as_asked(mixed, sets_of("AppDirect"), ipmctl.wanted("appdirect", 20)), (
        "rounded by ipmctl"
    )
    assert not ipmctl.is_as_asked(mixed, sets_of("AppDirect"), ipmctl.wanted("appdirect", 50))
    plain = [module(0, None, None), module(0, None, None)]
    assert ipmctl.is_as_asked(plain, sets_of("AppDirect"), direct)
    assert not ipmctl.is_as_asked(plain, sets_of("AppDirect"), memory)


def test_a_goal_that_waits() -> None:
    waiting = ipmctl.goals(GOAL_TABLE)
    assert ipmctl.goal_matches(waiting, ipmctl.wanted("appdirect", 88))
    assert not ipmctl.goal_matches(waiting, ipmctl.wanted("appdirect"))
    assert not ipmctl.goal_matches(waiting, ipmctl.wanted("memory"))
    assert not ipmctl.goal_matches((), ipmctl.wanted("memory"))
