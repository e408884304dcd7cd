"""Named machines that can be rented: cores, memory nodes, bandwidth and price, for `dso cost`.

Prices are examples: those of AWS on demand, Linux, US East (N. Virginia), in US dollars per hour. They were looked up on
2026-12-01 in SkyPilot's catalog: github.com/skypilot-org/skypilot-catalog, catalogs/v8/aws/vms.csv, commit e385a0d348ed.
Replace them with `--price NAME=PRICE`. Cores are physical ones, of which Intel's have two virtual CPUs each.

Bandwidth is what the channels of a socket deliver together, times `_REACHED`, times the instance's share of the socket's cores:
8 channels of DDR5-4800 for 48 cores (Sapphire Rapids), 12 of DDR5-4800 for 96 (Genoa), and 12 of DDR5-5600 for 96 (Graviton4).
Other tenants of the same socket may leave less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .scaling import Machine

DATE, SOURCE = "2026-12-01", "AWS on demand, Linux, us-east-1, in US dollars, by SkyPilot's catalog"
_REACHED = 0.8  # of the channels' bandwidth, by programs that only read
_SAPPHIRE_RAPIDS, _GENOA, _GRAVITON4 = 8 * 38.4 / 48, 12 * 38.4 / 96, 12 * 44.8 / 96  # GB/s per core


@dataclass(frozen=True)
class Instance:
    """A machine and its price per hour, an example. memory_gb: 2^30 bytes."""

    machine: Machine
    memory_gb: int
    per_hour: float


def _instance(cores: int, per_core: float, memory_gb: int, per_hour: float, nodes: int = 1) -> Instance:
    return Instance(Machine(cores, round(_REACHED * per_core * cores, 1), nodes), memory_gb, per_hour)


INSTANCES: Mapping[str, Instance] = MappingProxyType(
    {
        "c7i.8xlarge": _instance(16, _SAPPHIRE_RAPIDS, 64, 1.428),
        "c7i.48xlarge": _instance(96, _SAPPHIRE_RAPIDS, 384, 8.568, nodes=2),
        "c7a.8xlarge": _instance(32, _GENOA, 64, 1.64224),
        "c7a.48xlarge": _instance(192, _GENOA, 384, 9.85344, nodes=2),
        "c8g.8xlarge": _instance(32, _GRAVITON4, 64, 1.27616),
        "c8g.48xlarge": _instance(192, _GRAVITON4, 384, 7.65696, nodes=2),
    }
)
