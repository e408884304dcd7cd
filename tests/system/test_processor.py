"""The processor's name, from /proc/cpuinfo as machines have it."""

from __future__ import annotations

import platform

import pytest

from deepseek_optimizer.system.processor import cpu_name

_ARM = """processor\t: {n}
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer\t: {implementer}
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: {part}
CPU revision\t: 1

"""


def arm(*cores):
    return "".join(_ARM.format(n=n, implementer=implementer, part=part) for n, (implementer, part) in enumerate(cores))


@pytest.mark.parametrize(
    ("cores", "name"),
    [
        ([("0x41", "0xd08")] * 4, "Cortex-A72"),
        ([("0x41", "0xd0b")] * 4, "Cortex-A76"),
        ([("0x41", "0xd0c")] * 2, "Neoverse-N1"),
        ([("0x41", "0xd40")], "Neoverse-V1"),
        ([("0x41", "0xd49")], "Neoverse-N2"),
        ([("0x41", "0xd4f")], "Neoverse-V2"),
        ([("0xc0", "0xac3")], "Ampere-1"),
        ([("0x61", "0x022"), ("0x61", "0x023")], "Apple M1 Icestorm, Apple M1 Firestorm"),
        ([("0x41", "0xd0b"), ("0x41", "0xd05"), ("0x41", "0xd0b")], "Cortex-A55, Cortex-A76"),  # big and little cores
        ([("0x41", "0xfff")], "ARM implementer 0x41 part 0xfff"),
        ([("0x00", "0x051")], "ARM implementer 0x00 part 0x051"),  # qemu's
    ],
)
def test_arm_processors_have_names(tree, cores, name):
    assert cpu_name(tree({"/proc/cpuinfo": arm(*cores)})) == name


def test_a_reported_name_comes_first(tree):
    text = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t\t: 1\nmodel name\t: AMD EPYC 7763 64-Core Processor\n"
    assert cpu_name(tree({"/proc/cpuinfo": text})) == "AMD EPYC 7763 64-Core Processor"


@pytest.mark.parametrize("text", ["", "processor\t: 0\nisa\t: rv64imafdc\n", "CPU implementer\t: ?\nCPU part\t: 0xd0c\n"])
def test_without_a_name_the_architecture_remains(tree, text):
    assert cpu_name(tree({"/proc/cpuinfo": text})) == (platform.processor() or platform.machine())
