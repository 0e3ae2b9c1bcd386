"""Saves one checkpoint after the other until it is killed: `python save_forever.py DIRECTORY`.

The first line of input starts a saver and the next kills it; its exit code is printed. So it goes
on to the end of the input. Savers are forked, so that the imports are done once for all of them.
"""

import multiprocessing
import sys

import jax
import jax.numpy as jnp

from jaxscale.checkpoint.manager import CheckpointConfig, Checkpoints

NUM_LEAVES = 4


def open_checkpoints(directory):
    config = CheckpointConfig(directory=str(directory), save_every=1, keep_last=2, keep_every=50)
    return Checkpoints(config, fingerprint={"num_leaves": NUM_LEAVES})


@jax.jit
def state_of(step):
    """The state that step must hold: 4 MiB that do not compress to nothing."""
    leaves = jax.random.split(jax.random.fold_in(jax.random.key(0), step), NUM_LEAVES)
    return {
        "step": jnp.int32(step),
        "params": {str(n): jax.random.normal(key, (512, 512)) for n, key in enumerate(leaves)},
        "key": jax.random.key(step),
    }


def abstract_state():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(state_of, 0),
    )


def save_forever(directory):
    checkpoints = open_checkpoints(directory)
    step = 1
    if checkpoints.latest_step() is not None:
        restored, _ = checkpoints.restore(abstract_state())
        step = int(restored["step"]) + 1
    while True:
        checkpoints.save(step, state_of(step), {"position": step})
        step += 1


def main(directory):
    context = multiprocessing.get_context("fork")
    while sys.stdin.readline():
        saver = context.Process(target=save_forever, args=(directory,), daemon=True)
        saver.start()
        sys.stdin.readline()
        saver.kill()
        saver.join()
        print(saver.exitcode, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
