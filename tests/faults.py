"""Deliberate faults: each is put into a copy of the code, where the test named beside it must fail.

`make faults` writes them, runs the tests, prints a table and fails if a fault is not caught.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("jaxscale", "kernels", "experiments", "tests", "docs", "pyproject.toml", "setup.cfg")


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of one line that makes the results wrong.

    Args:
        what: is wrong.
        file: that is changed.
        right, wrong: a text that the file has once, and what stands there instead.
        test: that fails, as pytest takes it.
        keyword: of pytest's -k, which chooses a case of the test; empty for all cases.
    """

    what: str
    file: str
    right: str
    wrong: str
    test: str
    keyword: str = ""

    @property
    def text(self) -> str:
        """The file with the fault."""
        return (ROOT / self.file).read_text().replace(self.right, self.wrong)


FAULTS = (
    Fault(
        "a query sees the next token",
        "jaxscale/ops/attention/context.py",
        "visible & (distance >= 0)",
        "visible & (distance >= -1)",
        "tests/ops/test_attention.py::test_no_future_token_is_seen",
    ),
    Fault(
        "the pair bias's gradient is the first row's",
        "jaxscale/ops/attention/evoformer_chunked.py",
        "dlogits.sum(1, keepdims=True)",
        "dlogits[:, :1]",
        "tests/ops/test_evoformer_attention.py::test_chunks_agree_with_the_reference",
    ),
    Fault(
        "a query without keys is NaN",
        "jaxscale/ops/attention/evoformer_chunked.py",
        "jnp.where(new_top == -jnp.inf, 0, new_top)",
        "new_top",
        "tests/ops/test_evoformer_attention.py::test_a_query_without_keys_gives_zeros",
    ),
    Fault(
        "the kernel's gradient of the pair bias is the first row's",
        "kernels/evoformer_attention/triton_pair_gradient.py",
        "range(begin, end)",
        "range(begin, begin + 1)",
        "tests/kernels/test_evoformer_attention.py::test_rows_divided_among_programs_add_up",
    ),
    Fault(
        "the kernel's query without keys is NaN",
        "kernels/evoformer_attention/triton_forward.py",
        'tl.where(new_top == -float("inf"), 0.0, new_top)',
        "new_top",
        "tests/kernels/test_evoformer_attention.py::test_a_query_without_keys_gives_zeros",
        "triton",
    ),
    Fault(
        "the incoming edges of a triangle are its outgoing ones",
        "jaxscale/models/evoformer/block.py",
        '"bktf,bksf->btsf" if is_incoming',
        '"btkf,bskf->btsf" if is_incoming',
        "tests/models/evoformer/test_block.py::test_a_block_is_alphafolds",
    ),
    Fault(
        "documents of a row see one another",
        "jaxscale/ops/attention/context.py",
        "self.segments[:, :, None] == key_segments[:, None, :]",
        "self.segments[:, :, None] >= key_segments[:, None, :]",
        "tests/ops/test_attention.py::test_a_document_sends_no_gradient_to_another",
        "reference",
    ),
    Fault(
        "the attention kernel's window is one key too wide",
        "jaxscale/ops/attention/context.py",
        "low = jnp.maximum(low, token - self.window + 1)",
        "low = jnp.maximum(low, token - self.window)",
        "tests/ops/test_attention.py::test_key_intervals_are_the_mask",
    ),
    Fault(
        "rotary positions turn the wrong way",
        "jaxscale/ops/rotary.py",
        "self.theta ** (-np.arange(half) / half)",
        "self.theta ** (np.arange(half) / half)",
        "tests/models/test_huggingface.py",
        "llama",
    ),
    Fault(
        "gates are not renormalised",
        "jaxscale/models/router.py",
        "return gates / gates.sum(-1, keepdims=True)",
        "return gates",
        "tests/models/test_moe.py::test_gates_are_the_softmax_over_the_chosen_or_over_all",
    ),
    Fault(
        "SparseMixer's gradient counts the expert that was drawn twice",
        "jaxscale/models/sparsemixer.py",
        "(drawn - selection.p), None, None, None",
        "(2 * drawn - selection.p), None, None, None",
        "tests/models/test_sparsemixer.py"
        "::test_the_expected_gradient_over_all_draws_is_the_closed_form",
    ),
    Fault(
        "every layer draws the same random numbers",
        "jaxscale/ops/draws.py",
        "jnp.asarray(self.layer, jnp.uint32) * len(PURPOSES) + purpose",
        "jnp.asarray(0, jnp.uint32) * len(PURPOSES) + purpose",
        "tests/ops/test_draws.py"
        "::test_numbers_are_uniform_and_differ_by_step_token_layer_and_purpose",
    ),
    Fault(
        "an expert's tokens go back to other tokens",
        "jaxscale/ops/dispatch.py",
        "return rows[dispatch.inverse]",
        "return rows[dispatch.order]",
        "tests/ops/test_moe.py::test_forward_and_gradient_equal_the_reference",
    ),
    Fault(
        "a device leaves out the tokens of its first expert",
        "jaxscale/parallel/expert.py",
        "is_here = (local >= 0) & (local < num_local)",
        "is_here = (local > 0) & (local < num_local)",
        "tests/parallel/test_expert.py::test_forward_and_gradients_equal_one_device",
    ),
    Fault(
        "the gradient of a replicated parameter is not summed over devices",
        "jaxscale/parallel/zero.py",
        "return lax.psum(gradient, absent)",
        "return gradient",
        "tests/parallel/test_region.py::test_data_expert_tensor_equal_one_device",
    ),
    Fault(
        "the last micro-batch is left out",
        "jaxscale/parallel/region.py",
        "numbers = jnp.arange(self.num_microbatches)",
        "numbers = jnp.arange(self.num_microbatches) % (self.num_microbatches - 1)\n"
        "        microbatches = jax.tree.map(lambda x: x[numbers], microbatches)",
        "tests/parallel/test_region.py::test_microbatches_equal_one_batch",
    ),
    Fault(
        "activations go to the stage before",
        "jaxscale/parallel/pipeline/engine.py",
        "activation_sent=self._shift(carry.activation_sent, 1)",
        "activation_sent=self._shift(carry.activation_sent, -1)",
        # Of two stages each is before the other.
        "tests/parallel/test_composition.py::test_every_pair_and_triple",
        "dense and pipeline and 4 and not data and not tensor and not sequence",
    ),
    Fault(
        "two stages have one another's layers",
        "jaxscale/parallel/pipeline/stages.py",
        "return by_stage.reshape(-1)",
        "return by_stage[::-1].reshape(-1)",
        "tests/parallel/pipeline/test_stages.py::test_chunks_go_round_the_stages",
    ),
    Fault(
        "the ring adds up blocks without their weights",
        "jaxscale/parallel/sequence/ring.py",
        "return weight_one * o_one + weight_other * o_other, lse",
        "return (o_one + o_other) / 2, lse",
        "tests/parallel/sequence/test_ring.py::test_every_member_sees_what_it_should",
    ),
    Fault(
        "the ring leaves a block's gradient with the wrong member",
        "jaxscale/parallel/sequence/ring.py",
        "arriving = self._pass_on(gradient)",
        "arriving = gradient",
        "tests/parallel/sequence/test_ring.py::test_every_member_sees_what_it_should",
    ),
    Fault(
        "Ulysses returns heads in another order",
        "jaxscale/parallel/sequence/ulysses.py",
        "by_token = received.transpose(2, 1, 0, 3, 4)",
        "by_token = received[::-1].transpose(2, 1, 0, 3, 4)",
        "tests/parallel/sequence/test_ulysses.py::test_every_number_of_heads",
    ),
    Fault(
        "the tensor group adds one member's rows twice",
        "jaxscale/parallel/tensor.py",
        "member = (lax.axis_index(TENSOR) + distance) % num_members",
        "member = lax.axis_index(TENSOR)",
        "tests/parallel/test_tensor.py::test_rows_by_member_equal_all_at_once",
    ),
    Fault(
        "the loss is a mean over all tokens and not over the valid ones",
        "jaxscale/train/step.py",
        "scale = jnp.where(weight > 0, 1 / weight, 0)",
        'scale = 1 / jnp.asarray(batch["weights"].size, weight.dtype)',
        "tests/train/test_step.py::test_figures_are_means_over_valid_tokens",
    ),
    Fault(
        "the optimizer's moments are stale",
        "jaxscale/train/step.py",
        "trained, opt_state = update(gradients, state.opt_state, trained)",
        "trained, opt_state = update(gradients, state.opt_state, trained)[0], state.opt_state",
        "tests/test_golden.py",
    ),
    Fault(
        "a broken step updates the parameters",
        "jaxscale/train/step.py",
        "lambda n, o: jnp.where(is_finite, n, o)",
        "lambda n, o: n",
        "tests/train/test_step.py::test_a_bad_batch_leaves_the_state_and_stops_all_later_steps",
    ),
    Fault(
        "weight decay reaches the norms",
        "jaxscale/train/optim.py",
        "lambda path, _: path in decayed",
        "lambda path, _: True",
        "tests/train/test_optim.py::test_weight_decay_spares_norms_biases_and_routers",
    ),
    Fault(
        "a token's label is the token itself",
        "jaxscale/data/packing.py",
        "labels = tokens[following] * has_label",
        "labels = tokens[index] * has_label",
        "tests/data/test_packing.py::test_rows_are_those_of_a_naive_loop",
    ),
    Fault(
        "packed documents do not begin at position 0",
        "jaxscale/data/packing.py",
        "positions = place_in_piece",
        "positions = _ranks(num_used)",
        "tests/data/test_packing.py::test_rows_are_those_of_a_naive_loop",
    ),
    Fault(
        "a resumed loader begins one batch late",
        "jaxscale/data/loader.py",
        'self._batches.set_state({"next_index": batch})',
        'self._batches.set_state({"next_index": batch + 1})',
        "tests/data/test_loader.py::test_batches_are_the_same_after_a_seek",
    ),
    Fault(
        "copies of a held-out text are trained on",
        "jaxscale/data/corpus.py",
        'cache.text_hashes if held_out_by == "text" else cache.key_hashes',
        "cache.key_hashes",
        "tests/data/test_loader.py::test_no_text_is_in_both_splits_however_often_it_is_reached",
        "copy_files",
    ),
    Fault(
        "bits per byte count bytes that no model predicts",
        "jaxscale/data/cache.py",
        "return max(num_bytes - tokenizer.num_bytes(int(ids[0])), 0)",
        "return num_bytes",
        "tests/evaluate/test_perplexity.py::test_models_with_different_tokenizers_can_be_compared",
    ),
    Fault(
        "a sequence that stands still in a launch forgets its last token",
        "jaxscale/serve/packing.py",
        '"slot_drawn": jnp.where(is_token, fields["slot_drawn"], shape.num_slots),',
        '"slot_drawn": fields["slot_drawn"],',
        "tests/serve/test_engine.py::test_greedy_tokens_are_those_of_a_sequence_alone",
        "still",
    ),
    Fault(
        "a decoded token has the position of the one before",
        "jaxscale/serve/decoding.py",
        "position = lengths + state.count - 1",
        "position = lengths + state.count - 2",
        "tests/serve/test_decoding.py::test_greedy_is_the_arg_max_of_the_full_forward",
    ),
    Fault(
        "the flash kernel forgets the sums of the tiles before",
        "kernels/attention/pallas_forward.py",
        "return o * spread(shrink, o.shape, 0), p,",
        "return o, p,",
        "tests/kernels/test_attention.py::test_results_and_gradients_are_those_of_float64",
    ),
    Fault(
        "the grouped matmul gives a tile to the wrong expert",
        "kernels/grouped_matmul/tiles.py",
        "begin = jnp.clip(starts[group] - first, 0, tile)",
        "begin = jnp.zeros_like(starts[group])",
        "tests/kernels/test_grouped_matmul.py",
    ),
    Fault(
        "a reward is read one token before the end of an answer",
        "jaxscale/rlhf/reward.py",
        "scores = values[row, pairs.starts + pairs.lengths - 1]",
        "scores = values[row, pairs.starts + pairs.lengths - 2]",
        "tests/rlhf/test_reward.py::test_pairs_in_rows_have_the_loss_and_gradient_of_answers_apart",
    ),
    Fault(
        "what comes later in an answer is not discounted by lambda",
        "jaxscale/rlhf/experience.py",
        "error + gamma * gae_lambda * advantage",
        "error + gamma * advantage",
        "tests/rlhf/test_ppo.py",
        "their_sums",
    ),
    Fault(
        "answers are compared from their second difference on",
        "jaxscale/rlhf/reward.py",
        "is_compared = is_used & (position >= first[row, pair])",
        "is_compared = is_used & (position > first[row, pair])",
        "tests/rlhf/test_reward.py::test_pairs_in_rows_have_the_loss_and_gradient_of_answers_apart",
        "each",
    ),
)


