"""What a train step sends, compiled for described H200s, and what the papers' formulas say.

Sizes are what a device is given: of an all-gather the whole, of a reduce-scatter its share.
"""

import collections
import math

import optax

from jaxscale import tree
from jaxscale.launch.ahead_of_time import described_devices
from jaxscale.launch.collectives import collectives
from jaxscale.models.config.facts import from_flat
from jaxscale.models.execution import ExecutionConfig
from jaxscale.models.losses import NextTokenLoss
from jaxscale.models.parameters import parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.batch import abstract_batch
from jaxscale.parallel.mesh import TENSOR
from jaxscale.parallel.rules import all_axes_of, make_specs
from jaxscale.train.config import TrainConfig
from jaxscale.train.optim import OptimizerConfig
from jaxscale.train.setup import Setup, make_region, make_setup
from jaxscale.train.state import abstract_state
from jaxscale.train.step import make_step

B, T, D, H, F, V = 4, 128, 64, 16, 192, 320
COMPUTE = 2  # bytes of an activation, bfloat16
FLOAT = 4  # bytes of a parameter, a gradient and the loss, float32
GATHER = "all-gather"
SCATTER = "reduce-scatter"
EXCHANGE = "all-to-all"
PERMUTE = "collective-permute"
# Loss, weight and metrics; each parameter's part of two norms. Fewer bytes than the smallest
# gradient, a norm's [D].
MOST_FIGURES = 48


def model(num_heads=8, num_kv_heads=8, **fields):
    """Without rotary positions and gates, which send nothing and take long to compile."""
    sizes = dict(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_layers=1,
        vocab_size=V,
        model_dim=D,
        head_dim=H,
        ffn_dim=F,
        max_length=T,
        positions="none",
        activation="gelu",
    )
    return from_flat(**sizes | fields)


# The step's program


def program(
    model,
    mesh,
    *,
    num_microbatches=1,
    num_loss_chunks=1,
    remat="none",
    is_scanned=True,
    momentum=None,
):
    """One step, compiled; without momentum the optimizer has no state, so nothing to shard."""
    table = parameter_table(model)
    region = make_region(
        table=table,
        mesh=mesh,
        train=TrainConfig(steps=1, num_microbatches=num_microbatches),
        policy=Policy(),
        attention_backend="reference",
        devices=devices_of(mesh),
    )
    execution = ExecutionConfig(
        is_scanned=is_scanned,
        num_loss_chunks=num_loss_chunks,
        remat=remat,
    )
    optimizer = optax.sgd(1e-3, momentum)
    state = abstract_state(
        table,
        optimizer,
        mesh=region.mesh,
        specs=region.specs,
        dtype="float32",
        trainable=".*",
    )
    loss = NextTokenLoss(model, Policy(), execution)
    return compiled_step(Setup(table, "float32", loss, region, optimizer, lambda step: 1e-3, state))


def run_program(model, mesh):
    """The step as a run has it, with AdamW and clipping."""
    execution = ExecutionConfig(num_loss_chunks=1, remat="none")
    setup = make_setup(
        table=parameter_table(model),
        loss_fn=NextTokenLoss(model, Policy(), execution),
        mesh=mesh,
        optimizer=OptimizerConfig(name="adamw"),
        train=TrainConfig(steps=2),
        attention_backend="reference",
        devices=devices_of(mesh),
    )
    return compiled_step(setup)


def devices_of(mesh):
    num_devices = math.prod(mesh.sizes)
    return described_devices("h200", num_hosts=1, gpus_per_host=num_devices)


def compiled_step(setup):
    batch = abstract_batch(setup.mesh, B, T, is_packed=False)
    lowered = make_step(setup).lower(setup.state, batch)
    return lowered.compile().as_text()


def sent(model, mesh, **settings):
    """What one step sends; arguments as `program`, and what is returned as `in_total`."""
    return in_total(program(model, mesh, **settings))


def in_total(hlo):
    """({kind: {bytes: runs}} without all-reduces, bytes that are all-reduced)."""
    found, reduced = collections.defaultdict(collections.Counter), 0
    for each in collectives(hlo):
        assert each.is_exact
        if each.kind == "all-reduce":  # the compiler packs them together as it likes
            reduced += each.times * each.num_bytes
        else:
            found[each.kind][each.num_bytes] += each.times
    return dict(found), reduced


# Sums of what is sent, {kind: {bytes: runs}}


def times(number, counted):
    return {
        kind: {size: number * runs for size, runs in sizes.items()}
        for kind, sizes in counted.items()
    }


def in_bytes(counted):
    return {
        kind: sum(size * runs for size, runs in sizes.items()) for kind, sizes in counted.items()
    }


def together(*counted):
    found = collections.defaultdict(collections.Counter)
    for each in counted:
        for kind, sizes in each.items():
            found[kind].update(sizes)
    return dict(found)


def gradient_bytes(model, mesh):
    """Of the gradients that a device sums with others: those whose share other devices have too."""
    table = parameter_table(model)
    shares = tree.flatten(make_specs(table, mesh).gradients)
    total = 0
    for path, entry in tree.flatten(table).items():
        num_shards = math.prod(getattr(mesh, axis) for axis in all_axes_of(shares[path]))
        if num_shards < math.prod(mesh.sizes):
            total += FLOAT * math.prod(entry.shape) // num_shards
    return total


def check_reduced(got, expected):
    """Asserts that what is all-reduced is what is expected, and a few figures."""
    assert expected <= got <= expected + MOST_FIGURES * FLOAT


# The papers' formulas


