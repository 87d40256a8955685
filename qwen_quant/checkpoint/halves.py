"""What a family of checkpoints is made of: the halves of its blocks, and its row of the table in `families.py`."""

from __future__ import annotations

from dataclasses import dataclass

KeepRules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SubBlock:
    """One pre-norm residual half of a decoder block: x + output(module_body(norm(x))).

    Attributes:
        norm: name in the block of the normalization in front.
        module: name in the block of the mixer or MLP.
        inputs: linears (names in the block) that all read the normalized input.
        output: the linear (name in the block) that is the module's last operation.
        takes_context: whether the module takes the block's keyword arguments (mask, positions).
        without: keyword arguments of the block that the module does not take all the same.
        joins_residual: whether `output` is added to the residual stream as it is (a shared expert's is scaled first).
        join: the module (name in the block) that joins stream and output; None: their sum.
        lookup: the module (name in the block) that adds to the stream, in front of the half, what the token ids say.
    """

    norm: str
    module: str
    inputs: tuple[str, ...]
    output: str
    takes_context: bool = False
    without: tuple[str, ...] = ()
    joins_residual: bool = True
    join: str | None = None
    lookup: str | None = None

    def linears(self) -> tuple[str, ...]:
        """Names in a block of the linears to quantize, in solving order."""
        return (*self.inputs, self.output)


@dataclass(frozen=True)
class SparseBlock:
    """The half of a block whose MLP is a router and `count` experts (gate+up -> down), with or without a shared one.

    Attributes:
        norm: name in the block of the normalization in front.
        module: name of the MLP; it holds `gate` (the router) and `experts`.
        count: routed experts.
        shared: the expert that every token passes, as an ordinary half of the same norm.
        join: as in SubBlock.
    """

    norm: str
    module: str
    count: int
    shared: SubBlock | None = None
    join: str | None = None

    def expert(self, index: int) -> SubBlock:
        """Expert `index` as a half that reads the tokens routed to it."""
        name = f"{self.module}.experts.{index}"
        inputs = (f"{name}.gate_proj", f"{name}.up_proj")
        return SubBlock(self.norm, name, inputs, f"{name}.down_proj", joins_residual=False)

    def linears(self) -> tuple[str, ...]:
        """Names in a block of the linears to quantize, in solving order."""
        shared = self.shared.linears() if self.shared else ()
        return (*shared, *(name for k in range(self.count) for name in self.expert(k).linears()))


Half = SubBlock | SparseBlock


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: `model_type` of config.json.
        sub_blocks: the halves of an ordinary block in execution order: mixer, MLP.
        layers_prefix: disk name in front of the block number.
        embedding, final_norm, head: disk names (without ".weight").
        keep_rules: (pattern, reason) for parameters that stay 16-bit on purpose; matched with re.fullmatch.
        key_aliases: (older name, name) of keys of config.json.
        linear_mixer: the mixer of a block whose entry in layer_types is "linear_attention".
        sparse: whether blocks have routed experts where config.json says so.
        shared: the shared expert of such a block.
        passengers: patterns of tensors that the model has no module for and that are carried through unchanged.
        skips: GPTQModel's negative `dynamic` patterns (without "-:") for modules that stay 16-bit.
        has_vision: whether the checkpoint is a vision model's, whose text decoder this is.
        hyper: whether the residual stream is several hidden states wide (hyper-connections), hc_count of config.json.
        lookup: the module of `SubBlock.lookup` in the blocks that ple_layer_ids of config.json counts from 1.
        tables: patterns of tensors that are read by rows and never whole.
    """

    model_type: str
    sub_blocks: tuple[SubBlock, ...]
    layers_prefix: str
    embedding: str
    final_norm: str
    head: str
    keep_rules: KeepRules
    key_aliases: tuple[tuple[str, str], ...] = ()
    linear_mixer: SubBlock | None = None
    sparse: bool = False
    shared: SubBlock | None = None
    passengers: tuple[str, ...] = ()
    skips: tuple[str, ...] = ()
    has_vision: bool = False
    hyper: bool = False
    lookup: str | None = None
    tables: tuple[str, ...] = ()