def run(fault: Fault) -> tuple[bool, float]:
    """(whether its test failed, seconds), in a copy of the repository."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, symlinks=True)
            else:
                shutil.copy(source, copy / name)
        (copy / fault.file).write_text(fault.text)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", fault.test]
        if fault.keyword:
            command += ["-k", fault.keyword]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
    is_caught = done.returncode == pytest.ExitCode.TESTS_FAILED and "error" not in summary(done)
    if not is_caught:
        print(done.stdout[-3000:], done.stderr[-1000:], file=sys.stderr)
    return is_caught, time.monotonic() - began


def summary(done: subprocess.CompletedProcess) -> str:
    """Pytest's last line, such as "1 failed in 2.00s"; an error in a fixture catches no fault."""
    return done.stdout.splitlines()[-1]


def rows(workers: int) -> Iterator[tuple[Fault, bool, float]]:
    with ThreadPoolExecutor(workers) as pool:
        for fault, (is_caught, seconds) in zip(FAULTS, pool.map(run, FAULTS), strict=True):
            yield fault, is_caught, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    all_caught = True
    print("| Fault | in | caught by | seconds |\n|---|---|---|---:|")
    for fault, is_caught, seconds in rows(parser.parse_args().workers):
        by = f"`{fault.test}`" if is_caught else "NOT CAUGHT"
        print(f"| {fault.what} | `{fault.file}` | {by} | {seconds:.0f} |", flush=True)
        all_caught &= is_caught
    sys.exit(not all_caught)


if __name__ == "__main__":
    main()
