"""Names of ARM processors, of which Linux reports only the numbers of their designs.

The numbers are those of the register MIDR_EL1 (Arm Architecture Reference Manual, and the designers' reference manuals).
"""

from __future__ import annotations

from collections.abc import Iterator

_DESIGNS = {
    (0x41, 0xD03): "Cortex-A53", (0x41, 0xD04): "Cortex-A35", (0x41, 0xD05): "Cortex-A55", (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72", (0x41, 0xD09): "Cortex-A73", (0x41, 0xD0A): "Cortex-A75", (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1", (0x41, 0xD0D): "Cortex-A77", (0x41, 0xD40): "Neoverse-V1", (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE", (0x41, 0xD44): "Cortex-X1", (0x41, 0xD46): "Cortex-A510", (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2", (0x41, 0xD49): "Neoverse-N2", (0x41, 0xD4A): "Neoverse-E1", (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3", (0x41, 0xD4F): "Neoverse-V2", (0x41, 0xD80): "Cortex-A520", (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4", (0x41, 0xD84): "Neoverse-V3", (0x41, 0xD8E): "Neoverse-N3",
    (0x43, 0x0AF): "Cavium ThunderX2", (0x46, 0x001): "Fujitsu A64FX", (0x48, 0xD01): "HiSilicon Kunpeng-920",
    (0x4E, 0x004): "NVIDIA Carmel", (0x61, 0x022): "Apple M1 Icestorm", (0x61, 0x023): "Apple M1 Firestorm",
    (0x61, 0x024): "Apple M1 Pro Icestorm", (0x61, 0x025): "Apple M1 Pro Firestorm", (0x61, 0x028): "Apple M1 Max Icestorm",
    (0x61, 0x029): "Apple M1 Max Firestorm", (0x61, 0x032): "Apple M2 Blizzard", (0x61, 0x033): "Apple M2 Avalanche",
    (0xC0, 0xAC3): "Ampere-1", (0xC0, 0xAC4): "Ampere-1A",
}  # fmt: skip


def arm_name(cpuinfo: str) -> str | None:
    """The designs of an ARM machine's cores, each once, such as "Cortex-A55, Cortex-A76"; None: the text names none.

    Args:
        cpuinfo: the text of Linux's /proc/cpuinfo.
    """
    designs = sorted(set(_designs(cpuinfo)))
    return ", ".join(_DESIGNS.get(one, f"ARM implementer {one[0]:#04x} part {one[1]:#05x}") for one in designs) or None


def _designs(cpuinfo: str) -> Iterator[tuple[int, int]]:
    """Implementer and part of each CPU."""
    implementer = None
    for line in cpuinfo.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name not in ("CPU implementer", "CPU part"):
            continue
        try:
            number = int(value, 16)
        except ValueError:
            continue
        if name == "CPU implementer":
            implementer = number
        elif implementer is not None:
            yield implementer, number
