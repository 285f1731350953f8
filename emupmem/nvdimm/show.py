# SPDX-License-Identifier: Apache-2.0
"""NVDIMMs, regions and namespaces as lines for people."""

from __future__ import annotations

from emupmem.nvdimm.goal import GoalPlan
from emupmem.nvdimm.view import Dimm, Namespace, NvdimmRegion, View
from emupmem.units import human


def tree(view: View) -> list[str]:
    """The lines that show it to a person."""
    known = {d.name: d for d in view.dimms}
    lines = []
    for r in view.regions:
        lines.append(f"{r.name}  {' · '.join(_region_words(r))}")
        below = [[f"{n}  {_dimm_words(known[n])}"] if n in known else [n] for n in r.dimms]
        below += [_namespace_lines(n) for n in r.namespaces]
        for number, group in enumerate(below, 1):
            last = number == len(below)
            lines.append(("└─ " if last else "├─ ") + group[0])
            lines += [("   " if last else "│  ") + line for line in group[1:]]
    used = {n for r in view.regions for n in r.dimms}
    lines += [f"{d.name}  {_dimm_words(d)} · in no region" for d in view.dimms if d.name not in used]
    for g in view.goal:
        words = f"{human(g.memory)} RAM, {human(g.app_direct)} App Direct"
        lines.append(f"goal for {g.dimm}  {words} · {g.status or 'a reboot is required'}")
    return lines or ["There is no persistent memory."]


def _region_words(r: NvdimmRegion) -> list[str]:
    words = [human(r.size)]
    words.append(f"room for {human(r.largest())}" if r.labelled else "no labels: one namespace of all of it")
    if not r.nature.startswith(r.provider):
        words.append(r.provider)
    if r.numa_node is not None:
        words.append(f"node {r.numa_node}")
    words.append(r.nature)
    if r.bad_blocks:
        words.append(_bad(r.bad_blocks))
    return words if r.enabled else [*words, "disabled"]


def _dimm_words(d: Dimm) -> str:
    words = [d.id] if d.id else []
    if d.optane is not None:
        o = d.optane
        words.append(f"Optane {o.id}, socket {o.socket}" if o.socket is not None else f"Optane {o.id}")
        words.append(human(o.capacity) if o.capacity is not None else "size unknown")
        words.append(o.health)
    if _held_back(d):
        words.append(_held_back(d))
    words += [f"failed: {', '.join(d.faults)}"] if d.faults else []
    return " · ".join(words if d.enabled else [*words, "disabled"])


def _held_back(d: Dimm) -> str:
    """What a passphrase keeps from being used, by the kernel or by ipmctl."""
    word = d.security or (d.optane.lock.lower() if d.optane is not None else "")
    return "" if word in ("", "disabled", "unsupported", "n/a", "unknown", "not supported") else word


def _bad(count: int) -> str:
    return f"{count} bad block{'s' if count != 1 else ''} of 512 bytes"


def _namespace_lines(n: Namespace) -> list[str]:
    size = human(n.size) if n.size else "size unknown"
    called = f" ({n.alt_name})" if n.alt_name else ""
    lines = [f"{n.name}{called}  {n.mode}{f' (map {n.map})' if n.map else ''}, {size}"]
    if n.bad_blocks:
        lines[0] += f" · {_bad(n.bad_blocks)}"
    if n.system_ram:
        lines[0] += " · in use as RAM"
    if not n.enabled:
        lines[0] += " · disabled"
    if n.dev:
        lines.append(f"└─ {n.dev}")
    for m in n.mounts:
        lines.append(f"   └─ {m.dir}  {m.fs}{', DAX' if m.dax else ''}")
    return lines


def made_lines(one: Namespace, holds: str) -> list[str]:
    """What to tell of a namespace that was made, and of what it still holds."""
    lines = [f"✓ {one.name} · {one.mode}, {human(one.size)}, {one.dev}"]
    if holds:
        lines.append(f"It still holds {holds} of before: sudo wipefs -a {one.dev} if nothing of it is needed")
    if one.mode == "fsdax":
        lines.append(f"Next:  sudo emupmem mount {one.dev}")
    return lines


def goal_lines(plan: GoalPlan) -> list[str]:
    """What to tell of where the modules are on their way."""
    if plan.state == "needed":
        return ["Nothing was changed."]
    if plan.state == "pending":
        lines = [
            f"  {g.dimm}: {human(g.memory)} RAM, {human(g.app_direct)} App Direct · {g.status or 'New'}"
            for g in plan.goal
        ]
        return ["✓ the goal is set; a reboot is required", *lines, "Next:  reboot, then this command again"]
    if plan.wanted.memory_percent == 100:
        return ["✓ the modules are RAM, as asked"]
    names = ", ".join(f"{r.name} ({human(r.size)})" for r in plan.regions)
    asked = f"✓ the modules are as requested: {names or 'regions are there'}"
    there = [
        f"  {n.name}{f' ({n.dev})' if n.dev else ''}, {n.mode}" for r in plan.regions for n in r.namespaces
    ]
    return [asked, *there] if plan.state == "done" and there else [asked, "Next:  sudo emupmem nvdimm create"]
