"""Connections between all processes of a model on several machines: two between each two of them."""

from __future__ import annotations

from multiprocessing.connection import Connection

from ...errors import BackendError
from .proven_links import connect, for_rows, listen, meet, own_address
from .rendezvous import Place

_ROWS, _ALIVE = "rows", "alive"  # what a connection is for

Links = dict[int, Connection]  # by rank


def connect_all(place: Place, links: Links) -> tuple[Links, Links]:
    """Connects this process with all others. All of them must call it.

    Each connects to those of lower ranks, and then waits for those of higher ones. Rank 0 tells all of them where they are.

    Args:
        place: this process's.
        links: of rank 0 the connections to the others, of these that to rank 0.

    Returns:
        The connections for rows, and those that tell whether the other processes are alive: `links`, and more.

    Raises:
        BackendError: a process cannot be reached, or has ended.
    """
    rank, rows, alive = place.rank, Links(), dict(links)
    try:
        with listen(place.address if rank == 0 else own_address(links[0])) as server:
            own = (place.address if rank == 0 else own_address(links[0]), server.getsockname()[1])
            addresses = _told(rank, links, own)
            for other in range(rank):
                rows[other] = connect(addresses[other], place.key, f"{rank} {_ROWS}")
                if other > 0:
                    alive[other] = connect(addresses[other], place.key, f"{rank} {_ALIVE}")
            kinds = (_ROWS,) if rank == 0 else (_ROWS, _ALIVE)
            names = {f"{other} {kind}": other for other in range(rank + 1, place.ranks) for kind in kinds}
            for name, link in meet(server, place.key, names, list(links.values())).items():
                (alive if name.endswith(_ALIVE) else rows)[names[name]] = link
    except (OSError, EOFError) as error:
        for link in (*rows.values(), *alive.values()):
            link.close()
        raise BackendError(
            f"several machines: rank {rank} cannot connect to all others ({error or 'one of them has ended'}); their addresses "
            "are those of their connections to rank 0, and their ports any free ones, which firewalls must permit"
        ) from error
    for link in rows.values():
        for_rows(link)
    return rows, alive


def _told(rank: int, links: Links, own: tuple[str, int]) -> list[tuple[str, int]]:
    """The addresses of all processes, by rank."""
    if rank > 0:
        links[0].send(own)
        addresses: list[tuple[str, int]] = links[0].recv()
        return addresses
    addresses = [own, *(links[other].recv() for other in sorted(links))]
    for link in links.values():
        link.send(addresses)
    return addresses
