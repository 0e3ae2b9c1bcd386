"""Hybrid engines of trainings on some of this process's devices."""

import math

import jax

from jaxscale.models.parameters import parameter_table
from jaxscale.ops.precision import Policy
from jaxscale.parallel.mesh import MeshConfig
from jaxscale.serve.hybrid_engine import HybridEngine
from jaxscale.train.config import TrainConfig
from jaxscale.train.setup import make_region

FLOAT32 = Policy(compute="float32")


def training(model, **sizes):
    """The region of a training on a mesh."""
    mesh = MeshConfig(**sizes)
    return make_region(
        table=parameter_table(model),
        mesh=mesh,
        train=TrainConfig(steps=1, num_microbatches=mesh.pipeline),
        policy=FLOAT32,
        devices=jax.devices()[: math.prod(mesh.sizes)],
    )


def one_device(model):
    return HybridEngine(model, FLOAT32, training(model), 1, "tensor")
