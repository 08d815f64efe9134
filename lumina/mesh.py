"""How a model's tensors and work are split over devices, without any array: mesh axes, and which dimension each splits.

Every mesh has all of the axes, most of size 1. Rows of a batch are split over `data`, `fsdp` and `expert`, positions of a row
over `context`; heads and feed-forward width over `tensor`, experts over `expert`. Weights lie split over everything but `data`,
and a layer's are gathered when it is computed (ZeRO-3; Rajbhandari et al., 2020).
"""

from dataclasses import dataclass
from typing import NamedTuple

from lumina.architecture import Tensor, tensor_groups
from lumina.config import Config, MeshConfig
from lumina.errors import ConfigError
from lumina.stages import lengths

AXES = ("data", "fsdp", "expert", "context", "tensor")  # outermost first: those along the last talk most
ROWS = ("data", "fsdp", "expert")  # axes that split the rows of a batch
SEQUENCE = ("context", "tensor")  # axes whose devices work on the same rows


class Sizes(NamedTuple):
    """Devices along each axis of a mesh."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        return self.along(AXES)

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a micro-batch are split into."""
        return self.along(ROWS)

    def along(self, axes: tuple[str, ...]) -> int:
        """Devices along several axes together."""
        count = 1
        for axis in axes:
            count *= getattr(self, axis)
        return count

    def __str__(self) -> str:
        return " ".join(f"{axis} {size}" for axis, size in self._asdict().items() if size > 1) or "one device"


@dataclass(frozen=True)
class Rules:
    """The mesh axes that split each logical axis of the table of tensors, outermost first.

    A layer's weights are gathered along the logical axes in GATHERED when it is computed, and stay split along the others.
    """

    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp", "expert", "context")
    expert: tuple[str, ...] = ("expert",)
    expert_embed: tuple[str, ...] = ("fsdp", "context")  # of experts' own tensors, whose expert axis is split already
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    head: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # of a router
    predictor: tuple[str, ...] = ()

    def layout(self, tensor: Tensor) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that split each dimension. Tensors of one dimension stay whole: they are not worth a gather.

        Raises ValueError where two dimensions would be split over one mesh axis.
        """
        if len(tensor.shape) < 2:
            return ((),) * len(tensor.shape)
        found = tuple(getattr(self, axis) for axis in tensor.axes)
        used = [axis for dimension in found for axis in dimension]
        if twice := sorted({axis for axis in used if used.count(axis) > 1}):
            each = ", ".join(
                f"{axis} over {'+'.join(over) or 'nothing'}" for axis, over in zip(tensor.axes, found, strict=True)
            )
            raise ValueError(f"{tensor.name}: mesh axis {twice[0]} would split two of its dimensions: {each}")
        return found


RULES = Rules()
GATHERED = ("embed", "expert_embed")  # logical axes that a layer has whole while it is computed
GATHERED_OVER = RULES.embed


def resolve(config: Config, devices: int) -> Sizes:
    """The sizes of `config.mesh` on so many devices, -1 being what is left, checked against the model and the batch.

    Raises ConfigError for what cannot be split so, naming the field and what would work.
    """
    sizes = fill(config.mesh, devices)
    check(config, sizes)
    return sizes


def named(mesh: MeshConfig) -> bool:
    """Whether any axis was set: then `mesh.auto` chooses none."""
    return any(getattr(mesh, axis) != getattr(MeshConfig(), axis) for axis in AXES)


def fill(mesh: MeshConfig, devices: int) -> Sizes:
    """The sizes with -1 replaced by what is left. Raises ConfigError where the devices are not enough or do not divide."""
    given = Sizes(*(getattr(mesh, axis) for axis in AXES))
    product, open_axes = 1, [axis for axis in AXES if getattr(given, axis) == -1]
    for size in given:
        product *= size if size != -1 else 1
    if product > devices:
        named = ", ".join(f"mesh.{axis} = {size}" for axis, size in given._asdict().items() if size > 1)
        raise ConfigError(f"{named}: {product} devices, and there are {devices}; their product must be at most {devices}")
    if not open_axes:
        return given
    if devices % product:
        raise ConfigError(
            f"mesh.{open_axes[0]} = -1: {devices} devices cannot be split by the {product} of the other axes; "
            f"their product must divide {devices}"
        )
    return given._replace(**{open_axes[0]: devices // product})


def check(config: Config, sizes: Sizes) -> None:
    """Raise a ConfigError where rows, positions or a tensor's dimension do not divide by the axes that split them."""
    train, model = config.train, config.model
    rows, parts = train.batch_size // train.micro_batches, sizes.row_parts
    if rows % parts:
        fits = max(n for n in range(1, parts + 1) if rows % n == 0)
        axes = " x ".join(f"mesh.{axis}" for axis in ROWS if getattr(sizes, axis) > 1)
        raise ConfigError(
            f"{axes} = {parts}: train.batch_size / train.micro_batches = {rows} rows cannot be split over {parts} devices; "
            f"use a multiple of {parts} rows, or {axes}={fits}"
        )
    pieces = 2 * sizes.context * sizes.tensor if sizes.context > 1 else sizes.tensor
    if T := next((T for T in [config.data.sequence_length, *lengths(config)] if T % pieces), None):
        axes = " x ".join(f"mesh.{axis} = {getattr(sizes, axis)}" for axis in SEQUENCE if getattr(sizes, axis) > 1)
        twice = " (twice mesh.context, as each device takes an early and a late part)" if sizes.context > 1 else ""
        raise ConfigError(f"data.sequence_length = {T}: must be a multiple of {pieces} for {axes}{twice}")
    if sizes.context > 1 and (model.dropout or model.moe.jitter):
        field = "model.dropout" if model.dropout else "model.moe.jitter"
        raise ConfigError(f"{field}: must be 0 with mesh.context = {sizes.context}, as its draws are for whole rows")
    for group in tensor_groups(model):
        tensor = group.tensor
        for size, axis, over in zip(tensor.shape, tensor.axes, RULES.layout(tensor), strict=True):
            if size % sizes.along(over):
                split = " x ".join(f"mesh.{name} = {getattr(sizes, name)}" for name in over if getattr(sizes, name) > 1)
                raise ConfigError(f"{split}: {group.name} has {size} of {axis}, which cannot be split into {sizes.along(over)}")
