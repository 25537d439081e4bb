"""How one SGLang server takes weights: by memory, by broadcast, by disk; and what it then holds.

Senders in any process may call these between ``begin_update`` and ``end_update`` of an engine; they
change nothing but the server.
"""

from __future__ import annotations

from collections.abc import Sequence

from chatlearn.models.engine.sglang_http import SGLangHttp


class WeightIntake:
    """The receiving side of a publish at the server that ``server`` speaks to."""

    def __init__(self, server: SGLangHttp) -> None:
        self._server = server

    async def update_from_tensors(
        self, payloads: Sequence[str], *, load_format: str = "flattened_bucket"
    ) -> None:
        """Load one bucket; ``payloads`` has one entry a tensor-parallel rank, base64."""
        body = {"serialized_named_tensors": list(payloads), "load_format": load_format}
        await self._server.ask("/update_weights_from_tensor", body | {"flush_cache": False})

    async def update_from_group(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
    ) -> None:
        """Receive one bucket in one broadcast of rank 0 of ``group_name``, and load it."""
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._server.ask("/update_weights_from_distributed", body)

    async def update_from_disk(self, path: str, *, version: int) -> None:
        """Load the safetensors files of a folder that the server can read."""
        body = {"model_path": str(path), "weight_version": str(version), "flush_cache": False}
        await self._server.ask("/update_weights_from_disk", body)

    async def join_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None:
        """Become ranks ``rank_offset`` and following of a process group; returns when it is up."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._server.ask("/init_weights_update_group", body)

    async def leave_group(self, group_name: str) -> None:
        await self._server.ask("/destroy_weights_update_group", {"group_name": group_name})

    async def checksums(self) -> dict[str, str]:
        """Hash of every parameter as the server holds it: fused, padded, in its dtype. With tensor
        parallelism the names begin with the rank: ``1/model.norm.weight``. Of a layer that has
        adapters, the base."""
        ranks = (await self._server.ask("/weights_checker", {"action": "checksum"}))["ranks"]
        if len(ranks) == 1:
            return {_plain(name): value for name, value in ranks[0]["checksums"].items()}
        return {
            f"{index}/{_plain(name)}": value
            for index, rank in enumerate(ranks)
            for name, value in rank["checksums"].items()
        }


def _plain(name: str) -> str:
    """The name of a parameter in a server without LoRA."""
    return name.replace(".base_layer.", ".")
