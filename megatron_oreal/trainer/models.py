"""From a Hugging Face folder to the three Megatron models, and back."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from megatron_oreal.checkpoint.tensors import StoredModel
from megatron_oreal.config.device import check_device
from megatron_oreal.config.schema import Config
from megatron_oreal.config.validate import check_layout, check_model
from megatron_oreal.engine.megatron_model import Load, MegatronModel
from megatron_oreal.engine.roles import Policy
from megatron_oreal.models.family import Family, ModelDims
from megatron_oreal.models.kernels import device_here
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel import topology
from megatron_oreal.parallel.collectives import agree, world_rank, world_size
from megatron_oreal.parallel.topology import Topology
from megatron_oreal.rollout.engine import RolloutEngine
from megatron_oreal.rollout.weight_sync import WeightSync, open_sync
from megatron_oreal.weights.bridge import HfStream, export_hf, load_hf, open_stream, survey
from megatron_oreal.weights.layout import MegatronPlace, hf_regions, megatron_regions
from megatron_oreal.weights.sums import source_sums

MIB = 1 << 20


@dataclass(frozen=True)
class ModelSource:
    """The checkpoint a run starts from, and where this rank stands in its layout."""

    config: Config
    family: Family
    dims: ModelDims
    topology: Topology

    @property
    def place(self) -> MegatronPlace:
        """This rank's coordinates among the weights; names count layers over the whole model."""
        return MegatronPlace(self.topology.tp_rank, self.topology.tp_size)

    @property
    def load(self) -> Load:
        """Fills parameters from the checkpoint; not collective."""

        def load(parameters: Mapping[str, torch.Tensor]) -> None:
            load_hf(parameters, self.config.model.path, self.family, self.dims, self.place)

        return load

    def stream(self, policy: Policy, receivers: tuple[int, ...] | None = None) -> HfStream:
        """Plans how the policy's weights leave as whole tensors; collective over the world."""
        return open_stream(
            policy.model.parameters(),
            self.family,
            self.dims,
            self.place,
            round_bytes=self.config.rollout.sync_round_mib * MIB,
            receivers=receivers,
        )

    def weight_sync(self, policy: Policy, engine: RolloutEngine) -> WeightSync:
        """Plans how the policy's weights reach the engines; collective over the world."""
        return open_sync(
            policy.model.parameters(),
            self.family,
            self.dims,
            self.place,
            engine,
            round_bytes=self.config.rollout.sync_round_mib * MIB,
            check=self.config.rollout.check_sync,
        )

    def weights_digest(self, policy: Policy) -> Callable[[], str]:
        """Returns what tells a policy's present weights from all others; both collective, world.

        The same for the same weights under every layout.
        """
        params = policy.model.parameters()
        found = survey(params, self.family, self.dims, self.place)
        whole = hf_regions(self.family.tensors(self.dims))
        sums = source_sums(found.tensors, found.sources, [whole], rank=world_rank(), params=params)

        def digest() -> str:
            return hashlib.blake2b(msgspec.json.encode(sums.count()), digest_size=16).hexdigest()

        return digest

    def stored(self, model: MegatronModel) -> StoredModel:
        """Says where a model's parameters lie in a checkpoint; not collective."""
        family, dims = self.family, self.dims
        if model.head == "scalar":
            family, dims = family.token_classifier(dims)
        local = {name: tuple(tensor.shape) for name, tensor in model.parameters().items()}
        regions = megatron_regions(family, dims, local, self.place)
        return StoredModel(model, family.tensors(dims), regions)

    def export(self, policy: Policy, folder: Path, *, replace: bool) -> None:
        """Writes the policy as a Hugging Face folder; collective over the world.

        With `replace` one of that name goes first: a resumed run may have got further before.
        """
        policy.model.settle()
        if replace and world_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        export_hf(
            self.stream(policy, receivers=(0,)),
            folder,
            source=self.config.model.path,
            shard_bytes=self.config.export.shard_mib * MIB,
        )


def open_source(config: Config) -> ModelSource:
    """Checks layout and checkpoint against each other and joins the layout's process groups.

    Collective over the world.

    Raises:
        UserError: An impossible layout, or a folder that holds no model of a known family.
    """
    check_layout(config, world_size())
    with agree():
        family, dims = read_model(config.model.path)
        check_model(config, dims)
        check_device(config, dims, device_here())
    layout = config.parallel
    place = topology.initialize(
        layout.tensor,
        layout.pipeline,
        layout.context,
        layout.virtual_pipeline,
        seed=config.run.seed + 1,
        timeout_s=config.watchdog.timeout_s,
    )
    return ModelSource(config, family, dims, place)
