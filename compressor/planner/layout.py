"""From claims to output shards: which source tensors are worked on together, and which file gets what.

Tensors whose parts share a tensor-level scale (q/k/v, gate/up) form one unit and stay in one shard; units
keep the source's order, so a spinning read of the source stays sequential.
"""

from __future__ import annotations

from collections.abc import Sequence

from compressor.stages.base import Claim, Shard, Unit


def group_units(claims: Sequence[Claim]) -> list[Unit]:
    """Units in file order; quantized claims that share a fuse group are merged into one."""
    leader: dict[str, int] = {}
    members: list[list[Claim]] = []
    for claim in claims:
        groups = {part.fuse_group for part in claim.role.parts if part.fuse_group} if claim.scheme else set()
        known = sorted({leader[group] for group in groups if group in leader})
        if known:
            home = known[0]
            for other in known[1:]:
                members[home] += members[other]
                members[other] = []
                leader = {group: home if index == other else index for group, index in leader.items()}
        else:
            home = len(members)
            members.append([])
        members[home].append(claim)
        leader.update(dict.fromkeys(groups, home))
    return [Unit(tuple(unit)) for unit in members if unit]


def pack_shards(units: Sequence[Unit], max_shard_bytes: int) -> list[Shard]:
    """Fills shards in order up to ``max_shard_bytes`` of output; one unit larger than that gets its own."""
    shards: list[Shard] = []
    filling: list[Unit] = []
    filled = 0
    for unit in units:
        size = unit.result_bytes
        if filling and filled + size > max_shard_bytes:
            shards.append(Shard(tuple(filling)))
            filling, filled = [], 0
        filling.append(unit)
        filled += size
    if filling:
        shards.append(Shard(tuple(filling)))
    return shards