def ulysses(mesh, num_heads, num_kv_heads, num_layers, *, rows=B):
    """The layers' exchanges of q, k, v and o, forward and of their gradients.

    Source: Jacobs et al. 2023 (arXiv 2309.14509), section 3.2: 4 N h / P elements a layer forward,
        N tokens of width h. Fewer key-value heads are fewer bytes, until there are fewer than
        members: each member needs at least one, so those are sent several times.
    """
    spread = math.lcm(num_kv_heads, mesh.sequence)
    if num_heads % mesh.sequence or num_heads % spread:
        num_heads = math.ceil(num_heads / mesh.sequence) * mesh.sequence
        spread = num_heads
    head = rows * T // mesh.sequence * H * COMPUTE
    one_way = num_layers * [num_heads * head, spread * head, spread * head, num_heads * head]
    return {EXCHANGE: collections.Counter(one_way + one_way)}


def ring(mesh, num_kv_heads, num_layers):
    """Blocks of keys and values, forward and again backward, with their gradients in float32.

    Source: Liu et al. 2023 (arXiv 2310.01889), section 3: what R members have passes by every other
        in R - 1 rounds.
    """
    num_ulysses = mesh.sequence // mesh.ring
    block = B * T // mesh.ring * num_kv_heads // num_ulysses * H
    each = 2 * block * (COMPUTE + COMPUTE + FLOAT)
    return {PERMUTE: {num_layers * (mesh.ring - 1) * each: 1}}


def tensor(mesh, *, rows=B, length=T, num_layers=1, num_split=2, again=0, chunks=1):
    """What layers send whose norms have a share of the tokens, the embedding and the loss.

    Source: Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2: two all-reduces a layer
        forward and two backward, each as an all-gather and a reduce-scatter; where rows are split,
        instead of either each member's share to each other member. Shoeybi et al. 2019 (arXiv
        1909.08053), section 3: of the vocabulary's shares only figures a token.

    Args:
        mesh: of the step.
        rows, length: of a device's tokens.
        num_layers: of the model.
        num_split: how many of a layer's two halves have their rows split.
        again: exchanges of shares a layer that rematerialisation repeats.
        chunks: of the loss.
    """
    whole = rows * length * D * COMPUTE
    part = whole // mesh.tensor
    shares = num_layers * (4 * num_split + again) * (mesh.tensor - 1)
    gathered = num_layers * 2 * (2 - num_split)
    layers = {PERMUTE: {part: shares}, GATHER: {whole: gathered}, SCATTER: {part: gathered}}
    head = {GATHER: {whole: 1}, SCATTER: {part: 1}}
    # Rows are looked up in the parameters' type; their gradient comes back in that of the
    # activations.
    embedding = {SCATTER: {part * FLOAT // COMPUTE: 1}, GATHER: {whole: 1}}
    figures = 2 * rows * length * FLOAT // chunks  # the sum of exponentials and the label's logit
    loss = {SCATTER: {figures // mesh.tensor: chunks}, GATHER: {figures: chunks}}
    everything = together(layers, head, embedding, loss)
    return {kind: +sizes for kind, sizes in everything.items() if +sizes}


def zero(config, mesh, *, num_microbatches=1, remat="none"):
    """Gradients to the devices that update them, parameters to those that use them.

    Source: Rajbhandari et al. 2019 (arXiv 1910.02054), with Psi for all parameters.
        Section 7.1: Psi is scattered and Psi gathered, once a step.
        Section 7.2: under ZeRO 3 in each micro-batch, and what is not kept for the backward is
        gathered again, to 3 Psi. That is the layers; embedding, head and final norm are gathered
        once and kept.
    """
    table = parameter_table(config)
    specs = tree.flatten(make_specs(table, mesh).parameters)
    sizes = {}  # of each parameter, on one of the `tensor` members
    for path, entry in tree.flatten(table).items():
        num_shards = mesh.tensor if TENSOR in all_axes_of(specs[path]) else 1
        sizes[path] = math.prod(entry.shape) // num_shards
    total = FLOAT * sum(sizes.values())
    scattered = total // (mesh.data * mesh.sequence)
    if mesh.zero < 3:
        return {GATHER: {total: 1}, SCATTER: {scattered: 1}}
    gathered = 0
    for path, size in sizes.items():
        # As they are used: rows are looked up and norms scaled in the parameters' type.
        is_wide = path == "embedding/tokens" or path.endswith("scale")
        is_repeated = path.startswith("layers") and remat == "full"
        num_bytes = size * (FLOAT if is_wide else COMPUTE)
        gathered += num_bytes * (2 if is_repeated else 1)
    return times(num_microbatches, {GATHER: {gathered: 1}, SCATTER: {scattered: 1}})


def permutes(num_ticks, *, num_microbatches, share=1):
    """An activation [b, T, D] to the next stage and a gradient to the previous one, in each tick.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 3.2. Idle stages send too, what nobody
        reads.
    """
    activation = B // num_microbatches * T * D * COMPUTE
    return {PERMUTE: {activation // share: 2 * num_ticks}}


def shared_head(num_ticks, *, num_microbatches):
    """Bytes reduced over stages in each tick: the last one's output, what comes of it, its loss.

    Source: Yeung et al. 2024 (arXiv 2411.05288), section 4. Of a token the maximum, and two numbers
        forward and backward. Ticks without a loss count too, as each tick's branch may be taken.
    """
    tokens = B // num_microbatches * T
    return num_ticks * tokens * (2 * D * COMPUTE + 5 * FLOAT)


def outside_layers(mesh):
    """Each stage stores a share of what is in no layer; all gather it and reduce its gradient."""
    num_elements = (2 * V // mesh.tensor + 1) * D  # embedding, head, the final norm's scale
    size = FLOAT * num_elements
    return {GATHER: {size: 1}, SCATTER: {size // mesh.pipeline: 1}}
